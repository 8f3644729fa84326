"""Phantoms: the same seed gives the same body, organs lie where they belong in the world, files are kept."""

from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine
from scipy import ndimage

from lib.tasks import load_task
from lib.volumes.phantoms.anatomy import LABELS
from lib.volumes.phantoms.studies import ORIENTATIONS, Case, generate_case, write_studies
from support.helpers import read_nifti

SEEDS = (0, 1, 2)
COARSE = (4.0, 4.0, 5.0)

# Plausible means in a portal-venous CT, bone and disc together for the spine.
HOUNSFIELD = {
    "liver": (80, 140),
    "spleen": (90, 150),
    "left kidney": (110, 210),
    "right kidney": (110, 210),
    "aorta": (110, 200),
    "spine": (120, 320),
}


@pytest.fixture(scope="module", params=SEEDS)
def case(request: pytest.FixtureRequest) -> Case:
    return generate_case(request.param)


def centre(case: Case, name: str) -> np.ndarray:
    return apply_affine(case.affine, np.argwhere(case.label == LABELS[name])).mean(0)


def test_same_seed_same_case() -> None:
    a, b = generate_case(7, spacing=COARSE), generate_case(7, spacing=COARSE)
    assert np.array_equal(a.image, b.image)
    assert np.array_equal(a.label, b.label)
    assert np.array_equal(a.affine, b.affine)


def test_other_seed_other_case() -> None:
    options: dict[str, Any] = {"size_mm": (360.0, 280.0, 250.0), "spacing": COARSE, "orientation": "RAS"}
    a, b = generate_case(7, **options), generate_case(8, **options)
    assert a.image.shape == b.image.shape
    overlap = 2 * ((a.label == 1) & (b.label == 1)).sum() / ((a.label == 1).sum() + (b.label == 1).sum())
    assert 0.3 < overlap < 0.97, "livers are alike but not the same"
    assert not np.array_equal(a.affine, b.affine)


def test_types_and_size(case: Case) -> None:
    assert case.image.dtype == np.int16
    assert case.label.dtype == np.uint8
    assert case.image.shape == case.label.shape
    assert all(32 <= n <= 180 for n in case.image.shape)
    assert case.image.flags.c_contiguous


def test_every_organ_is_one_piece(case: Case) -> None:
    assert set(np.unique(case.label)) == {0, *LABELS.values()}
    for name, value in LABELS.items():
        _, parts = ndimage.label(case.label == value)
        assert parts == 1, name
        assert (case.label == value).sum() >= 300, name


def test_organ_volumes_are_human(case: Case) -> None:
    millilitres = abs(np.linalg.det(case.affine[:3, :3])) / 1000
    limits = {"liver": (400, 1900), "spleen": (50, 400), "left kidney": (60, 300), "right kidney": (60, 300)}
    for name, (low, high) in limits.items():
        assert low < (case.label == LABELS[name]).sum() * millilitres < high, name


def test_organs_have_the_intensity_of_ct(case: Case) -> None:
    for name, (low, high) in HOUNSFIELD.items():
        assert low < case.image[case.label == LABELS[name]].mean() < high, name
    assert case.image.min() >= -1024
    corners = case.image[:: case.image.shape[0] - 1, :: case.image.shape[1] - 1, :: case.image.shape[2] - 1]
    assert corners.mean() < -950, "air outside the body"


def test_intensity_alone_does_not_tell_organs(case: Case) -> None:
    liver = case.image[case.label == LABELS["liver"]]
    unlabelled = case.image[case.label == 0]
    low, high = np.percentile(liver, [10, 90])
    assert ((unlabelled > low) & (unlabelled < high)).sum() > 0.2 * liver.size


def test_organs_lie_right_in_the_world(case: Case) -> None:
    """In RAS+ coordinates x grows to the patient's right, y to the front, z to the head."""
    spine = centre(case, "spine")
    assert centre(case, "liver")[0] > spine[0] > centre(case, "spleen")[0]
    assert centre(case, "right kidney")[0] > spine[0] > centre(case, "left kidney")[0]
    assert centre(case, "aorta")[0] < spine[0], "left of the midline"
    assert centre(case, "aorta")[1] > spine[1] + 15, "in front of the spine"
    assert centre(case, "right kidney")[2] < centre(case, "left kidney")[2] + 5, "the liver pushes it down"
    assert centre(case, "liver")[2] > centre(case, "right kidney")[2]


