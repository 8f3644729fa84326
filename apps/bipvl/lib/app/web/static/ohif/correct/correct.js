/** Clicks, scribbles and the box: what a person points out, and the server's answers to it. */

import { Pointing } from './pointing.js'
import * as server from '../server.js'
import { fromNifti, toNifti } from '../volumes.js'

/** The tools: what they point out, how, and their keys. */
export const TOOLS = {
  'click-in': { name: 'Click +', key: 'A', inside: true, drags: false, help: 'belongs to the structure' },
  'click-out': { name: 'Click −', key: 'S', inside: false, drags: false, help: 'does not belong to it' },
  'scribble-in': { name: 'Scribble +', key: 'D', inside: true, drags: true, help: 'draw a line through what belongs to it' },
  'scribble-out': { name: 'Scribble −', key: 'F', inside: false, drags: true, help: 'draw a line through what does not' },
  box: { name: 'Box', key: 'B', drags: true, help: 'answers change nothing outside; draw in a second view to limit the depth' },
}
const NEAR = 54 // millimetres between clicks from which on they cannot meddle with each other
const WIDE = 110 // millimetres that clicks which are answered together span at most: more takes long
const LIVE = 'bipvl-live'
const OUTDATED = 409

const MANY = 5000 // voxels of clicks and scribbles that are answered together at most
const MOST = 20000 // voxels that the server takes at once

const count = voxels => voxels === 1 ? '1 voxel' : `${voxels.toLocaleString('en')} voxels`
const millimetres = (drawing, voxel) => drawing.placeOf(voxel).map(mm => Math.round(mm * 1000) / 1000)

/** Whether a key goes into a field. */
export const isTyping = event =>
  Boolean(event.composedPath()[0]?.matches?.('input:not([type=checkbox]), textarea, select, [contenteditable]'))

export class Correct {
  constructor(session) {
    this.session = session
    this.tool = null
    this.live = localStorage.getItem(LIVE) !== 'false'
    this.said = '' // of the last answer
    this._pointing = new Pointing({
      drawing: () => this.tool ? this.drawing : null,
      drags: () => TOOLS[this.tool].drags,
      pointed: (voxels, ends, viewport) => this._pointed(voxels, ends, viewport),
      shown: () => this.drawing,
      marks: () => this._marks(),
    })
    this._keys = event => this._key(event)
    this._others = () => this.tool && this.hold(null) // the person took one of the viewer's tools
    this._chosen = () => this.session.onChange() // another structure, perhaps
    this.clear()
  }

  get drawing() {
    return this.session.drawing
  }

  /** How many clicks and scribbles the server has answered on this drawing. */
  get answers() {
    return this._answered.length
  }

  /** Whether the server answers clicks for this task. */
  get offered() {
    return Boolean(this.session.info?.models[`${this.session.task}_clicks`])
  }

  start() {
    this._pointing.start()
    addEventListener('keydown', this._keys, true)
    const { TOOL_ACTIVATED, SEGMENTATION_MODIFIED } = cornerstoneTools.Enums.Events
    cornerstone.eventTarget.addEventListener(TOOL_ACTIVATED, this._others)
    cornerstone.eventTarget.addEventListener(SEGMENTATION_MODIFIED, this._chosen)
  }

  stop() {
    this._pointing.stop()
    removeEventListener('keydown', this._keys, true)
    const { TOOL_ACTIVATED, SEGMENTATION_MODIFIED } = cornerstoneTools.Enums.Events
    cornerstone.eventTarget.removeEventListener(TOOL_ACTIVATED, this._others)
    cornerstone.eventTarget.removeEventListener(SEGMENTATION_MODIFIED, this._chosen)
    this.tool = null
    this.clear()
  }

  /** Another drawing, or none: nothing is pointed out on it yet. */
  clear() {
    this.box = null // {low, high} in voxels of the viewer
    this.pending = [] // what is not answered yet: {label, inside, voxels}
    this._known = null // the mask that the server has: {state, token}
    this._answered = [] // all that was: {label, inside, voxels}
    this._together = new Map() // by state of the drawing: by label, those that are answered together there
    this._newBox = false
    this.said = ''
  }

  /** By label, what was pointed out since something else changed the mask as it is shown, such as the brush. */
  get _groups() {
    return this._together.get(this.drawing?.edits) ?? {}
  }

  /** The server's last mask of its own is what is shown. */
  agree(token) {
    this._known = token ? { state: this.drawing.edits, token } : null
  }

  // Tools ---------------------------------------------------------------------------------------------------------

  /** Take a tool; put it down if it is held already, unless it shall be held in any case. */
  hold(tool, always = false) {
    this.tool = (tool === this.tool && !always) || !this.offered ? null : tool
    for (const viewport of this.drawing?.viewports() ?? []) viewport.element.style.cursor = this.tool ? 'crosshair' : ''
    this.session.onChange()
  }

  setLive(live) {
    this.live = live
    localStorage.setItem(LIVE, live)
    if (live) this.send()
    this.session.onChange()
  }

