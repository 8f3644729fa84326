"""The whole on an archive that asks for a password: the plain command, training on another program's SEGs, and the
model's mask as a SEG."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from monailabel.datastore.dicom import DICOMwebClientX

from lib.model.versions import Versions, load
from lib.stores.cases import audit
from lib.stores.dicom.listing import FRESH_SECONDS
from lib.stores.dicom.store import DicomStore
from lib.trainers import BiPVLTrain
from support.dicom.archive import Archive, needs_orthanc
from support.dicom.dicoms import iod_errors, needs_dciodvfy
from support.dicom.series import ACCOUNT, SHAPE, TASK, stored
from support.dicom.stores import label_file, label_of, store_on
from support.drawn import history, rejected
from support.helpers import read_nifti
from support.server import Server
from support.training import SMALL


@needs_orthanc
@pytest.mark.slow
def test_segs_of_another_program_train_the_right_classes(tmp_path: Path) -> None:
    with Archive(tmp_path / "orthanc") as archive:
        expected = dict(stored(archive, tmp_path, number, labelled=True) for number in range(3))
        store = store_on(archive, tmp_path / "cache", TASK)
        cases = store.datalist()
        assert {case["id"] for case in cases} == set(expected)
        for found in audit(TASK, cases).cases:  # as the round counts them
            values = expected[found.case["id"]]
            counts = {name: int((values == value).sum()) for name, value in TASK.label_values.items()}
            assert (found.problem, found.counts) == (None, counts)
            assert counts["liver"] == 12 * 12 * 10 > counts["spleen"] == 800 > 0 == counts["aorta"]
            np.testing.assert_array_equal(label_of(store, found.case["id"]), values)
        trainer = BiPVLTrain(TASK, tmp_path / "models")
        trainer({"max_epochs": 1, "val_split": 0.34, "device": "cpu", "tracking": "None"}, store)
    versions = Versions(tmp_path / "models")
    manifest = load(versions.path(versions.numbers()[0]))["manifest"]
    assert {*manifest["trained_on"], *manifest["validated_on"]} == set(expected)


@dataclass
class Running:
    archive: Archive
    server: Server
    cache: Path
    labelled: list[tuple[str, np.ndarray]]
    free: list[str]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two labelled series and two others, in an archive with an account."""
    folder = tmp_path_factory.mktemp("archive-server")
    with Archive(folder / "orthanc", ACCOUNT) as archive:
        labelled = [stored(archive, folder, number, labelled=True) for number in range(2)]
        free = [stored(archive, folder, number, labelled=False)[0] for number in range(2, 4)]
        conf = {**SMALL, "models": "quickstart"}
        with Server(archive.url, folder / "models", conf, **archive.environment(folder / "cache")) as server:
            yield Running(archive, server, folder / "cache", labelled, free)


def counts(server: Server) -> tuple[int, int]:
    status = server.call("GET", "/datastore/").json()
    return status["total"], status["completed"]


