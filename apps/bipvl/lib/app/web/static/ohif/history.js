/** What was done to a label volume, step by step, so that it can be undone and done again. */

const STEPS = 100 // that are kept, at least those of the last minutes
const BYTES = 128 * 2 ** 20 // that they take together; the last 20 stay in any case
const LEAST = 20

/**
 * Where two volumes of the same size differ: {low, high}, voxels at both ends that belong to it, or null.
 * Volumes are Uint8Arrays that run along i first.
 */
export function difference(before, after, [ni, nj, nk]) {
  const slice = ni * nj
  let [i0, i1, j0, j1, k0, k1] = [ni, -1, nj, -1, nk, -1]
  for (let k = 0; k < nk; k++) {
    if (same(before, after, k * slice, slice)) continue
    if (k < k0) k0 = k
    k1 = k
    for (let j = 0; j < nj; j++) {
      const row = k * slice + j * ni
      let first = 0
      while (first < ni && before[row + first] === after[row + first]) first++
      if (first === ni) continue
      let last = ni - 1
      while (before[row + last] === after[row + last]) last--
      if (first < i0) i0 = first
      if (last > i1) i1 = last
      if (j < j0) j0 = j
      if (j > j1) j1 = j
    }
  }
  return k1 < 0 ? null : { low: [i0, j0, k0], high: [i1, j1, k1] }
}

/** Four voxels at a time, where they lie so. */
function same(one, other, start, length) {
  if (start % 4 || length % 4 || one.byteOffset % 4 || other.byteOffset % 4) {
    for (let at = start; at < start + length; at++) if (one[at] !== other[at]) return false
    return true
  }
  const [a, b] = [one, other].map(part => new Uint32Array(part.buffer, part.byteOffset + start, length / 4))
  for (let at = 0; at < a.length; at++) if (a[at] !== b[at]) return false
  return true
}

/** Call for each row of a box: where it begins in the volume and in the box, and how long it is. */
function rows({ low, high }, [ni, nj], each) {
  const length = high[0] - low[0] + 1
  let at = 0
  for (let k = low[2]; k <= high[2]; k++) {
    for (let j = low[1]; j <= high[1]; j++, at += length) each((k * nj + j) * ni + low[0], at, length, k)
  }
}

export const size = ({ low, high }) => low.reduce((product, start, axis) => product * (high[axis] - start + 1), 1)

/** The values in a box of a volume. */
export function cut(data, dimensions, box) {
  const part = new Uint8Array(size(box))
  rows(box, dimensions, (start, at, length) => part.set(data.subarray(start, start + length), at))
  return part
}

/** Put values into a box of a volume. */
export function paste(data, dimensions, box, part) {
  rows(box, dimensions, (start, at, length) => data.set(part.subarray(at, at + length), start))
}

/** Runs of equal values: masks shrink to a few percent. */
export function pack(data) {
  const runs = []
  for (let at = 0; at < data.length;) {
    const value = data[at]
    const start = at
    while (at < data.length && data[at] === value) at++
    runs.push(value, at - start)
  }
  return { length: data.length, runs: Uint32Array.from(runs) }
}

export function unpack({ length, runs }) {
  const data = new Uint8Array(length)
  for (let run = 0, at = 0; run < runs.length; at += runs[run + 1], run += 2) {
    data.fill(runs[run], at, at + runs[run + 1])
  }
  return data
}

export class History {
  constructor() {
    this._steps = []
    this._at = 0 // steps before it are done, those from it on are undone
  }

  /**
   * Keep what was done; what was undone before is forgotten.
   * @param what in a word or two, for the annotator
   * @param box where
   * @param before,after the values in the box
   * @param from,to numbers of the states before and after
   */
  push(what, box, before, after, from, to) {
    this._steps.length = this._at
    this._steps.push({ what, box, before: pack(before), after: pack(after), from, to })
    const bytes = () => this._steps.reduce((sum, { before, after }) => sum + before.runs.byteLength + after.runs.byteLength, 0)
    while (this._steps.length > STEPS || (this._steps.length > LEAST && bytes() > BYTES)) this._steps.shift()
    this._at = this._steps.length
  }

  /** What would be undone next, in a word or two, or undefined. */
  get back() {
    return this._steps[this._at - 1]?.what
  }

  get forth() {
    return this._steps[this._at]?.what
  }

  /** {box, values, state}: what to put where, and the number of the state that it leads to; null at the end. */
  undo() {
    const step = this._steps[this._at - 1]
    if (!step) return null
    this._at--
    return { box: step.box, values: unpack(step.before), state: step.from }
  }

  redo() {
    const step = this._steps[this._at]
    if (!step) return null
    this._at++
    return { box: step.box, values: unpack(step.after), state: step.to }
  }
}
