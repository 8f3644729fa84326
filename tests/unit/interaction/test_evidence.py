"""Geodesic distance and what it makes of clicks."""

from __future__ import annotations

import numpy as np
import pytest

from lib.interaction.evidence import Reach, evidence, path_lengths

NONE = np.zeros((0, 3), np.int64)
AT = np.array([[3, 3, 1]])


def test_in_an_even_image_the_way_is_the_distance() -> None:
    found = path_lengths(np.zeros((1, 7, 7, 3)), (2.0, 1.0, 5.0), AT, weight=3.0)
    assert found[3, 3, 1] == 0 and found[6, 3, 1] == pytest.approx(6) and found[3, 5, 1] == pytest.approx(2)
    assert found[3, 3, 2] == pytest.approx(5)
    assert found[4, 3, 2] == pytest.approx(np.hypot(2, 5))


def test_a_way_through_other_tissue_is_longer() -> None:
    image = np.zeros((1, 7, 7, 3))
    image[:, :, 4:] = 2.0  # standard deviations
    found = path_lengths(image, (1.0, 1.0, 1.0), AT, weight=1.5)
    assert found[0, 3, 1] == pytest.approx(3)
    # From the border on each mm counts (1 + 1.5 * 2) times; the step across it half of each.
    assert found[3, 5, 1] == pytest.approx(0.5 + 0.5 * 4 + 4)


def test_one_noisy_voxel_stops_nothing() -> None:
    image = np.zeros((1, 7, 7, 3))
    image[0, 3, 4, 1] = 5.0
    assert path_lengths(image, (1.0, 1.0, 1.0), AT, weight=2.0)[3, 6, 1] == pytest.approx(3)


def say(margin: float, inside: np.ndarray, outside: np.ndarray, reach: Reach) -> np.ndarray:
    """Evidence in a row of nine voxels of one margin."""
    margins, image = np.full((9, 1, 1), margin), np.zeros((1, 9, 1, 1))
    return evidence(margins, image, (1.0, 1.0, 1.0), inside, outside, reach).ravel()


def test_without_clicks_nothing_is_near() -> None:
    assert np.isinf(path_lengths(np.zeros((1, 3, 3, 3)), (1, 1, 1), NONE, 1.0)).all()
    assert not say(0.0, NONE, NONE, Reach()).any()


def test_the_nearer_click_decides_and_its_say_falls_off() -> None:
    reach = Reach(distance=2.0, intensity=0.0, gain=4.0)
    found = say(0.0, np.array([[0, 0, 0]]), np.array([[8, 0, 0]]), reach)
    expected = [4 * np.exp(-(d**2) / 8) for d in range(5)]
    assert found[:5] == pytest.approx(expected)
    assert found[5:] == pytest.approx([-x for x in expected[:4][::-1]])


@pytest.mark.parametrize(("margin", "gain"), [(-8.0, 12.0), (-1.0, 4.0), (8.0, 4.0)])
def test_a_click_overrules_a_model_that_is_sure(margin: float, gain: float) -> None:
    """At the click: `firm` times what speaks against it, and never less than `gain`."""
    reach = Reach(distance=2.0, intensity=0.0, gain=4.0, firm=1.5)
    assert say(margin, np.array([[4, 0, 0]]), NONE, reach)[4] == pytest.approx(gain)
    assert say(-margin, NONE, np.array([[4, 0, 0]]), reach)[4] == pytest.approx(-gain)


def test_each_click_has_its_own_gain() -> None:
    margins = np.array([-8.0] * 5 + [-1.0] * 4).reshape(9, 1, 1)
    reach = Reach(distance=1.0, intensity=0.0, gain=4.0, firm=1.5)
    points = np.array([[0, 0, 0], [8, 0, 0]])
    found = evidence(margins, np.zeros((1, 9, 1, 1)), (1.0, 1.0, 1.0), points, NONE, reach).ravel()
    assert found[[0, 8]] == pytest.approx([12, 4])
