"""Simulated corrections, and a refiner that learns from them what no rule says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lib.interaction.evidence import Reach
from lib.interaction.margins import Margin
from lib.interaction.prompts import Prompts
from lib.model.nets.refiner import Refiner
from lib.model.refining import text_of_labels
from lib.trainers.refiner import training
from lib.trainers.refiner.cases import Segmented
from support.helpers import tiny_overlapping_task, tiny_task

SHAPE = (24, 20, 12)
REACH = Reach(3.0, 1.0, 2.0)


def case() -> Segmented:
    """Two boxes of one class, of which the network is sure of the left one only. The features show both."""
    truth = np.zeros(SHAPE, np.uint8)
    truth[3:10, 5:14, 3:9] = truth[14:21, 5:14, 3:9] = 1
    margin = np.full(SHAPE, -3.0, np.float32)
    margin[3:10, 5:14, 3:9] = 3.0
    image = np.where(truth > 0, 100.0, 0.0)[None] + np.random.default_rng(0).normal(0, 5, (1, *SHAPE))
    affine = torch.eye(4, dtype=torch.float64)
    meta = {"affine": affine, "original_affine": affine, "spatial_shape": SHAPE}
    margins = {"liver": Margin(torch.from_numpy(margin).half(), (0, 0, 0), SHAPE)}
    features = torch.from_numpy(np.stack([truth, 1 - truth]).astype(np.float32)).half()
    found = np.where(margin > 0, 1, 0).astype(np.uint8)
    return Segmented(
        "a", image, truth, found, (1.0, 1.0, 1.0), meta, margins, features, {"liver": torch.ones(4)}, {"liver": 1}
    )


def test_noise_is_smooth_and_bounded_in_strength() -> None:
    choose = np.random.default_rng(1)
    strengths = [training.noise(SHAPE, (1, 1, 1), choose).std() for _ in range(20)]
    assert max(strengths) <= training.NOISE + 1e-3 and np.std(strengths) > 0.3
    found = training.noise((40, 40, 40), (1, 1, 1), choose)
    assert np.abs(np.diff(found, axis=0)).max() < 0.5 * np.abs(found).max()


def test_a_scene_holds_an_error() -> None:
    choose = np.random.default_rng(0)
    scenes = [found for _ in range(10) if (found := training.scene(case(), choose))]
    assert scenes
    for found in scenes:
        assert (found.mask != found.truth).any() and found.label == "liver"
        assert found.features.shape == (2, *found.truth.shape) and found.image.shape == (1, *found.truth.shape)


def test_prompts_of_a_simulation_say_the_truth() -> None:
    choose, refiner = np.random.default_rng(0), Refiner(2, 4, (4, 8, 8))
    numbers = []
    for _ in range(12):
        found = training.scene(case(), choose)
        prompts = found and training.simulate(refiner, found, REACH, choose)
        if not found or not prompts:
            continue
        assert found.truth[tuple(prompts.inside.T)].all() and not found.truth[tuple(prompts.outside.T)].any()
        numbers.append(len(prompts))
    assert len(set(numbers)) > 3


def test_an_untrained_refiner_answers_as_the_evidence_does() -> None:
    found = training.scene(case(), np.random.default_rng(0))
    assert found
    prompts = Prompts(np.argwhere(found.truth)[:1], np.argwhere(~found.truth)[:1])
    margin, base = training.answered(Refiner(2, 4, (4, 8, 8)), found, prompts, REACH)
    assert torch.equal(margin, base)


def test_it_learns_to_correct_better_than_the_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "LEARNING_RATE", 1e-2)
    torch.manual_seed(0)
    refiner, told = Refiner(2, 4, (4, 8, 8)), []
    training.train_refiner(refiner, [case()], 60, 0, REACH, lambda step, losses: told.append((step, losses)), every=20)
    assert [step for step, _ in told] == [20, 40, 60]
    assert told[-1][1]["refiner"] < 0.8 * told[-1][1]["evidence"]


def test_a_label_s_text_is_its_class_s_or_its_smallest_region_s() -> None:
    task = tiny_task()
    text = torch.arange(3.0)[:, None]
    assert {name: float(v) for name, v in text_of_labels(text, task).items()} == dict(
        zip(task.classes, (0.0, 1.0, 2.0), strict=True)
    )
    nested = tiny_overlapping_task()
    assert nested.regions is not None
    found = text_of_labels(torch.arange(float(len(nested.regions)))[:, None], nested)
    for name, vector in found.items():
        region = list(nested.regions.values())[int(vector)]
        sizes = [len(other.labels) for other in nested.regions.values() if name in other.labels]
        assert name in region.labels and len(region.labels) == min(sizes)


@pytest.mark.parametrize("sure", [False, True])
def test_the_loss_is_least_for_the_truth(sure: bool) -> None:
    truth = torch.tensor([[True, False, True, False]])
    right = torch.where(truth, 8.0, -8.0) if sure else torch.where(truth, 1.0, -1.0)
    assert training.refiner_loss(right, truth) < training.refiner_loss(-right, truth)


def test_a_case_can_be_cut_to_a_box_without_moving_anything() -> None:
    box = (slice(2, 12), slice(4, 18), slice(1, 10))
    asked = {"liver": Prompts(np.array([[4, 6, 4], [20, 6, 4]]), np.zeros((0, 3), np.int64))}
    whole = replace(case(), asked=asked)
    cut = whole.within(box)
    everything = (slice(0, 10), slice(0, 14), slice(0, 9))
    assert np.array_equal(cut.truth, whole.truth[box])
    assert np.allclose(cut.features_in(everything), whole.features_in(box))
    ours, theirs = (found.margins["liver"].on(found.meta, part) for found, part in ((cut, everything), (whole, box)))
    assert np.allclose(ours, theirs)
    assert cut.asked["liver"].inside.tolist() == [[2, 2, 3]]


def test_half_of_the_scenes_have_the_errors_of_a_network_that_had_not_seen_the_case() -> None:
    """It has found the right box alone, and says 5 where the network that is refined says 3."""
    other = np.full(SHAPE, -5.0, np.float32)
    other[14:21, 5:14, 3:9] = 5.0
    found = replace(case(), errors={"liver": Margin(torch.from_numpy(other).half(), (0, 0, 0), SHAPE)})
    choose, real = np.random.default_rng(0), 0
    for _ in range(60):
        scene = training.scene(found, choose)
        assert scene is not None
        real += set(np.unique(scene.margin.round(3)).tolist()) <= {-5.0, 5.0}
    assert 18 <= real <= 42


def test_a_simulation_may_begin_where_a_person_prompted() -> None:
    """One prompt is right, and the network wrong there; another one the reference contradicts."""
    right, wrong = [16, 8, 5], [1, 1, 1]
    found = replace(case(), asked={"liver": Prompts(np.array([right, wrong]), np.zeros((0, 3), np.int64))})
    choose, led = np.random.default_rng(0), []
    for _ in range(60):
        scene = training.scene(found, choose)
        assert scene is not None
        if len(scene.asked):
            led.append(scene)
            assert scene.asked.inside.shape == (1, 3) and scene.truth[tuple(scene.asked.inside[0])]
            prompts = training.simulate(Refiner(2, 4, (4, 8, 8)), scene, REACH, choose)
            assert prompts is not None and scene.asked.inside[0].tolist() in prompts.inside.tolist()
    assert 6 <= len(led) <= 30
    assert training.scene(replace(found, asked={}), choose).asked is training.NOTHING  # type: ignore[union-attr]


def test_cases_without_errors_end_the_training_instead_of_going_on_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "VAIN", 20)
    right = case()
    sure = torch.from_numpy(np.where(right.truth > 0, 9.0, -9.0)).half()
    perfect = replace(right, labels=right.truth, margins={"liver": Margin(sure, (0, 0, 0), SHAPE)})
    monkeypatch.setattr(training, "NOISE", 0.1)
    with pytest.raises(ValueError, match="20 draws from 1 case.* no error"):
        training.train_refiner(Refiner(2, 4, (4, 8, 8)), [perfect], 5, 0, REACH)
