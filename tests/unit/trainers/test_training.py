"""Rounds through the command line: schedule, sigmas, validation, publishing, resuming, and what is refused."""

import json
import math
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from lib.app.cli.commands import app
from lib.model import versions
from lib.model.reports.page import Examined
from lib.model.versions import CheckpointError, Versions
from lib.stores.cases import audit
from lib.tasks import load_task
from lib.trainers import rounds
from lib.trainers import roundtask as trainer_module
from lib.trainers.recipe import LOG_SIGMA_FLOOR
from lib.trainers.rounds import Round
from lib.trainers.roundtask import RoundTask
from support import ROOT
from support.helpers import read_nifti
from support.training import OPTIONS, RESUMED, SMALL, Cases, phantom_cases, small_trainer


def run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_train_infer_evaluate_from_the_command_line(studies, tmp_path):
    """The round's parts in one go: validation on a case of its own, best model, manifest, statistics, metrics."""
    models = tmp_path / "models"
    common = ["--task", "quickstart", "--model-dir", models, *OPTIONS]
    train = ["train", *common, "--data", studies, "--val-split", "0.34", "--device", "cpu"]
    output = run(*train, "--epochs", 3)
    assert "Version 1 of quickstart is served" in output

    store = Versions(models / "quickstart")
    manifest = versions.load(store.path(1))["manifest"]
    assert len(manifest["trained_on"]) == 2
    assert len(manifest["validated_on"]) == 1
    assert not set(manifest["trained_on"]) & set(manifest["validated_on"])
    assert set(manifest["metrics"]["class_dice"]) == {
        "liver",
        "spleen",
        "left kidney",
        "right kidney",
        "aorta",
        "spine",
    }
    assert (models / "quickstart" / "mlflow.db").exists(), "MLflow keeps its runs in SQLite"
    stats = json.loads((models / "quickstart" / "train_stats.json").read_text())
    assert len(stats["loss_history"]) == 3
    assert {"sigma_segmentation", "sigma_alignment", "val_mean_dice", "patches_per_second"} <= set(stats["latest"])

    # The next round starts from the served version, sigmas included, and keeps the split.
    run(*train, "--epochs", 1, "--tracking", "None")
    second = versions.load(store.path(2))
    assert second["manifest"]["parent"] == 1
    assert second["manifest"]["validated_on"] == manifest["validated_on"]
    first = versions.load(store.path(1))["uncertainty"]["log_sigma"]
    assert 0 < (second["uncertainty"]["log_sigma"] - first).abs().max() < 0.01, "sigmas are carried on, not reset"

    image = studies / "phantom_000.nii.gz"
    run("infer", image, *common, "--out", tmp_path / "masks", "--version", "1", "--device", "cpu")
    mask = read_nifti(tmp_path / "masks" / image.name)
    assert mask.shape == read_nifti(image).shape
    assert np.array_equal(mask.affine, read_nifti(image).affine)
    assert json.loads((tmp_path / "masks" / f"{image.name}.json").read_text())["model_version"] == 1

    output = run("evaluate", *common, "--data", studies, "--out", tmp_path / "scores", "--device", "cpu")
    assert "DSC" in output
    scores = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert len(scores["rows"]) == 3 * 6
    assert (tmp_path / "scores" / "metrics.csv").read_text().count("\n") == 1 + 3 * 6


def test_learning_rate_rises_once_and_is_one_half_cosine(studies, tmp_path, monkeypatch):
    """Defect 7: after the warm-up falling from the full rate to the least, however many iterations."""
    rates = []
    step = RoundTask._train_step

    def recording(self, engine, batch):
        rates.append(engine.optimizer.param_groups[0]["lr"])
        return step(self, engine, batch)

    monkeypatch.setattr(RoundTask, "_train_step", recording)
    trainer = small_trainer(tmp_path)
    cases = phantom_cases(studies, 3)
    trainer({"max_epochs": 4, "learning_rate": 1e-3, "val_split": 0, "tracking": "None", "device": "cpu"}, cases)
    least = trainer.task.training.min_learning_rate
    falling = [least + (1e-3 - least) * (1 + math.cos(math.pi * i / 11)) / 2 for i in range(11)]
    assert rates == pytest.approx([0.5e-3, *falling], rel=1e-6), "a tenth of 12 steps is one step of warm-up"


