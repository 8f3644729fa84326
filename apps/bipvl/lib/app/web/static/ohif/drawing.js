/**
 * The drawing of one task on one series: a segmentation of the viewer with the task's names, values and colours, and all
 * that was done to it.
 */

import { cut, difference, History, paste } from './history.js'
import { counts, inverse, onGrid, partOf } from './volumes.js'

const MODALITIES = ['CT', 'MR']
const MAX_VALUE = 255 // the viewer keeps 8 bits per voxel

export class Drawing {
  /**
   * @param services the viewer's
   * @param displaySet the series
   * @param task its name
   * @param labels of the task as the server lists them: {name, value, color}
   */
  constructor(services, displaySet, task, labels) {
    this.services = services
    this.displaySet = displaySet
    this.task = task
    this.labels = labels
    this.id = `${task} ${displaySet.SeriesInstanceUID}`
    this.history = new History()
    this.edits = 0 // number of the state of its voxels; what was there before gets its number back when it is undone
    this._numbers = 0 // given so far
    this._settled = new Set([0]) // states in which nothing that a person drew is missing on the server
    this._known = null // its voxels without strokes that are not in the history yet; null: none is drawn
    this._before = 0 // the number of that state
    this._listen = event => this._modified(event.detail)
    cornerstone.eventTarget.addEventListener(cornerstoneTools.Enums.Events.SEGMENTATION_DATA_MODIFIED, this._listen)
    // A stroke of the viewer's tools ends with the button.
    this._released = () => setTimeout(() => this.commit())
    addEventListener('mouseup', this._released)
  }

  /** Strokes name their slices, scissors do not, nor does the viewer when it merely shows a segmentation. */
  _modified({ segmentationId, modifiedSlicesToUse }) {
    if (segmentationId !== this.id || !this.ready || this._writing) return
    if (!modifiedSlicesToUse?.length && !this._difference(this._voxels())) return
    this.edits = ++this._numbers
    this.onEdit?.()
  }

  _difference(now) {
    return difference(this._known ?? new Uint8Array(now.length), now, this._volume.dimensions)
  }

  /** Take strokes into the history. */
  commit() {
    if (this.edits === this._before || !this.ready) return
    const now = this._voxels()
    const box = this._difference(now)
    if (box) {
      this._record('stroke', box, cut(now, this._volume.dimensions, box))
    } else {
      this.edits = this._before // painted over with the same
    }
    this.onEdit?.()
  }

  _record(what, box, after) {
    const { dimensions } = this._volume
    this._known ??= new Uint8Array(dimensions.reduce((a, b) => a * b))
    this.history.push(what, box, cut(this._known, dimensions, box), after, this._before, this.edits)
    paste(this._known, dimensions, box, after)
    this._before = this.edits
  }

  /** All that a person drew up to a state is on the server. */
  settle(edits) {
    this._settled = new Set([edits])
  }

  get series() {
    return this.displaySet.SeriesInstanceUID
  }

  get unsubmitted() {
    return !this._settled.has(this.edits)
  }

  close() {
    cornerstone.eventTarget.removeEventListener(cornerstoneTools.Enums.Events.SEGMENTATION_DATA_MODIFIED, this._listen)
    removeEventListener('mouseup', this._released)
  }

  /** The viewports that show its series, once they do. */
  viewports() {
    const { viewportGridService, cornerstoneViewportService } = this.services
    return [...viewportGridService.getState().viewports]
      .filter(([, { displaySetInstanceUIDs }]) => displaySetInstanceUIDs.includes(this.displaySet.displaySetInstanceUID))
      .map(([viewportId]) => cornerstoneViewportService.getCornerstoneViewport(viewportId))
      .filter(viewport => viewport?.getActors?.().length)
  }

  /** Show the segmentation in every viewport that shows this series; it is made, empty, if there is none yet. */
  async show() {
    const { segmentationService } = this.services
    if (this.labels.some(({ value }) => value > MAX_VALUE)) {
      throw new Error(`This task has label values above ${MAX_VALUE}, which the viewer cannot hold: use 3D Slicer.`)
    }
    for (const { id: viewportId } of this.viewports()) {
      if (!segmentationService.getSegmentation(this.id)) await this._create()
      const shown = segmentationService.getSegmentationRepresentations(viewportId).map(({ segmentationId }) => segmentationId)
      for (const id of shown) { // of another task
        if (id !== this.id && id.endsWith(` ${this.series}`)) {
          segmentationService.removeSegmentationRepresentations(viewportId, { segmentationId: id })
        }
      }
      if (shown.includes(this.id)) continue
      const type = cornerstoneTools.Enums.SegmentationRepresentations.Labelmap
      await segmentationService.addSegmentationRepresentation(viewportId, { segmentationId: this.id, type })
      for (const { value, color } of this.labels) {
        segmentationService.setSegmentColor(viewportId, this.id, value, [...color, 255])
      }
    }
  }

  async _create() {
    const segments = this.labels.map(({ name, value, color }, i) => [
      value,
      { segmentIndex: value, label: name, color: [...color, 255], active: i === 0, locked: false },
    ])
    await this.services.segmentationService.createLabelmapForDisplaySet(this.displaySet, {
      segmentationId: this.id,
      label: this.task,
      segments: Object.fromEntries(segments),
    })
  }

  /** The label that the annotator has chosen in the list. */
  get label() {
    const value = this.ready ? cornerstoneTools.segmentation.segmentIndex.getActiveSegmentIndex(this.id) : undefined
    return this.labels.find(label => label.value === value) ?? this.labels[0]
  }

