"""The proxy in front of a real archive: what annotators see is the archive's, and its own interface is out of reach."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pydicom
import pytest
import requests

from support.dicom.archive import DICOM_PARTS, WAIT, Archive, needs_orthanc, serving

pytestmark = needs_orthanc


@pytest.fixture(scope="module")
def orthanc(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Archive]:
    """Orthanc with a CT series of one patient and one slice of another."""
    folder = tmp_path_factory.mktemp("archive")
    series = real_data / "dicom_ct" / "crlm-ct-1004"
    other = pydicom.dcmread(sorted(series.iterdir())[0])
    other.PatientID = other.PatientName = "SECOND"
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        setattr(other, name, pydicom.uid.generate_uid())
    other.file_meta.MediaStorageSOPInstanceUID = other.SOPInstanceUID
    (folder / "other").mkdir()
    other.save_as(folder / "other" / "1.dcm")
    with Archive(folder / "orthanc") as archive:
        archive.store(series, folder / "other")
        yield archive


@pytest.fixture(scope="module")
def url(orthanc: Archive) -> Iterator[str]:
    with serving(orthanc.url) as address:
        yield address


def patients(answer: requests.Response) -> list[str]:
    answer.raise_for_status()
    return sorted(study["00100020"]["Value"][0] for study in answer.json())


def test_study_list_is_filtered_by_patient(url: str) -> None:
    assert patients(requests.get(f"{url}/qido/studies", timeout=WAIT)) == ["CRLM-CT-1004", "SECOND"]
    assert patients(requests.get(f"{url}/qido/studies?PatientID=SECOND", timeout=WAIT)) == ["SECOND"]
    assert patients(requests.get(f"{url}/qido/studies?PatientName=*CRLM*&limit=101", timeout=WAIT)) == ["CRLM-CT-1004"]


def test_slices_and_bulk_data_are_those_of_the_archive(url: str, orthanc: Archive) -> None:
    study = requests.get(f"{url}/qido/studies?PatientID=SECOND", timeout=WAIT).json()[0]["0020000D"]["Value"][0]
    text = requests.get(f"{url}/wado/studies/{study}/metadata", timeout=WAIT).text
    assert orthanc.rest not in text
    (instance,) = json.loads(text)
    link = instance["7FE00010"]["BulkDataURI"]
    assert link.startswith(f"/proxy/dicom/wado/studies/{study}/")

    frame = link.removeprefix("/proxy/dicom").replace("/bulk/7fe00010", "/frames/1")
    for path in (link.removeprefix("/proxy/dicom"), frame):
        ours = requests.get(f"{url}{path}", timeout=WAIT)
        theirs = requests.get(f"{orthanc.url}{path.removeprefix('/wado')}", timeout=WAIT)
        assert ours.status_code == theirs.status_code == 200
        # Each part of the multipart answer stands between boundaries that are new in every answer.
        assert len(ours.content) == len(theirs.content) > 512 * 512 * 2
        assert ours.content[300:-300] == theirs.content[300:-300]


def test_dicom_is_stored(url: str, orthanc: Archive, real_data: Path, tmp_path: Path) -> None:
    new = pydicom.dcmread(sorted((real_data / "dicom_ct" / "crlm-ct-1004").iterdir())[0])
    new.SOPInstanceUID = new.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    new.save_as(tmp_path / "new.dcm")
    body = b"--x\r\nContent-Type: application/dicom\r\n\r\n" + (tmp_path / "new.dcm").read_bytes() + b"\r\n--x--"
    before = orthanc.instances()
    answer = requests.post(f"{url}/wado/studies", body, headers={"Content-Type": DICOM_PARTS}, timeout=WAIT)
    assert answer.status_code == 200
    assert orthanc.instances() == before + 1


@pytest.mark.parametrize(
    "way",
    [
        "../",
        "..%2f",
        "%2e%2e/",
        "%2e%2e%2f",
        "%252e%252e%252f",
        "..%5c",
        "..\\",
        "studies/../../",
        "studies/..%2f..%2f",
        "studies/%2e%2e/%2e%2e/",
        "wado/..%2f",
        "qido/../",
        "stow/%2e%2e/",
        "./../",
        "/../",
        "..;/",
        "..%00/",
        "%c0%ae%c0%ae/",
        "..%2f%0d%0a",
    ],
)
def test_no_way_leads_to_the_archives_own_interface(url: str, orthanc: Archive, way: str) -> None:
    """Requests as no client library would send them, each of which could delete a patient in Orthanc."""
    before = orthanc.instances()
    patient = requests.get(f"{orthanc.rest}/patients", timeout=WAIT).json()[0]
    body = json.dumps({"Resources": [patient]})
    attacks = [
        ("POST", "tools/bulk-delete", "application/json", body),
        ("POST", "tools/bulk-delete", DICOM_PARTS, body),
        ("POST", "tools/execute-script", DICOM_PARTS, f"RestApiDelete('/patients/{patient}')"),
        ("DELETE", f"patients/{patient}", "text/plain", ""),
        ("GET", "system", "text/plain", ""),
    ]
    for method, target, content_type, text in attacks:
        with socket.create_connection(("127.0.0.1", urlsplit(url).port), timeout=WAIT) as attacker:
            attacker.sendall(
                f"{method} /proxy/dicom/{way}{target} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
                f"Content-Type: {content_type}\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode()
            )
            answer = attacker.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 4"), answer
        assert b"DicomAet" not in answer  # Orthanc's description of itself
    assert orthanc.instances() == before
