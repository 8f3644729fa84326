/** The uncertainty map as colours over the images of its series, in every viewport that shows them. */

import { onGrid } from './volumes.js'

// Percent of the largest entropy, colour (matplotlib's "inferno"), opacity: what is certain stays as it was.
const COLOURS = [
  [0, [0, 0, 0.02], 0],
  [10, [0.16, 0.04, 0.33], 0],
  [30, [0.47, 0.11, 0.43], 0.45],
  [50, [0.73, 0.21, 0.33], 0.6],
  [75, [0.95, 0.49, 0.09], 0.7],
  [100, [0.99, 1, 0.64], 0.8],
]

export class Overlay {
  /**
   * @param drawing on the series
   * @param map volume of percent on the same voxels, see volumes.js
   */
  constructor(drawing, map) {
    this.drawing = drawing
    this.values = onGrid(map, drawing.read())
    this.id = `uncertainty ${drawing.id}`
  }

  /** Show it, also in viewports that have come since. */
  async show() {
    const viewports = this.drawing.viewports().filter(viewport => !viewport.getActor(this.id))
    if (!viewports.length) return
    for (const viewport of viewports) {
      const { volumeId } = this._volume(viewport)
      // The largest value in a slice: adding up along the line of sight would make the colours of a thin slice faint.
      const blendMode = cornerstone.Enums.BlendModes.MAXIMUM_INTENSITY_BLEND
      const input = { volumeId, actorUID: this.id, visibility: true, blendMode, callback: coloured }
      await viewport.addVolumes([input], true, true) // drawn at once, and the window of the images stays
    }
    // The first viewport brings the voxels to the GPU while it is drawn, and shows them the next time.
    for (let frame = 0; frame < 2; frame++) await new Promise(requestAnimationFrame)
    for (const viewport of viewports) viewport.render()
  }

  hide() {
    for (const viewport of this.drawing.viewports()) {
      if (viewport.getActor(this.id)) viewport.removeVolumeActors([this.id], true)
    }
    if (cornerstone.cache.getVolume(this.id)) cornerstone.cache.removeVolumeLoadObject(this.id)
  }

  _volume(viewport) {
    const found = cornerstone.cache.getVolume(this.id)
    if (found) return found
    const [images] = viewport.getAllVolumeIds()
    const volume = cornerstone.volumeLoader.createAndCacheDerivedLabelmapVolume(images, { volumeId: this.id })
    volume.voxelManager.setCompleteScalarDataArray(this.values)
    return volume
  }
}

function coloured({ volumeActor }) {
  const property = volumeActor.getProperty()
  const [colour, opacity] = [property.getRGBTransferFunction(0), property.getScalarOpacity(0)]
  colour.removeAllPoints()
  opacity.removeAllPoints()
  for (const [percent, rgb, alpha] of COLOURS) {
    colour.addRGBPoint(percent, ...rgb)
    opacity.addPoint(percent, alpha)
  }
}
