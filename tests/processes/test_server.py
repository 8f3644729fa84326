"""The main job, as its users do it: a real server, MONAI Label's client, real volumes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from monailabel.client.client import MONAILabelClientException

from lib.tasks import load_task
from lib.volumes.reading import read_volume
from support.helpers import read_nifti, write_nifti
from support.server import PlainServer, Server, add_case

SMALL = {
    "model.text": "scratch",
    "model.scratch": "{layers: 12, width: 48, heads: 4}",
    "model.feature_size": "12",
    "model.swin_heads": "1",
    "training.patches_per_case": "1",
    "training.language_learning_rate": "1e-4",
}


def same_grid(mask: Path | str, image: Path) -> bool:
    ours, theirs = read_nifti(mask), read_nifti(image)
    return ours.shape == theirs.shape[:3] and np.array_equal(ours.affine, theirs.affine)


def pooled_dice(mask: Path | str, reference: Path | str) -> float:
    """Multi-class Dice over all organ voxels of a case: 2 |voxels of the right organ| / (|predicted| + |reference|)."""
    ours, theirs = (np.asarray(read_nifti(p).dataobj) for p in (mask, reference))
    return 2 * float(((ours == theirs) & (theirs > 0)).sum()) / float((ours > 0).sum() + (theirs > 0).sum())


@pytest.mark.slow
def test_whole_loop_on_real_ct(real_data, tmp_path):
    """Start, next sample, segment, correct, train, a better mask; restart without network, the same mask."""
    conf = {"models": "amos22-ct", "spacing": "[6, 6, 6]", "patch": "[64, 64, 64]", **SMALL}
    task = load_task("amos22-ct", {k: v for k, v in conf.items() if k != "models"})
    studies, models = tmp_path / "studies", tmp_path / "models"
    folder = real_data / "abdomen_ct"
    add_case(studies, folder / "ts-example_ct.nii.gz", "first")
    add_case(studies, folder / "ts-s0009_ct.nii.gz", "second")
    truth = folder / "ts-example_label-amos15.nii.gz"

    with PlainServer(studies, models, conf) as server:  # as users start it, and so are its rounds
        info = server.client.info()
        assert list(info["models"]) == ["amos22-ct", "amos22-ct_clicks", "amos22-ct_scribbles"]
        assert list(info["trainers"]) == ["amos22-ct"]
        assert info["models"]["amos22-ct"]["labels"] == task.label_values
        assert server.client.next_sample("random", {})["id"] in ("first", "second")

        before, result = server.client.infer("amos22-ct", "first", {"overlap": 0.25})
        assert result["model_version"] == 0
        assert "untrained" in result["warnings"][0]
        assert same_grid(before, studies / "first.nii.gz")
        assert read_nifti(before).get_data_dtype() == np.uint8
        dice_before = pooled_dice(before, truth)

        server.client.save_label("first", str(truth), "final", {})
        assert server.client.next_sample("first", {})["id"] == "second", "a labelled case is not offered again"
        status = server.train("amos22-ct", 900, max_epochs=70, learning_rate=1.5e-2, tracking="None")
        assert status["status"] == "DONE", "\n".join(status["details"])
        assert any("Published version 1" in line for line in status["details"])

        after, result = server.client.infer("amos22-ct", "first", {"overlap": 0.25})
        assert result["model_version"] == 1
        assert result["warnings"] == []
        assert same_grid(after, studies / "first.nii.gz")
        dice_after = pooled_dice(after, truth)
        print(f"Dice of the trained case: {dice_before:.3f} -> {dice_after:.3f}")
        assert dice_after - dice_before >= 0.3

        mask = np.asarray(read_nifti(after).dataobj)
        assert result["voxels"] == {n: int((mask == v).sum()) for n, v in task.label_values.items()}
        for weights in result["concept_weights"].values():
            assert sum(weights.values()) == pytest.approx(1, abs=1e-4)
        assert set(result["alignment"]) == set(task.classes)
        assert 0 <= result["uncertainty"] <= 1
        assert set(result["latencies"]) >= {"pre", "infer", "post", "write", "total"}

        # What Slicer asks for.
        slicer, _ = server.client.infer("amos22-ct", "first", {"result_extension": ".nrrd", "result_dtype": "uint8"})
        ours, theirs = read_volume(slicer), read_volume(after)
        assert slicer.endswith(".nrrd")
        assert np.allclose(ours.affine, theirs.affine, atol=1e-4)
        assert ours.shape == theirs.shape

        _, subset = server.client.infer("amos22-ct", "first", {"label_subset": ["liver"], "largest_component": True})
        assert subset["voxels"]["liver"] > 0
        assert sum(subset["voxels"].values()) == subset["voxels"]["liver"]
        words = {"liver": {"shape": "A tiny round dot near the surface of the body."}}
        _, told = server.client.infer("amos22-ct", "first", {"concepts": json.dumps(words), "overlap": 0.25})
        liver = [answer["concept_weights"]["liver"] for answer in (result, told)]
        assert liver[0] != liver[1], "the request's sentences must reach the model"

        for model, image, params, reason in (
            ("no-such-model", "first", {}, "unknown model 'no-such-model'; valid are amos22-ct"),
            ("amos22-ct", "no-such-image", {}, "unknown image 'no-such-image'"),
            ("amos22-ct", "first", {"model_version": "7"}, "model version '7': valid are 'served' and 1"),
            ("amos22-ct", "first", {"label_subset": ["livr"]}, "unknown label 'livr'; valid are spleen"),
            ("amos22-ct", "first", {"overlap": 1}, "overlap 1.0: valid is 0"),
            ("amos22-ct", "first", {"concepts": {"liver": {"colour": "x"}}}, "unknown attribute 'colour'"),
        ):
            with pytest.raises(MONAILabelClientException) as error:
                server.client.infer(model, image, params)
            assert reason in error.value.msg

    # Another process, no hub, no text encoder's folder: the checkpoint is enough.
    with Server(studies, models, conf, HF_HUB_OFFLINE="1") as server:
        again, result = server.client.infer("amos22-ct", "first", {"overlap": 0.25})
        assert result["model_version"] == 1
        assert np.array_equal(np.asarray(read_nifti(again).dataobj), mask)
        assert server.client.info()["datastore"]["completed"] == 1, "the label is still there"


def falling(losses: list[float]) -> bool:
    """The mean of the last third is below the mean of the first: single steps on random patches jump."""
    third = len(losses) // 3
    return np.mean(losses[-third:]) < np.mean(losses[:third])


@pytest.mark.slow
def test_loop_with_overlapping_regions_on_four_channel_mr(real_data, tmp_path):
    conf = {"models": "msd-brain", "spacing": "[4, 4, 4]", "patch": "[64, 64, 32]", **SMALL}
    studies = tmp_path / "studies"
    folder = real_data / "brain_mr_4ch"
    add_case(studies, folder / "tcga-fg-6692_4ch-flair-t1-t1gd-t2.nii.gz", "glioma")
    with Server(studies, tmp_path / "models", conf) as server:
        server.client.save_label("glioma", str(folder / "tcga-fg-6692_label-msd.nii.gz"), "final", {})
        status = server.train("msd-brain", 600, max_epochs=12, learning_rate=1e-2, tracking="None")
        assert status["status"] == "DONE", "\n".join(status["details"])
        assert falling(server.client.info()["train_stats"]["msd-brain"]["loss_history"])
        mask, result = server.client.infer("msd-brain", "glioma", {"overlap": 0.0})
        assert result["model_version"] == 1
        assert same_grid(mask, studies / "glioma.nii.gz")
        assert set(np.unique(read_nifti(mask).dataobj)) <= {0, 1, 2, 3}, "raw labels, as annotators edit them"


@pytest.mark.slow
def test_loop_on_anisotropic_cardiac_mr_and_refusals(real_data, tmp_path):
    conf = {"models": "acdc-mr", "spacing": "[3, 3, 10]", "patch": "[64, 64, 32]", **SMALL}
    studies = tmp_path / "studies"
    folder = real_data / "cardiac_mr_acdc"
    for patient in ("patient001", "patient002"):
        add_case(studies, folder / f"{patient}_frame01.nii.gz", patient)
    flat = write_nifti(tmp_path / "flat.nii.gz", np.ones((40, 40), np.int16), np.eye(4))
    add_case(studies, flat, "flat")
    (studies / "broken.nii.gz").write_bytes(b"this is not NIfTI")
    with Server(studies, tmp_path / "models", conf) as server:
        with pytest.raises(MONAILabelClientException) as error:
            server.client.infer("acdc-mr", "broken", {})
        assert "broken.nii.gz: cannot be read as an image" in error.value.msg
        with pytest.raises(MONAILabelClientException) as error:
            server.client.infer("acdc-mr", "flat", {})
        assert "not a volume" in error.value.msg

        status = server.train("acdc-mr", 120, max_epochs=1)
        assert status["status"] == "ERROR"
        assert "no image has a final label yet" in "\n".join(status["details"])

        # A label on another patient's grid is refused and kept aside. One put there by hand is left out by name, and
        # the good case still trains.
        label = folder / "patient001_frame01_gt.nii.gz"
        server.client.save_label("patient001", str(label), "final", {})
        with pytest.raises(MONAILabelClientException) as error:
            server.client.save_label("patient002", str(label), "final", {})
        assert "not on the grid of its image" in error.value.msg
        assert [p.read_bytes() for p in studies.glob("labels/rejected/patient002/*.nii.gz")] == [label.read_bytes()]
        shutil.copy(label, studies / "labels" / "final" / "patient002.nii.gz")
        status = server.train("acdc-mr", 600, max_epochs=12, learning_rate=1e-2, tracking="None")
        assert status["status"] == "DONE", "\n".join(status["details"])
        assert "patient002: " in server.log.read_text()
        stats = server.client.info()["train_stats"]["acdc-mr"]
        assert falling(stats["loss_history"])
        assert (studies / "labels" / "final" / "patient002.nii.gz").exists(), "nothing is lost"
        mask, result = server.client.infer("acdc-mr", "patient001", {"overlap": 0.0})
        assert result["model_version"] == 1
        assert same_grid(mask, studies / "patient001.nii.gz")
