// Trying the sentences in the table on a case: masks slice by slice, scores, what the text does, and the map.

import { ask, byId, element, number, run, swatch } from './parts.js'
import { heat, scatter, spread } from './charts.js'
import { Slices } from './slices.js'

const TOLD_APART = 0.01 // cosines that differ by less tell no class from another

export class Trial {
  // now: () => {model, base, sentences, colors}, what the page shows at this moment
  constructor(now) {
    this.now = now
    this.slices = null
    byId('try').addEventListener('click', (event) => run(event.target, byId('working'), 'Segmenting twice …', () => this.attempt()))
    byId('map').addEventListener('click', (event) => run(event.target, byId('working'), 'Reading the sentences …', () => this.map()))
    byId('plane').addEventListener('change', () => this.choose())
    for (const id of ['slice', 'fill']) byId(id).addEventListener('input', () => this.draw())
    byId('next').addEventListener('click', () => this.next())
  }

  reset(images) {
    byId('images').replaceChildren(...images.map((id) => element('option', { value: id })))
    if (!images.includes(byId('image').value)) byId('image').value = images[0] ?? ''
    byId('trial').hidden = byId('maps').hidden = true
    byId('working').textContent = ''
    this.slices = null
  }

  body() {
    const { model, base, sentences, colors } = this.now()
    return { model, colors, body: { base, sentences, image: byId('image').value } }
  }

  async attempt() {
    const { model, colors, body } = this.body()
    const found = await ask(`${model}/try`, body)
    const palette = found.labels.map((label) => colors[label.name])
    this.slices = await Slices.of(found.volumes, palette)
    byId('trial').hidden = false
    this.verdict(found)
    this.scores(found, colors)
    for (const [text, title] of [['before', 'with the served sentences'], ['after', 'with the sentences above']]) {
      heat(byId(`weights-${text}`), title, found[text].concept_weights, colors, (w, n) => w * n - 1)
      heat(byId(`similarity-${text}`), title, found[text].similarity, colors, (s) => s, (a, b) => a === b)
    }
    const flat = spread(found.before.similarity)
    byId('collapse').hidden = flat >= TOLD_APART
    byId('collapse').textContent = `The text vectors of this version's classes are not told apart: no two rows differ by more than ${flat.toFixed(4)}. These matrices say nothing about single classes.`
    const thinned = this.slices.step.some((s) => s > 1)
    byId('thinned').textContent = thinned ? `Shown is one voxel of ${this.slices.step.join(' × ')} (right-left, back-front, down-up); scores count all.` : ''
    this.choose()
  }

  verdict(found) {
    const total = found.labels.reduce((n, label) => n + label.before, 0)
    const said = found.changed
      ? `${found.changed} voxels changed, ${((100 * found.changed) / Math.max(total, 1)).toFixed(1)} % of what was segmented before.`
      : 'No voxel changed.'
    const warnings = [...new Set([...found.before.warnings, ...found.after.warnings])]
    byId('verdict').textContent = [`Version ${found.before.model_version || '0 (untrained)'}: ${said}`, ...warnings.map((w) => `${w[0].toUpperCase()}${w.slice(1)}.`)].join(' ')
  }

  scores(found, colors) {
    const titles = ['Label', 'Dice of the two masks', 'Voxels before', 'Voxels after', 'Changed voxels']
    const head = element('tr', {}, ...titles.map((t, i) => element('th', { className: i ? 'number' : '' }, t)))
    const lines = found.labels.map((label) =>
      element('tr', {}, element('td', {}, swatch(colors[label.name]), label.name),
        ...[number(label.dice, 3), label.before, label.after, label.changed].map((v) => element('td', { className: 'number' }, `${v}`))))
    byId('scores').replaceChildren(element('tbody', {}, head, ...lines))
  }

  get axis() {
    return Number(byId('plane').value)
  }

  choose() {
    byId('slice').max = this.slices.shape[this.axis] - 1
    byId('slice').value = this.slices.start(this.axis)
    byId('next').disabled = !this.slices.changes(this.axis).some((n) => n)
    this.draw()
  }

  next() {
    const counts = this.slices.changes(this.axis)
    const here = Number(byId('slice').value)
    const order = [...counts.keys()].map((i) => (here + 1 + i) % counts.length)
    byId('slice').value = order.find((i) => counts[i]) ?? here
    this.draw()
  }

  draw() {
    if (!this.slices) return
    const place = Number(byId('slice').value)
    const canvases = ['before', 'after', 'differences'].map(byId)
    this.slices.draw(canvases, this.axis, place, byId('fill').checked)
    byId('place').textContent = `${place + 1} of ${this.slices.shape[this.axis]}, ${this.slices.changes(this.axis)[place]} voxels differ`
  }

  async map() {
    const { model, colors, body } = this.body()
    const found = await ask(`${model}/map`, body)
    byId('maps').hidden = false
    byId('after-title').textContent = found.version ? `after training: version ${found.version}` : 'after training'
    for (const when of ['before', 'after']) scatter(byId(`map-${when}`), found[when], found.classes, found.rows, colors)
    byId('map-legend').replaceChildren(...found.classes.map((name) => element('span', {}, swatch(colors[name]), name)))
  }
}
