"""Points as clients send them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lib.interaction.prompts import MAX_POINTS, POINTS_KEPT, Asked, Prompts, asked_before

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
        ([[1, 2, 10**400]], [], r"foreground: expected \[i, j, k\] in voxels, got \[1, 2, 10+…$"),
        ([[0] * 5000], [], r"foreground: expected \[i, j, k\] in voxels, got \[(0, ?)+…$"),
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


def answer(label: str, inside: Any, outside: Any) -> Asked:
    prompts = Prompts(*(np.array(points, np.int64).reshape(-1, 3) for points in (inside, outside)))
    return Asked(label, "clicks", 2, "evidence", prompts, ((0, 3), (1, 1), (2, 2)), 4)


def test_what_was_asked_is_kept_and_read_back() -> None:
    first, second = answer("liver", [[3, 4, 5]], []), answer("liver", [[3, 4, 5], [0, 0, 1]], [[1, 1, 1]])
    assert first.to_dict() == {
        **{"label": "liver", "kind": "clicks", "version": 2, "answered_by": "evidence"},
        **{"foreground": [[3, 4, 5]], "background": [], "box": [[0, 3], [1, 1], [2, 2]], "changed": 4},
    }
    found = asked_before([first.to_dict(), second.to_dict()], ["Liver", "spleen"], SHAPE)
    assert list(found) == ["Liver"] and found["Liver"].inside.tolist() == [[0, 0, 1], [3, 4, 5]]
    assert found["Liver"].outside.tolist() == [[1, 1, 1]]


def test_of_a_long_stroke_some_voxels_are_kept() -> None:
    stroke = [[n, 0, 0] for n in range(500)]
    kept = answer("liver", stroke, []).to_dict()["foreground"]
    assert len(kept) == POINTS_KEPT and kept[0] == [0, 0, 0] and kept[-1] == [499, 0, 0]


@pytest.mark.parametrize(
    "records",
    [
        *(
            None,
            {},
            [3],
            [{}],
            [{"label": 7, "foreground": [[0, 0, 0]]}],
            [{"label": "kidney", "foreground": [[0, 0, 0]]}],
        ),
        [{"label": "liver", "foreground": [[9, 9, 9]]}],
        [{"label": "liver", "foreground": "all"}],
    ],
)
def test_records_that_cannot_be_used_are_left_out(records: Any) -> None:
    assert asked_before(records, ["liver"], SHAPE) == {}
