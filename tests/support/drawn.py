"""Images and labels of which tests can tell whose they are."""

from __future__ import annotations

from pathlib import Path

import itk
import numpy as np

from support.helpers import read_nifti, write_nifti

SHAPE = (6, 7, 8)


def picture(path: Path, seed: int = 0) -> Path:
    return write_nifti(path, np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32))


def drawing(path: Path, value: int, shape: tuple[int, ...] = SHAPE) -> Path:
    """A label whose voxels all hold one value, which tells whose it is."""
    if path.name.endswith(".nrrd"):
        itk.imwrite(itk.image_from_array(np.full(shape[::-1], value, np.uint8)), str(path))
        # ITK writes LPS; RAS identity of the images is -1, -1, 1 there.
        text = path.read_bytes()
        path.write_bytes(text.replace(b"(1,0,0) (0,1,0) (0,0,1)", b"(-1,0,0) (0,-1,0) (0,0,1)"))
        return path
    return write_nifti(path, np.full(shape, value, np.uint8))


def value_of(path: Path | str) -> int:
    """Whose label it is, after reading all of it."""
    voxels = np.unique(np.asarray(read_nifti(path).dataobj))
    assert len(voxels) == 1
    return int(voxels[0])


def history(folder: Path, case: str = "a", tag: str = "final") -> list[Path]:
    return sorted(p for p in (folder / "labels" / "history" / tag / case).glob("*") if p.suffix != ".json")


def rejected(folder: Path, case: str = "a") -> list[Path]:
    return sorted(p for p in (folder / "labels" / "rejected" / case).glob("*") if p.suffix != ".txt")


def everything(folder: Path) -> dict[str, bytes]:
    """All files but the lock, with what they hold."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def two_cases(folder: Path) -> Path:
    """A studies folder with images a and b."""
    folder.mkdir()
    picture(folder / "a.nii.gz")
    picture(folder / "b.nii.gz", 1)
    return folder


def ten_drawings(folder: Path) -> list[Path]:
    """Drawings 0 to 9."""
    folder.mkdir()
    return [drawing(folder / f"{i}.nii.gz", i) for i in range(10)]