@needs_orthanc
@needs_dciodvfy
@pytest.mark.slow
def test_the_loop_on_an_archive_with_a_password(running: Running, tmp_path: Path) -> None:
    client, server = running.server.client, running.server
    assert counts(server) == (4, 2)
    cases = {case["id"]: case for case in server.call("GET", "/datastore/?output=train").json()}
    assert set(cases) == {uid for uid, _ in running.labelled}
    for uid, values in running.labelled:
        np.testing.assert_array_equal(np.asarray(read_nifti(cases[uid]["label"]).dataobj), values)

    # The model's mask as a SEG, without further parameters: a draft that says so and is not in the archive.
    before = running.archive.instances()
    offered = client.next_sample("first", {})
    uid = offered["id"]
    assert uid in running.free and offered["StudyInstanceUID"]
    answer = server.call("POST", f"/infer/quickstart?image={uid}&output=dicom_seg")
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/dicom"
    (tmp_path / "draft.dcm").write_bytes(answer.content)
    draft = pydicom.dcmread(io.BytesIO(answer.content))
    assert iod_errors(tmp_path / "draft.dcm") == []
    assert {s.SegmentAlgorithmType for s in draft.SegmentSequence} == {"AUTOMATIC"}
    assert running.archive.instances() == before

    # The model's mask accepted as it is by uploading that SEG: semi-automatic, a label at once, in the archive.
    with (tmp_path / "draft.dcm").open("rb") as file:
        saved = server.call("PUT", f"/datastore/label?image={uid}", files={"label": ("draft.dcm", file)})
    assert saved.status_code == 200, saved.text
    seg = running.archive.segs()[-1]
    assert {s.SegmentAlgorithmType for s in seg.SegmentSequence} == {"SEMIAUTOMATIC"}
    assert counts(server) == (4, 3)
    other = client.next_sample("first", {})["id"]
    assert other in running.free and other != uid

    # A correction in a NIfTI of other numbers, as 3D Slicer sends it.
    mask, _ = client.infer("quickstart", other, {"device": "cpu"})
    image = read_nifti(mask)
    corrected = np.zeros(image.shape, np.uint8)
    corrected[3:9, 4:7, 2:5], corrected[20:22, 4:7, 2] = 1, 2
    nib.save(nib.Nifti1Image(corrected, image.affine), tmp_path / "l.nii.gz")
    names = {"label_info": [{"name": "aorta", "idx": 1}, {"name": "spleen", "idx": 2}]}
    client.save_label(other, str(tmp_path / "l.nii.gz"), params=names)
    seg = running.archive.segs()[-1]
    assert [(s.SegmentLabel, s.SegmentAlgorithmType) for s in seg.SegmentSequence] == [
        ("spleen", "MANUAL"),
        ("aorta", "MANUAL"),
    ]
    assert counts(server) == (4, 4)
    assert client.next_sample("first", {}) == {}
    status = server.train("quickstart", 240, max_epochs=1, val_split=0.25, device="cpu", tracking="None")
    assert status["status"] == "DONE", server.tail()
    assert Versions(running.cache.parent / "models" / "quickstart").numbers() == [1]


@needs_orthanc
@pytest.mark.slow
def test_refusals_say_what_to_do_and_keep_the_file(running: Running, tmp_path: Path) -> None:
    uid, values = running.labelled[0]
    image = nib.Nifti1Image(np.zeros(SHAPE, np.uint8), np.eye(4))
    nib.save(image, tmp_path / "l.nii.gz")
    wrong = (tmp_path / "l.nii.gz").read_bytes()
    (folder,) = running.cache.iterdir()

    def send(content: bytes, name: str = "l.nii.gz", image: str = uid, **params: object) -> tuple[int, str]:
        data = {"params": json.dumps(params)}
        answer = running.server.call(
            "PUT", f"/datastore/label?image={image}", files={"label": (name, content)}, data=data
        )
        return answer.status_code, answer.json().get("detail", "")

    before = running.archive.instances()
    status, text = send(wrong)
    assert status == 400 and "not on the grid of its image" in text and "kept as labels/rejected/" in text
    status, text = send(bytes(np.prod(SHAPE)), "l.bin")
    assert status == 400 and "the label is empty" in text and "annotated" in text
    status, text = send(b"no DICOM", "l.dcm")
    assert status == 400 and "the label is not a DICOM file" in text
    status, text = send(b"\1" * int(np.prod(SHAPE)), "l.bin", label_info=[{"name": "tumour", "idx": 1}])
    assert status == 400 and "'tumour'" in text and "valid are liver" in text
    assert len(rejected(folder, uid)) == 4
    assert send(wrong, image="1.2.3")[0] == 404
    assert running.archive.instances() == before

    status = running.server.call("DELETE", f"/datastore/label?id={uid}&tag=final").status_code
    assert status == 409
    running.archive.stop()
    try:
        time.sleep(FRESH_SECONDS)
        status, text = send(wrong)
        assert status == 502 and "did not answer" in text and "The drawing is kept as labels/history/final/" in text
        assert history(folder, uid)[0].read_bytes() == wrong
        assert running.server.call("GET", "/datastore/").status_code == 502
    finally:
        running.archive.start()
    assert counts(running.server)[0] == 4


@needs_orthanc
@pytest.mark.slow
def test_server_starts_while_the_archive_is_down(tmp_path: Path) -> None:
    """It says so until the archive is there, and then works without a restart."""
    archive = Archive(tmp_path / "orthanc")
    client = DICOMwebClientX(url=archive.url)
    store = DicomStore(client, {}, str(tmp_path / "cache"), tasks=[TASK], software="test")
    with archive:
        uid, values = stored(archive, tmp_path, 1, labelled=False)
        assert store.list_images() == [uid]
        store.save_label(uid, str(label_file(store, uid, values, tmp_path / "l.nii.gz")), "final", {})
        np.testing.assert_array_equal(label_of(store, uid), values)
