"""What clients rely on: MONAI Label's own, an answer while another request computes, nothing left by a kill."""

import json
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from monailabel.client import MONAILabelClient
from monailabel.client.client import MONAILabelClientException

from lib.volumes.phantoms.studies import write_studies
from support.helpers import read_nifti
from support.server import Server
from support.training import SMALL


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("web") / "studies"
    write_studies(folder, cases=3, labelled=1, seed=1)
    return folder


@pytest.fixture(scope="module")
def server(studies):
    account = {
        "BIPVL_USER": "ada",
        "BIPVL_PASSWORD": "word",
        "MONAI_LABEL_SESSION_PATH": str(studies.parent / "sessions"),
    }
    with Server(studies, studies.parent / "models", SMALL, **account) as server:
        yield server


def test_logging_in(server):
    client = MONAILabelClient(server.url)
    assert client.auth_enabled() is True
    assert client.auth_valid_token() is True, "this machine needs no token"
    with pytest.raises(MONAILabelClientException, match="") as error:
        client.auth_token("ada", "wrong")
    assert error.value.status_code == 401
    client.update_auth({"token_type": "bearer", "access_token": "wrong"})
    assert client.auth_valid_token() is False
    client.update_auth(client.auth_token("ada", "word"))
    assert client.auth_valid_token() is True
    answer = server.call("GET", "/auth/token/valid", elsewhere=True, headers=client._headers)
    assert answer.json()["username"] == "ada"
    assert "quickstart" in client.info()["models"]


def test_images_labels_and_samples(server, studies, tmp_path):
    client = MONAILabelClient(server.url, tmpdir=str(tmp_path))
    image, label = studies / "phantom_000.nii.gz", studies / "labels" / "final" / "phantom_000.nii.gz"
    assert client.upload_image(str(image), "sent")["image"] == "sent"
    assert server.call("HEAD", "/datastore/image?image=sent").ok
    assert server.call("HEAD", "/datastore/image?image=never").status_code == 404
    assert server.call("GET", "/datastore/image?image=sent").content == image.read_bytes()
    digest = subprocess.run(["sha256sum", str(image)], capture_output=True, text=True, check=True).stdout.split()[0]
    assert server.call("HEAD", f"/datastore/image?image=sent&check_sum=SHA256:{digest}").ok
    assert server.call("HEAD", f"/datastore/image?image=sent&check_sum=SHA256:{digest[::-1]}").status_code == 404

    assert client.save_label("sent", str(label), "final", {"reason": "test"})["label"] == "sent"
    assert Path(client.download_label("sent", "final")).read_bytes() == label.read_bytes()
    info = server.call("GET", "/datastore/label/info?label=sent&tag=final").json()
    assert (info["reason"], info["user"]) == ("test", "local")
    assert "sent" in client.datastore()["objects"]
    assert server.call("PUT", "/datastore/image/info?image=sent", data={"info": '{"ward": 7}'}).ok
    assert server.call("GET", "/datastore/image/info?image=sent").json()["ward"] == 7
    archive = server.call("GET", "/datastore/dataset")
    assert archive.content[:2] == b"PK"

    offered = client.next_sample("first", {})
    assert offered["id"] in ("phantom_001", "phantom_002")
    assert server.call("DELETE", "/datastore/label?id=sent&tag=final").ok
    assert server.call("DELETE", "/datastore/image?id=sent").ok
    with pytest.raises(MONAILabelClientException, match="404.*unknown image.*is kept as labels/rejected/sent/"):
        client.save_label("sent", str(label), "final", {})
    assert "sent" not in client.datastore()["objects"]


def test_ways_to_infer(server, studies):
    """By id, with a file, in a session; answers as a form, an image, and JSON."""
    image = studies / "phantom_001.nii.gz"
    by_id, result = server.client.infer("quickstart", "phantom_001", {})
    assert result["model_version"] == 0
    with_file, _ = server.client.infer("quickstart", "", {}, file=str(image))
    session = server.client.create_session(str(image))["session_id"]
    assert server.client.get_session(session)["name"] == session
    in_session, _ = server.client.infer("quickstart", "", {}, session_id=session)
    masks = [np.asarray(read_nifti(p).dataobj) for p in (by_id, with_file, in_session)]
    assert masks[0].shape == read_nifti(image).shape
    assert all(np.array_equal(m, masks[0]) for m in masks)
    answer = server.call("GET", f"/session/{session}?image=true")
    assert answer.content == image.read_bytes()
    server.client.remove_session(session)
    with pytest.raises(MONAILabelClientException):
        server.client.get_session(session)

    place = "/infer/quickstart?image=phantom_001"
    answer = server.call("POST", f"{place}&output=json")
    assert set(answer.json()["voxels"]) == set(result["voxels"])
    params = {"params": json.dumps({"result_extension": ".nrrd", "result_dtype": "uint8", "result_compress": False})}
    answer = server.call("POST", f"{place}&output=image", data=params)
    assert answer.content.startswith(b"NRRD")
    answer = server.call("POST", f"{place}&output=dicom_seg")
    assert answer.status_code == 400 and "DICOMweb" in answer.json()["detail"]
    params = {"params": '{"save_label": true, "label_tag": "proposed"}'}
    assert server.call("POST", place, data=params).ok
    info = server.call("GET", "/datastore/label/info?label=phantom_001&tag=proposed").json()
    assert info["model"] == "quickstart"


