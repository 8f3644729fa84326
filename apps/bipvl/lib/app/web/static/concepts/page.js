// The concept page: which task, its sentences and their wordings, what was edited, saved, signed and tried.

import { ask, byId, element, grow, run, swatch } from './parts.js'
import { Trial } from './trial.js'
import { Wordings } from './wordings.js'

let state = null // what the server says of the task
let shown = {} // class → attribute → sentence, as in the table
let fields = [] // {name, attribute, row, area, under, wordings}

const trial = new Trial(() => ({ model: state.model, base: state.revision, sentences: edits(), colors: state.colors }))

// What differs from the newest revision: class → attribute → sentence.
function edits() {
  const result = {}
  for (const [name, sentences] of Object.entries(state.classes))
    for (const [attribute, sentence] of Object.entries(sentences))
      if (shown[name][attribute].trim() !== sentence) (result[name] ??= {})[attribute] = shown[name][attribute]
  return result
}

// Likewise of the wordings, class → attribute → all of them.
function rewordings() {
  const result = {}
  for (const { name, attribute, wordings } of fields)
    if (wordings.changed) (result[name] ??= {})[attribute] = wordings.value
  return result
}

const size = (changes) => Object.values(changes).reduce((n, own) => n + Object.keys(own).length, 0)
const edited = () => size(edits()) + size(rewordings())

async function open(model) {
  state = await ask(model)
  shown = structuredClone(state.classes)
  heading()
  table()
  history()
  findings(state.problems)
  trial.reset(state.images)
  byId('note').value = ''
  window.history.replaceState(null, '', `#${model}`)
}

function heading() {
  const { review, served, text_format: format } = state
  byId('review').textContent = review.status === 'draft' ? `${review.part ?? 'draft'} of a language model` : review.status
  byId('review').className = review.status === 'reviewed' ? 'badge good' : 'badge'
  const signed = review.by ? `, ${review.status === 'draft' ? `${review.part ?? ''} written`.trim() : 'reviewed'} by ${review.by} on ${review.date}` : ''
  const text = state.revision ? `revision ${state.revision}` : 'the concepts file'
  byId('about').textContent = `${state.description}. ${state.modality}, ${Object.keys(state.classes).length} classes. Shown: ${text}${signed}.`
  byId('standing').textContent = standing(served, text)
  const warnings = []
  if (state.damaged) warnings.push(`${state.damaged}. No round starts until a revision is restored; the file's text is shown.`)
  if (state.file_changed) warnings.push('The concepts file has changed since this revision was saved. The revision counts; restore the file below to go on with its text.')
  if (!['concepts', 'definition'].includes(format)) warnings.push(`This task reads the text format “${format}”: its model does not read the sentences below.`)
  if (!state.may_save) warnings.push('Your account may read and try sentences. Saving needs the role annotator.')
  byId('warning').textContent = warnings.join(' ')
  byId('warning').hidden = !warnings.length
}

// How a saved text reaches the model.
function standing(served, text) {
  const rule = 'The next training round reads the newest revision.'
  if (!served) return `No version is published yet. ${rule}`
  if (served.hash === state.hash) return `Version ${served.version} is served and was trained with these sentences. A saved revision changes no mask before the next training round, which reads the newest revision.`
  const own = served.revisions.length ? (served.revisions[0] ? `revision ${served.revisions[0]}` : 'the concepts file') : 'other sentences, which are not a revision'
  return `Version ${served.version} is served and goes on reading ${own}, with which it was trained; masks do not change yet. ${rule}`
}

