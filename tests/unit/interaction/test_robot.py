"""The robot user points where people would."""

from __future__ import annotations

import numpy as np

from lib.interaction.robot import click, depth_of, largest_error, scribble

SPACING = (1.0, 1.0, 4.0)


def masks() -> tuple[np.ndarray, np.ndarray]:
    """A truth of 9 x 9 in three slices, of which one slice is missing, and four voxels too many."""
    truth = np.zeros((20, 20, 5), bool)
    truth[5:14, 5:14, 1:4] = True
    mask = truth.copy()
    mask[5:14, 5:14, 3] = False
    mask[0:2, 0:2, 0] = True
    return mask, truth


def test_the_largest_error_is_of_one_kind() -> None:
    mask, truth = masks()
    error = largest_error(mask, truth)
    assert error is not None and error.sum() == 81 and error[5:14, 5:14, 3].all()
    assert largest_error(truth, truth) is None


def test_depth_counts_in_mm_to_the_nearest_voxel_outside() -> None:
    error = np.zeros((7, 7, 1), bool)
    error[1:6, 1:6] = True
    assert depth_of(error, (1, 1, 1))[3, 3, 0] == 1  # the volume ends above and below
    assert depth_of(error, (1, 1, 9))[3, 3, 0] == 3
    assert depth_of(error, (1, 1, 9))[0, 0, 0] == 0


def test_the_precise_user_clicks_the_middle() -> None:
    mask, truth = masks()
    found = click(mask, truth, (1, 1, 9))
    assert found is not None and found.points.tolist() == [[9, 9, 3]] and found.belongs
    removed = click(truth | mask, truth, SPACING)
    assert removed is not None and not removed.belongs and removed.points[0, 2] == 0
    assert click(truth, truth, SPACING) is None


def test_the_sloppy_user_misses_but_stays_in_the_error() -> None:
    mask, truth = masks()
    places = set()
    for seed in range(20):
        found = click(mask, truth, (1, 1, 9), np.random.default_rng(seed))
        assert found is not None and found.error[tuple(found.points[0])]
        away = np.linalg.norm(found.points[0][:2] - [9, 9])
        assert 1.5 <= away <= 6.0
        places.add(tuple(found.points[0]))
    assert len(places) >= 8


def test_a_scribble_is_a_line_of_one_kind_in_one_slice() -> None:
    mask, truth = masks()
    found = scribble(mask, truth, SPACING, np.random.default_rng(0))
    assert found is not None and found.belongs and set(found.points[:, 2]) == {3}
    assert found.error[tuple(found.points.T)].all()
    assert [9, 9, 3] in found.points.tolist() or len(found.points) >= 3
    assert 3 <= len(found.points) <= 40
    assert scribble(truth, truth, SPACING, np.random.default_rng(0)) is None
