/** The drawing of one task on one series: a segmentation of the viewer with the task's names, values and colours. */

import { checksum, counts, onGrid } from './volumes.js'

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
    this.edits = 0 // strokes since the viewer opened it
    this.settled = 0 // strokes after which nothing that a person drew was missing on the server
    this._settledSum = 0 // checksum of the voxels then; of an empty drawing
    this._listen = event => this._modified(event.detail)
    cornerstone.eventTarget.addEventListener(cornerstoneTools.Enums.Events.SEGMENTATION_DATA_MODIFIED, this._listen)
  }

  /** Strokes name their slices, scissors do not, nor does the viewer when it merely shows a segmentation. */
  _modified({ segmentationId, modifiedSlicesToUse }) {
    if (segmentationId !== this.id || !this.ready) return
    if (!modifiedSlicesToUse?.length && !this.unsubmitted && checksum(this._voxels()) === this._settledSum) return
    this.edits++
    this.onEdit?.()
  }

  /** All that a person drew so far is on the server, or was given up. */
  settle(edits = this.edits) {
    this.settled = edits
    if (!this.unsubmitted) this._settledSum = checksum(this._voxels())
  }

  get series() {
    return this.displaySet.SeriesInstanceUID
  }

  get unsubmitted() {
    return this.edits !== this.settled
  }

  close() {
    cornerstone.eventTarget.removeEventListener(cornerstoneTools.Enums.Events.SEGMENTATION_DATA_MODIFIED, this._listen)
  }

  /** Show the segmentation in every viewport that shows this series; it is made, empty, if there is none yet. */
  async show() {
    const { segmentationService, viewportGridService, cornerstoneViewportService } = this.services
    if (this.labels.some(({ value }) => value > MAX_VALUE)) {
      throw new Error(`This task has label values above ${MAX_VALUE}, which the viewer cannot hold: use 3D Slicer.`)
    }
    for (const [viewportId, { displaySetInstanceUIDs }] of viewportGridService.getState().viewports) {
      if (!displaySetInstanceUIDs.includes(this.displaySet.displaySetInstanceUID)) continue
      if (!cornerstoneViewportService.getCornerstoneViewport(viewportId)?.getActors?.().length) continue // still loading
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

  /** Its voxels with their position in space, see volumes.js. */
  read() {
    const { dimensions, spacing, direction, origin } = this._volume
    const affine = [0, 1, 2].map(row => [
      ...[0, 1, 2].map(axis => direction[3 * axis + row] * spacing[axis]),
      origin[row],
    ])
    return { dimensions: [...dimensions], affine, data: Uint8Array.from(this._voxels()) }
  }

  /** Replace it with a volume of the same voxels, whatever the order of its axes. */
  write(volume) {
    const values = onGrid(volume, this.read())
    this._check(values)
    this._volume.voxelManager.setCompleteScalarDataArray(values)
    this.settle()
    cornerstoneTools.segmentation.triggerSegmentationEvents.triggerSegmentationDataModified(this.id)
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
