/** Where a person points in the viewports while one of our tools is held, and marks over the images that show it. */

const SVG = 'http://www.w3.org/2000/svg'
const LEFT = 0

/** The voxels along a line between two voxels that need not be whole. */
function between(from, to) {
  const steps = Math.max(1, Math.ceil(2 * Math.max(...from.map((value, axis) => Math.abs(to[axis] - value)))))
  return [...Array(steps + 1).keys()].map(step => from.map((value, axis) => value + (to[axis] - value) * step / steps))
}

export class Pointing {
  /**
   * @param {object} person
   * person.drawing() what is pointed at, or null while no tool is held
   * person.drags() whether the tool draws a line or a box
   * person.pointed(voxels, ends, viewport) what was pointed at: the voxels of the way, and its first and last one
   * person.shown() the drawing that is marked
   * person.marks() what is shown: {points: [{voxels, inside, sent}], box: {low, high}, place: {low, high}}
   */
  constructor(person) {
    this.person = person
    this._layers = new Map() // by viewport's element: its SVG
    this._way = null // while the button is down: {viewport, voxels}
    this._handlers = [
      ['mousedown', event => this._down(event)],
      ['mousemove', event => this._move(event)],
      ['mouseup', event => this._up(event)],
      ['dblclick', event => this._at(event) && this._take(event)], // which would enlarge the view
    ]
    this._rendered = event => this._mark(event.detail.element)
  }

  start() {
    // Before the viewer's own: its tools do not see what ours take.
    for (const [name, handler] of this._handlers) addEventListener(name, handler, true)
  }

  stop() {
    for (const [name, handler] of this._handlers) removeEventListener(name, handler, true)
    for (const [element, layer] of this._layers) {
      element.removeEventListener(cornerstone.Enums.Events.IMAGE_RENDERED, this._rendered)
      layer.remove()
    }
    this._layers.clear()
    this._way = null
  }

  /** The viewport below the mouse, if it shows what is drawn on. */
  _at(event) {
    const drawing = this.person.drawing()
    if (!drawing?.ready || !event.target.closest) return null
    const { target, clientX: x, clientY: y } = event
    // The first event after the mouse has gone from one view to another is for the frame around the view.
    return drawing.viewports().find(({ element }) => {
      const { left, right, top, bottom } = element.getBoundingClientRect()
      const here = x >= left && x < right && y >= top && y < bottom
      return here && (element.contains(target) || target.contains(element))
    }) ?? null
  }

  _take(event) {
    event.stopImmediatePropagation()
    event.preventDefault()
  }

  /** The voxel below the mouse, not rounded, no further out than the volume's edge. */
  _voxel(viewport, event) {
    const { left, top } = viewport.canvas.getBoundingClientRect()
    const drawing = this.person.drawing()
    const found = drawing.voxelAt([...viewport.canvasToWorld([event.clientX - left, event.clientY - top])])
    const ends = drawing.grid.dimensions
    const inside = found.every((n, axis) => Math.round(n) >= 0 && Math.round(n) < ends[axis])
    return { inside, voxel: found.map((n, axis) => Math.min(Math.max(n, 0), ends[axis] - 1)) }
  }

  _down(event) {
    const viewport = event.button === LEFT && this._at(event)
    if (!viewport) return
    this._take(event)
    const { inside, voxel } = this._voxel(viewport, event)
    if (!inside) return
    if (!this.person.drags()) return this.person.pointed([voxel.map(Math.round)], [], viewport)
    this._way = { viewport, path: [voxel] }
  }

  _move(event) {
    if (!this._way) return
    this._take(event)
    const { viewport, path } = this._way
    const { voxel } = this._voxel(viewport, event)
    path.push(...between(path.at(-1), voxel).slice(1))
    this.show()
  }

  _up(event) {
    if (!this._way || event.button !== LEFT) return
    this._take(event)
    const { viewport } = this._way
    const [voxels, ends] = [this.way, this.ends]
    this._way = null
    this.person.pointed(voxels, ends, viewport)
  }

  /** The whole voxels of the line that is being drawn. */
  get way() {
    const seen = new Map((this._way?.path ?? []).map(voxel => voxel.map(Math.round)).map(voxel => [voxel.join(), voxel]))
    return [...seen.values()]
  }

  /** Its first and its last voxel. */
  get ends() {
    return [0, -1].map(at => this._way.path.at(at).map(Math.round))
  }

