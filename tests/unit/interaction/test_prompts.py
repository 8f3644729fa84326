"""Points as clients send them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lib.interaction.prompts import MAX_POINTS, Prompts

SHAPE = (4, 5, 6)


def test_points_keep_their_order_and_lose_repeats() -> None:
    found = Prompts.of_points([[3, 4, 5], [0, 0, 0], [3, 4, 5.0]], [[1, 1, 1]], SHAPE)
    assert found.inside.tolist() == [[3, 4, 5], [0, 0, 0]] and found.outside.tolist() == [[1, 1, 1]]
    assert len(found) == 3 and found.all.tolist() == [[3, 4, 5], [0, 0, 0], [1, 1, 1]]
    assert found.moved((1, 1, 1)).inside.tolist() == [[2, 3, 4], [-1, -1, -1]]


def test_no_points_are_no_prompts() -> None:
    assert len(Prompts.of_points(None, [], SHAPE)) == 0


@pytest.mark.parametrize(
    ("inside", "outside", "message"),
    [
        ([[4, 0, 0]], [], r"foreground: \[4, 0, 0\] is outside the image; valid are 0 to 3, 0 to 4, 0 to 5"),
        ([], [[0, -1, 0]], r"background: \[0, -1, 0\] is outside the image; valid are 0 to 3, 0 to 4, 0 to 5"),
        ([[1, 2]], [], r"foreground: expected \[i, j, k\] in voxels, got \[1, 2\]"),
        ([[1, 2, 2.5]], [], r"foreground: expected \[i, j, k\] in voxels, got \[1, 2, 2.5\]"),
        ([[1, 2, True]], [], r"foreground: expected \[i, j, k\] in voxels"),
        ([[1, 2, float("nan")]], [], r"foreground: expected \[i, j, k\] in voxels"),
        ("1,2,3", [], r"foreground: expected a list of \[i, j, k\], got str"),
        ([], {"a": 1}, r"background: expected a list of \[i, j, k\], got dict"),
        ([[0, 0, 0]] * (MAX_POINTS + 1), [], f"foreground: {MAX_POINTS + 1} points; valid are at most {MAX_POINTS}"),
        ([[1, 2, 3]], [[1, 2, 3]], r"the voxel \[1, 2, 3\] is in `foreground` and in `background`"),
    ],
)
def test_other_points_are_refused(inside: Any, outside: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Prompts.of_points(inside, outside, SHAPE)


def test_a_voxel_with_strokes_of_both_kinds_counts_as_inside() -> None:
    inside, outside = np.zeros((2, *SHAPE), bool)
    inside[1, 1, 1] = outside[1, 1, 1] = outside[0, 0, 0] = True
    found = Prompts.of_maps(inside, outside)
    assert found.inside.tolist() == [[1, 1, 1]] and found.outside.tolist() == [[0, 0, 0]]
