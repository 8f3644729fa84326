"""Whether places hold errors: masks whose answer is plain."""

from __future__ import annotations

import numpy as np

from benchmarks.interaction.doubts import look, summary

TRUTH = np.zeros((30, 20, 20), np.uint8)
TRUTH[5:15, 5:15, 5:15] = 1


def test_the_largest_thick_error_counts() -> None:
    mask = TRUTH.copy()
    mask[15:19, 5:9, 5:9] = 1  # 64 voxels too many
    mask[5:7, 5:7, 5:7] = 0  # 8 too few
    mask[5:15, 5:15, 15] = 1  # a layer of 100, no thicker than one voxel
    found = look(mask, TRUTH, [(10, 10, 10), (5, 5, 5), (20, 7, 7)], (2.0, 2.0, 2.0))
    # The third place is 4 mm from the nearest voxel of the largest error, and beside it; the second lies in an error.
    assert (found.reached, found.places, found.wrong) == ([False, True, True, True], 3, 1)
    assert found.chance and found.chance == sorted(found.chance) and 0 < found.chance[0] < 1
    further = look(mask, TRUTH, [(21, 7, 7)], (2.0, 2.0, 2.0))
    assert further.reached == [False] * 4 and further.wrong == 0


def test_a_mask_without_thick_errors_counts_for_the_middles_alone() -> None:
    mask = TRUTH.copy()
    mask[5:15, 5:15, 15] = 1
    found = look(mask, TRUTH, [(6, 6, 15)], (1.0, 1.0, 1.0))
    assert (found.reached, found.chance, found.places, found.wrong) == (None, None, 1, 1)
    mask[20:23, 5:8, 5:8] = 1
    both = summary([found, look(mask, TRUTH, [(21, 6, 6)], (1.0, 1.0, 1.0))])
    assert (both["cases"], both["with a thick error"], both["places"]) == (2, 1, 1.0)
    assert both["middles that are wrong"] == 1.0 and both["largest error reached"] == {"1": 1, "3": 1, "5": 1, "10": 1}