function table() {
  const names = Object.keys(state.classes)
  const filter = byId('filter')
  filter.replaceChildren(element('option', { value: '' }, 'all classes'), ...names.map((n) => element('option', { value: n }, n)))
  fields = []
  const head = element('thead', {}, element('tr', {}, ...['Class', 'Attribute', 'Sentence'].map((t) => element('th', {}, t))))
  const bodies = names.map((name) => {
    const body = element('tbody')
    body.dataset.class = name
    state.attributes.forEach((attribute, i) => {
      const area = element('textarea', { rows: 1, spellcheck: true, maxLength: 1000 })
      area.setAttribute('aria-label', `${name}, ${attribute}`)
      const under = element('div')
      const wordings = new Wordings(`${name}: ${attribute}`, state.may_save, refresh)
      const row = element('tr', {},
        element('td', { className: 'name' }, ...(i ? [] : [swatch(state.colors[name]), name])),
        element('td', { className: 'attribute' }, attribute),
        element('td', {}, area, under, wordings.fold))
      area.addEventListener('input', () => {
        shown[name][attribute] = area.value
        refresh()
      })
      fields.push({ name, attribute, row, area, under, wordings })
      body.append(row)
    })
    return body
  })
  byId('sentences').replaceChildren(head, ...bodies)
  fill()
}

// Put what is in `shown`, and wordings, into the fields.
function fill(variants = state.variants) {
  for (const { name, attribute, area, wordings } of fields) {
    area.value = shown[name][attribute]
    wordings.show(variants[name]?.[attribute] ?? [], state.variants[name]?.[attribute] ?? [])
  }
  refresh()
}

function refresh() {
  const changes = edits()
  for (const { name, attribute, row, area, under, wordings } of fields) {
    const changed = changes[name]?.[attribute] !== undefined
    row.className = changed ? 'changed' : ''
    under.replaceChildren()
    if (changed) under.append(element('div', { className: 'was' }, state.classes[name][attribute]))
    if (changed && wordings.now.length && !wordings.changed) under.append(element('div', { className: 'hint' }, 'Its wordings still say the old.'))
    wordings.mark()
    grow(area)
  }
  const plural = (n) => `${n} sentence${n > 1 ? 's' : ''}`
  const sentences = size(changes)
  const reworded = size(rewordings())
  const parts = [sentences && plural(sentences), reworded && `${sentences ? 'wordings' : 'Wordings'} of ${plural(reworded)}`].filter(Boolean)
  byId('count').textContent = parts.length ? `${parts.join(' and ')} changed` : 'Nothing changed'
  byId('save').classList.toggle('edited', parts.length > 0)
  byId('submit').disabled = !parts.length || !state.may_save
  byId('undo').disabled = !parts.length
}

function growAll() {
  for (const { area, wordings } of fields) {
    grow(area)
    wordings.grow()
  }
}

function findings(problems) {
  const rest = problems.filter(({ class: name, attribute, message, fatal }) => {
    const [own, number] = attribute.split(' wording ')
    const field = fields.find((f) => f.name === name && f.attribute === own)
    const finding = element('div', { className: fatal ? 'finding fatal' : 'finding' }, message)
    if (number) return !field?.wordings.find(Number(number), finding)
    field?.under.append(finding)
    return !field
  })
  const where = (p) => [p.class, p.attribute].filter(Boolean).join(', ')
  byId('findings').replaceChildren(...rest.map((p) => element('li', {}, `${where(p)}: ${p.message}`)))
}

function history() {
  const head = element('tr', {}, ...['Revision', 'Saved', 'Who', 'Why', 'Review', ''].map((t) => element('th', {}, t)))
  const lines = state.history.map((entry) => {
    const name = entry.number || 'the file'
    if (entry.damaged) return element('tr', {}, element('td', {}, `${name}`), element('td', { colSpan: 5 }, entry.damaged))
    const compare = element('button', { type: 'button', disabled: entry.number === state.revision }, 'Compare')
    compare.addEventListener('click', () => run(compare, byId('said'), '', () => load(entry.number)))
    const restore = element('button', { type: 'button', disabled: entry.number === state.revision || !state.may_save }, 'Restore')
    restore.addEventListener('click', () => run(restore, byId('said'), 'Restoring …', () => change(`revisions/${entry.number}/restore`, {})))
    const { review } = entry
    const served = state.served?.hash === entry.hash ? ' · served' : ''
    return element('tr', {},
      element('td', {}, element('b', {}, `${name}`), served),
      element('td', {}, entry.time ? new Date(entry.time).toLocaleString() : ''),
      element('td', {}, entry.who),
      element('td', {}, entry.note),
      element('td', {}, review.status === 'reviewed' ? `reviewed by ${review.by}, ${review.date}` : review.status),
      element('td', {}, element('div', { className: 'row' }, compare, restore)))
  })
  byId('history').replaceChildren(element('tbody', {}, head, ...lines))
  const submit = byId('sign').querySelector('button')
  submit.disabled = !state.may_save
}

