"""Our panel in the viewer for tests: what it shows, and what the archive holds of it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import requests
import yaml

from support import ROOT
from support.clients.browser import ACCOUNT, ACCOUNT_OF_SERVER, WAIT, Visit
from support.dicom.archive import Archive
from support.server import Server

LABELS = yaml.safe_load((ROOT / "sample-apps-config" / "quickstart.yaml").read_text())["labels"]
# The drawing in the active viewport as the viewer holds it, or another volume of its.
DRAWING = """id => {
    const segmentation = cornerstoneTools.segmentation.state.getSegmentations()[0]
    const volume = cornerstone.cache.getVolume(id ?? segmentation.representationData.Labelmap.volumeId)
    const data = volume.voxelManager.getCompleteScalarDataArray()
    let text = ''
    for (let i = 0; i < data.length; i += 32768) text += String.fromCharCode(...data.slice(i, i + 32768))
    const { dimensions, origin, direction, spacing } = volume
    return { dimensions, origin: [...origin], direction: [...direction], spacing, data: btoa(text) }
}"""
# On the page, where the first viewport shows a place.
POINT = """centre => {
    const canvas = document.querySelector('canvas.cornerstone-canvas')
    const viewports = cornerstone.getRenderingEngines().flatMap(engine => engine.getViewports())
    const [x, y] = viewports.find(each => each.canvas === canvas).worldToCanvas(centre)
    const { left, top } = canvas.getBoundingClientRect()
    return [x + left, y + top]
}"""


@dataclass
class Site:
    """Archive and server, with the series of each patient."""

    archive: Archive
    server: Server
    series: dict[str, str]

    def ask(self, method: str, path: str, **more: Any) -> Any:
        answer = self.server.call(method, path, auth=(ACCOUNT["username"], ACCOUNT["password"]), **more)
        answer.raise_for_status()
        return answer.json()

    def segmentations(self, patient: str) -> list[pydicom.Dataset]:
        """The patient's DICOM SEG objects, oldest first."""
        query: dict[str, Any] = {"Level": "Instance", "Query": {"Modality": "SEG", "PatientID": patient}}
        found = requests.post(f"{self.archive.rest}/tools/find", json=query, timeout=60).json()
        files = [requests.get(f"{self.archive.rest}/instances/{i}/file", timeout=60).content for i in found]
        return sorted((pydicom.dcmread(io.BytesIO(f)) for f in files), key=lambda ds: ds.ContentDate + ds.ContentTime)


@contextmanager
def serving(
    folder: Path, patients: Iterable[str], conf: dict[str, str], **environment: str
) -> Iterator[tuple[Archive, Server]]:
    """A real archive with the patients' series, which lie in folders of their names, and a server with an account."""
    environment = {**ACCOUNT_OF_SERVER, "MONAI_LABEL_DICOMWEB_CACHE_PATH": str(folder / "cache"), **environment}
    with Archive(folder / "orthanc") as archive:
        archive.store(*(folder / patient for patient in patients))
        with Server(archive.url, folder / "models", conf, **environment) as server:
            yield archive, server


@dataclass
class Drawing:
    """Voxels (slice, row, column) with their place in space: directions and spacing of column, row and slice."""

    voxels: np.ndarray
    origin: np.ndarray
    directions: np.ndarray
    spacing: np.ndarray

    @property
    def orientation(self) -> list[float]:
        return self.directions[:2].flatten().tolist()

    def indices(self, places: np.ndarray) -> np.ndarray:
        """Column, row and slice of places (n, 3) in mm."""
        return np.rint((places - self.origin) @ self.directions.T / self.spacing).astype(int)

    def counts(self) -> dict[str, int]:
        found = {name: int((self.voxels == label["value"]).sum()) for name, label in LABELS.items()}
        return {name: n for name, n in found.items() if n}


def drawing(visit: Visit, volume: str | None = None) -> Drawing:
    found = visit.page.evaluate(DRAWING, volume)
    voxels = np.frombuffer(base64.b64decode(found["data"]), np.uint8).reshape(found["dimensions"][::-1])
    direction = found["direction"]
    return Drawing(voxels, np.array(found["origin"]), np.reshape(direction, (3, 3)), np.array(found["spacing"]))


def button(visit: Visit, name: str) -> Any:
    return visit.page.get_by_role("button", name=name, exact=True)


def wait_for(visit: Visit, selector: str, text: str, seconds: int = WAIT // 1000) -> str:
    """Wait until a part of the panel says something, and return all that it says."""
    part = visit.page.locator(selector).filter(has_text=text)
    part.wait_for(timeout=seconds * 1000)
    return part.inner_text()


def assert_holds(ds: pydicom.Dataset, shown: Drawing, series: str) -> None:
    """The SEG is of this series; its segments have the task's names and codes, and the voxels that the page showed."""
    assert ds.ReferencedSeriesSequence[0].SeriesInstanceUID == series
    names = {}
    for segment in ds.SegmentSequence:
        snomed = LABELS[segment.SegmentLabel]["snomed"]
        (kind,) = segment.SegmentedPropertyTypeCodeSequence
        assert (kind.CodingSchemeDesignator, kind.CodeValue) == ("SCT", snomed["code"])
        names[int(segment.SegmentNumber)] = segment.SegmentLabel
    assert set(names.values()) >= set(shown.counts())
    found = np.zeros_like(shown.voxels)
    shared = ds.SharedFunctionalGroupsSequence[0]
    orientation = shared.PlaneOrientationSequence[0].ImageOrientationPatient
    np.testing.assert_allclose([float(v) for v in orientation], shown.orientation, atol=1e-5)
    frames = ds.pixel_array.reshape(-1, ds.Rows, ds.Columns)
    for frame, groups in zip(frames, ds.PerFrameFunctionalGroupsSequence, strict=True):
        position = np.array([float(v) for v in groups.PlanePositionSequence[0].ImagePositionPatient])
        number = int(groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        k = shown.indices(position[None])[0, 2]
        found[k][frame > 0] = LABELS[names[number]]["value"]
    np.testing.assert_array_equal(found, shown.voxels)
