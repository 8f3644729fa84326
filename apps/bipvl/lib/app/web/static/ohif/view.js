/** The panel: buttons, options and what is known of case, model and training, in plain DOM. */

import { Tools, TOOLS_PANEL } from './correct/tools.js'
import { Places, REVIEW_PANEL } from './review/places.js'

const PANEL = `
<link rel="stylesheet" href="/ohif/bipvl/panel.css">
<p class="case" role="status"></p>
<label class="task">Task <select></select></label>
<div class="row"><button class="segment" type="button">Auto-Segmentation</button><span class="version"></span></div>
<div class="row running" hidden><progress class="windows" max="1"></progress>
  <button class="cancel minor" type="button">Cancel <kbd>Esc</kbd></button></div>
<ul class="warnings"></ul>
<div class="row map" hidden><button class="overlay minor" type="button"></button>
  <a download>Download the uncertainty map</a></div>
${TOOLS_PANEL}
${REVIEW_PANEL}
<div class="row"><button class="submit" type="button">Submit Label</button><span class="drawn"></span></div>
<div class="row kept"><span></span>
  <button class="restore minor" type="button">Bring it back</button>
  <button class="discard minor" type="button">Delete it</button></div>
<button class="load minor" type="button">Load the submitted label</button>
<div class="row"><button class="next" type="button">Next Sample</button>
  <select class="strategy" aria-label="Strategy" title="How the next case is chosen"></select></div>
<p class="count"></p>
<div class="row"><button class="train" type="button">Update Model</button>
  <button class="stop minor" type="button">Stop</button></div>
<p class="training" role="status"></p>
<progress class="round" max="1" value="0"></progress>
<div class="message" role="alert"><span></span> <button class="again minor" type="button">Try again</button></div>
<details><summary>Options</summary>
  <section class="infer"><h3>Auto-Segmentation</h3><div></div></section>
  <section class="train"><h3>Update Model</h3><div></div></section></details>
`

