"""A DICOM archive in this process: it answers the calls that the app makes of dicomweb_client, without a server."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from lib.stores.dicom.store import DicomStore
from lib.tasks import Task


@dataclass(frozen=True)
class Kept:
    """One instance, as it was stored."""

    study: str
    series: str
    modality: str
    content: bytes

    def read(self) -> Dataset:
        return dcmread(io.BytesIO(self.content))


class MemoryArchive:
    """Stands where MONAI Label's DICOMweb client does.

    `taking` is called with every dataset before it is stored, `asked` counts the calls.

    Args:
        folders: of files to store.
    """

    def __init__(self, *folders: Path) -> None:
        self.base_url = "http://archive.invalid/dicom-web"
        self._session = requests.Session()
        self.instances: dict[str, Kept] = {}
        self.taking: Callable[[Dataset], None] = lambda ds: None
        self.asked: list[str] = []
        for folder in folders:
            for file in sorted(folder.iterdir()) if folder.is_dir() else [folder]:
                self.put(file.read_bytes())

    def store_of(self, cache: Path, *tasks: Task) -> DicomStore:
        """A store on this archive, with a folder of its own for copies."""
        return DicomStore(self, {}, str(cache), tasks=tasks, software="test")  # type: ignore[arg-type]

    def put(self, content: bytes) -> None:
        """Store an instance."""
        ds = dcmread(io.BytesIO(content), stop_before_pixels=True)
        uids = (str(ds.StudyInstanceUID), str(ds.SeriesInstanceUID), str(ds.Modality))
        self.instances[str(ds.SOPInstanceUID)] = Kept(*uids, content)

    def segs(self) -> list[Dataset]:
        """All segmentations, in the order in which they came."""
        return [one.read() for one in self.instances.values() if one.modality == "SEG"]

    # What the app calls -------------------------------------------------------------------------------------------

    def set_http_retry_params(self, retry: bool) -> None:
        pass

    def search_for_series(self, search_filters: dict[str, Any], offset: int = 0) -> list[dict[str, Any]]:
        self.asked.append("search_for_series")
        series: dict[str, list[Kept]] = {}
        for one in self.instances.values():
            if search_filters.get("Modality") in (None, one.modality):
                series.setdefault(one.series, []).append(one)
        found = []
        for uid, members in list(series.items())[offset:]:
            ds = Dataset()
            ds.StudyInstanceUID, ds.Modality = members[0].study, members[0].modality
            ds.NumberOfSeriesRelatedInstances = len(members)
            found.append({**ds.to_json_dict(), "0020000E": {"vr": "UI", "Value": [uid]}})
        return found

    def search_for_instances(
        self, study_instance_uid: str | None = None, search_filters: dict[str, Any] | None = None, offset: int = 0
    ) -> list[dict[str, Any]]:
        self.asked.append("search_for_instances")
        wanted, found = search_filters or {}, []
        for uid, one in self.instances.items():
            if study_instance_uid not in (None, one.study) or wanted.get("Modality") not in (None, one.modality):
                continue
            if wanted.get("SOPInstanceUID") not in (None, uid):
                continue
            ds = Dataset()
            ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID = one.study, one.series, uid
            found.append(ds.to_json_dict())
        return found[offset:]

    def retrieve_instance_metadata(self, study: str, series: str, instance: str) -> dict[str, Any]:
        self.asked.append("retrieve_instance_metadata")
        ds = self.instances[instance].read()
        ds.pop("PixelData", None)
        return ds.to_json_dict()

    def retrieve_instance(self, study: str, series: str, instance: str, media_types: Any) -> Dataset:
        self.asked.append("retrieve_instance")
        return self.instances[instance].read()

    def iter_series(self, study: str, series: str, media_types: Any) -> Iterator[Dataset]:
        self.asked.append("iter_series")
        yield from [one.read() for one in self.instances.values() if one.series == series]

    def store_instances(self, datasets: list[Dataset]) -> Dataset:
        self.asked.append("store_instances")
        for ds in datasets:
            self.taking(ds)
            file = io.BytesIO()
            if not hasattr(ds, "file_meta") or "TransferSyntaxUID" not in ds.file_meta:
                ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            ds.save_as(file, write_like_original=False)
            self.put(file.getvalue())
        return Dataset()