  removeBox() {
    Object.assign(this, { box: null, _newBox: true })
    this._changed()
  }

  _key(event) {
    if (isTyping(event) || !this.drawing || event.altKey) return
    const action = this._action(event)
    if (!action) return
    event.stopImmediatePropagation()
    event.preventDefault()
    action()
  }

  _action({ key, ctrlKey, metaKey, shiftKey, repeat }) {
    const letter = key.toLowerCase()
    if (ctrlKey || metaKey) {
      if (letter === 'z') return () => shiftKey ? this.redo() : this.undo()
      return letter === 'y' ? () => this.redo() : null
    }
    if (key === 'Escape') return this.session.cancellable ? () => this.session.cancel() : this.tool ? () => this.hold(null) : null
    if (key === 'Enter') return this.pending.length ? () => this.send() : null
    const [tool] = Object.entries(TOOLS).find(entry => entry[1].key.toLowerCase() === letter) ?? []
    return tool && this.offered && !repeat ? () => this.hold(tool, true) : null
  }

  // What is pointed out -------------------------------------------------------------------------------------------

  _pointed(voxels, ends, viewport) {
    const { inside } = TOOLS[this.tool]
    if (this.tool === 'box') return this._boxed(ends, viewport)
    const { drawing, box } = this
    if (box && !voxels.some(voxel => voxel.every((n, axis) => n >= box.low[axis] && n <= box.high[axis]))) {
      this.session.tell('That is outside of the box, where nothing may change. Remove the box, or point inside it.')
      return
    }
    drawing.commit()
    const spoken = [drawing.label.value, ...inside ? voxels.map(voxel => drawing.valueAt(voxel)) : []]
    const locked = drawing.locked.find(({ value }) => spoken.includes(value))
    if (locked) return this.session.tell(`${locked.name} is locked: unlock it in the menu of its row.`)
    this.pending.push({ label: drawing.label.name, inside, voxels })
    this._changed()
    if (this.live) this.send()
  }

  /** The ends of a drag span a box across all slices, or across those of one drawn before in another view. */
  _boxed([from, to], viewport) {
    if (from.filter((n, axis) => n !== to[axis]).length < 2) return this.show() // a click, by mistake
    const { viewPlaneNormal } = viewport.getCamera()
    const { affine, dimensions } = this.drawing.grid
    const along = [0, 1, 2].map(axis => Math.abs(affine.reduce((sum, row, i) => sum + row[axis] * viewPlaneNormal[i], 0)) /
      Math.hypot(...affine.map(row => row[axis])))
    const depth = along.indexOf(Math.max(...along))
    const low = from.map((n, axis) => Math.min(n, to[axis]))
    const high = from.map((n, axis) => Math.max(n, to[axis]))
    low[depth] = this.box?.low[depth] ?? 0
    high[depth] = this.box?.high[depth] ?? dimensions[depth] - 1
    Object.assign(this, { box: { low, high }, _newBox: true })
    this._changed()
  }

  _marks() {
    const points = [
      ...Object.values(this._groups).flat().map(prompt => ({ ...prompt, sent: true })),
      ...this.pending.map(prompt => ({ ...prompt, sent: false })),
    ]
    const way = this._pointing.way
    if (way.length && this.tool !== 'box') points.push({ voxels: way, inside: TOOLS[this.tool].inside, sent: false })
    const place = this.session.review?.box ?? null
    if (!way.length || this.tool !== 'box') return { points, box: this.box, place }
    const [from, to] = this._pointing.ends
    const drawn = { low: from.map((n, axis) => Math.min(n, to[axis])), high: from.map((n, axis) => Math.max(n, to[axis])) }
    return { points, box: drawn, place }
  }

  /** Whether the server's mask is the one that is shown. */
  get _current() {
    return this._known?.state === this.drawing?.edits
  }

  show() {
    this._pointing.show()
  }

  _changed() {
    this.show()
    this.session.onChange()
  }

  // Undo and redo -------------------------------------------------------------------------------------------------

  get back() {
    return this.pending.length ? 'what is not sent' : this.drawing?.history.back
  }

  undo() {
    if (this.session.busy) return this.session.busy === 'Correcting' ? this.session.cancel() : undefined
    this.drawing.commit()
    if (this.pending.length) this.pending.pop()
    else this.drawing.undo()
    this.said = ''
    this._changed()
  }

  redo() {
    if (this.session.busy) return
    this.drawing.redo()
    this.said = ''
    this._changed()
  }

  // Answers -------------------------------------------------------------------------------------------------------

  /** Ask for answers to all that is pending, one label and a group of neighbours at a time. */
  send() {
    if (this.session.busy || !this.pending.length) return
    const { drawing } = this
    this.session.work('Correcting', async signal => {
      while (this.pending.length && this.drawing === drawing) {
        const { label } = this.pending[0]
        const last = this.pending.findIndex(prompt => prompt.label !== label)
        await this._ask(drawing, label, this.pending.slice(0, last < 0 ? undefined : last), signal)
      }
    }, () => this.send(), () => this._cancelled())
  }

