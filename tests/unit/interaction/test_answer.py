"""Answers without training, on images small enough to think through."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lib.interaction.answer import Settings, answer, respect
from lib.interaction.cut import graph_cut
from lib.interaction.evidence import Reach
from lib.interaction.prompts import Prompts
from lib.interaction.refit import refit
from lib.interaction.regions import obey

SPACING = (1.0, 1.0, 1.0)


def after(margin: np.ndarray, image: np.ndarray, mask: np.ndarray, prompts: Prompts, *way: Any) -> np.ndarray:
    wanted = answer(margin, image, mask, SPACING, prompts, *way)
    return obey(mask, wanted, prompts.inside, prompts.outside)


def test_a_refit_without_voxels_changes_nothing() -> None:
    assert not refit(np.zeros((0, 3)), np.zeros(0), np.zeros(0, bool), np.zeros(0), 1.0).any()


def test_a_refit_finds_the_root_of_its_gradient() -> None:
    """One voxel, one feature f = 2, margin -1, said to belong: d solves 2 · (1 - sigmoid(-1 + 2d)) = pull · d."""
    (d,) = refit(np.array([[2.0]]), np.array([-1.0]), np.array([True]), np.array([1.0]), 0.5)
    assert 2 * (1 - 1 / (1 + np.exp(1 - 2 * d))) == pytest.approx(0.5 * d, abs=1e-4)
    (stiff,) = refit(np.array([[2.0]]), np.array([-1.0]), np.array([True]), np.array([1.0]), 50.0)
    assert 0 < stiff < d / 5  # pulled to where it was


def test_a_refit_moves_along_the_feature_that_tells_the_voxels_apart() -> None:
    features = np.array([[1.0, 1.0], [-1.0, 1.0]])
    d = refit(features, np.array([0.0, 0.0]), np.array([True, False]), np.ones(2), 0.1)
    assert d[0] > 1 and d[1] == pytest.approx(0, abs=1e-6)


def test_a_cut_runs_along_the_edge_and_around_the_seeds() -> None:
    image = np.zeros((12, 9, 9), np.float32)
    image[:6] = 2.0
    margin = np.where(image > 1, 0.2, -0.2).astype(np.float32)
    margin[2, 4, 4] = -1.0  # a hole that no image shows
    found = graph_cut(image, margin, np.array([[1, 1, 1]]), np.array([[10, 1, 1]]), 3.0, 0.5)
    assert np.array_equal(found, image > 1)
    against = graph_cut(image, margin, np.array([[9, 4, 4]]), np.array([[2, 4, 4]]), 0.01, 0.5)
    assert against[9, 4, 4] and not against[2, 4, 4]


def test_what_was_drawn_outweighs_the_model() -> None:
    margin = np.array([3.0, -3.0, 3.0, -3.0])
    mask = np.array([True, False, False, True])
    assert respect(margin, mask, 1.0).tolist() == [3.0, -3.0, -1.0, 1.0]


def ball(shape: tuple[int, ...], centre: tuple[int, int, int], radius: float) -> np.ndarray:
    grid = np.indices(shape) - np.reshape(centre, (3, 1, 1, 1))
    return (grid**2).sum(0) <= radius**2


def scene() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two bright balls, of which the model found the left one: margin, image, mask."""
    shape = (40, 20, 20)
    left, right = ball(shape, (10, 10, 10), 5), ball(shape, (29, 10, 10), 5)
    image = np.where(left | right, 1.0, 0.0) + np.random.default_rng(0).normal(0, 0.05, shape)
    return np.where(left, 4.0, -2.0).astype(np.float32), image[None], left


WAYS = {
    "stamp": Settings(),
    "cut": Settings(reach=None, smooth=2.0),
    "stamp and cut": Settings(smooth=2.0),
    "refit": Settings(reach=None, pull=0.1),
    "all": Settings(pull=0.1, smooth=2.0),
}


@pytest.mark.parametrize("way", WAYS)
def test_one_click_each_way_is_obeyed_and_nothing_else_moves(way: str) -> None:
    margin, image, mask = scene()
    features = np.concatenate([image, np.linspace(0, 1, image.size).reshape(image.shape)])
    prompts = Prompts.of_points([[29, 10, 10]], [[10, 10, 10]], image.shape[1:])
    found = after(margin, image, mask, prompts, WAYS[way], features)
    assert found[29, 10, 10] and not found[10, 10, 10]
    again = after(margin, image, mask, prompts, WAYS[way], features)
    assert np.array_equal(found, again)


def test_a_stamp_takes_the_ball_that_was_clicked_and_stops_at_its_edge() -> None:
    margin, image, mask = scene()
    right = ball(image.shape[1:], (29, 10, 10), 5)
    prompts = Prompts.of_points([[29, 10, 10]], [], image.shape[1:])
    found = after(margin, image, mask, prompts, Settings(reach=Reach(9.0, 6.0, 8.0)))
    assert np.array_equal(found & ~right, mask)
    assert (found & right).sum() / right.sum() > 0.9


def test_a_refit_takes_all_that_looks_alike_near_the_click() -> None:
    margin, image, mask = scene()
    right = ball(image.shape[1:], (29, 10, 10), 5)
    prompts = Prompts.of_points([[29, 10, 10]], [], image.shape[1:])
    found = after(margin, image, mask, prompts, Settings(reach=None, pull=0.01), image)
    assert (found & right).sum() / right.sum() > 0.9 and not (found & ~right & ~mask).any()


def test_a_click_on_what_is_already_right_changes_nothing() -> None:
    margin, image, mask = scene()
    prompts = Prompts.of_points([[10, 10, 10]], [[20, 10, 10]], image.shape[1:])
    assert np.array_equal(after(margin, image, mask, prompts, Settings(reach=Reach(3.0, 2.0, 1.0))), mask)
