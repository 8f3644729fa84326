"""Scores of a case from one forward pass: by hand, and equal to what the network says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lib.activelearning.scoring.forward import score_case
from lib.model.predict import Prediction, predict


def prediction(probabilities, classes):
    p = torch.tensor(probabilities, dtype=torch.float32)[:, :, None, None]
    return Prediction(p, torch.full((classes, 6), 1 / 6), torch.eye(classes), 1, 0)


def test_entropy_by_hand():
    """Two exclusive channels, three voxels: sure of background, undecided, sure of foreground."""
    found = prediction([[1.0, 0.5, 0.0], [0.0, 0.5, 1.0]], 1)
    assert found.entropy().flatten().tolist() == pytest.approx([0, 1, 0])
    assert found.uncertainty() == pytest.approx(0.5 / 1.5), "each voxel counts by its foreground probability"
    assert found.found().tolist() == [True]


def test_entropy_of_overlapping_classes_by_hand():
    found = prediction([[0.5, 1.0], [0.0, 1.0]], 2)
    assert found.overlapping
    assert found.entropy().flatten().tolist() == pytest.approx([0.5, 0])
    assert found.uncertainty() == pytest.approx(0.25 / 1.5)
    assert found.found().tolist() == [True, True]


def test_a_model_that_draws_nothing_because_it_is_unsure_is_uncertain():
    """No voxel is foreground, all are nearly: counting predicted foreground alone would call this certain."""
    unsure, sure = prediction([[0.51] * 4, [0.49] * 4], 1), prediction([[0.0] * 4, [1.0] * 4], 1)
    assert unsure.found().tolist() == [False]
    assert unsure.uncertainty() > 0.99
    assert sure.uncertainty() == 0


def test_entropy_in_parts_is_entropy(model, task):
    torch.manual_seed(1)
    found = predict(model, torch.rand(1, 70, 20, 20), task, overlap=0.0)
    p = found.probabilities.double()
    assert torch.allclose(found.entropy().double(), -(p * p.log()).sum(0) / math.log(4), atol=1e-5)


def test_scores_are_those_of_the_forward_pass(model, task):
    """The vector is the mean of V_4 over places and windows; one pass per window, and no hook is left behind."""
    torch.manual_seed(2)
    image = torch.rand(1, 60, 40, 40)
    seen, calls = [], []
    hooks = [
        model.fusion[-1].register_forward_hook(lambda _m, _i, out: seen.append(out[1].flatten(2).mean(2))),
        model.register_forward_pre_hook(lambda _m, i: calls.append(len(i[0]))),
    ]
    scores, found = score_case(model, image, task)
    for hook in hooks:
        hook.remove()
    assert sum(calls) == found.windows - found.skipped
    vector = torch.cat(seen).mean(0)
    assert np.allclose(scores.vector, vector / vector.norm(), atol=1e-6)
    assert scores.entropy == found.uncertainty()
    assert scores.alignment == pytest.approx(float(found.alignment[found.found()].mean()))
    assert not model.fusion[-1]._forward_hooks


def test_a_case_without_content_has_scores_too(model, task):
    scores, found = score_case(model, torch.zeros(1, 48, 48, 48), task)
    assert found.windows == found.skipped
    assert scores.entropy < 1e-3 and scores.alignment == 0 and not scores.vector.any()
