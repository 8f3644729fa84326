"""The body of a phantom: shapes and intensities of an abdomen in a portal-venous CT (see `.studies`).

Shapes are depth functions: millimetres below the surface, negative outside. Coordinates are RAS+ millimetres: x grows
to the patient's right, y to the front, z to the head; the origin is the first lumbar vertebra.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.interpolate import make_interp_spline

LABELS = {"liver": 1, "spleen": 2, "left kidney": 3, "right kidney": 4, "aorta": 5, "spine": 6}
SIZE_MM = (370.0, 280.0, 250.0)  # the field of view that the body is drawn for

Array = NDArray[np.float32]
Vector = NDArray[np.float64]
Point = Sequence[float] | Vector


def smooth_field(rng: np.random.Generator, shape: Sequence[int], knots: int) -> Array:
    """A random field of about unit amplitude that varies over 1/knots of the volume."""
    field = rng.uniform(-1.5, 1.5, (knots + 2,) * 3)
    for axis, length in enumerate(shape):
        spline = make_interp_spline(np.arange(knots + 2), field, axis=axis)
        field = spline(np.linspace(0.5, knots + 0.5, length))
    return field.astype(np.float32)


def _rotation(x: float = 0, y: float = 0, z: float = 0) -> Array:
    """Rotation by degrees about the three axes, z first."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(np.radians([x, y, z])), np.sin(np.radians([x, y, z]))
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return (about_x @ about_y @ about_z).astype(np.float32)


def _union(a: Array, b: Array, blend: float = 12.0) -> Array:
    """Smooth union of two depths: organs have no creases where their parts meet."""
    weight = np.clip(0.5 + (a - b) * (0.5 / blend), 0, 1)
    return b + weight * (a - b) + weight * (1 - weight) * blend


