/** What an annotator does in the viewer, from opening a series to training, without a word about how it looks. */

import { Correct } from './correct/correct.js'
import { Drawing, activeSeries } from './drawing.js'
import * as keep from './keep.js'
import { Overlay } from './overlay.js'
import * as server from './server.js'
import { fromNifti, toNifti } from './volumes.js'

const FILL = 0.4 // opacity of a mask
const POLL = 1000 // milliseconds between questions about a running training
const LOOK = 500 // milliseconds between questions about a running request
const KEEP = 1000 // milliseconds after a stroke until the drawing is kept
const RUNNING = ['SUBMITTED', 'RUNNING']
const STRATEGY = 'bipvl-strategy'

export class Session {
  constructor() {
    this.info = null // what the server says it can do
    this.task = null
    this.strategy = null
    this.options = { infer: {}, train: {} } // by task, what was changed from the defaults
    this.drawing = null // the one in the active viewport
    this.drawings = new Map() // by id, all that were opened
    this.result = null // of the last auto-segmentation of this drawing
    this.overlay = null // the uncertainty map over the images, while it is shown
    this.submitted = null // what the server has of this drawing: {when, voxels}, or {} for an earlier label
    this.training = null // the status of the latest round
    this.busy = '' // what is being done
    this.progress = null // {done, total} windows of it
    this.slow = false // whether it takes so long that the panel shows it
    this.correct = new Correct(this)
    this.message = null // {kind: 'error' | 'note', text, retry}
    this.kept = null // a drawing of an earlier visit that was never submitted: {when, volume}
    this._queue = Promise.resolve()
    this.onChange = () => {}
    this.confirm = text => window.confirm(text)
    addEventListener('beforeunload', event => {
      if (this.unsubmitted && !this._leaving) event.preventDefault()
    })
    // The viewer's way back to the study list is not a page load.
    document.addEventListener('click', event => {
      if (!event.target.closest?.('[data-cy="return-to-work-list"]') || !this.unsubmitted) return
      if (!this.confirm('Your drawing is not submitted. Leave it? It is offered again when you come back.')) {
        event.stopPropagation()
      }
    }, true)
  }

  get unsubmitted() {
    return [...this.drawings.values()].some(drawing => drawing.unsubmitted)
  }

  get model() {
    return this.info?.models[this.task] ?? null
  }

  /** Whether what is being done can be given up. */
  get cancellable() {
    return Boolean(this._abort)
  }

  get isTraining() {
    return RUNNING.includes(this.training?.status)
  }

  // The viewer ----------------------------------------------------------------------------------------------------

  /** The mode was entered. */
  start(services) {
    this.services = services
    // The image stays visible below the mask; the annotator can change it under Appearance Settings.
    const type = cornerstoneTools.Enums.SegmentationRepresentations.Labelmap
    services.segmentationService.setStyle({ type }, { fillAlpha: FILL })
    const { viewportGridService: grid, cornerstoneViewportService: viewports } = services
    const follow = () => this._follow()
    this._subscriptions = [
      ...['ACTIVE_VIEWPORT_ID_CHANGED', 'GRID_STATE_CHANGED', 'VIEWPORTS_READY'].map(name =>
        grid.subscribe(grid.EVENTS[name], follow)),
      viewports.subscribe(viewports.EVENTS.VIEWPORT_DATA_CHANGED, follow),
    ]
    this.correct.start()
    this._run('', () => this._connect())
  }

  /** The mode was left: its segmentations are gone; what was drawn is kept. */
  stop() {
    this._subscriptions.forEach(subscription => subscription.unsubscribe())
    this.correct.stop()
    this.cancel()
    for (const drawing of this.drawings.values()) {
      this._keep(drawing)
      drawing.close()
    }
    this.drawings.clear()
    this.drawing = this.overlay = null
    clearTimeout(this._timer)
  }

  async _connect() {
    await this._refresh()
    await this._follow()
    await this._watch()
  }

  /** Names of what segments; clicks and scribbles are further models of the server. */
  get tasks() {
    return Object.entries(this.info?.models ?? {}).filter(([, { type }]) => type === 'segmentation').map(([name]) => name)
  }

