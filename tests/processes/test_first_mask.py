"""The quickstart as a user gets it: what the first mask of the model that comes with the app is worth."""

import json
import time
from pathlib import Path

import numpy as np

from lib.tasks import load_task
from lib.volumes import metrics
from lib.volumes.phantoms.studies import write_studies
from support.helpers import read_nifti
from support.server import Server


def test_the_first_mask_of_the_quickstart_shows_organs(tmp_path):
    """As a user gets it: a fresh server, the quickstart's own example without a label, and then a round from there."""
    studies, task = tmp_path / "studies", load_task("quickstart")
    write_studies(studies, cases=5, labelled=5)
    with Server(studies, tmp_path / "models", {}) as server:
        assert server.client.info()["models"]["quickstart"]["version"] == 1
        started = time.monotonic()
        mask, result = server.client.infer("quickstart", "phantom_004", {})
        print(f"First mask after {time.monotonic() - started:.1f} s")
        left, right = (task.concepts.classes[name].sentences for name in ("left kidney", "right kidney"))
        words = {"left kidney": right, "right kidney": left}
        exchanged, _ = server.client.infer("quickstart", "phantom_004", {"concepts": json.dumps(words)})
    assert result["model_version"] == 1
    assert result["warnings"] == []
    reference = studies / "labels" / "final" / "phantom_004.nii.gz"
    rows = metrics.evaluate_case(task, Path(mask), reference, "phantom_004")
    dice = {row.name: round(row.dice, 3) for row in rows}
    assert min(dice.values()) >= 0.5 and np.mean(list(dice.values())) >= 0.7, dice
    before, after = (np.asarray(read_nifti(file).dataobj) for file in (mask, exchanged))
    values = task.label_values
    for one, other in (("left kidney", "right kidney"), ("right kidney", "left kidney")):
        a, b = before == values[one], after == values[other]
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.95, "a class is what its sentences say"
