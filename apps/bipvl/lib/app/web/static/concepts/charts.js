// Heat tables and the map of sentences.

import { element, number, swatch } from './parts.js'

const LOW = [178, 84, 26]
const MIDDLE = [247, 248, 250]
const HIGH = [15, 118, 110]

// A colour for -1 to 1, and ink that can be read on it.
function shade(share) {
  const s = Math.max(-1, Math.min(1, share))
  const end = s < 0 ? LOW : HIGH
  const rgb = MIDDLE.map((m, i) => Math.round(m + (end[i] - m) * Math.abs(s)))
  return [`rgb(${rgb})`, Math.abs(s) > 0.55 ? '#fff' : '#1d2733']
}

// rows: name to {column: value}. share maps a value to -1 … 1; own says which cell gets a frame.
export function heat(table, title, rows, colors, share, own = () => false) {
  const names = Object.keys(rows)
  const columns = Object.keys(rows[names[0]] ?? {})
  const head = element('tr', {}, element('th'), ...columns.map((c) => element('th', {}, /^\d+$/.test(c) ? `sentence ${Number(c) + 1}` : c)))
  const lines = names.map((name) => {
    const label = element('th', { className: 'class' }, ...(colors[name] ? [swatch(colors[name])] : []), name)
    const cells = columns.map((column) => {
      const cell = element('td', { className: own(name, column) ? 'own' : '' }, number(rows[name][column]))
      ;[cell.style.background, cell.style.color] = shade(share(rows[name][column], columns.length))
      return cell
    })
    return element('tr', {}, label, ...cells)
  })
  table.replaceChildren(element('caption', {}, title), element('tbody', {}, head, ...lines))
}

// Whether the text of the classes is told apart at all: the largest difference between two rows of the matrix.
export function spread(similarity) {
  const rows = Object.values(similarity).map((row) => Object.values(row))
  let most = 0
  for (const a of rows) for (const b of rows) a.forEach((value, i) => (most = Math.max(most, Math.abs(value - b[i]))))
  return most
}

const SVG = 'http://www.w3.org/2000/svg'

function drawn(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name)
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value)
  made.append(...children)
  return made
}

// One map: one dot per sentence, with the sentence as its title.
export function scatter(place, map, classes, rows, colors) {
  if (map.missing) {
    place.replaceChildren(element('p', { className: 'notice' }, map.missing))
    return
  }
  const size = 420
  const points = map.points.flat()
  const [low, high] = [0, 1].map((axis) => points.map((p) => p[axis])).reduce(
    ([a, b], values) => [[...a, Math.min(...values)], [...b, Math.max(...values)]], [[], []])
  const scale = Math.max(high[0] - low[0], high[1] - low[1]) || 1
  const at = (p) => [0, 1].map((axis) => size / 2 + ((p[axis] - (low[axis] + high[axis]) / 2) / scale) * (size - 44))
  const dots = map.points.flatMap((own, c) =>
    own.map((p, k) => {
      const [x, y] = at(p)
      const title = drawn('title', {}, `${classes[c]}: ${rows[c][k]}`)
      return drawn('circle', { cx: x, cy: y, r: 6.5, fill: colors[classes[c]], stroke: '#fff', 'stroke-width': 1.2 }, title)
    }))
  const chart = drawn('svg', { viewBox: `0 0 ${size} ${size}`, role: 'img', 'aria-label': 'map of sentences' }, ...dots)
  const said = `mean cosine of two sentences of one class ${number(map.within, 3)}, of two classes ${number(map.between, 3)}`
  const one = map.between !== null && map.between > 0.999 ? ' – all sentences have become nearly one vector' : ''
  place.replaceChildren(chart, element('p', { className: 'small' }, said + one))
}
