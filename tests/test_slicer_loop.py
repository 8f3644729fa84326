"""3D Slicer's whole loop on real CT: on a folder, on a DICOM archive."""

from __future__ import annotations

import time
from collections.abc import Callable

import nibabel as nib
import numpy as np
import pytest
from monailabel.client.client import MONAILabelClientException

from archive import Archive, needs_orthanc
from dicoms import with_uids
from server import Server, add_case
from slicer import Slicer, read, shown
from test_server import SMALL


def _loop(slicer: Slicer, model: str, draw: Callable[[Slicer], np.ndarray], **training: str) -> str:
    """Next Sample, Run, correct, Submit, Train, Run again: another version, and the next case is another one.

    `draw` gives the values of the correct label on the grid of the open volume.
    """
    case = slicer.next_sample()
    assert case
    first = slicer.run(model, overlap="0.25")
    assert first["model_version"] == 0 and "untrained" in first["warnings"][0]
    truth = draw(slicer)
    for name, value in slicer.info["models"][model]["labels"].items():
        slicer.segments[name] = truth == value
    slicer.segments.pop("spleen")  # a segment that was deleted and drawn again comes last, and changes all numbers
    slicer.segments["spleen"] = truth == slicer.info["models"][model]["labels"]["spleen"]
    done = slicer.info["datastore"]["completed"]
    slicer.submit()
    assert slicer.info["datastore"]["completed"] == done + 1
    slicer.train(model, tracking="None", **training)
    deadline = time.monotonic() + 600
    while (status := slicer.watch())["status"] in ("SUBMITTED", "RUNNING") and time.monotonic() < deadline:
        time.sleep(1)
    assert status["status"] == "DONE", "\n".join(status["details"])
    slicer.connect()
    assert slicer.info["models"][model]["version"] == 1
    again = slicer.run(model, overlap="0.25")
    assert again["model_version"] == 1 and again["warnings"] == []
    assert slicer.next_sample() not in (case, None)
    return case


@pytest.mark.slow
def test_loop_on_a_folder(real_data, tmp_path):
    """Real CT, as a user on the server's own machine: files are opened where they are."""
    folder, studies = real_data / "abdomen_ct", tmp_path / "studies"
    add_case(studies, folder / "ts-example_ct.nii.gz", "first")
    add_case(studies, folder / "ts-s0009_ct.nii.gz", "second")
    truth = np.asarray(nib.load(folder / "ts-example_label-amos15.nii.gz").dataobj)
    conf = {"models": "amos22-ct", "spacing": "[6, 6, 6]", "patch": "[64, 64, 64]", **SMALL}
    with Server(studies, tmp_path / "models", conf) as server:
        slicer = Slicer(server.url, tmp_path / "slicer", shared=True)
        _loop(slicer, "amos22-ct", lambda _: truth, max_epochs="3", val_split="0")
    assert np.array_equal(np.asarray(nib.load(studies / "labels" / "final" / "first.nii.gz").dataobj), truth)


@needs_orthanc
@pytest.mark.slow
def test_loop_on_an_archive(real_data, tmp_path):
    """Real DICOM series, from a machine that does not see the server's files."""
    folder = real_data / "dicom_ct"
    with_uids(folder / "ts-example-dicom-j2k", tmp_path / "j2k")
    conf = {"models": "amos22-ct", "spacing": "[6, 6, 6]", "patch": "[64, 64, 64]", **SMALL}
    cache = {"MONAI_LABEL_DICOMWEB_CACHE_PATH": str(tmp_path / "cache")}
    with Archive(tmp_path / "orthanc") as archive:
        archive.store(folder / "crlm-ct-1004", tmp_path / "j2k")
        with Server(archive.url, tmp_path / "models", conf, **cache) as server:
            slicer = Slicer(server.url, tmp_path / "slicer")
            case = _loop(slicer, "amos22-ct", _boxes, max_epochs="2", val_split="0")
            assert slicer.sample["PatientID"], "the name that the volume gets in the scene"
            (kept,) = archive.segs()
            names = [segment.SegmentLabel for segment in kept.SegmentSequence]
            assert sorted(names) == sorted(["spleen", "liver", "aorta"])
            assert kept.ReferencedSeriesSequence[0].SeriesInstanceUID == case
            label, _ = read(slicer.client().download_label(case, "final"))
            slicer.next_sample()
            assert np.bincount(label.ravel())[[1, 6, 8]].tolist() == [6 * 40 * 40, 6 * 60 * 60, 6 * 10 * 10]
            slicer.open_own(tmp_path / "slicer" / "cache" / f"{case}.nii.gz", "Volume")
            with pytest.raises(MONAILabelClientException) as error:
                slicer.run("amos22-ct")
            assert shown(error.value) == "images come from the archive: store the DICOM series there"


def _boxes(slicer: Slicer) -> np.ndarray:
    """A spleen, a liver and an aorta that are boxes."""
    values = slicer.info["models"]["amos22-ct"]["labels"]
    truth = np.zeros(slicer.volume.shape, np.uint8)
    for name, start, size in (("spleen", 40, 40), ("liver", 120, 60), ("aorta", 200, 10)):
        truth[start : start + size, start : start + size, 5:11] = values[name]
    return truth