def test_sigmas_are_trained_without_weight_decay_and_bounded(tmp_path):
    """Defect 8: own group, no decay; a loss that vanishes cannot send its weight to infinity."""
    task = small_trainer(tmp_path).task
    trainer = RoundTask(task, tmp_path, Round({}, [], [], Examined(task)))
    context = trainer_module.Context()
    context.device = torch.device("cpu")
    context.request = {"seed": 0, "learning_rate": 1e-3}
    context.network = trainer.network(context)
    groups = trainer.optimizer(context).param_groups
    recipe = trainer.task.training
    assert [g["weight_decay"] for g in groups] == [*[recipe.weight_decay] * 3, 0.0]
    joined = math.sqrt(1e-3 * recipe.language_learning_rate)
    assert [g["lr"] for g in groups] == [1e-3, recipe.language_learning_rate, joined, 1e-3]
    assert [p.shape for p in groups[3]["params"]] == [(3,)]
    counted = sum(p.numel() for g in groups for p in g["params"])
    assert counted == sum(p.numel() for p in context.network.parameters()), "every parameter is optimised (defect 1)"
    assert math.exp(LOG_SIGMA_FLOOR) == pytest.approx(0.1)


def test_a_round_that_goes_on_from_a_version_takes_its_share_of_every_rate(tmp_path):
    task = small_trainer(tmp_path).task
    trainer = RoundTask(task, tmp_path, Round({}, [], [], Examined(task)))
    context = trainer_module.Context()
    context.device = torch.device("cpu")
    context.request = {"seed": 0, "learning_rate": 1e-3, "continued_rate": 0.1}
    context.network = trainer.network(context)
    fresh = [group["lr"] for group in trainer.optimizer(context).param_groups]
    trainer.this.parent = 1
    assert [group["lr"] for group in trainer.optimizer(context).param_groups] == pytest.approx([r / 10 for r in fresh])


def test_a_broken_case_is_set_aside_and_the_rest_trains(studies, tmp_path, caplog):
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(b"")
    label = studies / "labels" / "final" / "phantom_000.nii.gz"
    cases = Cases(
        [
            {"image": str(broken), "label": str(label)},
            {"image": str(studies / "phantom_000.nii.gz"), "label": str(label)},
        ]
    )
    trainer = small_trainer(tmp_path)
    with caplog.at_level("INFO"):
        trainer({"max_epochs": 1, "tracking": "None", "device": "cpu"}, cases)
    assert trainer.versions.served == 1
    assert "zero bytes" in caplog.text
    assert "No validation" in caplog.text


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"max_epochs": "many"}, "max_epochs: expected a whole number, got 'many'"),
        ({"max_epochs": 0}, "max_epochs: 0 is too small"),
        ({"val_split": 1.5}, "val_split 1.5: valid is 0"),
    ],
)
def test_options_out_of_range_are_named(studies, tmp_path, request_, message):
    label = studies / "labels" / "final" / "phantom_000.nii.gz"
    cases = Cases([{"image": str(studies / "phantom_000.nii.gz"), "label": str(label)}])
    with pytest.raises(ValueError, match=message):
        small_trainer(tmp_path)({"tracking": "None", "device": "cpu", **request_}, cases)


def test_nothing_to_train_on_is_said(tmp_path):
    with pytest.raises(ValueError, match="no image has a final label yet"):
        small_trainer(tmp_path)({"device": "cpu"}, Cases())


