/** The part of the panel that lists where the model doubts, in plain DOM. */

const SAID = { right: '✓ looks right', fix: '✎ to be fixed' }

export const REVIEW_PANEL = `
<section class="review" aria-label="Where the model doubts">
  <div class="head"><h3>Where the model doubts</h3>
    <button class="onward minor" type="button">Next <kbd>N</kbd></button></div>
  <p class="seen"></p>
  <p class="state" role="status"></p>
  <ol class="places"></ol>
  <div class="row"><progress class="look" max="1"></progress>
    <button class="look minor" type="button">Let the model look</button>
    <button class="unlook minor" type="button">Cancel</button></div>
</section>`

/** 1234 mm³ are "1.2 ml". */
const millilitres = mm3 => `${(mm3 / 1000).toLocaleString('en', { maximumSignificantDigits: 2 })} ml`

const made = (tag, className, text = '') => Object.assign(document.createElement(tag), { className, textContent: text })

export class Places {
  /**
   * @param review
   * @param find an element of the panel by its selector
   */
  constructor(review, find) {
    this.review = review
    this._find = find
    find('button.onward').addEventListener('click', () => review.next())
    find('button.look').addEventListener('click', () => review.look())
    find('button.unlook').addEventListener('click', () => { review.giveUp(); this.update() })
    find('.places').addEventListener('click', event => {
      const { action, id } = event.target.closest('button')?.dataset ?? {}
      const place = review.places.find(other => other.id === id)
      if (place) review[action](place)
    })
  }

  update() {
    const { review, _find: find } = this
    review.follow()
    const { places, version, looking, problem, session: { drawing, model } } = review
    find('.review').hidden = !drawing?.ready || !model
    if (!drawing?.ready || !model) return
    const done = places.filter(place => review.said(place).length).length
    find('.seen').hidden = !places.length
    find('.seen').textContent = places.length ? `${done} of ${places.length} answered` : ''
    find('button.onward').hidden = !places.length
    find('.state').textContent = problem || this._state()
    find('.state').classList.toggle('failed', Boolean(problem))
    find('progress.look').hidden = find('button.unlook').hidden = !looking
    if (looking?.total) find('progress.look').value = looking.done / looking.total
    else find('progress.look').removeAttribute('value')
    // A mask brings the list along; without one, or with that of an earlier version, it can be asked for.
    find('button.look').hidden = Boolean(looking) || !model.version || version === model.version
    this._list()
  }

  _state() {
    const { review: { places, version, looking, session: { model } } } = this
    if (looking) return looking.total ? `The model looks: window ${Math.min(looking.done + 1, looking.total)} of ${looking.total}` : 'The model is looking …'
    if (version === 0 || !model.version) return 'An untrained model is sure of nothing: train first.'
    if (version === null) return 'The list comes with the mask of Auto-Segmentation.'
    if (version !== model.version) return `These are of version ${version}; version ${model.version} is served.`
    return places.length ? '' : 'Nowhere in this image.'
  }

  /** Built again only if something else is to be shown: a button that is held or has the focus stays. */
  _list() {
    const { places, at, saving, version } = this.review
    const shown = JSON.stringify([places, at, saving, version])
    if (shown === this._shown) return
    this._shown = shown
    const root = this._find('.places')
    const { id, action } = root.getRootNode().activeElement?.dataset ?? {}
    root.replaceChildren(...places.map(place => this._row(place)))
    root.querySelector('[aria-current]')?.scrollIntoView({ block: 'nearest' })
    if (id) [...root.querySelectorAll('button')].find(({ dataset }) => dataset.id === id && dataset.action === action)?.focus()
  }

  _row(place) {
    const { review } = this
    const row = made('li', '')
    const button = made('button', 'minor place')
    Object.assign(button, { type: 'button', title: `entropy ${place.entropy.toFixed(2)} of 1` })
    Object.assign(button.dataset, { action: 'go', id: place.id })
    const { color } = review.session.drawing.labels.find(({ name }) => name === place.label) ?? { color: [128, 128, 128] }
    const rival = ['not', 'background'].includes(place.instead) ? '' : ` or ${place.instead}`
    const name = made('span', 'label', place.class + rival)
    name.style.setProperty('--label', `rgb(${color.join()})`)
    const size = made('span', 'size', `${millilitres(place.volume)}, ${Math.round(Math.max(...place.extent))} mm`)
    button.append(name, size)
    const last = place.answers.at(-1)
    if (last) button.append(made('span', `answer ${last.answer}`, this._said(last)))
    row.append(button)
    if (place.id !== review.at) return row
    row.setAttribute('aria-current', 'true')
    row.append(made('p', 'why', place.why))
    const answers = made('div', 'row')
    for (const [action, text] of [['right', 'Looks right'], ['fix', 'Fix it here']]) {
      const each = made('button', `minor ${action}`, text)
      Object.assign(each, { type: 'button', disabled: review.saving === place.id })
      Object.assign(each.dataset, { action, id: place.id })
      answers.append(each)
    }
    row.append(answers)
    return row
  }

  _said({ answer, who, when, version }) {
    const earlier = version === this.review.version ? '' : `, of version ${version}`
    return `${SAID[answer]} (${who}, ${new Date(when).toLocaleDateString()}${earlier})`
  }
}
