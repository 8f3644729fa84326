"""Rounds through the command line: schedule, sigmas, validation, publishing, resuming, and what is refused."""

import json
import math

import nibabel as nib
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from lib import versions
from lib.cli import app
from lib.phantom import write_studies
from lib.tasks import load_task
from lib.trainers import BiPVLTrain
from lib.trainers import bipvl as trainer_module
from lib.versions import CheckpointError, Versions

SMALL = {
    "model.vision": "unet",  # the cheapest backbone: these tests are about the round, not the network
    "model.feature_size": "4",
    "model.scratch": "{layers: 4, width: 16, heads: 2}",
    "spacing": "[8, 8, 8]",
    "patch": "[48, 48, 48]",
    "training.patches_per_case": "1",
    "training.learning_rate": "1e-3",
}
OPTIONS = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies")
    write_studies(folder, cases=3, labelled=3, seed=1)
    return folder


def run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


class Cases(list):
    def datalist(self):
        return list(self)


def small_trainer(folder, **changes):
    task = load_task("quickstart", {**SMALL, **changes})
    return BiPVLTrain(task, folder / task.name)


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
    mask = nib.load(tmp_path / "masks" / image.name)
    assert mask.shape == nib.load(image).shape
    assert np.array_equal(mask.affine, nib.load(image).affine)
    assert json.loads((tmp_path / "masks" / f"{image.name}.json").read_text())["model_version"] == 1

    output = run("evaluate", *common, "--data", studies, "--out", tmp_path / "scores", "--device", "cpu")
    assert "DSC" in output
    scores = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert len(scores["rows"]) == 3 * 6
    assert (tmp_path / "scores" / "metrics.csv").read_text().count("\n") == 1 + 3 * 6


def test_learning_rate_is_one_half_cosine(studies, tmp_path, monkeypatch):
    """Defect 7: from the full rate to the least, falling at every iteration, whatever their number."""
    rates = []
    step = BiPVLTrain._train_step

    def recording(self, engine, batch):
        rates.append(engine.optimizer.param_groups[0]["lr"])
        return step(self, engine, batch)

    monkeypatch.setattr(BiPVLTrain, "_train_step", recording)
    trainer = small_trainer(tmp_path)
    names = [f"phantom_00{i}.nii.gz" for i in range(3)]
    cases = Cases({"image": str(studies / n), "label": str(studies / "labels" / "final" / n)} for n in names)
    trainer({"max_epochs": 4, "learning_rate": 1e-3, "val_split": 0, "tracking": "None", "device": "cpu"}, cases)
    least = trainer.task.training.min_learning_rate
    expected = [least + (1e-3 - least) * (1 + math.cos(math.pi * i / 12)) / 2 for i in range(12)]
    assert rates == pytest.approx(expected, rel=1e-6)


def test_sigmas_are_trained_without_weight_decay_and_bounded(tmp_path):
    """Defect 8: own group, no decay; a loss that vanishes cannot send its weight to infinity."""
    trainer = small_trainer(tmp_path)
    context = trainer_module.Context()
    context.request = {"seed": 0, "learning_rate": 1e-3}
    context.network = trainer.network(context)
    groups = trainer.optimizer(context).param_groups
    recipe = trainer.task.training
    assert [g["weight_decay"] for g in groups] == [recipe.weight_decay, recipe.weight_decay, 0.0]
    assert [g["lr"] for g in groups] == [1e-3, recipe.language_learning_rate, 1e-3]
    assert [p.shape for p in groups[2]["params"]] == [(3,)]
    counted = sum(p.numel() for g in groups for p in g["params"])
    assert counted == sum(p.numel() for p in context.network.parameters()), "every parameter is optimised (defect 1)"
    assert math.exp(trainer_module.LOG_SIGMA_FLOOR) == pytest.approx(0.1)


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
        ({"max_epochs": "many"}, "max_epochs: expected a number, got 'many'"),
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
    source = nib.load(studies / "labels" / "final" / "phantom_000.nii.gz")
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