  async _refresh() {
    this.info = await server.info()
    const tasks = this.tasks
    const strategies = Object.keys(this.info.strategies)
    if (!tasks.includes(this.task)) this.task = tasks[0]
    if (!strategies.includes(this.strategy)) {
      const before = localStorage.getItem(STRATEGY)
      this.strategy = strategies.includes(before) ? before : strategies[0]
    }
  }

  /** Open a drawing for the series that the annotator looks at. The viewer reports each change several times. */
  _follow() {
    this._queue = this._queue.then(() => this._open()).catch(error => this._fail(error))
    return this._queue
  }

  async _open() {
    const series = this.info && activeSeries(this.services)
    if (!series) return
    const id = `${this.task} ${series.SeriesInstanceUID}`
    if (!this.drawings.has(id)) {
      const drawing = new Drawing(this.services, series, this.task, this.model.label_info)
      drawing.onEdit = () => this._edited(drawing)
      this.drawings.set(id, drawing)
    }
    const drawing = this.drawings.get(id)
    if (this.drawing !== drawing) {
      this.hideMap()
      Object.assign(this, { drawing, result: null, submitted: null, kept: null, message: null })
      this.correct.clear()
      this.onChange()
    }
    await drawing.show()
    await this.overlay?.show()
    this.correct.show()
    if (drawing.ready && !drawing.looked) {
      drawing.looked = true
      await this._look(drawing)
    }
    this.onChange()
  }

  /** What is there of an earlier visit: a drawing that was not submitted, or a label. */
  async _look(drawing) {
    this.kept = (await keep.get(drawing.id)) ?? null
    const label = await server.label(drawing.series)
    if (label) this.submitted = { label }
  }

  restore() {
    const { drawing, kept } = this
    if (!this._mayReplace()) return
    this._run('', async () => {
      drawing.write(kept.volume, 'bringing it back', { unsubmitted: true })
      this.kept = null
    })
  }

  discard() {
    if (!this.confirm('Delete the drawing that was never submitted?')) return
    this._run('', async () => {
      await keep.remove(this.drawing.id)
      this.kept = null
    })
  }

  /** Show the label that the server has. */
  load() {
    if (!this._mayReplace()) return
    const { drawing, submitted } = this
    this._run('Loading the label', async () => {
      drawing.write(await fromNifti(submitted.label), 'loading the label')
    })
  }

  _edited(drawing) {
    clearTimeout(drawing.keeping)
    drawing.keeping = setTimeout(() => this._keep(drawing), KEEP)
    this.onChange()
  }

  /** Store a drawing in this browser. */
  async _keep(drawing) {
    clearTimeout(drawing.keeping)
    if (!drawing.ready || !drawing.unsubmitted) return
    await keep.put(drawing.id, { when: new Date(), volume: drawing.read() })
      .catch(error => this._fail(error))
  }

  // What buttons do -----------------------------------------------------------------------------------------------

  chooseTask(name) {
    this.task = name
    this._run('', () => this._follow())
  }

  chooseStrategy(name) {
    this.strategy = name
    localStorage.setItem(STRATEGY, name)
  }

  /** Change an option of the task; undefined: the default again. */
  setOption(kind, key, value) {
    this.options[kind][this.task] = { ...this.options[kind][this.task], [key]: value }
  }

  segment() {
    if (!this._mayReplace()) return
    const { drawing, task } = this
    drawing.commit()
    const { edits } = drawing
    this.work('Segmenting', async signal => {
      const { mask, result } = await server.infer(task, drawing.series, this.options.infer[task] ?? {}, signal)
      if (drawing.edits !== edits && !this.confirm('You have drawn while the server worked. Replace your drawing with its mask?')) return
      await this._keep(drawing)
      drawing.write(await fromNifti(mask), 'Auto-Segmentation')
      if (this.drawing === drawing) this.correct.agree(result.mask_state)
      this.hideMap()
      this.result = result
      await this._refresh()
    })
  }

  /** Show the uncertainty map of the mask that the model drew. */
  showMap() {
    const { drawing, result } = this
    this._run('Loading the uncertainty map', async () => {
      const { label, tag } = result.uncertainty_map
      const map = await fromNifti(await server.kept(label, tag))
      if (this.result !== result) return // another mask has come meanwhile
      const overlay = new Overlay(drawing, map)
      await overlay.show()
      this.overlay = overlay
    })
  }

  hideMap() {
    this.overlay?.hide()
    this.overlay = null
    this.onChange()
  }

