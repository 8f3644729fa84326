/**
 * Label volumes as NIfTI files, and from one voxel grid to another.
 *
 * A volume here is {dimensions: [i, j, k], affine: 3 rows of 4, data}: `affine` takes voxel indices to millimetres in
 * DICOM's axes (x to the patient's left, y to the back, z to the head), `data` runs along i first. NIfTI files have x and
 * y the other way round.
 */

const HEADER = 352 // bytes before the voxels: 348 of header, 4 that announce no extension
const UINT8 = 2
const TYPES = {
  [UINT8]: Uint8Array, 4: Int16Array, 8: Int32Array, 16: Float32Array, 64: Float64Array,
  256: Int8Array, 512: Uint16Array, 768: Uint32Array,
}
const TOLERANCE = 0.05 // voxels by which two grids may differ and still count as one

const flipped = row => row.map(value => -value)
const swapAxes = ([x, y, z]) => [flipped(x), flipped(y), z] // LPS to RAS, and back

/** A gzipped NIfTI file with 8 bits per voxel. */
export async function toNifti({ dimensions, affine, data }) {
  const header = new DataView(new ArrayBuffer(HEADER))
  header.setInt32(0, 348, true)
  ;[3, ...dimensions, 1, 1, 1, 1].forEach((n, i) => header.setInt16(40 + 2 * i, n, true))
  header.setInt16(70, UINT8, true)
  header.setInt16(72, 8, true)
  const spacing = [0, 1, 2].map(axis => Math.hypot(...affine.map(row => row[axis])))
  ;[1, ...spacing].forEach((mm, i) => header.setFloat32(76 + 4 * i, mm, true))
  header.setFloat32(108, HEADER, true)
  header.setFloat32(112, 1, true) // slope of the values
  header.setUint8(123, 2) // millimetres
  header.setInt16(254, 1, true) // the affine holds, in the scanner's axes
  swapAxes(affine).flat().forEach((value, i) => header.setFloat32(280 + 4 * i, value, true))
  ;[...'n+1'].forEach((letter, i) => header.setUint8(344 + i, letter.charCodeAt(0)))
  const stream = new Blob([header.buffer, Uint8Array.from(data)]).stream()
  return new Response(stream.pipeThrough(new CompressionStream('gzip'))).blob()
}

/** Read a NIfTI file, gzipped or not. */
export async function fromNifti(buffer) {
  const start = new Uint8Array(buffer, 0, 2)
  if (start[0] === 0x1f && start[1] === 0x8b) {
    const stream = new Blob([buffer]).stream().pipeThrough(new DecompressionStream('gzip'))
    buffer = await new Response(stream).arrayBuffer()
  }
  const header = new DataView(buffer)
  const Type = TYPES[buffer.byteLength > HEADER && header.getInt16(70, true)]
  if (!Type || header.getInt32(0, true) !== 348) throw new Error('The server sent a mask in a format that cannot be read.')
  if (header.getInt16(254, true) <= 0) throw new Error('The server sent a mask without a position in space.')
  const dimensions = [1, 2, 3].map(i => Math.max(1, header.getInt16(40 + 2 * i, true)))
  const rows = [0, 1, 2].map(r => [0, 1, 2, 3].map(c => header.getFloat32(280 + 16 * r + 4 * c, true)))
  const voxels = dimensions.reduce((a, b) => a * b)
  const offset = header.getFloat32(108, true)
  const data = new Type(buffer.slice(offset, offset + voxels * Type.BYTES_PER_ELEMENT))
  return { dimensions, affine: swapAxes(rows), data }
}

/** Of the part of an affine without the shift. */
export function inverse([[a, b, c], [d, e, f], [g, h, i]]) {
  const minors = [[e * i - f * h, c * h - b * i, b * f - c * e], [f * g - d * i, a * i - c * g, c * d - a * f],
    [d * h - e * g, b * g - a * h, a * e - b * d]]
  const determinant = a * minors[0][0] + b * minors[1][0] + c * minors[2][0]
  return minors.map(row => row.map(value => value / determinant))
}

/**
 * The values of a volume in the order of another grid of the same voxels: axes may be exchanged and run backwards.
 * @returns {Uint8Array}
 */
export function onGrid(volume, { dimensions, affine }) {
  const back = inverse(volume.affine)
  const index = point => back.map(row => row.reduce((sum, value, i) => sum + value * (point[i] - volume.affine[i][3]), 0))
  const world = voxel => affine.map(row => row[0] * voxel[0] + row[1] * voxel[1] + row[2] * voxel[2] + row[3])
  const first = index(world([0, 0, 0]))
  const origin = first.map(Math.round)
  const units = [0, 1, 2].map(axis => index(world([0, 1, 2].map(i => Number(i === axis)))).map((v, i) => Math.round(v - first[i])))
  // The corners show a difference in spacing, direction, position or size.
  for (let corner = 0; corner < 8; corner++) {
    const voxel = dimensions.map((n, axis) => (corner >> axis & 1) * (n - 1))
    const exact = index(world(voxel))
    const differs = origin.some((start, i) => {
      const whole = voxel.reduce((sum, n, axis) => sum + n * units[axis][i], start)
      return whole < 0 || whole >= volume.dimensions[i] || !(Math.abs(exact[i] - whole) <= TOLERANCE)
    })
    if (differs) throw new Error('The mask lies on a different voxel grid from the images shown here.')
  }
  if (volume.data.length !== dimensions.reduce((a, b) => a * b)) {
    throw new Error('The mask has a different number of voxels from the images shown here.')
  }
  const result = new Uint8Array(volume.data.length)
  const strides = [1, volume.dimensions[0], volume.dimensions[0] * volume.dimensions[1]]
  const steps = units.map(unit => unit.reduce((sum, n, i) => sum + n * strides[i], 0))
  let place = origin.reduce((sum, n, i) => sum + n * strides[i], 0)
  let target = 0
  for (let k = 0; k < dimensions[2]; k++, place += steps[2] - dimensions[1] * steps[1]) {
    for (let j = 0; j < dimensions[1]; j++, place += steps[1] - dimensions[0] * steps[0]) {
      for (let i = 0; i < dimensions[0]; i++, place += steps[0]) result[target++] = volume.data[place]
    }
  }
  return result
}

/**
 * A part of a volume on a grid that it belongs to: the box of voxels that it covers, {low, high}, and their values.
 */
export function partOf(part, { dimensions, affine }) {
  const back = inverse(affine)
  const corner = (data, far) => data.affine.map(row => row[3] + row.slice(0, 3).reduce((sum, mm, i) => sum + far * mm * (data.dimensions[i] - 1), 0))
  const [first, last] = [0, 1].map(far => back.map(row =>
    Math.round(row.reduce((sum, value, i) => sum + value * (corner(part, far)[i] - affine[i][3]), 0))))
  const [low, high] = [Math.min, Math.max].map(end => first.map((value, axis) => end(value, last[axis])))
  if (low.some(n => n < 0) || high.some((n, axis) => n >= dimensions[axis])) {
    throw new Error('The mask lies on a different voxel grid from the images shown here.')
  }
  const start = affine.map(row => row[0] * low[0] + row[1] * low[1] + row[2] * low[2] + row[3])
  const grid = { dimensions: low.map((n, axis) => high[axis] - n + 1), affine: affine.map((row, i) => [...row.slice(0, 3), start[i]]) }
  return { box: { low, high }, values: onGrid(part, grid) }
}

/** How many voxels have each value from 0 to 255. */
export function counts(data) {
  const found = new Array(256).fill(0)
  for (const value of data) found[value]++
  return found
}
