"""Random label maps go through a real archive and come back: on any grid, in any file, under any numbering, not one
voxel differs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import nrrd
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib.stores.dicom.store import DicomStore
from support.dicom.archive import Archive, needs_orthanc
from support.dicom.dicoms import make_series
from support.dicom.stores import label_of, store_on
from support.helpers import concepts, label, read_nifti, tiny_task

pytestmark = needs_orthanc

VALUES = {"liver": 1, "spleen": 2, "left kidney": 7, "right kidney": 40, "aorta": 300}  # not contiguous
TASK = tiny_task(labels={n: label(v) for n, v in VALUES.items()}, concepts=concepts(list(VALUES), "CT"))
GRIDS: list[dict[str, Any]] = [
    {"shape": (9, 7, 5)},
    {"shape": (8, 8, 2), "descending": True},
    {"shape": (5, 11, 4), "orientation": (-1, 0, 0, 0, -1, 0)},
    {"shape": (7, 6, 5), "orientation": (1, 0, 0, 0, 0, -1)},
    {"shape": (6, 9, 4), "orientation": (0, 1, 0, 0, 0, -1)},
    {"shape": (9, 5, 6), "orientation": (0.8, 0.6, 0.0, -0.48, 0.64, 0.6)},
    {"shape": (13, 3, 3), "orientation": (0.6, -0.8, 0.0, 0.8, 0.6, 0.0), "spacing": (0.7, 0.7, 10.0)},
]
TURNS = [*itertools.product((1, -1), repeat=3)]  # LPS, RAS, LAS and all others
PERMUTATIONS = [*itertools.permutations(range(3))]


@dataclass
class Place:
    """Two servers on one archive: one saves, the other has a folder of its own and reads."""

    saving: DicomStore
    reading: DicomStore
    series: list[str]
    folder: Path
    count: int = 0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("property")
    with Archive(folder / "orthanc") as archive:
        series = [make_series(folder / str(i), seed=i, patient=f"P{i}", **grid) for i, grid in enumerate(GRIDS)]
        archive.store(*(folder / str(i) for i in range(len(GRIDS))))
        saving, reading = (store_on(archive, folder / name, TASK) for name in ("saving", "reading"))
        yield Place(saving, reading, series, folder)


def mask_of(shape: tuple[int, ...], shown: list[int], seed: int, slices: str) -> np.ndarray:
    """A label map that shows exactly these values, as patches, single voxels, or in one slice only."""
    random = np.random.default_rng(seed)
    mask = np.zeros(shape, np.uint16)
    depth = random.integers(shape[2])
    place = (slice(None), slice(None), [depth] if slices == "one" else slice(None))
    part = mask[place]
    if slices == "sparse":
        part[random.random(part.shape) < 0.05] = random.choice(shown)
    else:
        part[...] = random.choice([0, *shown], part.shape)
    for value, at in zip(shown, random.choice(part.size, len(shown), replace=False), strict=True):
        part.flat[at] = value
    mask[place] = part
    return mask


def write(mask: np.ndarray, affine: np.ndarray, target: Path, turn: tuple[int, ...], order: tuple[int, ...]) -> None:
    """A file with its axes in another order and direction than the image's, on the same grid."""
    to = np.column_stack([order, np.array(turn)])
    turned = nib.Nifti1Image(mask, affine).as_reoriented(to)
    if target.name.endswith(".nrrd"):
        lps = np.diag([-1, -1, 1, 1]) @ turned.affine
        header = {"space": "left-posterior-superior", "space directions": lps[:3, :3].T, "space origin": lps[:3, 3]}
        nrrd.write(str(target), np.asarray(turned.dataobj), header)
    else:
        nib.save(turned, target)


def check(place: Place, data: st.DataObject) -> None:
    draw = data.draw
    number = draw(st.integers(0, len(GRIDS) - 1), "grid")
    series = place.series[number]
    shown = draw(st.lists(st.sampled_from(list(VALUES.values())), min_size=1, unique=True), "values")
    kind = draw(st.sampled_from(["all", "one", "sparse"]), "slices")
    image = read_nifti(place.saving.get_image_uri(series))
    mask = mask_of(image.shape, shown, draw(st.integers(0, 2**32 - 1), "seed"), kind)

    names, sent = {v: n for n, v in VALUES.items()}, mask
    info: dict[str, Any] = {}
    if draw(st.booleans(), "numbered by the client"):
        numbers = draw(st.permutations(range(1, 6)), "numbers")
        table = np.zeros(301, np.uint16)
        table[list(VALUES.values())] = numbers
        sent, info = table[mask], {"label_info": [{"name": n, "idx": i} for n, i in zip(VALUES, numbers, strict=True)]}
    place.count += 1
    suffix = draw(st.sampled_from([".nii.gz", ".nii", ".nrrd", ".bin"]), "file")
    target = place.folder / f"{place.count}{suffix}"
    if suffix == ".bin":
        sent = sent if sent.max() < 256 else np.where(sent == 300, 5, sent)
        values = {**names, 5: names[300]} if not info else {e["idx"]: e["name"] for e in info["label_info"]}
        info = {"label_info": [{"name": n, "idx": v} for v, n in values.items() if v < 256]}
        target.write_bytes(sent.astype(np.uint8).tobytes(order="F"))
    else:
        write(sent, image.affine, target, draw(st.sampled_from(TURNS)), draw(st.sampled_from(PERMUTATIONS)))
    place.saving.save_label(series, str(target), "final", info)
    target.unlink()
    place.reading.refresh()
    for store in (place.saving, place.reading):
        found = label_of(store, series)
        assert found.shape == mask.shape
        assert int((found != mask).sum()) == 0
    assert series in place.reading.get_labeled_images() and series not in place.reading.get_unlabeled_images()


COMMON = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=20, **COMMON)  # type: ignore[arg-type]
@given(st.data())
def test_some_label_maps_come_back(place: Place, data: st.DataObject) -> None:
    check(place, data)


@pytest.mark.slow
@settings(max_examples=220, **COMMON)  # type: ignore[arg-type]
@given(st.data())
def test_two_hundred_label_maps_come_back(place: Place, data: st.DataObject) -> None:
    check(place, data)


def test_at_least_as_many_cases_as_promised(place: Place, request: pytest.FixtureRequest) -> None:
    """Hypothesis counts invalid and repeated examples too."""
    slow = any(item.name == "test_two_hundred_label_maps_come_back" for item in request.session.items)
    assert place.count >= (200 if slow else 15)
