"""The app's start-up: which tasks it serves, and what it says when it cannot."""

import subprocess
import sys

import pytest
from fastapi import HTTPException

from lib.app.bipvl import BiPVLApp, _select
from lib.tasks import TaskError
from support import ROOT


def test_quickstart_is_the_default_and_names_select():
    assert list(_select({})) == ["quickstart"]
    assert list(_select({"models": "mmwhs-ct, mmwhs-mr"})) == ["mmwhs-ct", "mmwhs-mr"]


def test_dotted_settings_change_every_selected_task():
    tasks = _select({"models": "mmwhs-ct,mmwhs-mr", "model.feature_size": "24", "server_mode": "true"})
    assert {t.model.feature_size for t in tasks.values()} == {24}


@pytest.mark.parametrize(
    ("conf", "message"),
    [
        ({"models": "amos22ct"}, "unknown task 'amos22ct'; valid are .*did you mean 'amos22-ct'"),
        ({"model.feature_sise": "24"}, "feature_sise: unknown key; valid are .*did you mean 'feature_size'"),
        ({"config": "missing.yaml"}, "task file missing.yaml does not exist"),
    ],
)
def test_mistakes_at_start_up_are_named(conf, message):
    with pytest.raises(TaskError, match=message):
        _select(conf)


def test_app_offers_a_model_and_a_trainer_a_task(tmp_path, caplog):
    (tmp_path / "studies" / "p1").mkdir(parents=True)
    (tmp_path / "studies" / "p1" / "x.nii.gz").touch()
    app = BiPVLApp(str(ROOT / "apps" / "bipvl"), str(tmp_path / "studies"), {"model_dir": str(tmp_path / "models")})
    info = app.info()
    assert list(info["models"]) == ["quickstart", "quickstart_clicks", "quickstart_scribbles"]
    assert list(info["trainers"]) == ["quickstart"]
    assert info["models"]["quickstart"]["config"]["model_version"] == ["served"]
    assert "no images: there are images in sub folders, e.g. p1/x.nii.gz" in caplog.text
    assert info["labels"] == ["liver", "spleen", "left kidney", "right kidney", "aorta", "spine"]


def test_clicks_and_scribbles_can_be_left_out(tmp_path):
    (tmp_path / "studies").mkdir()
    conf = {"model_dir": str(tmp_path / "models"), "interaction": "false"}
    app = BiPVLApp(str(ROOT / "apps" / "bipvl"), str(tmp_path / "studies"), conf)
    assert list(app.info()["models"]) == ["quickstart"]
    asked = {"gate_clicks": 2, "refiner": 10}
    done = app.trainers["quickstart"].checked(asked)
    assert (done["gate_clicks"], done["refiner"]) == (0, 0), "a round has nothing to do with clicks either"
    with pytest.raises(TaskError, match="--conf interaction: expected true or false, got 'perhaps'"):
        BiPVLApp(str(ROOT / "apps" / "bipvl"), str(tmp_path / "studies"), {**conf, "interaction": "perhaps"})


def test_info_says_what_counts_for_nothing(tmp_path, caplog):
    studies, folder = tmp_path / "studies", tmp_path / "studies" / "labels" / "final"
    folder.mkdir(parents=True)
    (studies / "loop.nii.gz").symlink_to("loop.nii.gz")
    (folder / "old name.nii.gz").touch()
    app = BiPVLApp(str(ROOT / "apps" / "bipvl"), str(studies), {"model_dir": str(tmp_path / "models")})
    assert "1 label file(s) without an image: labels/final/old name.nii.gz" in caplog.text
    found = app.info()["datastore"]
    assert found["labels_without_image"] == {"count": 1, "files": ["labels/final/old name.nii.gz"]}
    assert "loop.nii.gz" in found["left_out"]["files"]["loop"]
    with pytest.raises(HTTPException, match="loop.nii.gz: it cannot be read") as error:
        app.infer({"model": "quickstart", "image": "loop"})
    assert error.value.status_code == 409


def test_a_users_mistake_is_one_line_on_the_command_line():
    command = [sys.executable, str(ROOT / "apps" / "bipvl" / "main.py"), "concepts", "no-such-task"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "Error: unknown task 'no-such-task'" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr
