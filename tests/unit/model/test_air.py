"""Windows of air are not computed, and inside the body nothing changes by that."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lib.model import predict as segment
from lib.model.nets import build_model
from lib.model.predict import content, predict
from lib.volumes.transforms import apply, load
from support.helpers import read_nifti, tiny_task, write_nifti

PATCH = (32, 32, 32)
NOISE_HU = 30


def task_of(low: float, **changes):
    small = {"vision": "unet", "feature_size": 4}
    return tiny_task(patch=PATCH, overlap=0.1, model=small, intensity={"low": low, "high": 250}, **changes)


def air(shape, seed=0):
    return np.random.default_rng(seed).normal(-1000, NOISE_HU, shape).astype(np.int16)


def body_beside_air(shape=(160, 60, 60)):
    """A trunk with lungs in the first half of a noisy CT, and a thin table far away from it."""
    image = air(shape)
    x, y, z = np.indices(shape)
    trunk = ((x - 36) / 30) ** 2 + ((y - 30) / 24) ** 2 < 1
    lung = ((x - 36) / 18) ** 2 + ((y - 30) / 14) ** 2 + ((z - 20) / 18) ** 2 < 1
    vessels = lung & (x % 7 == 0)
    image[trunk] += 1040
    image[lung & ~vessels] -= 890
    image[150:153, :, 50:] += 1100
    return image, trunk


def without_and_with_skipping(model, image, task, monkeypatch):
    ours = predict(model, image, task)
    monkeypatch.setattr(segment._Windows, "_shown", lambda _self, patches: torch.ones(len(patches), dtype=torch.bool))
    everything = predict(model, image, task)
    assert (everything.skipped, everything.windows) == (0, ours.windows)
    return everything, ours


@pytest.mark.parametrize("low", [-175, -1000])
def test_half_air_costs_half_and_changes_nothing_inside_the_body(low, tmp_path, monkeypatch):
    """Down to -175 HU air is one constant value. Down to -1000 HU its noise shows, and must not count."""
    task = task_of(low)
    voxels, trunk = body_beside_air()
    image = apply(load(task, label=False), {"image": str(write_nifti(tmp_path / "ct.nii.gz", voxels))})["image"]
    torch.manual_seed(0)
    everything, ours = without_and_with_skipping(build_model(task).eval(), image, task, monkeypatch)
    assert ours.windows - ours.skipped <= 0.7 * ours.windows
    offset = np.rint(np.linalg.solve(np.eye(4), image.affine.numpy())[:3, 3]).astype(int)
    inside = torch.as_tensor(trunk[tuple(slice(o, o + n) for o, n in zip(offset, image.shape[1:], strict=True))])
    assert inside.sum() > 0.9 * trunk.sum()
    assert torch.equal(ours.probabilities[:, inside], everything.probabilities[:, inside])


def test_content_of_noisy_air_is_empty_and_lungs_are_content():
    task = task_of(-1000)
    voxels, trunk = body_beside_air()
    scaled = torch.as_tensor((voxels.clip(-1000, 250) + 1000) / 1250).float()[None]
    shown = content(scaled, task)[0].bool().numpy()
    assert shown[trunk].all()
    assert not shown[80:140].any()
    assert shown[150:153, :, 52:58].all()


def test_only_a_ct_task_that_looks_into_air_asks_for_content():
    image = torch.zeros(1, 4, 4, 4)
    assert content(image, task_of(-175)) is None
    assert content(image, task_of(-1000, modality="MR")) is None
    assert content(image, tiny_task(modality="MR", intensity={"mode": "nonzero", "low": None, "high": None})) is None


@pytest.mark.parametrize("low", [-175, -1000])
def test_real_ct_in_a_wide_field_of_view(low, real_data, tmp_path, monkeypatch):
    """A real abdomen with as much noisy air beside it as it is wide: what a wide field of view looks like."""
    source = read_nifti(real_data / "abdomen_ct" / "ts-example_ct.nii.gz")
    voxels = np.asarray(source.dataobj).astype(np.int16)
    wide = air((2 * voxels.shape[0], *voxels.shape[1:]))
    wide[: voxels.shape[0]] = voxels
    wide[-3:, :4, :4] = 300  # something dense in the far corner: the crop to the foreground keeps the whole width
    task = task_of(low, spacing=[6.0, 6.0, 6.0])
    path = write_nifti(tmp_path / "wide.nii.gz", wide, source.affine)
    image = apply(load(task, label=False), {"image": str(path)})["image"]
    torch.manual_seed(0)
    everything, ours = without_and_with_skipping(build_model(task).eval(), image, task, monkeypatch)
    computed = ours.windows - ours.skipped
    assert computed <= 0.7 * ours.windows
    inside = image[0].as_tensor() > (-500 - low) / (250 - low) if low < -500 else image[0].as_tensor() > 0
    assert torch.equal(ours.probabilities[:, inside], everything.probabilities[:, inside])
