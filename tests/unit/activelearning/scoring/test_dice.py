"""The scoring method dice: right for several classes, and of the classes that were drawn."""

from __future__ import annotations

import math

import nibabel as nib
import numpy as np
import pytest

from lib.activelearning.scoring.methods import DiceScoring
from lib.stores.local import LocalStore
from lib.volumes.metrics import dice_of_classes, evaluate_volumes
from support.helpers import tiny_overlapping_task, tiny_task, write_nifti


def test_dice_by_hand(task):
    found, target = np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)
    found[0], target[0, :2] = 1, 1  # 16 and 8 voxels, 8 in common
    found[1] = 2  # spleen where there is none
    scores = dice_of_classes(task, found, target)
    assert scores["liver"] == pytest.approx(2 * 8 / 24)
    assert scores["spleen"] == 0
    assert math.isnan(scores["aorta"])


@pytest.mark.parametrize("make", [tiny_task, tiny_overlapping_task])
def test_dice_is_that_of_the_metrics(make):
    task, rng = make(), np.random.default_rng(0)
    found, target = (rng.integers(0, 4, (9, 8, 7)).astype(np.uint8) for _ in range(2))
    rows = evaluate_volumes(task, found, target, [1, 1, 1])
    assert dice_of_classes(task, found, target) == pytest.approx({r.name: r.dice for r in rows})
    with pytest.raises(ValueError, match="shapes differ"):
        dice_of_classes(task, found[:5], target)


def test_dice_of_stored_masks(task, tmp_path):
    """Of several classes, in another orientation, and of the declared classes only; MONAI Label's own multiplies label
    indices and would say more than 1."""
    folder = tmp_path / "studies"
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, (6, 5, 4)).astype(np.uint8)
    mask = np.where(rng.random(truth.shape) < 0.5, truth, 0).astype(np.uint8)
    store = LocalStore(folder, tasks=[task])
    turned = nib.Nifti1Image(mask[::-1], np.diag([-1.0, 1, 1, 1]) + np.eye(4, k=3) * [[5], [0], [0], [0]])
    nib.save(turned, tmp_path / "mask.nii.gz")
    label = write_nifti(tmp_path / "label.nii.gz", truth)
    for case in ("whole", "part", "alone"):
        write_nifti(folder / f"{case}.nii.gz", np.zeros(truth.shape, np.int16))
        store.save_label(case, str(label), "final", {"annotated": ["liver"]} if case == "part" else {})
    for case in ("whole", "part"):
        store.save_label(case, str(tmp_path / "mask.nii.gz"), "original", {})
    scores = DiceScoring({"tiny": task})({}, store)
    expected = {n: round(v, 6) for n, v in dice_of_classes(task, mask, truth).items()}
    assert scores == {"whole": expected, "part": {"liver": expected["liver"]}}
    info = store.get_image_info("whole")
    assert info["dice"] == pytest.approx(np.mean(list(expected.values())), abs=1e-6)
    assert info["dice_of_classes"] == expected
    with pytest.raises(ValueError, match="unknown model 'x'; valid are tiny"):
        DiceScoring({"tiny": task})({"model": "x"}, store)
