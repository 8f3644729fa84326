/** The part of the panel with the tools that correct a mask, in plain DOM. */

import { TOOLS } from './correct.js'

const button = ([tool, { name, key, help }]) =>
  `<button class="tool minor" type="button" data-tool="${tool}" aria-pressed="false" title="${help}">${name} <kbd>${key}</kbd></button>`

export const TOOLS_PANEL = `
<section class="correct" aria-label="Correct">
  <h3>Correct <span class="label"></span></h3>
  <div class="offered">
    <div class="tools">${Object.entries(TOOLS).map(button).join('')}
      <button class="unbox minor" type="button" hidden>Remove the box</button></div>
    <label class="live"><input type="checkbox"> Answer at once</label>
    <button class="send minor" type="button">Send <span></span> <kbd>Enter</kbd></button>
  </div>
  <div class="row">
    <button class="undo minor" type="button">Undo <kbd>Ctrl+Z</kbd></button>
    <button class="redo minor" type="button">Redo <kbd>Ctrl+Y</kbd></button></div>
  <p class="said" role="status"></p>
</section>`

export class Tools {
  /**
   * @param session
   * @param find an element of the panel by its selector
   */
  constructor(session, find) {
    this.session = session
    this._find = find
    const { correct } = session
    find('.tools').addEventListener('click', event => {
      const { tool } = event.target.closest('button')?.dataset ?? {}
      if (tool) correct.hold(tool)
    })
    find('.live input').addEventListener('change', event => correct.setLive(event.target.checked))
    for (const [name, action] of Object.entries({
      unbox: () => correct.removeBox(),
      send: () => correct.send(),
      undo: () => correct.undo(),
      redo: () => correct.redo(),
    })) find(`button.${name}`).addEventListener('click', action)
  }

  update() {
    const { correct, drawing, busy, slow } = this.session
    const ready = Boolean(drawing?.ready)
    const find = this._find
    find('.correct').hidden = !ready
    if (!ready) return
    find('.offered').hidden = !correct.offered
    const label = find('.correct .label')
    label.textContent = drawing.label.name
    label.style.setProperty('--label', `rgb(${drawing.label.color.join()})`)
    for (const each of find('.tools').querySelectorAll('[data-tool]')) {
      each.setAttribute('aria-pressed', each.dataset.tool === correct.tool)
    }
    find('.unbox').hidden = !correct.box
    find('.live input').checked = correct.live
    const waiting = correct.pending.length
    find('button.send').hidden = correct.live && (!waiting || Boolean(busy))
    find('button.send').disabled = Boolean(busy) || !waiting
    find('button.send span').textContent = waiting || ''
    const { back, drawing: { history: { forth } } } = correct
    this._step('undo', back)
    this._step('redo', forth)
    find('.said').textContent = slow && busy === 'Correcting' ? this._correcting() : correct.said
  }

  /** The first answer on an image waits for the model. */
  _correcting() {
    const { progress } = this.session
    if (!progress?.total) return 'Correcting …'
    return `The model looks at the image first: window ${Math.min(progress.done + 1, progress.total)} of ${progress.total}`
  }

  _step(which, what) {
    const found = this._find(`button.${which}`)
    found.disabled = !what || Boolean(this.session.busy)
    found.title = what ? `${which === 'undo' ? 'Undo' : 'Do again'}: ${what}` : ''
  }
}
