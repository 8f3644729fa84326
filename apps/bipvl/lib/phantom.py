"""CT-like abdominal phantoms: studies for the quickstart and for tests, without any download.

A case is drawn from its seed alone: a body with skin, fat, muscle, ribs and lung bases; six labelled organs with the
intensities of a portal-venous CT; unlabelled neighbours (stomach, bowel, pancreas, vena cava, heart) that keep
intensity alone from telling the organs apart. Size, position, rotation, shape, contrast, spacing, matrix and the
order of the stored axes vary. It teaches a network where organs lie; it is no model of a patient.

Shapes are depth functions: millimetres below the surface, negative outside. Coordinates are RAS+ millimetres: x grows
to the patient's right, y to the front, z to the head; the origin is the first lumbar vertebra.

    python -m lib.phantom FOLDER        (with apps/bipvl on PYTHONPATH)
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import nibabel as nib
import numpy as np
import typer
from nibabel import orientations
from numpy.typing import NDArray
from rich.progress import track
from scipy import ndimage

LABELS = {"liver": 1, "spleen": 2, "left kidney": 3, "right kidney": 4, "aorta": 5, "spine": 6}
ORIENTATIONS = ("RAS", "LPS", "LAS", "RAI", "PSR", "LPI")

Array = NDArray[np.float32]
Point = Sequence[float]


@dataclass(frozen=True)
class Case:
    """A study and its labels.

    Attributes:
        image: int16 Hounsfield units, three axes in the stored order.
        label: uint8 of the same shape, the values of `LABELS`, 0 elsewhere.
        affine: (4, 4), voxel indices to RAS+ millimetres.
    """

    image: NDArray[np.int16]
    label: NDArray[np.uint8]
    affine: NDArray[np.float64]


def generate_case(
    seed: int,
    size_mm: tuple[float, float, float] | None = None,
    spacing: tuple[float, float, float] | None = None,
    orientation: str | None = None,
) -> Case:
    """Generate one case; equal arguments give equal arrays.

    Args:
        seed: what is not given is drawn from it, and so is the anatomy.
        size_mm: width, depth and height of the field of view. The body fills it whatever its size.
        spacing: millimetres between voxels, left-right, posterior-anterior, inferior-superior.
        orientation: axis codes of the stored array, e.g. "LPS".

    Raises:
        ValueError: a size or spacing that is not positive, or axis codes that nibabel does not know.
    """
    rng = np.random.default_rng(seed)
    drawn_size = np.array([370.0, 280.0, 250.0]) * rng.uniform(0.87, 1.05) * rng.uniform(0.95, 1.05, 3)
    in_plane = rng.uniform(2.3, 3.1)
    drawn_spacing = np.array([in_plane, in_plane, rng.uniform(2.5, 5.0)])
    drawn_orientation = str(rng.choice(ORIENTATIONS))

    size = np.asarray(size_mm or drawn_size, dtype=float)
    step = np.asarray(spacing or drawn_spacing, dtype=float)
    if size.shape != (3,) or step.shape != (3,) or not (size > 0).all() or not (step > 0).all():
        raise ValueError(f"size_mm {size_mm} and spacing {spacing}: three positive numbers each are needed")
    target = orientations.axcodes2ornt(orientation or drawn_orientation)

    shape = np.maximum(np.ceil(size / step).astype(int), 8)
    centre = np.array([0.0, 28.0, 12.0]) * size / (370, 280, 250)
    corner = centre - step * (shape - 1) / 2
    hounsfield, label = _Abdomen(rng, shape, step, corner, size).draw()
    image = np.clip(np.rint(_scan(rng, hounsfield)), -1024, 3071).astype(np.int16)

    affine = np.diag([*step, 1.0])
    affine[:3, 3] = corner + rng.uniform(-150, 150, 3)  # scanners put the origin anywhere
    change = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), target)
    affine = affine @ orientations.inv_ornt_aff(change, tuple(shape))
    return Case(
        np.ascontiguousarray(orientations.apply_orientation(image, change)),
        np.ascontiguousarray(orientations.apply_orientation(label, change)),
        affine,
    )


def write_studies(folder: str | Path, cases: int = 8, labelled: int = 4, seed: int = 0) -> list[Path]:
    """Write cases as MONAI Label's local datastore lays them out; existing images and labels are left alone.

    Images go to `<folder>/phantom_000.nii.gz` and so on, labels of the first `labelled` cases to
    `<folder>/labels/final/` under the same names. Each file appears complete or not at all.

    Returns:
        The paths of all images, in order.

    Raises:
        ValueError: numbers that do not fit together.
    """
    if not 0 <= labelled <= cases or cases > 1000:
        raise ValueError(f"cases {cases}, labelled {labelled}: 0 <= labelled <= cases <= 1000 is needed")
    folder = Path(folder)
    images = [folder / f"phantom_{index:03d}.nii.gz" for index in range(cases)]
    # The image is written last: where it exists, the case is complete, and a label deleted since stays deleted.
    missing = [(index, path) for index, path in enumerate(images) if not path.exists()]
    for index, path in track(missing, description="Generating studies", disable=not missing):
        case = generate_case(1000 * seed + index)
        label = folder / "labels" / "final" / path.name
        if index < labelled and not label.exists():
            _write(label, case.label, case.affine)
        _write(path, case.image, case.affine)
    return images


def _write(path: Path, array: NDArray, affine: NDArray[np.float64]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".phantom-") as scratch:
        temporary = Path(scratch) / path.name
        nib.save(image, temporary)
        os.replace(temporary, path)


def _scan(rng: np.random.Generator, hounsfield: Array) -> Array:
    """The scanner: blur, correlated noise, slow shading."""
    image = ndimage.gaussian_filter(hounsfield, 0.4)
    noise = ndimage.gaussian_filter(rng.normal(size=image.shape).astype(np.float32), (0.6, 0.6, 0.3))
    image += noise * (rng.uniform(9, 15) / noise.std())
    return image + _smooth_field(rng, image.shape, 4) * 3


def _smooth_field(rng: np.random.Generator, shape: Sequence[int], knots: int) -> Array:
    """A random field of about unit amplitude that varies over 1/knots of the volume."""
    coarse = rng.uniform(-1.5, 1.5, (knots + 2,) * 3).astype(np.float32)
    grid = np.meshgrid(*(np.linspace(0.5, knots + 0.5, n, dtype=np.float32) for n in shape), indexing="ij", sparse=False)
    return ndimage.map_coordinates(coarse, grid, order=3, mode="nearest").astype(np.float32)


def _rotation(x: float = 0, y: float = 0, z: float = 0) -> Array:
    """Rotation by degrees about the three axes, z first."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(np.radians([x, y, z])), np.sin(np.radians([x, y, z]))
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return (about_x @ about_y @ about_z).astype(np.float32)


