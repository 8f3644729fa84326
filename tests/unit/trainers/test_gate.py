"""The publish gate: its decision by cases derived by hand, then with a trained model and copies made worse."""

import nibabel as nib
import numpy as np
import pytest
import torch

from lib.trainers import BiPVLTrain
from lib.trainers.gate import decide
from lib.trainers.judging import judge
from lib.volumes.folders import image_id
from support.helpers import read_nifti
from support.training import BOXES, Cases, box_case

CLASSES = ("liver", "spleen")
ROUND = {"val_split": 0.25, "patches_per_case": 2, "tracking": "None", "device": "cpu"}


def scores(*cases):
    """Dice of liver and spleen for case a, b, …"""
    return {name: dict(zip(CLASSES, dice, strict=True)) for name, dice in zip("abcdef", cases, strict=False)}


def test_the_first_version_is_published():
    decision = decide(None, scores((0.1, 0.3)), CLASSES)
    assert (decision.publish, decision.judged) == (True, False)
    assert "first version" in decision.reason
    assert [row.candidate for row in decision.rows] == pytest.approx([0.1, 0.3, 0.2])


@pytest.mark.parametrize(
    ("candidate", "publish", "reason"),
    [
        ((0.8, 0.6), True, "mean Dice 0.700 to 0.700"),  # equal
        ((0.79, 0.62), True, "mean Dice 0.700 to 0.705"),  # one class falls within the margin, the mean rises
        ((0.80, 0.59), False, "mean Dice falls from 0.700 to 0.695"),  # within the margin, but the mean falls
        ((0.95, 0.57), False, "falls by more than 0.02: spleen by 0.030"),  # the mean rises, one class is lost
        ((0.82, 0.58), True, "0.700 to 0.700"),  # exactly the margin
        ((0.1, 0.1), False, "mean Dice falls from 0.700 to 0.100; Dice falls by more than 0.02: liver by 0.700, spl"),
    ],
)
def test_mean_and_margin(candidate, publish, reason):
    decision = decide(scores((0.8, 0.6)), scores(candidate), CLASSES, margin=0.02)
    assert (decision.publish, decision.judged) == (publish, True)
    assert reason in decision.reason


def test_a_class_is_averaged_over_cases():
    """liver: 0.9, 0.5 → 0.7, 0.6 falls in case a only; the class's mean over both cases decides."""
    decision = decide(scores((0.9, 0.5), (0.5, 0.5)), scores((0.8, 0.5), (0.6, 0.5)), CLASSES)
    assert decision.publish
    assert decision.rows[0].difference == pytest.approx(0)


def test_only_common_cases_count():
    decision = decide(scores((0.5, 0.5), (0.1, 0.1)), scores((0.6, 0.6)), CLASSES)
    assert decision.publish
    assert decision.cases == ("a",)


@pytest.mark.parametrize(("unjudged", "publish"), [("keep", False), ("publish", True)])
def test_too_few_cases_cannot_be_judged(unjudged, publish):
    served, candidate = scores((0.5, 0.5)), scores((0.9, 0.9))
    decision = decide(served, candidate, CLASSES, min_cases=2, unjudged=unjudged)
    assert (decision.publish, decision.judged) == (publish, False)
    assert "cannot judge: 1 case(s) that neither model was trained on, 2 needed" in decision.reason
    assert not decide({}, {}, CLASSES).judged


def test_a_class_that_no_label_shows_is_not_judged():
    """The candidate raises a false alarm for the spleen, which no label shows: only the liver decides."""
    decision = decide(scores((0.5, 1.0)), scores((0.6, 0.0)), CLASSES, shown={"a": ["liver"]})
    assert decision.publish
    assert (decision.rows[1].served, decision.rows[1].candidate) == (None, None)
    assert "not judged" in decision.table().splitlines()[2]
    # If another label shows it, the false alarm counts.
    both = scores((0.5, 1.0), (0.5, 0.5))
    worse = scores((0.6, 0.0), (0.6, 0.5))
    assert not decide(both, worse, CLASSES, shown={"a": ["liver"], "b": ["liver", "spleen"]}).publish


def test_nothing_shown_cannot_be_judged():
    decision = decide(scores((1.0, 1.0)), scores((0.0, 0.0)), CLASSES, shown={"a": []})
    assert (decision.publish, decision.judged) == (False, False)
    assert "no label of the compared cases shows any class" in decision.reason


def test_a_partial_label_counts_for_its_classes_only():
    served, candidate = {"a": {"liver": 0.5}, "b": {"liver": 0.5, "spleen": 0.4}}, {}
    candidate = {"a": {"liver": 0.7}, "b": {"liver": 0.5, "spleen": 0.4}}
    rows = decide(served, candidate, CLASSES).rows
    assert [row.difference for row in rows] == pytest.approx([0.1, 0.0, 0.05])


def test_table_and_plain_data_say_the_same():
    decision = decide(scores((0.8, 0.6)), scores((0.7, 0.65)), CLASSES)
    assert decision.table().splitlines() == [
        "Dice    served  candidate  difference",
        "liver    0.800      0.700      -0.100",
        "spleen   0.600      0.650      +0.050",
        "mean     0.700      0.675      -0.025",
    ]
    data = decision.to_dict()
    assert data["table"][0] == {"class": "liver", "served": 0.8, "candidate": 0.7, "difference": -0.1}
    assert (data["publish"], data["judged"], data["cases"]) == (False, True, ["a"])