  submit() {
    const { drawing } = this
    drawing.commit()
    const { edits, labels, task } = drawing
    const names = labels.map(({ name }) => name)
    this._run('Submitting', async () => {
      const voxels = drawing.voxels()
      const params = { model: task, label_info: labels.map(({ name, value }) => ({ name, idx: value })) }
      if (!Object.keys(voxels).length) {
        if (!this.confirm(`Nothing is drawn. Does this image show none of ${names.join(', ')}?`)) return
        params.annotated = names
      }
      await server.submit(drawing.series, await toNifti(drawing.read()), params)
      drawing.settle(edits)
      if (!drawing.unsubmitted) {
        clearTimeout(drawing.keeping)
        await keep.remove(drawing.id)
      }
      this.kept = null
      this.submitted = { when: new Date(), voxels }
      await this._refresh()
    }, () => this.submit())
  }

  next() {
    if (this.unsubmitted && !this.confirm('Your drawing is not submitted. Go on without it? It is offered again when you come back.')) return
    this._run('Asking for the next case', async () => {
      const found = await server.next(this.strategy)
      if (!found) {
        await this._refresh()
        this.message = { kind: 'note', text: 'No case is left: all are labelled, or others are working on them.' }
        return
      }
      if (!found.StudyInstanceUID) throw new Error('The server does not say in which study the next case is.')
      for (const drawing of this.drawings.values()) await this._keep(drawing)
      this._leaving = true
      const query = new URLSearchParams({ StudyInstanceUIDs: found.StudyInstanceUID, SeriesInstanceUIDs: found.SeriesInstanceUID })
      location.assign(`/ohif/monai-label?${query}`)
    })
  }

  train() {
    this._run('Starting training', async () => {
      await server.startTraining(this.task, this.options.train[this.task] ?? {})
      await this._watch()
    })
  }

  stopTraining() {
    if (!this.confirm('Stop training? The version that is served stays as it is.')) return
    this._run('Stopping training', async () => {
      await server.stopTraining()
      await this._watch()
    })
  }

  /** Ask how training goes, and again while it runs. */
  async _watch() {
    clearTimeout(this._timer)
    const before = this.isTraining
    this.training = await server.training()
    if (this.isTraining) {
      this._timer = setTimeout(() => this._watch().catch(() => this._again()), POLL)
    } else if (before) {
      await this._refresh()
    }
    this.onChange()
  }

  /** The server did not answer; training may well go on. */
  _again() {
    this._timer = setTimeout(() => this._watch().catch(() => this._again()), 10 * POLL)
  }

  _mayReplace() {
    return !this.drawing.unsubmitted ||
      this.confirm('This replaces your drawing, with all clicks and scribbles. It is not submitted. Undo brings it back.')
  }

  async _run(what, work, retry) {
    if (this.busy) return
    Object.assign(this, { busy: what, message: null })
    this.onChange()
    try {
      await work()
    } catch (error) {
      this._fail(error, retry)
    }
    this.busy = ''
    this.onChange()
    if (this.correct.live && this.message?.kind !== 'error') this.correct.send() // what was clicked meanwhile
  }

  /** Ask a model for something that can be given up and tells how far it is. */
  work(what, work, retry, cancelled = () => {}) {
    return this._run(what, async () => {
      this._abort = new AbortController()
      const { signal } = this._abort
      const model = what === 'Segmenting' ? this.task : `${this.task}_clicks`
      const { series } = this.drawing
      const look = setInterval(async () => {
        this.slow = true
        this.onChange()
        const found = await server.progress(model, series).catch(() => null)
        if (this._abort?.signal !== signal) return
        this.progress = found
        this.onChange()
      }, LOOK)
      try {
        await work(signal)
      } catch (error) {
        if (error.name !== 'AbortError') throw error
        cancelled()
        this.tell('Cancelled. Your drawing is as it was.')
      } finally {
        clearInterval(look)
        Object.assign(this, { _abort: null, progress: null, slow: false })
      }
    }, retry)
  }

  cancel() {
    this._abort?.abort()
  }

  /** Say something to the annotator. */
  tell(text) {
    this.message = { kind: 'note', text }
    this.onChange()
  }

  _fail(error, retry) {
    console.error(error)
    this.message = { kind: 'error', text: error.message, retry }
    this.onChange()
  }
}