def _union(a: Array, b: Array, blend: float = 12.0) -> Array:
    """Smooth union of two depths: organs have no creases where their parts meet."""
    weight = np.clip(0.5 + 0.5 * (a - b) / blend, 0, 1)
    return weight * a + (1 - weight) * b + blend * weight * (1 - weight)


class _Abdomen:
    """One body on one grid. Organs are painted in order, each over what lies there already."""

    def __init__(
        self, rng: np.random.Generator, shape: NDArray, step: NDArray, corner: NDArray, size: NDArray
    ) -> None:
        self.rng = rng
        axes = (corner[i] + step[i] * np.arange(shape[i]) for i in range(3))
        grid = np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)
        # The anatomy is drawn at one size; the grid is bent, turned and scaled into it instead.
        bend = np.stack([_smooth_field(rng, shape, 4) for _ in range(3)]) * 3.5
        turn = _rotation(rng.uniform(-3, 3), rng.uniform(-3, 3), rng.uniform(-8, 8))
        scale = (np.array([370, 280, 250]) / size).astype(np.float32) * np.float32(rng.uniform(1.0, 1.06))
        shift = rng.uniform(-4, 4, 3).astype(np.float32)
        self.x, self.y, self.z = np.tensordot(turn, grid * scale[:, None, None, None], 1) + bend + shift[:, None, None, None]
        self.flat = grid * scale[:, None, None, None]  # the table is neither bent nor turned
        self.edge = float(np.mean(step * scale)) / 2  # half the width of a partial-volume ramp
        self.image = np.full(tuple(shape), -1000, dtype=np.float32)
        self.label = np.zeros(tuple(shape), dtype=np.uint8)
        self.texture = _smooth_field(rng, shape, 24)

    def paint(self, depth: Array, hounsfield: float | Array, value: int = 0) -> None:
        """Fill a shape; voxels that its surface cuts are mixed."""
        amount = np.clip(0.5 + depth / (2 * self.edge), 0, 1)
        self.image += amount * (hounsfield - self.image)
        self.label[amount > 0.5] = value

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
        t = np.clip((x * d[0] + y * d[1] + z * d[2]) / float(d @ d), 0, 1)
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
            self.paint(3 - np.abs(y - (x / 46) ** 2 * 0.6) - np.maximum(np.abs(x) - 150, 0), -300)
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
        ribs = 5.5 - np.hypot(self.wall - 7, 0.55 * ((self.z - 0.35 * self.y + 0.1 * np.abs(self.x) + 14) % 31 - 15.5))
        self.paint(np.minimum(ribs, np.minimum(self.z + 20 + 0.2 * np.abs(self.x) - 0.5 * self.y, 158 - np.abs(self.y))), 320)
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
            vessel = np.minimum(self.tube(start, end, rng.uniform(1.5, 3)), np.minimum(self.inner - 4, -self.below - 5))
            self.paint(vessel, 20)
        mediastinum = self.ellipsoid((0, 0, 140), (38, 55, 80))
        self.paint(np.minimum(np.minimum(mediastinum, -self.below), self.inner), 30)
        heart = self.ellipsoid((-25, 70, 138), (62, 50, 42), _rotation(0, 15, 30))
        self.paint(np.minimum(heart, self.inner - 2), 55)
        self.paint(np.minimum(heart - 10, self.inner - 10), self.vary(140))
        self.paint(3 - np.abs(self.below) - np.maximum(-self.inner, 0), 50)

    def bowel(self) -> None:
        """Colon on both flanks and across, small-bowel loops; gas lies in front, because the patient lies supine."""
        rng = self.rng
        for side in (1, -1):
            x = side * self.vary(104)
            for z in range(-125, -10 if side > 0 else 15, 24):
                centre = (x + rng.uniform(-4, 4), 22 + rng.uniform(-8, 8), z)
                self.loop(centre, rng.uniform(17, 23), np.inf, rng.uniform() < 0.6)
        for x in range(-80, 80, 26):
            self.loop((x, 92 - (x / 50) ** 2 * 6 + rng.uniform(-4, 4), -15 + rng.uniform(-9, 9)), 17, 1.0, rng.uniform() < 0.5)
        for _ in range(34):
            centre = (rng.uniform(-78, 78), rng.uniform(42, 95), rng.uniform(-125, -25))
            self.loop(centre, rng.uniform(10, 15), 1.0, rng.uniform() < 0.15)

    def loop(self, centre: Point, radius: float, stool: float, gas: bool) -> None:
        radii = radius * self.rng.uniform([0.9, 0.9, 0.9], [1.3, 1.1, 1.5])
        depth = np.minimum(self.ellipsoid(centre, radii, _rotation(z=self.rng.uniform(-60, 60))), self.inner - 2)
        self.paint(depth, 75)
        content = 25 + self.rng.uniform(-10, 25) + (45 * self.texture if stool > 1 else 6 * self.texture)
        self.paint(depth - 3, content)
        if gas:
            self.paint(np.minimum(depth - 3, self.y - centre[1] + self.rng.uniform(-2, 4)), -930)

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
            self.paint(np.minimum(self.tube(root, end, rng.uniform(2, 4.5)), depth - 4), level + 45, LABELS["liver"])
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
        spleen = self.ellipsoid((-108, 2, 50), (32 * size, 50 * size, 52 * size), _rotation(x=-20, z=rng.uniform(18, 30)))
        spleen = np.minimum(spleen, -self.ellipsoid((-62, 14, 36), (36, 46, 55)) - 1)
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
            depth = _union(bean, hilum * 0 - 99, 1)
            depth = np.minimum(depth, -hilum)
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


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of studies; made where missing.")],
    cases: Annotated[int, typer.Option(help="Number of images.")] = 8,
    labelled: Annotated[int, typer.Option(help="How many of them get a label.")] = 4,
    seed: Annotated[int, typer.Option(help="Other seeds give other bodies.")] = 0,
) -> None:
    """Write CT-like abdominal phantoms as studies for the server. Existing files are left alone."""
    write_studies(folder, cases, labelled, seed)


if __name__ == "__main__":
    typer.run(main)
