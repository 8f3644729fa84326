"""The picture of the versions: drawn from manifests, and nothing drawn where there is nothing."""

import numpy as np
import pytest
from matplotlib.image import imread

from lib.model.reports.version_chart import version_chart
from lib.trainers.gate import decide

CLASSES = ("liver", "spleen")


def manifest(version, decision, served=False):
    return {"version": version, "served": served, "gate": decision.to_dict()}


def scores(liver, spleen):
    return {"case": {"liver": liver, "spleen": spleen}}


def test_served_and_kept_versions_differ_in_the_picture(tmp_path):
    first = decide(None, scores(0.4, 0.5), CLASSES)
    better = decide(scores(0.4, 0.5), scores(0.6, 0.6), CLASSES)
    worse = decide(scores(0.4, 0.5), scores(0.6, 0.1), CLASSES)
    pictures = []
    for second in (better, worse):
        out = tmp_path / "chart.png"
        version_chart("organs", [manifest(1, first), manifest(2, second, served=True)], out)
        pictures.append(imread(out))
    assert pictures[0].shape == pictures[1].shape
    assert not np.array_equal(*pictures)


def test_a_damaged_version_is_left_out(tmp_path):
    first = manifest(1, decide(None, scores(0.4, 0.5), CLASSES), served=True)
    damaged = {"version": 2, "served": False, "damaged": "cut"}
    version_chart("organs", [first, damaged], tmp_path / "a.png")
    version_chart("organs", [first], tmp_path / "b.png")
    assert np.array_equal(imread(tmp_path / "a.png"), imread(tmp_path / "b.png"))


def test_nothing_to_draw_is_said(tmp_path):
    with pytest.raises(ValueError, match="task 'organs' has no version"):
        version_chart("organs", [], tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
