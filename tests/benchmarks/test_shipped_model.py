"""What makes the shipped models: who is unseen, which crops the quickstart has, and what a shipped checkpoint says."""

from pathlib import Path

import pytest
import torch

from benchmarks.accuracy.data import SPLITS, Split, find_cases, split_cases
from benchmarks.accuracy.settings import Run
from benchmarks.shipped_model import HIPPOCAMPUS, SHIPPED, as_published, dice, examples, person, ship, unseen_people
from lib.model import checkpoints
from lib.model.versions import Versions
from lib.volumes.metrics import Row
from support.helpers import checkpoint, tiny_task


def crop(number: int) -> dict[str, str]:
    name = f"hippocampus_{number:03}"
    return {"id": name, "patient": name, "image": name, "label": name}


SPLIT = Split([crop(2), crop(3)], [crop(8)], [crop(1), crop(4), crop(5), crop(6), crop(7), crop(9)])


def test_the_other_hippocampus_of_a_seen_person_is_not_unseen() -> None:
    assert [person(crop(n)) for n in (1, 2, 3, 4)] == [1, 1, 2, 2]
    assert [case["id"][-1] for case in unseen_people(SPLIT)] == ["5", "6", "9"]
    assert examples(SPLIT, 1, 2) == ([crop(2)], [crop(5), crop(6)])


def test_the_quickstart_has_the_crops_that_the_split_gives_byte_for_byte(real_data: Path) -> None:
    folder = real_data / "hippocampus_mr_msd"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    labelled, unlabelled = examples(split_cases(find_cases(folder), shares=SPLITS[HIPPOCAMPUS]))
    assert len({person(case) for case in (*labelled, *unlabelled)}) == 12
    for kind, cases in (("images", [*labelled, *unlabelled]), ("labels", labelled)):
        expected = {Path(case[kind[:-1]]).name: Path(case[kind[:-1]]).read_bytes() for case in cases}
        assert {path.name: path.read_bytes() for path in (SHIPPED / HIPPOCAMPUS / kind).iterdir()} == expected


def test_a_run_of_the_accuracy_benchmark_becomes_a_version_like_a_rounds(tmp_path: Path) -> None:
    task = tiny_task()
    run = Run(HIPPOCAMPUS, "bipvl", "text", size="task", iterations=6)
    found = as_published(checkpoint(task), task, SPLIT, run, tmp_path / "run.pt")
    rows = [Row("a", name, 0.91234, 1.0, 0.9, 1, 1) for name in task.classes]
    ship(found, {"unseen people": rows}, tmp_path / "shipped.pt")
    shipped = checkpoints.load(tmp_path / "shipped.pt")
    assert {t.dtype for t in shipped["model"].values() if t.is_floating_point()} == {torch.float16}
    store = Versions(tmp_path / "tiny")
    manifest = store.manifest(store.publish(shipped))
    assert (manifest["origin"], manifest["epoch"]) == ("shipped", 3 * task.training.batch_size)
    assert store.seen(1) == manifest["trained_on"] == ["hippocampus_002", "hippocampus_003"]
    assert manifest["metrics"]["held_out"]["unseen people"]["mean"] == 0.9123


@pytest.mark.parametrize("changes", [{"spacing": [2.0, 1.0, 1.0]}, {"model": {"text_format": "name"}}])
def test_a_run_of_another_task_is_not_shipped(tmp_path: Path, changes: dict) -> None:
    run = Run(HIPPOCAMPUS, "bipvl", "text", size="task", iterations=6)
    with pytest.raises(ValueError, match="remove it to train again"):
        as_published(checkpoint(tiny_task(**changes)), tiny_task(), SPLIT, run, tmp_path / "run.pt")


def test_two_empty_masks_agree() -> None:
    one = torch.tensor([True, True, False]).numpy()
    assert (dice(one, one), dice(one, ~one), dice(one & ~one, one & ~one)) == (1.0, 0.0, 1.0)
