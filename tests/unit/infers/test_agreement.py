"""How well a mask fits its class's text: cases to derive by hand, and the check of labels."""

import math

import nibabel as nib
import numpy as np
import pytest
import torch

from lib.infers.explain import label_check
from lib.infers.explain.agreement import FLOOR, agreement, fit, own_fit
from lib.infers.explain.label_check import check_labels
from lib.model.predict import Prediction
from support.helpers import read_nifti, tiny_overlapping_task, tiny_task, write_nifti

MM6 = (6.0, 6.0, 6.0)  # the band is one voxel wide
ROW = torch.tensor([0.5, 0.1, 0.8, 0.8, 0.2, 0.5]).view(6, 1, 1)


def test_half_of_the_weight_is_inside_and_half_in_the_band():
    mask = ROW > 0.6
    inside, band = 0.8, math.sqrt(0.9 * 0.8)  # of 1 - p
    assert fit(ROW, mask, MM6) == pytest.approx(math.sqrt(inside * band))


def test_the_band_has_a_width_in_millimetres():
    mask = ROW > 0.6
    far = (0.5 * 0.9 * 0.8 * 0.5) ** 0.25
    assert fit(ROW, mask, (3.0, 6.0, 6.0)) == pytest.approx(math.sqrt(0.8 * far))


def test_certain_agreement_is_1_and_certain_contradiction_the_floor():
    p = torch.zeros(8, 8, 8)
    p[2:5, 2:5, 2:5] = 1
    assert fit(p, p > 0, MM6) == pytest.approx(1)
    elsewhere = torch.zeros_like(p, dtype=torch.bool)
    elsewhere[6:, 6:, 6:] = True
    assert fit(p, elsewhere, MM6) == pytest.approx(math.sqrt(FLOOR * 1))


def test_what_lies_far_away_does_not_matter():
    p = torch.full((40, 9, 9), 0.3)
    mask = torch.zeros_like(p, dtype=torch.bool)
    mask[4:7, 3:6, 3:6] = True
    before = fit(p, mask, MM6)
    p[20:] = 1
    assert fit(p, mask, MM6) == before


def test_a_mask_that_fills_the_image_has_no_band():
    assert fit(torch.full((2, 2, 2), 0.49), torch.ones(2, 2, 2, dtype=torch.bool), MM6) == pytest.approx(0.7)


def test_an_empty_mask_is_not_judged():
    p = torch.stack([torch.ones(3, 3, 3), torch.zeros(3, 3, 3)])
    assert own_fit(p, False, MM6) == [None]
    assert agreement(p, [torch.zeros(3, 3, 3, dtype=torch.bool)], False, MM6) == [None]


@pytest.mark.parametrize("overlapping", [False, True])
def test_errors_of_a_mask_lower_its_agreement_and_nothing_else(overlapping):
    p = torch.full((30, 30, 12), 0.05)
    p[8:16, 10:20, 3:9] = 0.9
    right = p > 0.5
    probabilities = p[None] if overlapping else torch.stack([1 - p, p])

    def judged(mask):
        return agreement(probabilities, [mask], overlapping, (3.0, 3.0, 4.0))[0].agreement

    assert judged(right) == pytest.approx(1)
    shifts = [judged(right.roll(n, 0)) for n in (1, 2, 4)]
    assert 1 > shifts[0] > shifts[1] > shifts[2]
    grown = right.clone()
    grown[7:17, 9:21] |= right[8:9, 10:11]
    assert judged(grown) < 1
    assert judged(right.flip(0)) < shifts[1]
    shrunk = right.clone()
    shrunk[8:10] = False
    assert judged(shrunk) < 1


def test_where_the_network_finds_nothing_the_agreement_is_the_fit():
    p = torch.full((9, 9, 9), 0.2)
    mask = torch.zeros(9, 9, 9, dtype=torch.bool)
    mask[3:6, 3:6, 3:6] = True
    (found,) = agreement(torch.stack([1 - p, p]), [mask], False, MM6)
    assert found.agreement == found.fit == pytest.approx(math.sqrt(0.2 * 0.8))


# The check of labels --------------------------------------------------------------------------------------------------


def boxes(shape=(32, 32, 32)):
    """Three classes by file value: a box each."""
    label = np.zeros(shape, np.uint8)
    for value, start in zip(tiny_task().label_values.values(), (2, 12, 22), strict=True):
        label[start : start + 8, 8:24, 8:24] = value
    return label