@pytest.mark.parametrize(
    ("method", "path", "more", "status", "reason"),
    [
        ("POST", "/infer/unet?image=phantom_001", {}, 404, "unknown model 'unet'; valid are quickstart"),
        ("POST", "/infer/quickstart?image=nobody", {}, 404, "unknown image 'nobody'"),
        ("POST", "/infer/quickstart", {}, 400, "expected an image id, a file or a session_id"),
        ("POST", "/infer/quickstart?image=phantom_001", {"data": {"params": "{"}}, 400, "not valid JSON"),
        ("POST", "/infer/quickstart?image=phantom_001", {"data": {"params": "[1]"}}, 400, "expected a JSON object"),
        ("POST", "/infer/quickstart?image=phantom_001", {"data": {"params": '{"overlap": NaN}'}}, 400, "NaN"),
        ("POST", "/infer/quickstart?image=phantom_001", {"data": {"params": '{"device": "abacus"}'}}, 400, "device"),
        ("POST", "/infer/quickstart", {"files": {"file": ("x.exe", b"x")}}, 400, "must end in"),
        ("POST", "/infer/quickstart", {"files": {"file": ("x.nii", b"x")}}, 400, "cannot be read"),
        ("POST", "/activelearning/best", {}, 404, "unknown strategy 'best'; valid are "),
        ("POST", "/scoring/best", {}, 404, "unknown scoring method 'best'; valid are entropy, alignment, dice"),
        ("POST", "/train/unet", {}, 404, "unknown model 'unet'; valid are quickstart"),
        ("POST", "/train/quickstart?run_sync=true", {}, 400, "run_sync"),
        ("POST", "/batch/infer/unet", {}, 404, "unknown model"),
        ("POST", "/batch/infer/quickstart", {"json": {"images": ["nobody"]}}, 404, "unknown image"),
        ("GET", "/datastore/?output=everything", {}, 422, "'train', 'stats' or 'all'"),
        ("GET", "/session/../../etc", {}, 404, ""),
        ("GET", "/session/0", {}, 404, "unknown session"),
        ("GET", "/model/quickstart", {}, 404, "no version is published yet"),
        ("POST", "/model/quickstart/versions/3/serve", {}, 404, "no version 3; valid are none yet"),
        ("GET", "/train/", {}, 404, "No Train Tasks Found"),
        ("GET", "/proxy/dicom/studies", {}, 404, "this server's studies are not a DICOMweb archive"),
        ("GET", "/logs/?lines=0", {}, 422, "lines"),
        ("GET", "/nothing", {}, 404, "Not Found"),
        ("POST", "/info/", {}, 405, "Method Not Allowed"),
    ],
)
def test_mistakes_are_answered_with_a_sentence(server, method, path, more, status, reason):
    answer = server.call(method, path, **more)
    assert answer.status_code == status, answer.text
    assert reason in answer.json()["detail"]


def test_training_through_the_server(server):
    status = server.train("quickstart", 400, max_epochs=1)
    assert status["status"] == "DONE", "\n".join(status["details"])
    assert server.call("GET", "/train/?check_if_running=true").status_code == 404
    assert server.call("GET", "/scoring/").status_code == 404, "the end of a round starts no scoring"
    versions = server.call("GET", "/model/quickstart/versions").json()
    assert [(v["version"], v["served"]) for v in versions] == [(1, True)]
    checkpoint = server.call("GET", "/model/quickstart").content
    answer = server.call("PUT", "/model/quickstart", files={"file": ("mine.pt", checkpoint)})
    assert answer.json()["version"] == 2, answer.text
    assert server.call("POST", "/model/quickstart/versions/1/serve").json() == {"model": "quickstart", "served": 1}
    assert server.client.infer("quickstart", "phantom_001", {})[1]["model_version"] == 1


def test_a_second_training_is_refused_while_one_runs(server):
    server.client.train_start("quickstart", {"max_epochs": 500})
    try:
        answer = server.call("POST", "/train/quickstart", json={})
        assert answer.status_code == 429 and "already running" in answer.json()["detail"]
        assert server.call("GET", "/info/").ok
    finally:
        deadline = time.monotonic() + 60
        while server.client.train_status()["status"] in ("SUBMITTED", "RUNNING") and time.monotonic() < deadline:
            server.client.train_stop()
            time.sleep(0.2)
    assert server.client.train_status()["status"] == "STOPPED"


def test_an_inference_keeps_nobody_waiting(server):
    """/info answers while an inference that was asked for before it still computes."""
    finished = []

    def infer():
        server.client.infer("quickstart", "phantom_001", {"overlap": 0.9})
        finished.append("infer")

    computing = threading.Thread(target=infer)
    computing.start()
    while "Infer Request (final)" not in server.log.read_text().rpartition("overlap': 0.9")[0][-3000:]:
        assert computing.is_alive(), "the inference ended before it was seen to begin"
        time.sleep(0.01)
    assert server.call("GET", "/info/").ok
    finished.append("info")
    computing.join()
    assert finished == ["info", "infer"]


def test_the_page_names_every_route_and_needs_no_other_server(server):
    text = server.call("GET", "/").text
    assert "/infer/{model}" in text
    assert not re.search(r"(src|href)=\"?https?://", text)


def test_a_killed_servers_temporary_folder_goes_at_the_next_start(studies, tmp_path):
    (tmp_path / "tmp").mkdir()
    place = {"TMPDIR": str(tmp_path / "tmp")}
    with Server(studies, tmp_path / "models", SMALL, **place) as server:
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
    (left,) = (tmp_path / "tmp").glob("bipvl-server-*")
    with Server(studies, tmp_path / "models", SMALL, **place):
        assert not left.exists()