  _cancelled() {
    this.pending = []
    this._known = null // it may have answered all the same
    this.show()
  }

  async _ask(drawing, label, fresh, signal) {
    drawing.commit()
    const { edits } = drawing
    const begun = performance.now()
    const groups = this._groups
    const before = groups[label] ?? []
    const together = !this._newBox && before.length > 0 && this._close(drawing, before, fresh)
    const group = [...together ? before : [], ...fresh]
    const kept = this._kept(drawing, group)
    const options = { label, ...this._points(drawing, group), kept, ...this._roi(drawing), space: 'lps', box: true }
    const alone = this._newBox || (before.length > 0 && !together)
    if (this._current) {
      options.mask_state = this._known.token
      options.settled = alone
    }
    let answer
    try {
      answer = await server.click(drawing.task, drawing.series, options, this._current ? null : await this._map(drawing), signal)
    } catch (error) {
      if (error.status !== OUTDATED || !options.mask_state) throw error
      this._known = null // it was started again, or the person works in another window too: ours counts
      return
    }
    const answered = performance.now()
    const { mask, result } = answer
    const part = await fromNifti(mask)
    if (this.drawing !== drawing || drawing.edits !== edits) { // drawn meanwhile: the answer is about another mask
      this._known = null
      return
    }
    const changed = drawing.put(part, this._what(fresh))
    this.pending.splice(0, fresh.length)
    this._answered.push(...fresh)
    this._together.set(drawing.edits, alone ? { [label]: group } : { ...groups, [label]: group })
    this._known = { state: drawing.edits, token: result.mask_state }
    this._newBox = false
    this.said = [
      changed ? `${count(result.changed)} of ${label} changed.` : `Nothing to change: the mask of ${label} says so already.`,
      ...result.warnings,
    ].join(' ')
    this._changed()
    this._measure(begun, answered, result.latencies)
  }

  /** For whoever looks into how long answers take: entries of the browser's own list of measures. */
  _measure(begun, answered, latencies) {
    requestAnimationFrame(() => setTimeout(() => performance.measure('bipvl-answer', {
      start: begun, end: performance.now(), detail: { request: answered - begun, drawing: performance.now() - answered, ...latencies },
    })))
  }

  async _map(drawing) {
    const labels = drawing.labels.map(({ name, value }) => ({ name, value }))
    return { file: await toNifti(drawing.read()), labels }
  }

  /** Whether clicks are so near to earlier ones that they are answered together. */
  _close(drawing, before, fresh) {
    const spacing = [0, 1, 2].map(axis => Math.hypot(...drawing.grid.affine.map(row => row[axis])))
    const ends = prompts => [0, 1, 2].map(axis => {
      const all = prompts.flatMap(({ voxels }) => voxels.map(voxel => voxel[axis] * spacing[axis]))
      return [all.reduce((a, b) => Math.min(a, b)), all.reduce((a, b) => Math.max(a, b))]
    })
    if (before.reduce((sum, { voxels }) => sum + voxels.length, 0) > MANY) return false
    const [old, young] = [ends(before), ends(fresh)]
    return old.every(([low, high], axis) => {
      const [from, to] = young[axis]
      return from - high <= NEAR && low - to <= NEAR && Math.max(high, to) - Math.min(low, from) <= WIDE
    })
  }

  /** Both kinds in millimetres; where a voxel was pointed out as both, the last time counts. */
  _points(drawing, group) {
    const kinds = new Map()
    for (const { inside, voxels } of group) for (const voxel of voxels) kinds.set(voxel.join(), { inside, voxel })
    const places = wanted => [...kinds.values()].filter(({ inside }) => inside === wanted)
      .map(({ voxel }) => millimetres(drawing, voxel))
    return { foreground: places(true), background: places(false) }
  }

  /** Millimetres of earlier clicks, of any structure, that the mask follows: it goes on following them. */
  _kept(drawing, group) {
    const others = this._answered.filter(prompt => !group.includes(prompt))
    const spoken = new Set(group.flatMap(({ voxels }) => voxels.map(voxel => voxel.join())))
    const values = Object.fromEntries(drawing.labels.map(({ name, value }) => [name, value]))
    const followed = others.flatMap(({ label: name, inside, voxels }) => voxels.filter(voxel =>
      !spoken.has(voxel.join()) && (drawing.valueAt(voxel) === values[name]) === inside))
    return followed.slice(-MOST).map(voxel => millimetres(drawing, voxel))
  }

  _roi(drawing) {
    if (!this.box) return {}
    const [low, high] = [drawing.placeOf(this.box.low), drawing.placeOf(this.box.high)]
    return { roi: low.flatMap((n, axis) => [n, high[axis]]) }
  }

  _what(fresh) {
    const kind = fresh.every(({ voxels }) => voxels.length === 1) ? 'click' : 'scribble'
    return fresh.length > 1 ? `${fresh.length} clicks and scribbles` : `${kind} ${fresh[0].inside ? '+' : '−'}`
  }
}
