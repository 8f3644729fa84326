/** Requests to the server that this page comes from. Every failure is an Error whose message a person can act on. */

/** The server said no, or nothing at all (status 0). */
export class Refusal extends Error {
  constructor(message, status) {
    super(message)
    this.status = status
  }
}

async function request(method, path, { query = {}, body, json, signal } = {}) {
  const url = new URL(path, location.origin)
  for (const [key, value] of Object.entries(query)) url.searchParams.set(key, value)
  const options = { method, body, signal, credentials: 'same-origin' }
  if (json !== undefined) Object.assign(options, { body: JSON.stringify(json), headers: { 'Content-Type': 'application/json' } })
  let response
  try {
    response = await fetch(url, options)
  } catch (error) {
    if (error.name === 'AbortError') throw error
    throw new Refusal('The server does not answer. Your drawing is still here: try again in a moment.', 0)
  }
  if (response.ok) return response
  throw new Refusal(await reason(response), response.status)
}

/** Our routes answer every error with {"detail": "a sentence"}; a proxy in between may answer with a page of its own. */
async function reason(response) {
  const text = await response.text().catch(() => '')
  try {
    const { detail } = JSON.parse(text)
    if (typeof detail === 'string' && detail) return detail[0].toUpperCase() + detail.slice(1)
  } catch {
    // no JSON: the status is all there is to say
  }
  if (response.status === 401) return 'You are not logged in any more. Log in in another tab of this browser, then try again.'
  return `The server answered ${response.status} ${response.statusText}`.trim() + '; its log says more.'
}

/** What the server can do: tasks, options, strategies, counts. */
export const info = async () => (await request('GET', '/info/')).json()

/**
 * Segment a series.
 * @param signal ends the request
 * @returns {{mask: ArrayBuffer, result: object}} a NIfTI file, and what the server says about it
 */
export const infer = (task, series, options, signal) => ask(task, series, options, null, signal)

/**
 * Answer clicks and scribbles: the part of the mask that has changed.
 * @param map the mask that the person sees, {file, labels}, unless the server has it
 */
export function click(task, series, options, map, signal) {
  const given = map ? { ...options, label_info: map.labels } : options
  return ask(`${task}_clicks`, series, given, map?.file, signal)
}

async function ask(model, series, options, map, signal) {
  const form = new FormData()
  form.set('params', JSON.stringify({ ...options, client_id: client(), result_extension: '.nii.gz' }))
  if (map) form.set('label', map, 'label.nii.gz')
  const path = `/infer/${encodeURIComponent(model)}`
  const response = await request('POST', path, { query: { image: series, output: 'all' }, body: form, signal })
  const parts = await response.formData()
  const text = parts.get('params')
  const result = JSON.parse(typeof text === 'string' ? text : await text.text())
  return { mask: await parts.get('image').arrayBuffer(), result }
}

/** How far one's own request to a model is, {done, total} windows; null if it is not running. */
export async function progress(model, series) {
  const path = `/infer/${encodeURIComponent(model)}/progress`
  return (await request('GET', path, { query: { image: series, client_id: client() } })).json()
}

/**
 * Where the model doubts in a series: {version, places}; version null if nothing is known.
 * @param look whether the model looks at the image if it has to
 * @param signal ends that
 */
export const doubts = async (task, series, look, signal) =>
  (await request('GET', `/doubts/${encodeURIComponent(task)}`, { query: { image: series, look, client_id: client() }, signal })).json()

/** How far one's own look is, {done, total} windows; null if the model is not looking. */
export const looked = async (task, series) =>
  (await request('GET', `/doubts/${encodeURIComponent(task)}/progress`, { query: { image: series, client_id: client() } })).json()

/** Keep an answer about a place, {place, answer, version}; the list as it is then. */
export const answerDoubt = async (task, series, said) =>
  (await request('PUT', `/doubts/${encodeURIComponent(task)}`, { query: { image: series }, json: said })).json()

/** Save a NIfTI file as the final label of a series. */
export async function submit(series, file, params) {
  const form = new FormData()
  form.set('params', JSON.stringify({ ...params, client_id: client() }))
  form.set('label', file, 'label.nii.gz')
  const query = { image: series, tag: 'final' }
  return (await request('PUT', '/datastore/label', { query, body: form })).json()
}

/** A label of a series, of any tag, as a NIfTI file. */
export async function kept(series, tag) {
  return (await request('GET', '/datastore/label', { query: { label: series, tag } })).arrayBuffer()
}

/** The final label of a series as a NIfTI file, or null if there is none. */
export async function label(series) {
  try {
    return await kept(series, 'final')
  } catch (error) {
    if (error.status === 404) return null
    throw error
  }
}

/** The case to annotate next by a strategy; null if none is left. */
export async function next(strategy) {
  const path = `/activelearning/${encodeURIComponent(strategy)}`
  const found = await (await request('POST', path, { json: { client_id: client() } })).json()
  return found.id ? found : null
}

/** Tells two annotators apart who share an address and have no accounts: the server leases cases to this name. */
function client() {
  const key = 'bipvl-client'
  const name = localStorage.getItem(key) ?? `ohif-${Math.random().toString(36).slice(2, 10)}`
  localStorage.setItem(key, name)
  return name
}

export const startTraining = async (task, options) =>
  (await request('POST', `/train/${encodeURIComponent(task)}`, { json: options })).json()

export const stopTraining = async () => (await request('DELETE', '/train/')).json()

/** The latest training of this server's life, with its progress; null if there was none. */
export async function training() {
  const all = await (await request('GET', '/train/', { query: { all: true } })).json()
  return all.at(-1) ?? null
}
