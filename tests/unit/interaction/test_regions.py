"""What is written back: the part that was asked for."""

from __future__ import annotations

import numpy as np

from lib.interaction import boxes
from lib.interaction.regions import connected, obey, put

NONE = np.zeros((0, 3), np.int64)


def line(*voxels: int) -> np.ndarray:
    """A mask of 12 voxels in a row."""
    mask = np.zeros((12, 1, 1), bool)
    mask[list(voxels)] = True
    return mask


def at(*voxels: int) -> np.ndarray:
    return np.array([[n, 0, 0] for n in voxels])


def test_only_parts_with_a_seed_are_connected() -> None:
    change = line(0, 1, 4, 5, 8)
    assert np.array_equal(connected(change, at(5)), line(4, 5))
    assert np.array_equal(connected(change, at(2)), line())  # beside every part
    assert np.array_equal(connected(change, NONE), line())


def test_voxels_that_touch_by_a_corner_hang_together() -> None:
    change = np.zeros((3, 3, 3), bool)
    change[0, 0, 0] = change[1, 1, 1] = True
    assert connected(change, np.array([[0, 0, 0]])).sum() == 2


def test_what_is_not_connected_to_a_click_stays() -> None:
    before, wanted = line(0, 1, 2), line(1, 2, 3, 4, 8, 9)
    assert np.array_equal(obey(before, wanted, at(3), NONE), line(0, 1, 2, 3, 4))  # neither 0 goes nor 8 comes
    assert np.array_equal(obey(before, wanted, NONE, at(0)), line(1, 2))
    assert np.array_equal(obey(before, wanted, at(9), at(0)), line(1, 2, 8, 9))


def test_a_click_is_obeyed_against_everything_else() -> None:
    before = line(0, 1, 2)
    assert np.array_equal(obey(before, before, at(7), at(1)), line(0, 2, 7))
    assert np.array_equal(obey(before, ~before, at(0), at(11)), line(0, 1, 2))  # both are already as clicked


def test_neither_mask_is_changed() -> None:
    before, wanted = line(0), line(1)
    obey(before, wanted, at(1), at(0))
    assert np.array_equal(before, line(0)) and np.array_equal(wanted, line(1))


def test_other_classes_keep_their_voxels_unless_the_click_takes_them() -> None:
    labels = np.array([1, 1, 0, 2, 2, 3], np.uint8).reshape(6, 1, 1)
    wanted = np.array([0, 1, 1, 1, 1, 1], bool).reshape(6, 1, 1)
    assert put(labels, 1, wanted, at(2), at(0)).ravel().tolist() == [0, 1, 1, 2, 2, 3]
    assert put(labels, 1, wanted, at(3), NONE).ravel().tolist() == [1, 1, 1, 1, 1, 3]
    assert labels.ravel().tolist() == [1, 1, 0, 2, 2, 3]


def test_nothing_is_taken_beyond_another_class() -> None:
    labels = np.array([1, 0, 2, 0, 0], np.uint8).reshape(5, 1, 1)
    assert put(labels, 1, np.ones_like(labels, bool), at(1), NONE).ravel().tolist() == [1, 1, 2, 0, 0]


def test_a_box_reaches_as_many_mm_along_each_axis() -> None:
    found = boxes.around(np.array([[10, 10, 5], [12, 10, 5]]), 6.0, (1.0, 2.0, 8.0), (40, 12, 9))
    assert found == (slice(4, 19), slice(7, 12), slice(4, 7)) and boxes.corner(found) == (4, 7, 4)