  /** Marks as they are now, in all viewports. */
  show() {
    const viewports = this.person.shown()?.viewports() ?? []
    for (const { element } of viewports) {
      if (!this._layers.has(element)) {
        const layer = document.createElementNS(SVG, 'svg')
        layer.setAttribute('class', 'bipvl-marks')
        layer.style.cssText = 'height:100%;inset:0;pointer-events:none;position:absolute;width:100%;z-index:5'
        element.append(layer)
        element.addEventListener(cornerstone.Enums.Events.IMAGE_RENDERED, this._rendered)
        this._layers.set(element, layer)
      }
      this._mark(element)
    }
  }

  _mark(element) {
    const layer = this._layers.get(element)
    const drawing = this.person.shown()
    const viewport = drawing?.viewports().find(other => other.element === element)
    if (!layer) return
    if (!viewport || !drawing.ready) return layer.replaceChildren()
    const { points, box, place } = this.person.marks()
    const parts = points.flatMap(mark => this._points(viewport, drawing, mark))
    if (box) parts.push(...this._box(viewport, drawing, box, '#FFD24D', '6 4'))
    if (place) parts.push(...this._box(viewport, drawing, place, '#6FE3FF', '2 4'))
    layer.replaceChildren(...parts)
  }

  /** How many millimetres a place lies before the slice that is shown. */
  _depth(viewport, place) {
    const { focalPoint, viewPlaneNormal } = viewport.getCamera()
    return place.reduce((sum, value, axis) => sum + (value - focalPoint[axis]) * viewPlaneNormal[axis], 0)
  }

  _thickness(viewport, drawing) {
    const { viewPlaneNormal } = viewport.getCamera()
    const { affine } = drawing.grid
    return Math.max(...[0, 1, 2].map(axis => Math.abs(affine.reduce((sum, row, i) => sum + row[axis] * viewPlaneNormal[i], 0))))
  }

  _points(viewport, drawing, { voxels, inside, sent }) {
    const near = this._thickness(viewport, drawing) / 2
    const colour = inside ? '#7CFC7C' : '#FF7A7A'
    const seen = voxels.map(voxel => drawing.placeOf(voxel)).filter(place => Math.abs(this._depth(viewport, place)) <= near)
      .map(place => viewport.worldToCanvas(place))
    if (!seen.length) return []
    if (voxels.length > 1) {
      const path = document.createElementNS(SVG, 'path')
      path.setAttribute('d', `M${seen.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join('L')}`)
      path.setAttribute('style', `fill:none;stroke:${colour};stroke-width:2;stroke-dasharray:${sent ? 'none' : '4 3'}`)
      return [path]
    }
    const [[x, y]] = seen
    const ring = document.createElementNS(SVG, 'path')
    const sign = inside ? `M${x - 4} ${y}h8M${x} ${y - 4}v8` : `M${x - 4} ${y}h8`
    ring.setAttribute('d', `M${x - 7} ${y}a7 7 0 1 0 14 0a7 7 0 1 0 -14 0${sign}`)
    ring.setAttribute('style', `fill:#0008;stroke:${colour};stroke-width:2;stroke-dasharray:${sent ? 'none' : '3 2'}`)
    return [ring]
  }

  /** The outline of a box where the slice cuts it. */
  _box(viewport, drawing, { low, high }, colour, dashes) {
    const corners = [...Array(8).keys()].map(corner => drawing.placeOf(
      low.map((n, axis) => corner >> axis & 1 ? high[axis] + 0.5 : n - 0.5)))
    const depths = corners.map(place => this._depth(viewport, place))
    if (Math.min(...depths) > 0 || Math.max(...depths) < 0) return []
    const seen = corners.map(place => viewport.worldToCanvas(place))
    const [xs, ys] = [0, 1].map(axis => seen.map(point => point[axis]))
    const outline = document.createElementNS(SVG, 'rect')
    for (const [name, value] of Object.entries({
      x: Math.min(...xs), y: Math.min(...ys),
      width: Math.max(...xs) - Math.min(...xs), height: Math.max(...ys) - Math.min(...ys),
    })) outline.setAttribute(name, value)
    outline.setAttribute('style', `fill:none;stroke:${colour};stroke-width:2;stroke-dasharray:${dashes}`)
    return [outline]
  }
}
