"""Where a model doubts: places that a reader can derive by hand, on the grid of the model and on that of the file."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lib.infers.explain.doubts import FEWEST, LEAST, MOST, REACH, described, doubts
from support.helpers import tiny_overlapping_task, tiny_task

SHAPE = (40, 36, 30)
MM1 = (1.0, 1.0, 1.0)


def exclusive(*blocks: tuple[int, float, tuple[slice, ...]], channels: int = 3) -> torch.Tensor:
    """Background everywhere, but for blocks of (channel, probability); the rest of a block is background."""
    p = torch.zeros(channels, *SHAPE)
    p[0] = 1
    for channel, probability, box in blocks:
        p[0][box] -= probability
        p[channel][box] = probability
    return p


def block(i: int, j: int, k: int, side: int = 5) -> tuple[slice, ...]:
    return tuple(slice(n, n + side) for n in (i, j, k))


def test_a_block_that_may_as_well_be_background_is_one_place() -> None:
    (place,) = doubts(exclusive((2, 0.5, block(10, 12, 14))), False, (2.0, 1.0, 1.5))
    assert (place.row, place.rival, place.voxel, place.box) == (1, None, (12, 14, 16), block(10, 12, 14))
    assert (place.volume, place.entropy, place.probability) == (125 * 3.0, 1.0, 0.5)


def test_what_is_certain_or_too_small_is_no_place() -> None:
    assert doubts(exclusive(), False, MM1) == []
    # H(0.9) = 0.469 bits and H(0.1) likewise
    assert doubts(exclusive((1, 0.9, block(1, 1, 1)), (1, 0.1, block(20, 20, 20))), False, MM1) == []
    # 27 voxels of 1 mm³, but 26 are less
    whole = exclusive((1, 0.5, block(5, 5, 5, 3)))
    assert [place.volume for place in doubts(whole, False, MM1)] == [27.0]
    whole[:, 5, 5, 5] = torch.tensor([1.0, 0, 0])
    assert doubts(whole, False, MM1) == []
    # 7 large voxels are a speck all the same, 8 are not
    coarse = exclusive((1, 0.5, (slice(5, 7), slice(5, 7), slice(5, 7))))
    assert [place.volume for place in doubts(coarse, False, (4.0, 4.0, 4.0))] == [FEWEST * 64.0]
    coarse[:, 5, 5, 5] = torch.tensor([1.0, 0, 0])
    assert doubts(coarse, False, (4.0, 4.0, 4.0)) == []


def test_places_come_by_volume_times_entropy() -> None:
    large, small, unsure = block(2, 2, 2, 6), block(20, 2, 2, 4), block(20, 20, 20, 5)
    found = doubts(exclusive((1, 0.25, large), (1, 0.5, small), (2, 0.5, unsure)), False, MM1)
    assert [place.box for place in found] == [large, unsure, small]
    quarter = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))  # 0.811 bits
    assert [place.entropy for place in found] == pytest.approx([quarter, 1.0, 1.0])
    assert 6**3 * quarter > 5**3 > 4**3


def test_between_two_classes_the_likelier_one_is_in_question_and_the_other_its_rival() -> None:
    p = exclusive((1, 0.4, block(8, 8, 8)))
    p[2, 8:13, 8:13, 8:13] = 0.55
    p[0, 8:13, 8:13, 8:13] = 0.05
    (place,) = doubts(p, False, MM1)
    assert (place.row, place.rival, round(place.probability, 6)) == (1, 0, 0.55)


def test_classes_that_touch_are_places_of_their_own() -> None:
    found = doubts(exclusive((1, 0.5, block(8, 8, 8)), (2, 0.5, block(13, 8, 8))), False, MM1)
    assert sorted((place.row, place.box) for place in found) == [(0, block(8, 8, 8)), (1, block(13, 8, 8))]


def test_where_classes_overlap_the_less_certain_one_is_in_question() -> None:
    p = torch.zeros(2, *SHAPE)
    p[0, 5:20, 5:20, 5:20] = 1.0  # certainly the whole
    p[1, 8:13, 8:13, 8:13] = 0.5  # and perhaps the core
    (place,) = doubts(p, True, MM1)
    assert (place.row, place.rival, place.box, place.probability) == (1, None, block(8, 8, 8), 0.5)


def test_a_shell_is_cut_up_and_a_thick_place_is_not() -> None:
    """A plane of doubt, 40 mm wide: places reach 8 mm. A cube of 20 mm is 10 mm deep: one place holds all of it."""
    plane = doubts(exclusive((1, 0.5, (slice(10, 12), slice(None), slice(None)))), False, MM1)
    assert len(plane) > 1
    for place in plane:
        ends = zip(place.voxel, place.box, strict=True)
        assert all(n - part.start <= REACH and part.stop - 1 - n <= REACH for n, part in ends)
    assert sum(place.volume for place in plane) <= 2 * 36 * 30, "no voxel is in two of them"
    # The distance from its middle to its corner is 17.3 mm, and twice its depth is 20 mm.
    (cube,) = doubts(exclusive((1, 0.5, block(5, 5, 5, 20))), False, MM1)
    assert cube.volume == 20**3


def test_the_list_is_bounded_on_noise_too() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(4, 48, 48, 48, generator=generator).softmax(0)
    assert len(doubts(noise, False, (3.0, 3.0, 3.0))) <= MOST
    specks = torch.zeros(2, 48, 48, 48)
    specks[1, ::4, ::4, ::4] = 0.5
    specks[0] = 1 - specks[1]
    assert doubts(specks, False, MM1) == []


def test_the_threshold_is_in_bits() -> None:
    """H(0.19) = 0.7015, H(0.18) = 0.6801."""
    assert LEAST == 0.7
    assert len(doubts(exclusive((1, 0.19, block(8, 8, 8))), False, MM1)) == 1
    assert doubts(exclusive((1, 0.18, block(8, 8, 8))), False, MM1) == []


def test_places_are_described_on_the_grid_of_the_file() -> None:
    """The file is flipped along x, half as fine along z, and begins elsewhere; it ends within the place."""
    task = tiny_task()
    found = doubts(exclusive((2, 0.5, block(10, 12, 14)), channels=4), False, MM1)
    affine = np.eye(4)  # RAS, mm are voxels
    original = np.diag([-1.0, 1.0, 2.0, 1.0])
    original[:3, 3] = 39, -2, 0
    meta = {"affine": affine, "original_affine": original, "spatial_shape": (40, 36, 9)}
    (place,) = described(found, task, meta)
    assert place["voxel"] == [39 - 12, 14 + 2, 8] and place["box"] == [[25, 29], [14, 18], [7, 8]]
    assert place["centre"] == [-12.0, -14.0, 16.0]  # LPS
    assert place["corners"] == [[-14.0, -12.0, 14.0], [-10.0, -16.0, 16.0]]
    assert (place["id"], place["label"], place["class"], place["instead"]) == (
        "2-27-16-8",
        "spleen",
        "spleen",
        "background",
    )
    assert place["extent"] == [5.0, 5.0, 5.0]
    assert (place["volume"], place["entropy"], place["probability"]) == (125.0, 1.0, 0.5)
    assert place["why"] == "The model is 50% sure of spleen; background comes next."


def test_a_region_is_corrected_by_the_label_that_no_smaller_one_has() -> None:
    task = tiny_overlapping_task()
    p = torch.zeros(3, *SHAPE)
    for n in range(3):
        p[n][block(5 + 10 * n, 8, 8)] = 0.5
    meta = {"affine": np.eye(4), "original_affine": np.eye(4), "spatial_shape": SHAPE}
    found = described(doubts(p, True, MM1), task, meta)
    assert task.regions is not None
    regions = {name: region.labels for name, region in task.regions.items()}
    for place in sorted(found, key=lambda one: one["voxel"]):
        smaller = [set(labels) for labels in regions.values() if set(labels) < set(regions[place["class"]])]
        assert place["label"] in regions[place["class"]]
        assert not any(place["label"] in labels for labels in smaller) and place["instead"] == "not"
    assert {place["class"] for place in found} == set(regions)
    assert len({place["label"] for place in found}) == 3
