// Small things that all parts of the page use. Text from the server is only ever put on the page as text.

export const byId = (id) => document.getElementById(id)

// An element with properties and children; strings become text.
export function element(name, properties = {}, ...children) {
  const made = document.createElement(name)
  for (const [key, value] of Object.entries(properties)) {
    if (key in made) made[key] = value
    else made.setAttribute(key, value)
  }
  made.append(...children)
  return made
}

export function swatch(color) {
  const made = element('i', { className: 'swatch' })
  made.style.background = color
  return made
}

// As high as its text.
export function grow(area) {
  area.style.height = 'auto'
  if (area.scrollHeight) area.style.height = `${area.scrollHeight + 2}px`
}

// The answer's JSON; what the server refuses is an error with the server's sentence.
export async function ask(path, body) {
  const options = body === undefined ? {} : { method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(body) }
  let answer
  try {
    answer = await fetch(path, options)
  } catch {
    throw new Error('the server does not answer')
  }
  if (answer.ok) return answer.json()
  let text = `${answer.status} ${answer.statusText}`
  try {
    text = (await answer.json()).detail
  } catch {
    // not one of the server's own answers: a proxy's, perhaps
  }
  throw Object.assign(new Error(text), { status: answer.status })
}

// Run what a button starts: the button waits, and what goes wrong is said beside it.
export async function run(button, place, working, work) {
  button.disabled = true
  place.className = ''
  place.textContent = working
  try {
    place.textContent = (await work()) ?? ''
  } catch (error) {
    place.className = 'bad'
    place.textContent = error.message
  } finally {
    button.disabled = false
  }
}

export const number = (value, digits = 2) => (value === null || value === undefined ? '–' : value.toFixed(digits))