class Abdomen:
    """One body on one grid. Organs are painted in order, each over what lies there already."""

    def __init__(
        self, rng: np.random.Generator, shape: tuple[int, ...], step: Vector, corner: Vector, size: Vector
    ) -> None:
        self.rng = rng
        axes = (corner[i] + step[i] * np.arange(shape[i]) for i in range(3))
        grid = np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)
        # The anatomy is drawn at one size; the grid is bent, turned and scaled into it instead.
        scale = np.array(SIZE_MM) / size * rng.uniform(1.0, 1.06)
        self.corner, self.step = corner * scale, step * scale
        self.turn = _rotation(rng.uniform(-3, 3), rng.uniform(-3, 3), rng.uniform(-8, 8))
        self.shift = rng.uniform(-4, 4, 3)
        self.flat = grid * scale.astype(np.float32)[:, None, None, None]  # the table is neither bent nor turned
        bend = np.stack([smooth_field(rng, shape, 4) for _ in range(3)]) * 3.5
        moved = np.tensordot(self.turn, self.flat, 1) + bend + self.shift.astype(np.float32)[:, None, None, None]
        self.x, self.y, self.z = moved
        self.edge = float(np.mean(self.step)) / 2  # half the width of a partial-volume ramp
        self.image = np.full(shape, -1000, dtype=np.float32)
        self.label = np.zeros(shape, dtype=np.uint8)
        self.texture = smooth_field(rng, shape, 24)

    def paint(self, depth: Array, hounsfield: float | Array, value: int = 0) -> None:
        """Fill a shape; voxels that its surface cuts are mixed."""
        amount = np.clip(0.5 + depth / (2 * self.edge), 0, 1)
        self.image += amount * (hounsfield - self.image)
        self.label[amount > 0.5] = value

    def near(self, *points: Point, reach: float) -> Abdomen:
        """This body cut down to a box around points: small shapes are painted there in a fraction of the time."""
        centres = (np.asarray(points, float) - self.shift) @ self.turn  # the inverse rotation
        low = ((centres.min(0) - reach - 12 - self.corner) / self.step).astype(int).clip(0)
        high = ((centres.max(0) + reach + 12 - self.corner) / self.step + 2).astype(int).clip(0)
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        part = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray) and value.shape == self.image.shape:
                setattr(part, name, value[box])
        return part

    def vary(self, mean: float, fraction: float = 0.07) -> float:
        return mean * (1 + self.rng.uniform(-fraction, fraction))

    def ellipsoid(self, centre: Point, radii: Point, turn: Array | None = None) -> Array:
        """Depth in an ellipsoid, exact at the surface and to first order near it."""
        x, y, z = self.x - centre[0], self.y - centre[1], self.z - centre[2]
        if turn is not None:
            x, y, z = (row[0] * x + row[1] * y + row[2] * z for row in turn)
        x, y, z = x / radii[0], y / radii[1], z / radii[2]
        norm = np.sqrt(x * x + y * y + z * z)
        gradient = np.sqrt((x / radii[0]) ** 2 + (y / radii[1]) ** 2 + (z / radii[2]) ** 2)
        return norm * (1 - norm) / (gradient + 1e-6)

    def tube(self, start: Point, end: Point, radius: float) -> Array:
        """Depth in a capsule from start to end."""
        a, b = np.asarray(start, float), np.asarray(end, float)
        d = (b - a).astype(np.float32)
        x, y, z = self.x - a[0], self.y - a[1], self.z - a[2]
        t = np.clip((x * d[0] + y * d[1] + z * d[2]) / max(float(d @ d), 1e-6), 0, 1)
        return radius - np.sqrt((x - t * d[0]) ** 2 + (y - t * d[1]) ** 2 + (z - t * d[2]) ** 2)

    def draw(self) -> tuple[Array, NDArray[np.uint8]]:
        """Hounsfield units without noise, and labels of one connected component each."""
        self.trunk()
        self.chest()
        self.bowel()
        self.liver()
        self.spleen_and_stomach()
        self.kidneys()
        self.spine()
        self.vessels()
        for value in LABELS.values():
            parts, count = ndimage.label(self.label == value)
            if count > 1:
                largest = np.argmax(np.bincount(parts.ravel())[1:]) + 1
                self.label[(parts > 0) & (parts != largest)] = 0
        return self.image, self.label

    def trunk(self) -> None:
        rng = self.rng
        if rng.uniform() < 0.6:
            x, y = self.flat[0], self.flat[1] + 99
            self.paint(2.5 - np.abs(y - (x / 46) ** 2) - np.maximum(np.abs(x) - 160, 0), 40)
        waist = 1 - rng.uniform(0.01, 0.06) * np.exp(-(((self.z + 30) / 45) ** 2))
        x, y = self.x / (165 * waist), (self.y - 32) / (self.vary(112, 0.04) * waist)
        norm = (np.abs(x) ** 2.3 + np.abs(y) ** 2.3 + 1e-6) ** (1 / 2.3)
        self.body = (1 - norm) * 125
        fat = rng.uniform(9, 16) + 3 * np.abs(x) ** 2 - 4 * y * (y < 0) + 2 * self.texture
        self.wall = self.body - fat  # depth below the outer surface of the muscles
        self.inner = self.wall - rng.uniform(10, 14) - 5 * (np.abs(x) > 0.6)
        self.paint(self.body, 25)
        self.paint(self.body - 2.5, -105 + 6 * self.texture)
        self.paint(self.wall, 58 + 8 * self.texture)
        self.paint(self.inner, -98 + 10 * self.texture)
        ribs = 5 - np.hypot(self.wall - 7, 0.6 * ((self.z + 0.9 * self.y + 0.1 * np.abs(self.x) + 14) % 32 - 16))
        self.paint(
            np.minimum(ribs, np.minimum(self.z + 20 + 0.2 * np.abs(self.x) - 0.5 * self.y, 158 - np.abs(self.y))), 320
        )
        for side in (1, -1):
            self.paint(self.ellipsoid((36 * side, -46, 0), (30, 21, 900)), 55 + 14 * self.texture)
            self.paint(self.ellipsoid((38 * side, -4, -95), (20, 21, 90)), 60 + 8 * self.texture)

    def chest(self) -> None:
        """Lung bases over the two domes of the diaphragm, and the heart."""
        rng = self.rng
        right = rng.uniform(92, 108) - ((self.x - 70) / 68) ** 2 * 30 - ((self.y - 45) / 85) ** 2 * 45
        left = rng.uniform(84, 98) - ((self.x + 75) / 62) ** 2 * 30 - ((self.y - 35) / 85) ** 2 * 45
        self.below = (np.maximum(right, left) - self.z) * 0.75  # depth below the diaphragm
        self.paint(np.minimum(self.inner, -self.below), -860 + 25 * self.texture)
        for _ in range(26):
            start = np.array([rng.choice([-1, 1]) * rng.uniform(35, 60), rng.uniform(0, 70), 125])
            end = start + [np.sign(start[0]) * rng.uniform(20, 60), rng.uniform(-50, 50), rng.uniform(-60, 20)]
            part = self.near(start, end, reach=4)
            vessel = np.minimum(part.tube(start, end, rng.uniform(1.5, 3)), np.minimum(part.inner - 4, -part.below - 5))
            part.paint(vessel, 20)
        mediastinum = self.ellipsoid((0, 0, 140), (38, 55, 80))
        self.paint(np.minimum(np.minimum(mediastinum, -self.below), self.inner), 30)
        heart = self.ellipsoid((-25, 70, 138), (62, 50, 42), _rotation(0, 15, 30))
        self.paint(np.minimum(heart, self.inner - 2), 55)
        self.paint(np.minimum(heart - 10, self.inner - 10), self.vary(140))
        self.paint(3 - np.abs(self.below) - np.maximum(-self.inner, 0), 50)

    def bowel(self) -> None:
        """Mesentery, small bowel, and colon on both flanks and across."""
        rng = self.rng
        for _ in range(40):
            start = rng.uniform((-80, 30, -130), (80, 90, 0))
            end = start + rng.uniform(-40, 40, 3)
            part = self.near(start, end, reach=3)
            part.paint(np.minimum(part.tube(start, end, rng.uniform(1.2, 2.2)), part.inner), 100)
        for _ in range(16):
            path = [rng.uniform((-80, 35, -130), (80, 98, -25))]
            for _ in range(4):
                path.append(np.clip(path[-1] + rng.uniform(-38, 38, 3), (-85, 30, -140), (85, 100, -22)))
            self.gut(path, rng.uniform(10, 14), 0.0, 6)
        transverse = [(x, 95 - (x / 40) ** 2 * 5, -8 + rng.uniform(-10, 10)) for x in (95, 50, 0, -50, -95)]
        self.gut(transverse, rng.uniform(15, 19), 0.5, 30)
        for side, top in ((1, -18), (-1, 18)):
            descent = [(side * self.vary(103, 0.04), 25 + rng.uniform(-10, 14), z) for z in (-140, -100, -60, top)]
            self.gut(descent, rng.uniform(18, 23), 0.35, 45)

    def gut(self, path: Sequence[Point], radius: float, gas: float, stool: float) -> None:
        """A piece of bowel along a path; gas lies in front, because the patient lies supine."""
        part = self.near(*path, reach=radius + 4)
        depth = np.full_like(part.x, -99)
        for start, end in zip(path[:-1], path[1:], strict=True):
            depth = np.maximum(depth, part.tube(start, end, radius))
        folds = 1.5 * np.sin((part.x + part.z + 0.5 * part.y) / 6) + part.texture
        depth = np.minimum(depth + folds, part.inner - 2)
        part.paint(depth, 80)
        part.paint(depth - 3, 25 + self.rng.uniform(-10, 25) + stool * part.texture)
        if self.rng.uniform() < 2 * gas:
            front = float(np.mean([p[1] for p in path])) + self.rng.uniform(-4, 8)
            part.paint(np.minimum(depth - 3, part.y - front + 4 * part.texture), -930)

    def liver(self) -> None:
        rng = self.rng
        lobe = self.ellipsoid((82, 33, 38), (74, 84, self.vary(82, 0.1)), _rotation(y=rng.uniform(-14, -4)))
        left = self.ellipsoid((8, 76, 62), (self.vary(72, 0.15), 36, 33), _rotation(y=12, z=-8))
        depth = _union(lobe, left, 25)
        for cut in (
            self.ellipsoid((62, -14, -30), (40, 40, 66)),  # bed of the right kidney
            self.ellipsoid((0, 2, 0), (40, 42, 900)),  # spine and great vessels
            self.ellipsoid((20, 40, 10), (42, 34, 36)),  # porta hepatis
        ):
            depth = np.minimum(depth, -cut - 1)
        depth = np.minimum(depth, np.minimum(self.below - 2, self.inner - 2)) + 1.5 * self.texture
        level = self.vary(108)
        self.paint(depth, level + 5 * self.texture, LABELS["liver"])
        root = np.array([26, 42, 42])
        for _ in range(9):
            end = root + [rng.uniform(10, 100), rng.uniform(-60, 45), rng.uniform(-50, 55)]
            inside = np.minimum(self.tube(root, end, rng.uniform(2, 4.5)), depth - 4)
            self.paint(inside, level + 45, LABELS["liver"])
        self.paint(self.tube(root, (0, 36, 22), 6.5), level + 40)
        self.paint(self.ellipsoid((50, 72, 0), (14, 26, 18), _rotation(x=25)), 12)

    def spleen_and_stomach(self) -> None:
        rng = self.rng
        stomach = self.ellipsoid((-58, 66, 58), (44, 36, 46), _rotation(y=-25, z=20))
        stomach = _union(stomach, self.tube((-30, 88, 15), (20, 82, 8), 17), 20)
        stomach = np.minimum(np.minimum(stomach, self.below - 4), self.inner - 4)
        stomach = np.minimum(stomach, -self.ellipsoid((8, 76, 62), (62, 30, 30)) - 4)
        self.paint(stomach, 80)
        self.paint(stomach - 4, 22 + 12 * self.texture)
        self.paint(np.minimum(stomach - 4, self.y - rng.uniform(74, 90)), -940)
        pancreas = _union(self.tube((28, 44, 0), (0, 54, 14), 12), self.tube((0, 54, 14), (-68, 16, 38), 10), 10)
        self.paint(pancreas + 2 * self.texture, self.vary(88) + 12 * self.texture)
        size = self.vary(1.0, 0.1)
        turn = _rotation(x=-20, z=rng.uniform(18, 30))
        spleen = self.ellipsoid((-104, 4, 46), (38 * size, 54 * size, 56 * size), turn)
        spleen = np.minimum(spleen, -self.ellipsoid((-58, 12, 30), (34, 46, 58)) - 1)
        spleen = np.minimum(np.minimum(spleen, self.below - 2), self.inner - 2)
        self.paint(spleen + self.texture, self.vary(122) + 5 * self.texture, LABELS["spleen"])

    def kidneys(self) -> None:
        for side, name, height in ((-1, "left kidney", 2.0), (1, "right kidney", -14.0)):
            centre = np.array([64 * side, -6, height]) + self.rng.uniform(-5, 5, 3)
            radii = np.array([26.0, 27.0, 54.0]) * self.rng.uniform(0.92, 1.1, 3)
            turn = _rotation(x=-9, y=11 * side, z=-30 * side)  # upper pole inwards, hilum forwards
            bean = self.ellipsoid(centre, radii, turn)
            self.paint(bean + 9, -104 + 6 * self.texture)  # perirenal fat
            hilum = self.ellipsoid(centre + [-21 * side, 13, 0], (17, 14, 23), turn)
            depth = np.minimum(bean, -hilum)
            cortex = self.vary(185)
            self.paint(depth, cortex, LABELS[name])
            self.paint(np.minimum(bean - 9, depth - 3) + 2 * self.texture, cortex - 45, LABELS[name])
            self.paint(np.minimum(hilum - 5, bean - 3), 30)
            self.paint(self.tube(centre + [-20 * side, 13, 0], (18 * side, 26, height - 2), 4), 140)

    def spine(self) -> None:
        value = LABELS["spine"]
        lordosis = 8 * np.sin((self.z + 20) / 70)
        x, y = self.x, self.y + lordosis
        level = (self.z + 14) % 34 - 17  # 0 in the middle of a vertebra
        middle = np.abs(level) / 17
        # The column spans the volume: its ends are the field of view's.
        radius = np.hypot(x / 25, y / 18)
        column = (1 - radius) * 20 + 2.5 * middle**2 - 1.5
        self.paint(column, 420, value)
        self.paint(column - 2.5, self.vary(190) + 35 * self.texture, value)
        self.paint(np.minimum(column - 1, np.abs(level) - 13), 85, value)
        canal = np.hypot(x / 11, (y + 26) / 9)
        arch = np.minimum((1.85 - canal) * 9, 10 - np.abs(level))
        arch = np.maximum(arch, np.minimum(4 - np.abs(x), np.minimum(np.minimum(-y - 30, y + 68), 9 - np.abs(level))))
        process = np.minimum(5.5 - np.hypot(y + 20, level), np.minimum(np.abs(x) - 12, 42 - np.abs(x)))
        self.paint(np.maximum(arch, process), 330, value)
        self.paint((1 - canal) * 9, 35)

    def vessels(self) -> None:
        """Aorta left of the midline in front of the spine, vena cava right of it."""
        rng = self.rng
        path = [(-13, 34, -72), (-12, 32, -30), (-10, 31, 10), (-11, 28, 55), (-14, 18, 100), (-18, 8, 165)]
        points = np.array(path) + np.c_[rng.uniform(-2, 2, (6, 2)), np.zeros(6)]
        radius = rng.uniform(10, 12)
        aorta = np.full_like(self.x, -999)
        for index in range(5):
            aorta = np.maximum(aorta, self.tube(points[index], points[index + 1], radius + 0.4 * index))
        cava = np.maximum(
            self.ellipsoid((22, 25, -40), (14, 10, 80)), self.tube((21, 26, -10), (24, 34, 115), self.vary(11))
        )
        level = self.vary(165, 0.1)
        self.paint(np.minimum(cava, -aorta - 1.5), level - 30)
        for side in (1, -1):
            self.paint(self.tube(points[0], (38 * side, 18, -140), 7.5), level)
        self.paint(self.tube((-11, 38, 18), (-12, 62, -60), 4), level)  # superior mesenteric artery
        self.paint(aorta, level, LABELS["aorta"])
