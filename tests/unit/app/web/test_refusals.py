"""Requests that are refused: a sentence without a path of the server, and one line in its log without a traceback."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import numpy as np
import pytest
from fastapi.testclient import TestClient

from lib.app.bipvl import BiPVLApp
from lib.app.web import uploads
from lib.app.web.access.guard import Guard
from lib.app.web.access.options import WebOptions
from lib.app.web.answers import Places
from lib.app.web.common import Services
from lib.app.web.install import build, places_of
from support import ROOT
from support.helpers import write_nifti
from support.training import SMALL

INFER, CLICKS = "/infer/quickstart?image=", "/infer/quickstart_clicks?image="
DOUBTS, TRY = "/doubts/quickstart?image=", "/concepts/quickstart/try"
PARAMS: dict[str, dict[str, Any]] = {
    "overlap": {"overlap": 2},
    "version": {"model_version": "v9"},
    "label": {"label_subset": "livr"},
}


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> BiPVLApp:
    """A store with a whole case, and others that cannot be read."""
    folder = tmp_path_factory.mktemp("a server's") / "my studies"
    folder.mkdir()
    write_nifti(folder / "whole.nii.gz", np.arange(16**3, dtype=np.int16).reshape(16, 16, 16))
    write_nifti(folder / "plane.nii.gz", np.zeros((16, 16), np.int16))
    write_nifti(folder / "two.nii.gz", np.zeros((8, 8, 8, 2), np.int16))
    (folder / "cut.nii.gz").write_bytes((folder / "whole.nii.gz").read_bytes()[:300])
    (folder / "empty.nii.gz").touch()
    conf = {**SMALL, "model_dir": str(folder.parent / "models")}
    return BiPVLApp(str(ROOT / "apps" / "bipvl"), str(folder), conf)


@pytest.fixture(scope="module")
def client(app: BiPVLApp, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    temporary = tmp_path_factory.mktemp("temporary")
    with ThreadPoolExecutor(1) as infers, pytest.MonkeyPatch.context() as patch:
        patch.setattr(uploads.tempfile, "tempdir", str(temporary))
        options = WebOptions()
        services = Services(app, options, None, app.sessions(), infers, places_of(app, temporary))
        guarded = Guard(build(services), options, None)
        yield TestClient(guarded, "http://localhost", raise_server_exceptions=False, client=("127.0.0.1", 5000))


def label(shape: tuple[int, ...] = (16, 16, 16), value: int = 1) -> bytes:
    return nib.Nifti1Image(np.full(shape, value, np.uint8), np.eye(4)).to_bytes()


def sent(params: dict[str, Any]) -> dict[str, Any]:
    return {"data": {"params": json.dumps(params)}}


def upload(name: str, content: bytes, field: str = "file") -> dict[str, Any]:
    return {"files": {field: (name, content)}}


# method, path, more, status, and what the sentence names
REFUSED: list[tuple[str, str, dict[str, Any], int, str]] = [
    *(("POST", INFER + case, {}, 400, f"{case}.nii.gz: ") for case in ("plane", "two", "cut", "empty")),
    *(
        ("POST", f"{INFER}whole", sent(params), 400, next(iter(params.values())) if name == "label" else "")
        for name, params in PARAMS.items()
    ),
    ("POST", INFER + "nobody", {}, 404, "unknown image 'nobody'"),
    ("POST", INFER + "../../etc/passwd", {}, 404, "unknown image"),
    ("POST", "/infer/other?image=whole", {}, 404, "unknown model 'other'; valid are quickstart"),
    ("POST", INFER + "whole", sent({"image_path": "/etc/passwd"}), 400, "'image_path' cannot be set"),
    *(
        ("POST", f"/infer/quickstart{which}?image=whole", {"data": {"params": f'{{"{key}": {given}}}'}}, 400, reason)
        for which, key in (("", "overlap"), ("_clicks", "foreground"), ("_scribbles", "roi"))
        for given, reason in (
            (f"[[{'9' * 6000}, 1, 1]]", "params: a number of 6000 digits; valid are at most 300"),
            ("[[NaN, 1, 1]]", "params: NaN, infinity or broken Unicode cannot be used"),
            ("[" * 90000, "params: lists and objects in one another, too deep"),
        )
    ),
    *(
        ("POST", f"{CLICKS}whole", sent({"label": "liver", **params}), 400, reason)
        for params, reason in (
            ({"device": "cuda:9", "foreground": [[1, 1, 1]]}, "device: 'cuda:9'; valid are "),
            ({"foreground": [[10**299, 1, 1]]}, "foreground: expected [i, j, k] in voxels, got [100"),
            ({"foreground": [[99, 1, 1]]}, "is outside the image; valid are 0 to 15, 0 to 15, 0 to 15"),
            ({"foreground": [[1, 1, 1]], "roi": [10**299] * 6}, "is beside the image; valid are 0 to 15"),
        )
    ),
    ("POST", "/infer/quickstart", upload("my scan.nii.gz", b"no volume"), 400, "my_scan.nii.gz: cannot be read"),
    ("POST", "/infer/quickstart", upload("x.exe", b"x"), 400, "must end in"),
    ("POST", "/infer/quickstart", {}, 400, "what to segment"),
    ("POST", "/train/quickstart", {"json": {"max_epochs": 0}}, 400, "max_epochs: 0 is too small"),
    ("POST", "/train/quickstart", {"json": {"tracking_uri": "sqlite:///x"}}, 400, "'tracking_uri' cannot be set"),
    ("POST", "/train/", {"json": {"quickstart": [1]}}, 400, "expected a JSON object"),
    ("POST", "/batch/infer/quickstart", {"json": {"overlap": "half"}}, 400, "overlap: expected a number from 0"),
    ("POST", "/batch/infer/quickstart", {"json": {"max_workers": -1}}, 400, "max_workers: -1 is too small"),
    ("POST", "/scoring/dice", {"json": {"model": "other"}}, 400, "model: unknown model 'other'; valid are quickstart"),
    ("POST", "/scoring/", {"json": {"entropy": {"model": "other"}}}, 400, "valid are all, quickstart"),
    ("POST", "/activelearning/random", {"json": {"seed": "soon"}}, 400, "seed: expected a whole number"),
    ("POST", "/activelearning/best", {}, 404, "unknown strategy 'best'"),
    ("PUT", "/datastore/label?image=whole", upload("l.nii.gz", b"", "label"), 400, "l.nii.gz"),
    ("PUT", "/datastore/label?image=whole", upload("l.nii", label((8, 8, 8)), "label"), 400, "grid"),
    ("PUT", "/datastore/label?image=whole", upload("l.png", b"", "label"), 400, "must end in"),
    ("PUT", "/datastore/label?image=empty", upload("l.nii", label(), "label"), 400, "empty"),
    ("PUT", "/datastore/image?image=new", upload("n.nii", b"x"), 400, "cannot be read"),
    ("PUT", "/datastore/image?image=whole", upload("w.nii.gz", b"x"), 400, "not a NIfTI file"),
    ("PUT", "/datastore/image?image=..%2Fx", upload("n.nii", label()), 400, "image id"),
    ("GET", "/datastore/label?label=whole&tag=final", {}, 404, "whole"),
    ("GET", "/datastore/label?label=whole&tag=..%2Fx", {}, 400, "tag"),
    ("GET", "/datastore/dataset", {}, 404, "nothing to download"),
    ("PUT", "/session/?uncompress=true", upload("a.zip", b"x", "files"), 400, "neither a zip nor a tar archive"),
    ("GET", "/session/0", {}, 404, "unknown session"),
    ("PUT", "/model/quickstart", upload("m.pt", b"x"), 400, "m.pt"),
    ("GET", "/model/quickstart", {}, 404, "no version is published yet"),
    ("POST", "/model/quickstart/versions/3/serve", {}, 404, "no version 3"),
    ("DELETE", "/model/quickstart", {}, 405, "POST /model/quickstart/versions/<n>/serve"),
    ("GET", "/reports/quickstart/v0001.html", {}, 404, "no report"),
    ("POST", TRY, {"json": {"image": "whole", "sentences": {"heart": {"shape": "A cone."}}}}, 400, "'heart'"),
    ("POST", TRY, {"json": {"image": "cut"}}, 400, "cut.nii.gz"),
    ("POST", "/concepts/quickstart/map", {"json": {"image": "empty"}}, 400, "empty.nii.gz"),
    ("POST", "/concepts/quickstart/revisions", {"json": {}}, 400, "nothing to save"),
    ("GET", "/agreement/quickstart?image=whole", {}, 404, "no version is published yet"),
    ("GET", f"{DOUBTS}whole", {}, 404, "no version is published yet"),
    ("GET", f"{DOUBTS}nobody", {}, 404, "unknown image 'nobody'"),
    ("GET", f"{DOUBTS}whole&look=perhaps", {}, 422, "look"),
    ("GET", "/doubts/other?image=whole", {}, 404, "unknown model 'other'; valid are quickstart"),
    ("PUT", f"{DOUBTS}whole", {"json": {"place": "x", "answer": "perhaps"}}, 400, "valid are right, fix"),
    ("PUT", f"{DOUBTS}whole", {"json": {"place": 7}}, 422, "body.place"),
    ("PUT", f"{DOUBTS}nobody", {"json": {"place": "x", "answer": "right"}}, 404, "unknown image 'nobody'"),
    ("GET", "/datastore/?output=everything", {}, 422, "output"),
    ("GET", "/nothing%0Ahere", {}, 404, "Not Found"),
    ("POST", "/info/", {}, 405, "Method Not Allowed"),
    ("GET", "/info/", {"headers": {"host": "elsewhere.example"}}, 421, "not known as 'elsewhere.example'"),
    ("GET", "/info/", {"headers": {"origin": "http://elsewhere.example"}}, 403, "may not use this server"),
    ("GET", "/info/", {"headers": {"x-forwarded-for": "198.51.100.7"}}, 403, "lets in programs on its own machine"),
]


@pytest.mark.parametrize(("method", "path", "more", "status", "reason"), REFUSED)
def test_a_refusal_is_a_sentence_and_a_line(app, client, caplog, method, path, more, status, reason):
    caplog.set_level(logging.INFO)
    answer = client.request(method, path, **more)
    assert answer.status_code == status, answer.text
    _has_no_path(app, answer)
    assert reason in answer.json()["detail"]
    lines = [record for record in caplog.records if record.getMessage().startswith("Refused ")]
    assert [record.levelname for record in lines] == ["WARNING"]
    text = lines[0].getMessage()
    assert method in text and repr(httpx.URL(path).path)[1:-1] in text and f"{status}, " in text and "\n" not in text
    assert "127.0.0.1" in text or "198.51.100.7" in text
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR or record.exc_info]


@pytest.mark.parametrize("model", ["quickstart", "quickstart_clicks"])
def test_options_that_nobody_knows_are_named_in_the_answer(client, model):
    """A misspelled option was passed over in silence. What clients add by themselves is no option, and not named."""
    points = {"label": "liver", "foreground": [[1, 1, 1]]} if model.endswith("clicks") else {}
    quiet = {"client_id": "ada", "result_dtype": "uint8", "model": model, "image": "whole"}
    params = {**points, **quiet, "device": "cpu", "overlapp": 0.5, "x" * 900: 1}
    answer = client.post(f"/infer/{model}?image=whole&output=json", **sent(params))
    assert answer.status_code == 200, answer.text
    found = [text for text in answer.json()["warnings"] if text.startswith("unknown options")]
    assert found == [f"unknown options without effect: 'overlapp', '{'x' * 98}…"]


def test_clicks_beside_their_own_box_are_told(client):
    sent_ = sent({"label": "liver", "foreground": [[1, 1, 1]], "roi": [5, 9, 5, 9, 5, 9], "device": "cpu"})
    answer = client.post(f"{CLICKS}whole&output=json", **sent_).json()
    assert answer["changed"] == 0
    assert "roi: 1 of 1 voxels lie outside of the box: they change nothing" in answer["warnings"]


def _has_no_path(app: BiPVLApp, answer: httpx.Response) -> None:
    root = Path(app.studies).parent
    for place in (root, *root.parents[:-2], ROOT):
        assert str(place) not in answer.text
    assert not re.search(r"/(tmp|root|home|usr|var)/", answer.text), answer.text


@pytest.mark.parametrize(
    ("number", "status", "reason", "level"),
    [
        (errno.ENOSPC, 507, "the server's disk is full", "ERROR"),
        (errno.EROFS, 403, "may not write there", "WARNING"),
        (errno.EIO, 500, "its log says more", "ERROR"),
    ],
)
def test_a_disk_that_takes_nothing(app, client, caplog, monkeypatch, number, status, reason, level):
    def full(*_: Any) -> None:
        raise OSError(number, os.strerror(number), f"{app.studies}/.document")

    monkeypatch.setattr(type(app.datastore()), "update_image_info", full)
    answer = client.put("/datastore/image/info?image=whole", data={"info": "{}"})
    assert (answer.status_code, reason in answer.json()["detail"]) == (status, True)
    _has_no_path(app, answer)
    (line,) = (record for record in caplog.records if record.levelno >= logging.WARNING)
    assert line.levelname == level and app.studies in line.getMessage()
    assert bool(line.exc_info) == (status == 500), "only what nobody foresaw has a traceback"


def test_a_mistake_of_the_program_says_where_it_is(app, client, caplog, monkeypatch):
    def mistake(*_: Any) -> None:
        raise ValueError("list.remove(x): x not in list")

    monkeypatch.setattr(type(app.datastore()), "update_image_info", mistake)
    answer = client.put("/datastore/image/info?image=whole", data={"info": "{}"})
    assert (answer.status_code, answer.json()["detail"]) == (400, "list.remove(x): x not in list")
    assert re.search(r"raised in mistake, test_refusals.py:\d+", caplog.text)


def test_asking_whether_something_is_there_is_no_refusal(client, caplog):
    caplog.set_level(logging.WARNING)
    assert client.head("/datastore/image?image=nobody").status_code == 404
    assert "Refused" not in caplog.text


def test_folders_of_the_server_are_hidden(tmp_path):
    studies, link = tmp_path / "my studies", tmp_path / "link"
    studies.mkdir()
    link.symlink_to(studies)
    places = Places([link, tmp_path / "models"], tmp_path / "t")
    shown = {
        f"{studies}/labels/final/a b.nii.gz: other grid": "labels/final/a b.nii.gz: other grid",
        f"{link}/case.nii: cut, see '{tmp_path}/models/v0001.pt'": "case.nii: cut, see 'v0001.pt'",
        f"{studies}: cannot be used": "my studies: cannot be used",
        f"{tmp_path}/t/tmpab12_x/scan.nii: no volume": "scan.nii: no volume",
        "/etc/bipvl/task.yaml: labels: expected": "task.yaml: labels: expected",
        "serve it: POST /model/heart/versions/3/serve": "serve it: POST /model/heart/versions/3/serve",
        f"see http://127.0.0.1:8000{tmp_path}/x": f"see http://127.0.0.1:8000{tmp_path}/x",
        "1/2 of it, and/or nothing": "1/2 of it, and/or nothing",
        f"{studies}-old stays": f"{studies.name}-old stays",
    }
    assert {text: places.hide(text) for text in shown} == shown


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("my scan.nii.gz", "my_scan.nii.gz"),
        ("../../up.nii", "up.nii"),
        ("C:\\scans\\x.NII.GZ", "x.nii.gz"),
        ("腹部" * 100 + ".nii.gz", "….nii.gz"),
        (".nii", "file.nii"),
    ],
)
def test_an_upload_has_its_name_while_it_is_looked_at(name, kept):
    class Sent:
        filename, file = name, BytesIO(b"content")

    upload: Any = Sent()
    with uploads.saved(upload, uploads.IMAGE_SUFFIXES, "file") as path:
        assert path.read_bytes() == b"content" and len(path.name.encode()) < 200
        assert path.name == kept or (kept[0] == "…" and path.name.endswith(kept[1:]) and "腹部" in path.name)
    assert not path.parent.exists()
