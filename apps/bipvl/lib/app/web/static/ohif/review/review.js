/** Where the model still doubts: the places, what people answered, and the way from one to the next. */

import { isTyping } from '../correct/correct.js'
import * as server from '../server.js'

const NEXT = 'n'
const LOOK = 500 // milliseconds between questions about how far the model is
const GONE = [404, 409] // the list is another one by now

const dot = (one, other) => one.reduce((sum, value, axis) => sum + value * other[axis], 0)
const add = (one, other) => one.map((value, axis) => value + other[axis])

export class Review {
  constructor(session) {
    this.session = session
    this._keys = event => this._key(event)
    this._numbers = 0 // of requests: the answer to the latest one counts
    this._clear(null)
  }

  start() {
    addEventListener('keydown', this._keys, true)
  }

  stop() {
    removeEventListener('keydown', this._keys, true)
    this._clear(null)
  }

  _clear(drawing) {
    this.giveUp()
    this._drawing = drawing
    this._result = undefined // what the list was taken from: a mask,
    this._answers = 0 // and so many answers to clicks
    this.places = [] // as the server lists them
    this.version = null // of the model that doubts; null: nobody has looked yet
    this.at = null // the id of the place that is shown
    this.looking = null // while the model looks: {done, total} windows, as far as they are known
    this.saving = null // the id of the place whose answer is on its way
    this.problem = ''
  }

  /** Something has changed in the session: another drawing, a new mask, an answer to a click. */
  follow() {
    const { drawing, result, correct } = this.session
    if (drawing !== this._drawing) this._clear(drawing)
    if (!drawing?.ready) return
    const fresh = result !== this._result && result?.doubts
    const changed = this._result === undefined || correct.answers !== this._answers
    Object.assign(this, { _result: result, _answers: correct.answers }) // first: what follows comes here again
    if (fresh) this._take(fresh)
    else if (changed) this._ask(() => server.doubts(drawing.task, drawing.series, false))
  }

  /** The place that is shown, or undefined. */
  get place() {
    return this.places.find(({ id }) => id === this.at)
  }

  /** Its box in voxels of the viewer, {low, high}, or null. */
  get box() {
    if (!this.place || !this._drawing?.ready) return null
    const ends = this.place.corners.map(corner => this._drawing.voxelAt(corner).map(Math.round))
    const [low, high] = [Math.min, Math.max].map(end => ends[0].map((n, axis) => end(n, ends[1][axis])))
    return { low, high }
  }

  /** What people said of a place while they saw the list that is shown. */
  said(place) {
    return place.answers.filter(({ version }) => version === this.version)
  }

  // Going there ---------------------------------------------------------------------------------------------------

  /** The next place without an answer; if all have one, the next. */
  next() {
    const { places } = this
    if (!places.length) return
    const from = places.findIndex(({ id }) => id === this.at) + 1
    const order = [...places.slice(from), ...places.slice(0, from)]
    this.go(order.find(place => !this.said(place).length) ?? order[0])
  }

  /** Show a place in every view. */
  go(place) {
    this.at = place.id
    for (const viewport of this._drawing?.viewports() ?? []) {
      const { focalPoint, position, viewPlaneNormal: normal } = viewport.getCamera()
      const way = add(place.centre, focalPoint.map(value => -value))
      const [x, y] = viewport.worldToCanvas(place.centre)
      const { clientWidth, clientHeight } = viewport.canvas
      const seen = x >= 0 && y >= 0 && x < clientWidth && y < clientHeight
      const shift = seen ? normal.map(value => value * dot(way, normal)) : way // to its slice; or into the middle
      viewport.setCamera({ focalPoint: add(focalPoint, shift), position: add(position, shift) })
      viewport.render()
    }
    this._changed()
  }

  _key(event) {
    if (event.key.toLowerCase() !== NEXT || event.ctrlKey || event.metaKey || event.altKey || isTyping(event)) return
    if (!this._drawing?.ready || !this.places.length) return
    event.stopImmediatePropagation()
    event.preventDefault()
    this.next()
  }

  // Answers -------------------------------------------------------------------------------------------------------

  /** It looks right: on to the next one. */
  async right(place) {
    if (await this._answer(place, 'right')) this.next()
  }

  /** It is to be fixed: its structure is chosen and the tool that it needs is taken. */
  async fix(place) {
    this.go(place)
    const { _drawing: drawing, session: { correct } } = this
    const label = drawing.labels.find(({ name }) => name === place.label)
    drawing.choose(label)
    const shown = drawing.valueAt(drawing.voxelAt(place.centre).map(Math.round))
    correct.hold(shown === label.value ? 'click-out' : 'click-in', true)
    await this._answer(place, 'fix')
  }

  /** @returns whether the server has it; if its list is another one by now, that is shown */
  async _answer(place, answer) {
    const { _drawing: drawing, version } = this
    this.saving = place.id
    const said = { place: place.id, answer, version }
    const error = await this._ask(() => server.answerDoubt(drawing.task, drawing.series, said))
    if (drawing !== this._drawing) return false
    this.saving = null
    if (GONE.includes(error?.status)) {
      await this._ask(() => server.doubts(drawing.task, drawing.series, false))
      this.problem = error.message
    }
    this._changed()
    return !error
  }

  // The list ------------------------------------------------------------------------------------------------------

  /** Have the model look at the image. Drawing goes on meanwhile. */
  async look() {
    const { _drawing: drawing } = this
    this._abort = new AbortController()
    const { signal } = this._abort
    this.looking = {}
    const timer = setInterval(async () => {
      const found = await server.looked(drawing.task, drawing.series).catch(() => null)
      if (this._abort?.signal !== signal) return
      this.looking = found ?? this.looking
      this._changed()
    }, LOOK)
    const error = await this._ask(() => server.doubts(drawing.task, drawing.series, true, signal))
    // An answer on the way may have overtaken it.
    if (!error) await this._ask(() => server.doubts(drawing.task, drawing.series, false))
    clearInterval(timer)
    if (this._abort?.signal !== signal) return
    Object.assign(this, { _abort: null, looking: null })
    this._changed()
  }

  giveUp() {
    this._abort?.abort()
    Object.assign(this, { _abort: null, looking: null })
  }

  /**
   * Take over the list that the server answers with. Whatever fails stands in the list's own part of the panel.
   * @returns the error, if there is one
   */
  async _ask(request) {
    const { _drawing: drawing } = this
    const number = ++this._numbers
    this.problem = ''
    this._changed()
    try {
      const found = await request()
      if (number === this._numbers && drawing === this._drawing) this._take(found)
      return null
    } catch (error) {
      if (drawing === this._drawing && error.name !== 'AbortError') this.problem = error.message
      this._changed()
      return error
    }
  }

  _take({ version, places }) {
    Object.assign(this, { version, places, problem: '' })
    this._changed()
  }

  _changed() {
    this.session.correct.show()
    this.session.onChange()
  }
}
