// The further wordings of one sentence: a fold below it, where each can be changed or removed and others be added.

import { element, grow } from './parts.js'

export class Wordings {
  // what: whose they are; editable: whether this account may save; after: called when the user has changed something
  constructor(what, editable, after) {
    Object.assign(this, { what, editable, after, now: [], old: [], boxes: [] })
    this.summary = element('summary')
    this.list = element('ol')
    this.note = element('div', { className: 'hint' })
    this.gone = element('div')
    const add = element('button', { type: 'button' }, 'Add a wording')
    add.setAttribute('aria-label', `Add a wording of ${what}`)
    add.addEventListener('click', () => this.add())
    this.fold = element('details', { className: 'wordings' }, this.summary, this.list, this.note, this.gone, ...(editable ? [add] : []))
    this.fold.addEventListener('toggle', () => this.grow())
  }

  // The wordings to show, and those of the newest revision.
  show(now, old) {
    this.now = [...now]
    this.old = old
    this.fold.open = this.changed
    this.draw()
  }

  get value() {
    return this.now.map((wording) => wording.trim())
  }

  get changed() {
    const { value, old } = this
    return value.length !== old.length || value.some((wording, i) => wording !== old[i])
  }

  // In front of the last one, so that it stays the one kept aside.
  add() {
    const place = this.now.length > 1 ? this.now.length - 1 : this.now.length
    this.now.splice(place, 0, '')
    this.draw()
    this.after()
    this.boxes[place].area.focus()
  }

  draw() {
    this.boxes = this.now.map((wording, i) => this.box(wording, i))
    this.list.replaceChildren(...this.boxes.map(({ line }) => line))
    this.mark()
    this.grow()
  }

  box(wording, place) {
    const area = element('textarea', { rows: 1, spellcheck: true, maxLength: 1000, readOnly: !this.editable, value: wording })
    area.setAttribute('aria-label', `${this.what} wording ${place + 1}`)
    area.addEventListener('input', () => {
      this.now[place] = area.value
      grow(area)
      this.after()
    })
    const aside = element('span', { className: 'aside', title: 'Training never reads this one: each round is scored with it.' }, 'kept aside')
    const remove = element('button', { type: 'button' }, 'Remove')
    remove.setAttribute('aria-label', `Remove ${this.what} wording ${place + 1}`)
    remove.addEventListener('click', () => {
      this.now.splice(place, 1)
      this.draw()
      this.after()
    })
    const under = element('div')
    const line = element('li', {}, element('div', { className: 'line' }, area, aside, ...(this.editable ? [remove] : [])), under)
    return { area, aside, under, line }
  }

  // Say how many there are and what differs from the newest revision; findings go.
  mark() {
    const { value, old, boxes, changed } = this
    this.summary.textContent = `${value.length || 'no'} wording${value.length === 1 ? '' : 's'}${changed ? ', changed' : ''}`
    this.fold.classList.toggle('none', !value.length)
    this.fold.hidden = !value.length && !this.editable && !changed
    boxes.forEach(({ line, aside, under }, i) => {
      line.className = old.includes(value[i]) ? '' : 'changed'
      aside.hidden = i < value.length - 1 || value.length < 2
      under.replaceChildren()
    })
    this.note.textContent = value.length === 1 ? 'At least two are needed, because the last is kept aside.' : ''
    this.gone.replaceChildren(...old.filter((w) => !value.includes(w)).map((w) => element('div', { className: 'was' }, w)))
  }

  // Put what is wrong under a wording, counted from 1. False if there is none of that number.
  find(number, finding) {
    const box = this.boxes[number - 1]
    if (!box) return false
    box.under.append(finding)
    this.fold.hidden = false
    this.fold.open = true
    return true
  }

  grow() {
    for (const { area } of this.boxes) grow(area)
  }
}