  /** Choose a label, as a click in the list does. */
  choose({ value }) {
    this.services.segmentationService.setActiveSegment(this.id, value)
  }

  /** Names of the labels that the annotator has locked against changes. */
  get locked() {
    const locked = cornerstoneTools.segmentation.segmentLocking.getLockedSegmentIndices(this.id)
    return this.labels.filter(({ value }) => locked.includes(value))
  }

  /** Whether it can be read and written: not before a viewport shows it as a volume. */
  get ready() {
    const { segmentationService } = this.services
    return Boolean(segmentationService.getSegmentation(this.id) && segmentationService.getLabelmapVolume(this.id))
  }

  get _volume() {
    const volume = this.ready && this.services.segmentationService.getLabelmapVolume(this.id)
    if (!volume) throw new Error('The images are not loaded yet: wait a moment.')
    return volume
  }

  _voxels() {
    return this._volume.voxelManager.getCompleteScalarDataArray()
  }

  /** Where its voxels lie, see volumes.js. */
  get grid() {
    const { dimensions, spacing, direction, origin } = this._volume
    const affine = [0, 1, 2].map(row => [
      ...[0, 1, 2].map(axis => direction[3 * axis + row] * spacing[axis]),
      origin[row],
    ])
    return { dimensions: [...dimensions], affine }
  }

  /** Its voxels with their position in space, see volumes.js. */
  read() {
    return { ...this.grid, data: Uint8Array.from(this._voxels()) }
  }

  /** The value of a voxel, without a stroke that has not ended. */
  valueAt([i, j, k]) {
    const { dimensions: [ni, nj] } = this._volume
    return this._known?.[(k * nj + j) * ni + i] ?? 0
  }

  /** The voxel (not rounded) at a place in millimetres. */
  voxelAt(place) {
    const { affine } = this.grid
    const from = place.map((value, axis) => value - affine[axis][3])
    return inverse(affine).map(row => row.reduce((sum, value, axis) => sum + value * from[axis], 0))
  }

  /** The middle of a voxel in millimetres. */
  placeOf([i, j, k]) {
    return this.grid.affine.map(row => row[0] * i + row[1] * j + row[2] * k + row[3])
  }

  /**
   * Replace it with a volume of the same voxels, whatever the order of its axes. Nothing in it is a person's that the
   * server does not have, unless `unsubmitted` is set.
   */
  write(volume, what, { unsubmitted = false } = {}) {
    this.commit()
    const values = onGrid(volume, this.grid)
    this._check(values)
    const box = this._difference(values)
    if (box) this._change(what, box, cut(values, this._volume.dimensions, box))
    if (!unsubmitted) this._settled.add(this.edits)
    this.onEdit?.()
  }

  /**
   * Put a part of a volume where it belongs.
   * @returns whether anything has changed
   */
  put(part, what) {
    this.commit()
    const { dimensions } = this._volume
    const { box, values } = partOf(part, this.grid)
    this._check(values)
    const now = Uint8Array.from(this._known ?? new Uint8Array(dimensions.reduce((a, b) => a * b)))
    paste(now, dimensions, box, values)
    const changed = this._difference(now)
    if (changed) this._change(what, changed, cut(now, dimensions, changed))
    this.onEdit?.()
    return Boolean(changed)
  }

  _change(what, box, values) {
    this.edits = ++this._numbers
    this._record(what, box, values)
    this._draw(box)
  }

  undo() {
    this._step('undo')
  }

  redo() {
    this._step('redo')
  }

  _step(which) {
    this.commit()
    const step = this.history[which]()
    if (!step) return
    paste(this._known, this._volume.dimensions, step.box, step.values)
    this.edits = this._before = step.state
    this._draw(step.box)
    this.onEdit?.()
  }

  /** Bring a box of what is known to the viewer. */
  _draw({ low, high }) {
    const { imageIds, dimensions } = this._volume
    const length = dimensions[0] * dimensions[1]
    const slices = []
    for (let k = low[2]; k <= high[2]; k++) {
      const image = cornerstone.cache.getImage(imageIds[k])
      const values = this._known.subarray(k * length, (k + 1) * length)
      image.voxelManager.getScalarData().set(values)
      image.minPixelValue = 0
      image.maxPixelValue = Math.max(image.maxPixelValue || 0, ...this.labels.map(({ value }) => value))
      slices.push(k)
    }
    this._writing = true
    try {
      cornerstoneTools.segmentation.triggerSegmentationEvents.triggerSegmentationDataModified(this.id, slices)
    } finally {
      this._writing = false
    }
  }

  _check(values) {
    const unknown = counts(values).findIndex((n, value) => n && value && !this.labels.some(label => label.value === value))
    if (unknown > 0) throw new Error(`There are voxels of the value ${unknown}, which no label of ${this.task} has.`)
  }

  /** Names of the labels that have voxels, with how many. */
  voxels() {
    const voxels = this._voxels()
    this._check(voxels)
    const found = counts(voxels)
    const entries = this.labels.map(({ name, value }) => [name, found[value]])
    return Object.fromEntries(entries.filter(([, n]) => n))
  }
}

/** The series in the active viewport, if it can be drawn on. */
export function activeSeries({ viewportGridService, displaySetService }) {
  const { activeViewportId, viewports } = viewportGridService.getState()
  const sets = (viewports.get(activeViewportId)?.displaySetInstanceUIDs ?? []).map(uid => displaySetService.getDisplaySetByUID(uid))
  return sets.find(set => set && MODALITIES.includes(set.Modality) && set.isReconstructable) ?? null
}
