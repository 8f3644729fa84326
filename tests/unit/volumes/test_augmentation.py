"""Training patches: what is drawn, and what may and may not change."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose

from lib.volumes.augmentation import augment, rotation_degrees
from support.helpers import label, tiny_overlapping_task, tiny_task


def cubic_task(**changes):
    return tiny_task(patch=[32, 32, 32], model={"vision": "unet"}, **changes)


def cubic_overlapping_task():
    return tiny_overlapping_task(patch=[32, 32, 32], model={"vision": "unet"})


def _patches(task, data, count, seed=0):
    return Compose(augment(task, count)).set_random_state(seed)(dict(data))


def _loaded(image: np.ndarray, mask: np.ndarray) -> dict[str, MetaTensor]:
    return {
        "image": MetaTensor(torch.as_tensor(image, dtype=torch.float32)),
        "label": MetaTensor(torch.as_tensor(mask, dtype=torch.float32)),
    }


def test_patches_have_the_patch_size_and_show_rare_classes():
    task = cubic_task()
    mask = np.zeros((1, 60, 50, 20), np.float32)
    mask[:, :, :, :10] = 1
    mask[0, 50, 40, 15] = 3  # one voxel in 60,000
    got = _patches(task, _loaded(np.random.rand(1, 60, 50, 20), mask), 12)
    assert len(got) == 12
    assert all(p["image"].shape == p["label"].shape == (1, 32, 32, 32) for p in got)
    assert sum(bool((p["label"] == 3).any()) for p in got) >= 2


@pytest.mark.parametrize("task", [cubic_task(), cubic_overlapping_task()], ids=["exclusive", "overlapping"])
def test_cases_smaller_than_the_patch_and_without_any_label(task):
    channels = len(task.channels)
    label_channels = len(task.classes) if task.overlapping else 1
    got = _patches(task, _loaded(np.random.rand(channels, 9, 11, 40), np.zeros((label_channels, 9, 11, 40))), 3)
    assert len(got) == 3
    for patch in got:
        assert set(patch) == {"image", "label"}
        assert patch["image"].shape == (channels, 32, 32, 32)
        assert patch["label"].shape == (label_channels, 32, 32, 32)
        assert not patch["label"].any()


def test_rare_region_is_seen():
    task = cubic_overlapping_task()
    mask = np.zeros((3, 48, 48, 48))
    mask[0, :20] = 1
    mask[:, 40, 40, 40] = 1
    got = _patches(task, _loaded(np.random.rand(4, 48, 48, 48), mask), 12)
    assert sum(bool(p["label"][2].any()) for p in got) >= 2


def test_same_seed_same_patches():
    task = cubic_task(augmentation={"flip": ["left-right"], "rotate_probability": 1.0})
    image, mask = np.random.rand(1, 40, 40, 40), np.random.randint(0, 4, (1, 40, 40, 40))
    first, again, other = (_patches(task, _loaded(image, mask), 2, seed) for seed in (5, 5, 6))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a["image"].as_tensor(), b["image"].as_tensor())
        assert torch.equal(a["label"].as_tensor(), b["label"].as_tensor())
    assert not torch.equal(first[0]["image"].as_tensor(), other[0]["image"].as_tensor())


@pytest.mark.parametrize("flip", [[], ["left-right"], ["posterior-anterior"], ["inferior-superior"]])
def test_only_named_axes_are_flipped(flip):
    """Without any other change, a patch of full size is the volume itself or its mirror along a named axis."""
    still = {"rotate_probability": 0, "intensity_probability": 0}
    task = cubic_task(augmentation={"flip": flip, **still})
    volume = torch.arange(32**3, dtype=torch.float32).reshape(1, 32, 32, 32)
    axes = {"left-right": 1, "posterior-anterior": 2, "inferior-superior": 3}
    expected = [volume, *(volume.flip(axes[name]) for name in flip)]
    seen = set()
    data = _loaded(volume.numpy(), (volume % 4).numpy())
    for patch in itertools.chain.from_iterable(_patches(task, data, 4, seed) for seed in range(4)):
        match = [i for i, e in enumerate(expected) if torch.equal(patch["image"].as_tensor(), e)]
        assert len(match) == 1
        assert torch.equal(patch["label"].as_tensor(), patch["image"].as_tensor() % 4)
        seen.add(match[0])
    assert seen == set(range(len(expected)))


def test_left_and_right_never_swap():
    """The left kidney lies left of the right kidney in every patch of a lateralised task, at its usual settings."""
    task = cubic_task(
        labels={"left kidney": label(1), "right kidney": label(2)},
        augmentation={"flip": ["posterior-anterior", "inferior-superior"], "rotate_probability": 1.0},
    )
    assert task.lateralised == ("left kidney", "right kidney")
    mask = np.zeros((1, 32, 32, 32))
    mask[:, 4:10, 10:22, 10:22], mask[:, 22:28, 10:22, 10:22] = 1, 2  # RAS: x grows to the right
    for seed in range(6):
        for patch in _patches(task, _loaded(np.random.rand(1, 32, 32, 32), mask), 2, seed):
            left = (patch["label"][0] == 1).nonzero()[:, 0].float().mean()
            right = (patch["label"][0] == 2).nonzero()[:, 0].float().mean()
            assert left + 10 < right


def test_rotation_keeps_labels_whole_and_aligned():
    task = cubic_task(augmentation={"rotate_probability": 1.0, "rotate_degrees": 20, "intensity_probability": 0})
    mask = np.zeros((1, 32, 32, 32), np.float32)
    mask[:, 8:24, 10:20, 12:22] = 2
    (patch,) = _patches(task, _loaded(mask / 2, mask), 1, seed=3)
    turned = patch["label"].as_tensor()
    assert set(turned.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(turned, torch.as_tensor(mask))
    assert ((patch["image"].as_tensor() > 0.5) != (turned == 2)).float().mean() < 0.01


def test_rotation_shrinks_where_spacings_differ():
    assert rotation_degrees(cubic_task(augmentation={"rotate_degrees": 20})) == (20, 20, 20)
    task = cubic_task(spacing=[1.5, 1.5, 7.5], augmentation={"rotate_degrees": 20})
    assert rotation_degrees(task) == pytest.approx((4, 4, 20))


def test_intensity_changes_leave_labels():
    task = cubic_task(augmentation={"rotate_probability": 0, "intensity_probability": 1.0})
    image, mask = np.random.rand(1, 32, 32, 32).astype(np.float32), np.random.randint(0, 4, (1, 32, 32, 32))
    (patch,) = _patches(task, _loaded(image, mask), 1)
    assert torch.equal(patch["label"].as_tensor(), torch.as_tensor(mask).float())
    scale, shift = np.polyfit(image.ravel(), patch["image"].numpy().ravel(), 1)
    assert scale != 1 and abs(scale - 1) <= 0.1 and abs(shift) <= 0.1 + 1e-5
