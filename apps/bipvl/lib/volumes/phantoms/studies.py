"""CT-like abdominal phantoms: studies for the quickstart and for tests, without any download.

A case is drawn from its seed alone: a body with skin, fat, muscle, ribs and lung bases; six labelled organs with the
intensities of a portal-venous CT; unlabelled neighbours (stomach, bowel, pancreas, vena cava, heart) that keep
intensity alone from telling the organs apart. Size, position, rotation, shape, contrast, spacing, matrix and the
order of the stored axes vary. It teaches a network where organs lie; it is not a model of a patient.

    python -m lib.volumes.phantoms.studies FOLDER        (with apps/bipvl on PYTHONPATH)
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import typer
from nibabel import orientations
from numpy.typing import NDArray
from rich.progress import track
from scipy import ndimage

from lib.files import FINAL
from lib.volumes.phantoms.anatomy import SIZE_MM, Abdomen, Array, smooth_field

ORIENTATIONS = ("RAS", "LPS", "LAS", "RAI", "PSR", "LPI")


@dataclass(frozen=True)
class Case:
    """A study and its labels.

    Attributes:
        image: int16 Hounsfield units, three axes in the stored order.
        label: uint8 of the same shape, the values of `lib.volumes.phantoms.anatomy.LABELS`, 0 elsewhere.
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
    drawn_size = np.array(SIZE_MM) * rng.uniform(0.87, 1.05) * rng.uniform(0.95, 1.05, 3)
    in_plane = rng.uniform(2.3, 3.1)
    drawn_spacing = np.array([in_plane, in_plane, rng.uniform(2.5, 5.0)])
    drawn_orientation = str(rng.choice(ORIENTATIONS))

    size = np.asarray(size_mm or drawn_size, dtype=float)
    step = np.asarray(spacing or drawn_spacing, dtype=float)
    if size.shape != (3,) or step.shape != (3,) or not (size > 0).all() or not (step > 0).all():
        raise ValueError(f"size_mm {size_mm} and spacing {spacing}: three positive numbers each are needed")
    target = orientations.axcodes2ornt(orientation or drawn_orientation)

    shape = tuple(int(n) for n in np.maximum(np.ceil(size / step), 8))
    centre = np.array([0.0, 28.0, 12.0]) * size / SIZE_MM
    corner = centre - step * (np.array(shape) - 1) / 2
    hounsfield, label = Abdomen(rng, shape, step, corner, size).draw()
    image = np.clip(np.rint(_scan(rng, hounsfield)), -1024, 3071).astype(np.int16)

    affine = np.diag([*step, 1.0])
    affine[:3, 3] = corner + rng.uniform(-150, 150, 3)  # scanners put the origin anywhere
    change = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), target)
    affine = affine @ orientations.inv_ornt_aff(change, shape)
    return Case(
        np.ascontiguousarray(orientations.apply_orientation(image, change)),
        np.ascontiguousarray(orientations.apply_orientation(label, change)),
        affine,
    )


def write_studies(folder: Path, cases: int = 8, labelled: int = 4, seed: int = 0, name: str = "phantom") -> list[Path]:
    """Write cases as MONAI Label's local datastore lays them out; existing images and labels are left alone.

    Images go to `<folder>/<name>_000.nii.gz` and so on, labels of the first `labelled` cases to
    `<folder>/labels/final/` under the same names. Each file appears complete or not at all. The cases of one seed are
    no other seed's.

    Returns:
        The paths of all images, in order.

    Raises:
        ValueError: numbers that do not fit together.
    """
    if not 0 <= labelled <= cases or cases > 1000:
        raise ValueError(f"cases {cases}, labelled {labelled}: 0 <= labelled <= cases <= 1000 is needed")
    images = [folder / f"{name}_{index:03d}.nii.gz" for index in range(cases)]
    # The image is written last: if it exists, the case is complete, and a label deleted since stays deleted.
    missing = [(index, path) for index, path in enumerate(images) if not path.exists()]
    for index, path in track(missing, description="Generating studies", disable=not missing):
        case = generate_case(1000 * seed + index)
        label = folder / "labels" / FINAL / path.name
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
    return image + smooth_field(rng, image.shape, 4) * 3


if __name__ == "__main__":
    typer.run(write_studies)
