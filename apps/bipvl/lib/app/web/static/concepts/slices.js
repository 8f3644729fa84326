// Two masks on one case, slice by slice. Volumes are bytes, RAS, the last axis running fastest.

const LOST = [66, 133, 244]
const GAINED = [234, 88, 12]
const OTHER = [217, 70, 239]
const INSIDE = 0.4

async function unpacked(text) {
  const raw = Uint8Array.from(atob(text), (c) => c.charCodeAt(0))
  const stream = new Blob([raw]).stream().pipeThrough(new DecompressionStream('gzip'))
  return new Uint8Array(await new Response(stream).arrayBuffer())
}

export class Slices {
  // volumes: the server's answer; palette: label names in order to '#rrggbb'.
  static async of(volumes, palette) {
    const parts = await Promise.all([volumes.grey, volumes.before, volumes.after].map(unpacked))
    return new Slices(volumes, palette, ...parts)
  }

  constructor(volumes, palette, grey, before, after) {
    Object.assign(this, { shape: volumes.shape, spacing: volumes.spacing, step: volumes.step, grey, before, after })
    this.palette = [[0, 0, 0], ...palette.map((c) => [1, 3, 5].map((i) => parseInt(c.slice(i, i + 2), 16)))]
  }

  // Offsets into the volumes of one slice, as it is shown: right on the left, front and head up.
  offsets(axis, place) {
    const [, ny, nz] = this.shape
    const stride = [ny * nz, nz, 1]
    const [across, down] = [[1, 2], [0, 2], [0, 1]][axis] // columns, rows
    const width = this.shape[across]
    const height = this.shape[down]
    const result = new Uint32Array(width * height)
    for (let row = 0; row < height; row++)
      for (let column = 0; column < width; column++)
        result[row * width + column] = place * stride[axis] + (width - 1 - column) * stride[across] + (height - 1 - row) * stride[down]
    return { result, width, height, ratio: (height * this.spacing[down]) / (width * this.spacing[across]) }
  }

  // How many voxels differ in each slice along an axis.
  changes(axis) {
    const counts = new Uint32Array(this.shape[axis])
    const [, ny, nz] = this.shape
    for (let i = 0; i < this.before.length; i++)
      if (this.before[i] !== this.after[i]) counts[[Math.floor(i / (ny * nz)), Math.floor(i / nz) % ny, i % nz][axis]]++
    return counts
  }

  // Where to begin: the slice that differs most, else the one that shows most, else the middle.
  start(axis) {
    const most = (counts) => counts.reduce((best, n, i) => (n > counts[best] ? i : best), 0)
    const counts = this.changes(axis)
    if (counts.some((n) => n)) return most(counts)
    const [, ny, nz] = this.shape
    const shown = new Uint32Array(this.shape[axis])
    this.before.forEach((value, i) => { if (value) shown[[Math.floor(i / (ny * nz)), Math.floor(i / nz) % ny, i % nz][axis]]++ })
    return shown.some((n) => n) ? most(shown) : Math.floor(this.shape[axis] / 2)
  }

  draw(canvases, axis, place, fill) {
    const { result, width, height, ratio } = this.offsets(axis, place)
    const pictures = [this.before, this.after].map((mask) => this.coloured(result, width, mask, fill))
    pictures.push(this.opposed(result))
    canvases.forEach((canvas, i) => {
      Object.assign(canvas, { width, height })
      canvas.style.aspectRatio = `${1 / ratio}`
      canvas.getContext('2d').putImageData(new ImageData(pictures[i], width, height), 0, 0)
    })
  }

  coloured(offsets, width, mask, fill) {
    const pixels = new Uint8ClampedArray(4 * offsets.length)
    offsets.forEach((offset, i) => {
      const label = mask[offset]
      const edge = label && [i - 1, i + 1, i - width, i + width].some((j) => offsets[j] === undefined || mask[offsets[j]] !== label)
      const share = !label ? 0 : edge ? 1 : fill ? INSIDE : 0
      this.put(pixels, i, this.grey[offset], this.palette[label], share)
    })
    return pixels
  }

  opposed(offsets) {
    const pixels = new Uint8ClampedArray(4 * offsets.length)
    offsets.forEach((offset, i) => {
      const [a, b] = [this.before[offset], this.after[offset]]
      this.put(pixels, i, this.grey[offset], !b ? LOST : !a ? GAINED : OTHER, a === b ? 0 : 0.8)
    })
    return pixels
  }

  put(pixels, i, grey, color, share) {
    for (let c = 0; c < 3; c++) pixels[4 * i + c] = grey * (1 - share) + color[c] * share
    pixels[4 * i + 3] = 255
  }
}