# With models: a small network that has learned a few boxes, and copies of it that were made worse


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two rounds of the same task: a short one, then one that learns. The trainer and its cases."""
    folder = tmp_path_factory.mktemp("gate")
    cases = Cases(box_case(folder, number) for number in range(4))
    trainer = BiPVLTrain(BOXES, folder / "models" / BOXES.name)
    for epochs, rate in ((1, 1e-3), (24, 1e-2)):
        trainer({**ROUND, "max_epochs": epochs, "learning_rate": rate}, cases)
    return trainer, cases


def verdict(trainer, cases, candidate, **options):
    """What the gate says of a checkpoint, compared with the served version on the round's validation case."""
    training, validation = (
        [{**case, "id": image_id(case["image"])} for case in cases if (image_id(case["image"]) in ids) == wanted]
        for ids, wanted in ((candidate["manifest"]["trained_on"], True), (candidate["manifest"]["validated_on"], True))
    )
    request = {"gate_margin": 0.02, "gate_min_cases": 1, "gate_unjudged": "keep", "gate_clicks": 0}
    request |= {"gate_reading": "none", **options}
    return judge(candidate, trainer.task, trainer.versions, training, validation, request, torch.device("cpu"))


def test_a_better_round_is_published(trained):
    trainer, _ = trained
    first, second = trainer.versions.manifests()
    assert (first["status"], first["gate"]["judged"]) == ("served at publish", False)
    assert (second["served"], second["parent"], second["gate"]["judged"]) == (True, 1, True)
    means = second["gate"]["table"][-1]
    assert means["class"] == "mean"
    assert means["candidate"] > means["served"] + 0.1, "it has learned something, or the tests below mean nothing"
    assert second["gate"]["cases"] == second["validated_on"]
    assert trainer.stats()["gate"]["publish"] is True
    assert "case_000" in trainer.stats()["audit"]["table"]


def test_the_same_model_passes(trained):
    trainer, cases = trained
    decision, report = verdict(trainer, cases, trainer.versions.read(2))
    assert decision.publish, decision.reason
    assert report["against"] == 2


def shuffle_channels(checkpoint):
    for key in ("head.weight", "head.bias"):
        checkpoint["model"][key] = checkpoint["model"][key].roll(1, 0)


def destroy_spleen(checkpoint):
    checkpoint["model"]["head.bias"][2] -= 100


def random_vision(checkpoint):
    generator = torch.Generator().manual_seed(0)
    for key, value in checkpoint["model"].items():
        if key.startswith("vision.") and value.is_floating_point():
            value += value.abs().mean() * torch.randn(value.shape, generator=generator)


def noisy_text(checkpoint):
    """Noise on the text encoder and on what carries text to the image. The gate compares masks: sentences exchanged
    between classes, or noise on the text encoder alone, move the mean Dice of this narrow network by less than 0.001,
    so that no gate on Dice could see them."""
    generator = torch.Generator().manual_seed(0)
    for key, value in checkpoint["model"].items():
        if key.startswith(("text.", "fusion.")) and value.is_floating_point():
            value += 10 * value.abs().mean() * torch.randn(value.shape, generator=generator)


@pytest.mark.parametrize("damage", [shuffle_channels, destroy_spleen, random_vision, noisy_text])
def test_a_model_made_worse_is_blocked(trained, damage):
    trainer, cases = trained
    candidate = trainer.versions.read(2)
    damage(candidate)
    decision, _ = verdict(trainer, cases, candidate)
    assert decision.judged
    assert not decision.publish, decision.table()


def test_cases_that_a_model_was_trained_on_do_not_judge(trained):
    trainer, cases = trained
    candidate = trainer.versions.read(2)
    candidate["manifest"]["seen"] = [image_id(case["image"]) for case in cases]
    decision, report = verdict(trainer, cases, candidate)
    assert (decision.publish, decision.judged) == (False, False)
    assert report["left_out"] == candidate["manifest"]["validated_on"]
    assert verdict(trainer, cases, candidate, gate_unjudged="publish")[0].publish


def test_a_round_with_wrong_labels_is_kept_and_the_served_file_stays(trained, tmp_path, caplog):
    trainer, cases = trained
    served = trainer.versions.path(2)
    before = served.read_bytes()
    wrong = Cases()
    for case in cases:
        label = read_nifti(case["label"])
        values = np.asarray(label.dataobj)
        path = tmp_path / f"{image_id(case['image'])}.nii.gz"
        nib.save(nib.Nifti1Image(np.where(values > 0, values % 3 + 1, 0).astype(np.uint8), label.affine), path)
        validates = image_id(case["image"]) in trainer.versions.manifest(2)["validated_on"]
        wrong.append(case if validates else {**case, "label": str(path)})
    with caplog.at_level("INFO"):
        trainer({**ROUND, "max_epochs": 4, "learning_rate": 1e-2}, wrong)
    assert (trainer.versions.numbers(), trainer.versions.served) == ([1, 2, 3], 2)
    assert served.read_bytes() == before
    kept = trainer.versions.manifest(3)
    assert (kept["status"], kept["parent"], kept["gate"]["publish"]) == ("kept", 2, False)
    assert "POST /model/tiny/versions/3/serve" in caplog.text
    assert trainer.stats()["served"] == 2
    trainer.versions.serve(3, why="test")
    trainer.versions.serve(2, why="test")
    assert served.read_bytes() == before, "rolling back rewrites nothing"