def test_unusable_labels_are_refused_with_a_table(studies, tmp_path):
    wrong = tmp_path / "wrong.nii.gz"
    source = read_nifti(studies / "labels" / "final" / "phantom_000.nii.gz")
    nib.save(nib.Nifti1Image(np.full(source.shape, 99, np.uint8), source.affine), wrong)
    cases = Cases([{"image": str(studies / "phantom_000.nii.gz"), "label": str(wrong)}])
    with pytest.raises(ValueError, match=r"(?s)none of 1 case.*unusable.*99"):
        small_trainer(tmp_path)({"device": "cpu"}, cases)


def test_a_served_checkpoint_of_another_task_is_refused(studies, tmp_path):
    trainer = small_trainer(tmp_path)
    other = load_task("acdc-mr", {**SMALL, "model.text": "scratch"})
    torch.manual_seed(0)
    trainer.versions.publish(versions.checkpoint_of(trainer_module.build_model(other), other, {}))
    label = studies / "labels" / "final" / "phantom_000.nii.gz"
    cases = Cases([{"image": str(studies / "phantom_000.nii.gz"), "label": str(label)}])
    with pytest.raises(CheckpointError, match="a checkpoint of another task: task 'acdc-mr'"):
        trainer({"tracking": "None", "device": "cpu"}, cases)
    assert trainer.versions.served == 1, "the served version stays"


LEAVE_ONE_OUT = {"val_split": 0, "cross_validate": True, "tracking": "None", "device": "cpu"}


def test_few_cases_are_cross_validated_and_judged_by_it(studies, tmp_path, caplog, monkeypatch):
    """Three cases: each is left out once, then all train. The next round compares held-out scores, case by case. Each
    is also scored with a wording that no training reads."""
    audits = []
    monkeypatch.setattr(trainer_module, "audit", lambda *a: audits.append(1) or audit(*a))
    trainer, cases = small_trainer(tmp_path), phantom_cases(studies, 3)
    with caplog.at_level("INFO"):
        trainer({**LEAVE_ONE_OUT, "max_epochs": 4, "gate_unjudged": "keep"}, cases)
    assert "Fold 2/3: 2 epochs without phantom_001, from fresh weights" in caplog.text
    assert "Fold 3/3, Epoch 2/2" in caplog.text
    assert audits == [1], "audited once, not for each fold"
    first = trainer.versions.manifest(1)
    folds = first["metrics"]["cross_validation"]
    assert set(folds["scores"]) == {"phantom_000", "phantom_001", "phantom_002"} == set(first["trained_on"])
    assert (folds["method"], folds["epochs"]) == ("leave-one-out", 2)
    assert all(set(dice) == set(trainer.task.classes) for dice in folds["scores"].values())
    assert trainer.versions.served == 1
    assert folds["unseen"].keys() == folds["scores"].keys()
    assert "\nDice with wordings it never read: " in caplog.text

    trainer({**LEAVE_ONE_OUT, "max_epochs": 4, "gate_margin": 1}, cases)
    gate = trainer.versions.manifest(2)["gate"]
    assert (gate["judged"], gate["method"], gate["against"]) == (True, "cross-validation", 1)
    assert gate["cases"] == sorted(folds["scores"])
    served = [sum(dice["liver"] for dice in folds["scores"].values()) / 3, gate["table"][0]["served"]]
    assert served[0] == pytest.approx(served[1], abs=1e-4)
    reading = gate["reading"]["table"]
    assert [row["class"] for row in reading] == [*trainer.task.classes, "mean"]
    unseen = sum(dice["liver"] for dice in folds["unseen"].values()) / 3
    assert (reading[0]["served"], reading[0]["served_own"]) == pytest.approx((unseen, served[0]), abs=1e-4)
    assert trainer.stats()["gate"]["reading"] == gate["reading"]
    line = f"Dice with wordings it never read: {reading[-1]['candidate']:.3f} (own {reading[-1]['candidate_own']:.3f})"
    assert line in trainer.versions.report(2).read_text()

    # With other epochs the folds cannot be compared, and every case is known to the served version.
    trainer({**LEAVE_ONE_OUT, "max_epochs": 3, "gate_unjudged": "keep"}, cases)
    third = trainer.versions.manifest(3)
    assert (third["gate"]["judged"], third["status"]) == (False, "kept")
    assert "cannot judge: 0 case(s)" in third["gate"]["reason"]