/** 75 seconds are "1:15". */
const clock = seconds => {
  const whole = Math.max(0, Math.round(seconds))
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60]
  const two = n => String(n).padStart(2, '0')
  return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`
}

const choices = (names, chosen) => names.map(name => new Option(name, name, false, name === chosen))

export class View {
  constructor(session) {
    this.session = session
    this.root = document.createElement('div')
    // A tree of its own: the viewer's style sheets name everything.
    const shadow = this.root.attachShadow({ mode: 'open' })
    shadow.innerHTML = PANEL
    const find = selector => shadow.querySelector(selector)
    this._find = find
    for (const [name, action] of Object.entries({
      segment: () => session.segment(),
      overlay: () => session.overlay ? session.hideMap() : session.showMap(),
      submit: () => session.submit(),
      next: () => session.next(),
      train: () => session.train(),
      stop: () => session.stopTraining(),
      load: () => session.load(),
      restore: () => session.restore(),
      discard: () => session.discard(),
      cancel: () => session.cancel(),
      again: () => session.message.retry(),
    })) find(`button.${name}`).addEventListener('click', action)
    find('.task select').addEventListener('change', event => session.chooseTask(event.target.value))
    find('.strategy').addEventListener('change', event => session.chooseStrategy(event.target.value))
    this._tools = new Tools(session, find)
    this._places = new Places(session.review, find)
    session.onChange = () => this.update()
    this.update()
  }

  update() {
    const { info, model, drawing, busy, isTraining } = this.session
    const ready = Boolean(drawing?.ready) && !busy
    this._enable('segment', ready)
    this._enable('submit', ready)
    this._enable('load', ready)
    this._enable('overlay', ready)
    this._enable('restore', ready)
    this._enable('discard', ready)
    this._enable('next', info && !busy)
    this._enable('train', info && !busy && !isTraining)
    this._enable('stop', !busy)
    this._lists()
    this._text('.case', this._case())
    this._text('.version', busy === 'Segmenting' ? this._looking() : model ? this._version() : '')
    this._running()
    this._tools.update()
    this._places.update()
    this._find('.warnings').replaceChildren(...(this.session.result?.warnings ?? []).map(warning => {
      const item = document.createElement('li')
      item.textContent = warning[0].toUpperCase() + warning.slice(1)
      return item
    }))
    this._map(this.session.result?.uncertainty_map)
    this._text('.drawn', this._drawn())
    this._find('.drawn').classList.toggle('unsubmitted', Boolean(drawing?.unsubmitted))
    const { kept } = this.session
    this._find('.kept').hidden = !kept
    if (kept) this._text('.kept span', `A drawing of ${kept.when.toLocaleString()} was never submitted.`)
    this._find('.load').hidden = !this.session.submitted?.label
    const counts = info?.datastore
    this._text('.count', counts ? `${counts.completed} of ${counts.total} cases are annotated.` : '')
    this._training()
    this._message()
  }

  _case() {
    const { info, drawing, busy } = this.session
    if (!info) return busy || !this.session.message ? 'Connecting …' : 'Not connected.'
    if (!drawing) return 'Open a CT or MR series: what is shown cannot be annotated.'
    const { instances, SeriesDescription } = drawing.displaySet
    const patient = instances?.[0]?.PatientID ?? ''
    return [patient, SeriesDescription].filter(Boolean).join(' · ') + (drawing.ready ? '' : ' is loading …')
  }

  _looking() {
    const { progress } = this.session
    return progress?.total ? `The model looks: window ${Math.min(progress.done + 1, progress.total)} of ${progress.total}` : 'The model is looking …'
  }

  /** A request that can be given up: how far it is. */
  _running() {
    const { slow, progress } = this.session
    const bar = this._find('progress.windows')
    this._find('.running').hidden = !slow
    if (progress?.total) bar.value = progress.done / progress.total
    else bar.removeAttribute('value')
  }

  _version() {
    const { model, result } = this.session
    const served = model.version ? `Version ${model.version} is served.` : 'Not trained yet: expect noise.'
    if (!result) return served
    const drawn = result.model_version ? `Drawn by version ${result.model_version}.` : 'Drawn by an untrained model.'
    return result.model_version === model.version ? drawn : `${drawn} ${served}`
  }

  /** The map of the mask that is shown, if one was asked for. */
  _map(kept) {
    this._find('.map').hidden = !kept
    if (!kept) return
    this._find('.map a').href = `/datastore/label?${new URLSearchParams({ label: kept.label, tag: kept.tag })}`
    this._text('.overlay', this.session.overlay ? 'Hide the uncertainty' : 'Show the uncertainty')
  }

  _drawn() {
    const { drawing, submitted, busy } = this.session
    if (busy === 'Submitting') return 'Submitting …'
    if (drawing?.unsubmitted) return 'Your drawing is not submitted.'
    if (submitted?.label) return 'This case has a label.'
    if (!submitted) return ''
    const parts = Object.entries(submitted.voxels).map(([name, n]) => `${name} ${n.toLocaleString('en')}`)
    return `Submitted at ${submitted.when.toLocaleTimeString()}: ${parts.join(', ') || 'no'} voxels.`
  }

  _training() {
    const { training, isTraining } = this.session
    const progress = training?.progress
    const bar = this._find('progress.round')
    this._find('button.stop').hidden = !isTraining
    bar.hidden = !isTraining
    if (isTraining && progress) bar.value = (progress.epoch + (progress.step / progress.steps || 0)) / progress.epochs
    else bar.removeAttribute('value')
    if (!training) return this._text('.training', '')
    if (!isTraining) return this._text('.training', this._outcome(training))
    if (!progress) return this._text('.training', 'Training begins: reading the labelled cases …')
    const epoch = progress.step ? progress.epoch + 1 : progress.epoch
    const parts = [`${progress.stage ? `${progress.stage}, epoch` : 'Epoch'} ${epoch} of ${progress.epochs}`]
    if (progress.step) parts.push(`step ${progress.step} of ${progress.steps}`)
    if (progress.loss !== null) parts.push(`loss ${progress.loss.toFixed(3)}`)
    if (progress.dice !== null) parts.push(`Dice ${progress.dice.toFixed(3)}`)
    const { doing } = progress
    if (doing) parts.push(`${doing.what}: ${doing.done} of ${doing.total}`)
    else parts.push(progress.epoch < progress.epochs ? `${clock(progress.seconds_left)} left` : 'comparing with the served version')
    this._text('.training', parts.join(', '))
  }

  _outcome({ status, outcome }) {
    if (status === 'DONE') return `Training has ended. ${outcome}`
    if (status === 'STOPPED') return 'Training was stopped; the served version is unchanged.'
    return `Training failed; the served version is unchanged. ${outcome}`
  }

  _message() {
    const { message } = this.session
    const box = this._find('.message')
    box.hidden = !message
    box.classList.toggle('error', message?.kind === 'error')
    this._text('.message span', message?.text ?? '')
    this._find('.again').hidden = !message?.retry
  }

  /** Lists and options follow the server; they are rebuilt only when that says something else. */
  _lists() {
    const { info, task, strategy, model } = this.session
    const shown = JSON.stringify([task, strategy, this.session.tasks, Object.keys(info?.strategies ?? {}), model?.config])
    if (!info || shown === this._shown) return
    this._shown = shown
    const { tasks } = this.session
    this._find('.task').hidden = tasks.length < 2
    this._find('.task select').replaceChildren(...choices(tasks, task))
    this._find('.strategy').replaceChildren(...choices(Object.keys(info.strategies), strategy))
    this._find('.strategy').title = info.strategies[strategy]?.description ?? ''
    this._options('infer', model.config)
    this._options('train', info.trainers[task]?.config ?? {})
  }

  /** An input for each option: a list offers its entries, the first is the default. */
  _options(kind, config) {
    const changed = this.session.options[kind][this.session.task] ?? {}
    const rows = Object.entries(config).map(([key, standard]) => {
      const value = changed[key] ?? (Array.isArray(standard) ? standard[0] : standard)
      const row = document.createElement('label')
      const input = document.createElement(Array.isArray(standard) ? 'select' : 'input')
      const kindOf = typeof standard
      if (Array.isArray(standard)) input.append(...choices(standard, value))
      else if (kindOf === 'boolean') Object.assign(input, { type: 'checkbox', checked: value })
      else if (kindOf === 'number') Object.assign(input, { type: 'number', step: 'any', value })
      else Object.assign(input, { type: 'text', value })
      input.addEventListener('change', () => {
        const given = kindOf === 'boolean' ? input.checked : kindOf === 'number' ? input.valueAsNumber : input.value
        this.session.setOption(kind, key, Number.isNaN(given) ? undefined : given)
      })
      input.name = `${kind}.${key}`
      row.append(key, input)
      return row
    })
    this._find(`section.${kind} div`).replaceChildren(...rows)
    this._find(`section.${kind}`).hidden = !rows.length
  }

  _text(selector, text) {
    this._find(selector).textContent = text
  }

  _enable(name, enabled) {
    this._find(`button.${name}`).disabled = !enabled
  }
}
