"""The scans that the quickstart fills a folder with."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from lib.app import examples
from lib.app.examples import Example, copy_studies, fill
from lib.files import FINAL
from lib.stores.cases import read_datalist
from lib.stores.local import LocalStore
from lib.tasks import load_task
from lib.volumes.reading import encode, read_volume
from support import ROOT

HIPPOCAMPUS = load_task(examples.TASKS[Example.HIPPOCAMPUS])


def test_an_empty_folder_gets_twelve_people_four_of_them_labelled(tmp_path: Path) -> None:
    fill(Example.HIPPOCAMPUS, tmp_path / "new")
    store = LocalStore(str(tmp_path / "new"), False, (HIPPOCAMPUS,))
    assert len(store.list_images()) == 12
    assert len(store.get_labeled_images()) == 4 and len(store.get_unlabeled_images()) == 8
    cases = [case for case in read_datalist(tmp_path / "new") if case["label"]]
    assert len(cases) == 4
    for case in cases:
        label, image = read_volume(str(case["label"])), read_volume(str(case["image"]))
        assert label.shape == image.shape
        assert set(encode(label, HIPPOCAMPUS, case["id"]).unique().tolist()) == {0, 1, 2}


def test_what_a_user_has_is_never_overwritten_and_what_they_removed_stays_away(tmp_path: Path) -> None:
    images = copy_studies(examples.SHIPPED / HIPPOCAMPUS.name, tmp_path)
    labels = sorted((tmp_path / "labels" / FINAL).iterdir())
    labels[0].unlink()
    labels[1].write_bytes(b"a correction")
    images[0].write_bytes(b"another image")
    images[-1].unlink()
    assert copy_studies(examples.SHIPPED / HIPPOCAMPUS.name, tmp_path) == images
    assert not labels[0].exists()
    assert (labels[1].read_bytes(), images[0].read_bytes()) == (b"a correction", b"another image")
    assert images[-1].exists(), "an image that is missing is completed"
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]


def test_a_checkout_without_the_images_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="images are missing"):
        copy_studies(tmp_path, tmp_path / "new")


def test_an_unknown_example_is_refused_with_the_valid_ones() -> None:
    app = examples.typer.Typer()
    app.command()(fill)
    result = CliRunner().invoke(app, ["brain", "folder"])
    assert result.exit_code == 2
    assert "hippocampus" in result.output and "phantom" in result.output


def test_the_files_that_come_with_the_app_are_few_and_under_their_licence() -> None:
    folder = examples.SHIPPED / HIPPOCAMPUS.name
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1.2e6
    notice = " ".join((folder / "README.md").read_text().split())
    for words in ("CC BY-SA 4.0", "Medical Segmentation Decathlon", "Antonelli", "1902.09063", "Changes"):
        assert words in notice
    assert (ROOT / "bipvl").read_text().count("lib.app.examples") == 1