def test_a_new_case_judges_a_version_that_never_saw_it(studies, tmp_path):
    """The fold that leaves the new case out starts from the served version; both are scored on that case."""
    trainer = small_trainer(tmp_path)
    trainer({**LEAVE_ONE_OUT, "max_epochs": 1}, phantom_cases(studies, 1))
    trainer({**LEAVE_ONE_OUT, "max_epochs": 2}, phantom_cases(studies, 2))
    gate = trainer.versions.manifest(2)["gate"]
    assert gate["judged"]
    assert gate["cases"] == ["phantom_001"]
    assert trainer.versions.manifest(2)["seen"] == ["phantom_000", "phantom_001"]


STOPPED = """
import sys, time
sys.path[:0] = {paths!r}
from pathlib import Path
from support.training import RESUMED, phantom_cases, small_trainer
from lib.trainers import rounds
save = rounds.save_progress
def stopping(this, context, state):
    save(this, context, state)
    if state["epoch"] == 2:
        print("epoch 2 is saved", flush=True)
        time.sleep(600)
rounds.save_progress = stopping
small_trainer(Path({folder!r}))(RESUMED, phantom_cases(Path({studies!r}), 2))
"""


def test_a_killed_round_is_resumed_and_ends_as_if_it_had_run_through(studies, tmp_path, monkeypatch):
    """A real process, killed after its second epoch. While it lives, no other round of the task may begin."""
    rates = []
    step = RoundTask._train_step

    def recording(self, engine, batch):
        rates.append((engine.state.epoch, engine.optimizer.param_groups[0]["lr"]))
        return step(self, engine, batch)

    monkeypatch.setattr(RoundTask, "_train_step", recording)
    cases = phantom_cases(studies, 2)
    whole = small_trainer(tmp_path / "whole")
    whole({**RESUMED, "resume": True}, cases)  # nothing to resume is not an error
    complete, rates[:] = list(rates), []
    assert not (whole.folder / "train" / "last.pt").exists(), "a finished round removes it"

    killed = small_trainer(tmp_path / "killed")
    script = STOPPED.format(
        paths=[str(ROOT / "apps" / "bipvl"), str(ROOT / "tests")],
        folder=str(tmp_path / "killed"),
        studies=str(studies),
    )
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout.readline() == "epoch 2 is saved\n", (tmp_path / "log").read_text()
    with pytest.raises(ValueError, match=rf"already running \(process {process.pid}, since 20"):
        killed(RESUMED, cases)
    assert "already running" in killed.stats()["failure"]["error"]
    assert killed.stats()["epoch"] == 2, "what the other process tells of its round stays"
    process.kill()
    process.wait()
    assert killed.versions.served is None

    with pytest.raises(ValueError, match="seed was 0, now 1.*start over with resume false"):
        killed({**RESUMED, "resume": True, "seed": 1}, cases)
    with pytest.raises(ValueError, match="other training cases"):
        killed({**RESUMED, "resume": True}, phantom_cases(studies, 3))
    # The split has learned of the third case; the round of two cases goes on all the same.
    killed({**RESUMED, "resume": True}, cases)
    assert rates == complete[4:], "from the third epoch, at the same learning rates"
    assert rates[0][0] == 3
    ours, theirs = (versions.load(t.versions.path(1)) for t in (killed, whole))
    assert ours["manifest"]["epoch"] == theirs["manifest"]["epoch"] == 4
    assert len(killed.stats()["loss_history"]) == 4
    assert "failure" not in killed.stats()
    assert all(torch.equal(ours["model"][k], theirs["model"][k]) for k in theirs["model"]), "the same weights"
    assert not (killed.folder / "train" / "last.pt").exists()


def test_what_killed_rounds_left_goes_whatever_their_names(tmp_path):
    left = ("mine/.last.pt.x1", "mine/cache_1/a", "train/.best.pt.x2", "train/cache_2/b", ".train_stats.json.x3")
    kept = ("mine/last.pt", "concepts/.r0001.json.x4", "concepts/cache_3/c", "v0001.pt", "train/events_1/e")
    for name in (*left, *kept):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    with rounds.only_round(tmp_path, "quickstart"):
        found = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert found - {"train/round.lock", "train/round.json"} == set(kept)


def test_resume_after_a_stop_between_and_within_folds(studies, tmp_path, monkeypatch):
    """Stopped in the second fold: the first is not trained again."""

    class Stopped(Exception):
        pass

    save = rounds.save_progress

    def stopping(this, context, state):
        save(this, context, state)
        if str(this.fold) == "Fold 2/3":
            raise Stopped

    trainer, cases = small_trainer(tmp_path), phantom_cases(studies, 3)
    request = {**LEAVE_ONE_OUT, "max_epochs": 6, "val_interval": 1}
    with monkeypatch.context() as patch:
        patch.setattr(rounds, "save_progress", stopping)
        with pytest.raises(Stopped):
            trainer(request, cases)
    epochs = []
    step = RoundTask._train_step

    def recording(self, engine, batch):
        epochs.append(engine.state.epoch)
        return step(self, engine, batch)

    monkeypatch.setattr(RoundTask, "_train_step", recording)
    trainer({**request, "resume": True}, cases)
    # Two cases a fold, one step each: the rest of fold 2, fold 3, then six epochs on three cases.
    assert epochs == [2, 2, 1, 1, 2, 2, *(e for e in range(1, 7) for _ in range(3))]
    assert len(trainer.versions.manifest(1)["metrics"]["cross_validation"]["scores"]) == 3


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"gate_unjudged": "perhaps"}, "gate_unjudged: 'perhaps'; valid are keep, publish"),
        ({"gate_margin": "wide"}, "gate_margin: expected a number"),
        ({"gate_reading": 2}, "gate_reading: expected a number from 0 to 1, or none, got 2"),
        ({"resume": "maybe"}, "resume: expected true or false"),
        ({"name": "../elsewhere"}, "name: expected up to 64 letters, digits"),
        ({"name": "v0002.pt"}, "name: expected up to 64 letters, digits"),
        ({"name": "Concepts"}, "name: expected .*; not concepts, got 'Concepts'"),
    ],
)
def test_options_of_the_gate_are_checked(tmp_path, request_, message):
    with pytest.raises(ValueError, match=message):
        small_trainer(tmp_path)(request_, Cases())
    assert not (tmp_path / "elsewhere").exists()


def test_a_partial_label_trains_and_is_scored_for_its_classes_only(studies, tmp_path):
    cases = phantom_cases(studies, 2)
    for case in cases:
        case["annotated"] = ["liver", "spleen"]
    trainer = small_trainer(tmp_path)
    trainer({**LEAVE_ONE_OUT, "max_epochs": 2}, cases)
    scores = trainer.versions.manifest(1)["metrics"]["cross_validation"]["scores"]
    assert [set(dice) for dice in scores.values()] == [{"liver", "spleen"}] * 2


def test_versions_are_listed_shown_and_served_from_the_command_line(studies, tmp_path):
    task = load_task("quickstart", SMALL)
    store = Versions(tmp_path / task.name)
    for _ in range(2):
        store.publish(versions.checkpoint_of(trainer_module.build_model(task), task, {"trained_on": ["a"]}))
    common = ["--task", "quickstart", "--model-dir", tmp_path]
    assert "served" in run("versions", "list", *common)
    assert json.loads(run("versions", "show", "1", *common))["trained_on"] == ["a"]
    assert "Version 1 is served" in run("versions", "serve", "1", *common)
    assert store.served == 1