async function load(number) {
  const { classes, variants } = await ask(`${state.model}/revisions/${number}`)
  shown = classes
  fill(variants)
  return edited() ? '' : 'The same sentences and wordings as the newest.'
}

// Save, restore or sign; then show what there is.
async function change(path, body) {
  const { revision } = await ask(`${state.model}/${path}`, { base: state.revision, ...body })
  await open(state.model)
  return `Revision ${revision} is saved.`
}

// What the served version would misread is saved only after a second look.
async function keep(body) {
  const { revision, warnings } = await ask(`${state.model}/revisions`, { base: state.revision, ...body, anyway: false })
  if (revision) {
    await open(state.model)
    return `Revision ${revision} is saved.`
  }
  const lines = warnings.map((text) => `${text[0].toUpperCase()}${text.slice(1)}.`)
  if (window.confirm([...lines, 'Save it all the same?'].join('\n'))) return change('revisions', body)
  return `Nothing was saved. ${lines.join(' ')}`
}

// If somebody else has saved in between, what was edited here stays: on top of what they saved.
async function save() {
  const mine = edits()
  const reworded = rewordings()
  const note = byId('note').value
  try {
    return await keep({ sentences: mine, variants: reworded, note })
  } catch (error) {
    if (error.status !== 409) throw error
    await open(state.model)
    byId('note').value = note
    const variants = structuredClone(state.variants)
    for (const [name, sentences] of Object.entries(mine)) Object.assign(shown[name] ?? {}, sentences)
    for (const [name, own] of Object.entries(reworded)) Object.assign(variants[name] ?? {}, own)
    fill(variants)
    throw new Error(`${error.message}. Your changes are in the table, on top of the newest: look at them, and save again`)
  }
}

byId('model').addEventListener('change', (event) => {
  if (edited() && !window.confirm('Leave this task? Your changes are not saved.')) {
    byId('model').value = state.model
    return
  }
  open(event.target.value)
})
byId('filter').addEventListener('change', (event) => {
  for (const body of byId('sentences').tBodies) body.hidden = Boolean(event.target.value) && body.dataset.class !== event.target.value
  growAll()
})
byId('undo').addEventListener('click', () => {
  shown = structuredClone(state.classes)
  fill()
})
byId('check').addEventListener('click', (event) =>
  run(event.target, byId('said'), 'Checking …', async () => {
    const { problems } = await ask(`${state.model}/check`, { base: state.revision, sentences: edits(), variants: rewordings() })
    refresh()
    findings(problems)
    document.querySelector('.finding')?.scrollIntoView({ block: 'center' })
    return problems.length ? `${problems.length} finding${problems.length > 1 ? 's' : ''}` : 'The check finds nothing.'
  }))
byId('save').addEventListener('submit', (event) => {
  event.preventDefault()
  run(byId('submit'), byId('said'), 'Saving …', save).then(refresh)
})
byId('sign').addEventListener('submit', (event) => {
  event.preventDefault()
  const button = event.target.querySelector('button')
  run(button, byId('said'), 'Signing …', async () => {
    if (edited()) throw new Error('save or undo your changes first: only a saved text can be signed')
    return change('review', { by: byId('by').value })
  })
})
window.addEventListener('beforeunload', (event) => {
  if (state && edited()) event.preventDefault()
})
window.addEventListener('resize', growAll)

run(byId('check'), byId('said'), '', async () => {
  const models = Object.keys((await ask('../info/')).models)
  byId('model').replaceChildren(...models.map((name) => element('option', {}, name)))
  const wanted = decodeURIComponent(location.hash.slice(1))
  byId('model').value = models.includes(wanted) ? wanted : models[0]
  await open(byId('model').value)
})