def test_sides_agree_with_a_real_scan(real_data: Path) -> None:
    """AMOS numbering: 2 right kidney, 3 left kidney, 6 liver."""
    scan = read_nifti(real_data / "abdomen_ct" / "ts-example_label-amos15.nii.gz")
    label = np.asarray(scan.dataobj)
    x = {value: apply_affine(scan.affine, np.argwhere(label == value))[:, 0].mean() for value in (2, 3, 6)}
    phantom = generate_case(0, spacing=COARSE)
    ours = {2: centre(phantom, "right kidney")[0], 3: centre(phantom, "left kidney")[0], 6: centre(phantom, "liver")[0]}
    assert np.sign(x[2] - x[3]) == np.sign(ours[2] - ours[3])
    assert np.sign(x[6] - x[3]) == np.sign(ours[6] - ours[3])


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_stored_axes_do_not_change_the_body(orientation: str) -> None:
    reference = generate_case(3, spacing=COARSE, orientation="RAS")
    case = generate_case(3, spacing=COARSE, orientation=orientation)
    assert "".join(nib.aff2axcodes(case.affine)) == orientation
    canonical = nib.as_closest_canonical(nib.Nifti1Image(case.image, case.affine))
    assert np.array_equal(np.asarray(canonical.dataobj), reference.image)
    assert np.allclose(canonical.affine, reference.affine)


def test_seeds_vary_orientation_and_spacing() -> None:
    with np.errstate(divide="raise", invalid="raise"):
        cases = [generate_case(seed, spacing=(9.0, 9.0, 9.0)) for seed in range(12)]
    assert len({nib.aff2axcodes(c.affine) for c in cases}) >= 3
    assert len({c.image.shape for c in cases}) >= 3
    drawn = [generate_case(seed, size_mm=(90.0, 70.0, 60.0)) for seed in range(4)]
    spacings = np.array([np.sort(nib.affines.voxel_sizes(c.affine)) for c in drawn])
    assert len({tuple(s) for s in spacings.round(3)}) == 4
    assert spacings.min() > 1.5 and spacings.max() <= 5.0


@pytest.mark.parametrize("options", [{"spacing": (0, 1, 1)}, {"size_mm": (100, 100)}, {"orientation": "ABC"}])
def test_impossible_options_are_refused(options: dict) -> None:
    with pytest.raises(ValueError):
        generate_case(0, **options)


def test_labels_are_those_of_the_quickstart_task() -> None:
    assert load_task("quickstart").label_values == LABELS


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    coarse = partial(generate_case, spacing=(8.0, 8.0, 8.0))
    monkeypatch.setattr("lib.volumes.phantoms.studies.generate_case", coarse)


def test_written_files_hold_the_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    paths = write_studies(tmp_path, cases=3, labelled=2, seed=5)
    assert [p.name for p in paths] == ["phantom_000.nii.gz", "phantom_001.nii.gz", "phantom_002.nii.gz"]
    found = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert found == [
        "labels/final/phantom_000.nii.gz",
        "labels/final/phantom_001.nii.gz",
        "phantom_000.nii.gz",
        "phantom_001.nii.gz",
        "phantom_002.nii.gz",
    ]
    case = generate_case(5001, spacing=(8.0, 8.0, 8.0))
    image, label = read_nifti(paths[1]), read_nifti(tmp_path / "labels" / "final" / paths[1].name)
    assert image.get_data_dtype() == np.int16 and label.get_data_dtype() == np.uint8
    assert np.array_equal(np.asarray(image.dataobj), case.image)
    assert np.array_equal(np.asarray(label.dataobj), case.label)
    assert np.allclose(image.affine, case.affine, atol=1e-3)
    assert np.array_equal(image.affine, label.affine)


def test_existing_files_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    corrected = tmp_path / "labels" / "final" / "phantom_000.nii.gz"
    corrected.parent.mkdir(parents=True)
    corrected.write_bytes(b"corrected by a person")
    (tmp_path / "phantom_001.nii.gz").write_bytes(b"someone's scan")
    write_studies(tmp_path, cases=2, labelled=2)
    assert corrected.read_bytes() == b"corrected by a person"
    assert (tmp_path / "phantom_001.nii.gz").read_bytes() == b"someone's scan"
    assert not (tmp_path / "labels" / "final" / "phantom_001.nii.gz").exists(), "no label for a scan that is not ours"
    assert (tmp_path / "phantom_000.nii.gz").stat().st_size > 1000


def test_impossible_numbers_of_cases_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="labelled 3"):
        write_studies(tmp_path, cases=2, labelled=3)
    assert not list(tmp_path.iterdir())
