"""What clients say about the values of their labels."""

from __future__ import annotations

import numpy as np
import pytest

from lib.stores.uploads.names import named_values, to_task_values
from support.helpers import tiny_task

LIVER = {"name": "liver", "idx": 1}


@pytest.mark.parametrize(
    ("sent", "values"),
    [
        ([{"name": "background", "idx": 0}, LIVER], {1: "liver"}),
        ([{"name": "Background", "value": 0}, LIVER], {1: "liver"}),
        ([{"name": "background"}, {"name": "liver"}, {"name": "aorta"}], {1: "liver", 2: "aorta"}),
        ([{"name": "liver"}, {"name": "aorta"}], {1: "liver", 2: "aorta"}),
        ([LIVER, {"name": "background", "idx": 0}], {1: "liver"}),
    ],
)
def test_listed_background_is_left_out(sent, values):
    assert named_values(sent) == values


def test_segment_called_background_is_background():
    mask = np.array([[[0, 1, 2]]])
    found = to_task_values(
        mask, named_values([{"name": "background", "idx": 1}, {"name": "aorta", "idx": 2}]), tiny_task()
    )
    assert found.tolist() == [[[0, 0, 3]]]


def test_no_other_name_may_have_the_value_of_the_background():
    with pytest.raises(ValueError, match="'liver': expected a value of at least 1, found 0"):
        named_values([{"name": "liver", "idx": 0}])