@pytest.fixture
def oracle(monkeypatch):
    """A network that knows the boxes: 0.9 inside, and 0.1 to share elsewhere."""
    encoded = torch.zeros(32, 32, 32, dtype=torch.long)
    for n, value in enumerate(tiny_task().label_values.values(), 1):
        encoded[torch.from_numpy(boxes() == value)] = n
    p = torch.nn.functional.one_hot(encoded, 4).movedim(-1, 0) * 0.8 + 0.05

    def predict(model, image, task):
        if task.overlapping:
            return Prediction(p[1:], torch.zeros(3, 6), torch.zeros(3, 3), 1, 0)
        return Prediction(p, torch.zeros(3, 6), torch.zeros(3, 3), 1, 0)

    monkeypatch.setattr(label_check, "predict", predict)


def case(folder, name, label, **more):
    noise = np.random.default_rng(1).integers(0, 200, label.shape).astype(np.int16)
    image = write_nifti(folder / f"{name}.nii.gz", noise)
    return {"id": name, "image": str(image), "label": str(write_nifti(folder / f"{name}_label.nii.gz", label)), **more}


def test_the_worst_mask_comes_first(oracle, tmp_path):
    task = tiny_task(intensity={"mode": "range", "low": -175, "high": 250})
    right, wrong = boxes(), boxes()
    value = list(task.label_values.values())[1]
    wrong[wrong == value] = 0
    wrong[12:20, 2:18, 8:24] = value  # 6 mm to the side
    found = check_labels(None, task, [case(tmp_path, "right", right), case(tmp_path, "wrong", wrong)])
    first, *others = found["masks"]
    assert (first["image"], first["class"]) == ("wrong", task.classes[1])
    assert len(others) == 5
    assert first["agreement"] < 0.6
    assert all(entry["agreement"] == pytest.approx(1) for entry in others)
    assert found["problems"] == {}


def test_classes_that_nobody_drew_are_not_judged(oracle, tmp_path):
    task, label = tiny_task(), boxes()
    last = list(task.label_values.values())[2]
    label[label == last] = 0
    partial = case(tmp_path, "partial", label, annotated=[task.classes[0]])
    found = check_labels(None, task, [partial, case(tmp_path, "whole", label)])
    assert [(e["image"], e["class"]) for e in found["masks"] if e["image"] == "partial"] == [
        ("partial", task.classes[0])
    ]
    assert {e["class"] for e in found["masks"] if e["image"] == "whole"} == set(task.classes[:2])


def test_a_label_that_cannot_be_used_does_not_stop_the_others(oracle, tmp_path):
    task = tiny_task()
    unknown = boxes()
    unknown[0, 0, 0] = 77
    found = check_labels(None, task, [case(tmp_path, "a", unknown), case(tmp_path, "b", boxes())])
    assert "77" in found["problems"]["a"]
    assert {e["image"] for e in found["masks"]} == {"b"}


def test_an_image_without_usable_voxels_does_not_stop_the_others(oracle, tmp_path):
    """MONAI hides the reason behind a RuntimeError: the whole request answered 500."""
    task = tiny_task()
    broken = case(tmp_path, "a", boxes())
    image = read_nifti(broken["image"])
    voxels = np.full(image.shape, np.nan, np.float32)
    nib.save(nib.Nifti1Image(voxels, image.affine), broken["image"])
    found = check_labels(None, task, [broken, case(tmp_path, "b", boxes())])
    assert "NaN or infinite" in found["problems"]["a"]
    assert {e["image"] for e in found["masks"]} == {"b"}


def test_overlapping_classes_are_judged_by_their_regions(oracle, tmp_path):
    task = tiny_overlapping_task()
    label = np.zeros((32, 32, 32), np.uint8)
    label[10:20, 8:24, 8:24] = list(task.label_values.values())[0]
    image = np.random.default_rng(1).integers(1, 200, (32, 32, 32, 4)).astype(np.int16)
    given = {"id": "x", "image": str(write_nifti(tmp_path / "x.nii.gz", image))}
    found = check_labels(None, task, [{**given, "label": str(write_nifti(tmp_path / "l.nii.gz", label))}])
    assert found["problems"] == {}
    assert {e["class"] for e in found["masks"]} <= set(task.classes)
    assert found["masks"]
