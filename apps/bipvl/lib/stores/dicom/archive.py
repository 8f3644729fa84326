"""A DICOMweb archive: what is asked of it, and what it answers when it is down, slow or refuses."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import requests
from pydicom.dataset import Dataset

from lib.stores.errors import StoreError
from lib.upstream import DICOMwebClient, limit_waiting

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
PAGE = 100  # no archive is known to cut its answers shorter than this
AS_STORED = (("application/dicom", "*"),)  # no transcoding: archives cannot decode every compression
FAILURES = (requests.RequestException, OSError, HTTPException, ValueError, LookupError)


class ArchiveError(StoreError):
    """The archive does not answer, or not as DICOMweb says."""

    status = 502


@dataclass(frozen=True)
class SeriesEntry:
    """A series as the archive lists it. `instances` is None if the archive does not say how many it holds."""

    study: str
    uid: str
    modality: str
    instances: int | None
    info: Mapping[str, str]


class Archive:
    """The requests this app makes.

    `seconds` adds up the time spent waiting for the archive.

    Args:
        client: MONAI Label's, with the account and the prefixes of the environment.
        timeout: seconds without a byte after which the archive counts as down.
    """

    def __init__(self, client: DICOMwebClient, timeout: float) -> None:
        self.client = client
        address = urlsplit(str(client.base_url))  # as it may be shown: without an account
        self.name = address._replace(netloc=address.netloc.rpartition("@")[2]).geturl()
        self.seconds = 0.0
        limit_waiting(client, CONNECT_SECONDS, timeout, self._waited)

    def series(self, filters: Mapping[str, Any]) -> list[SeriesEntry]:
        """The series that match, in the archive's order."""
        found = []
        for ds in self._pages(self.client.search_for_series, filters, "SeriesInstanceUID"):
            count = ds.get("NumberOfSeriesRelatedInstances")
            fields = ("PatientID", "StudyDate", "StudyTime", "SeriesDescription", "SeriesNumber")
            info = {name: str(ds.get(name)) for name in fields if ds.get(name) not in (None, "")}
            modality, study, uid = str(ds.get("Modality", "")), str(ds.StudyInstanceUID), str(ds.SeriesInstanceUID)
            info |= {"Modality": modality, "StudyInstanceUID": study, "SeriesInstanceUID": uid}
            found.append(SeriesEntry(study, uid, modality, int(count) if count not in (None, "") else None, info))
        return found

    def segmentations(self) -> list[tuple[str, str, str]]:
        """Study, series and instance UID of every instance of modality SEG, in one query."""
        found = self._pages(self.client.search_for_instances, {"Modality": "SEG"}, "SOPInstanceUID")
        return [(str(ds.StudyInstanceUID), str(ds.SeriesInstanceUID), str(ds.SOPInstanceUID)) for ds in found]

    def series_of(self, study: str, instance: str) -> str:
        """The series of a study that an instance belongs to, empty if the archive does not list it."""
        search = partial(self.client.search_for_instances, study)
        found = self._pages(search, {"SOPInstanceUID": instance}, "SOPInstanceUID")
        return next((str(ds.SeriesInstanceUID) for ds in found if str(ds.SOPInstanceUID) == instance), "")

    def describe(self, study: str, series: str, instance: str) -> Dataset:
        """All of an instance but its pixels."""
        with self._asking(f"the description of {instance}"):
            found = self.client.retrieve_instance_metadata(study, series, instance)
            return Dataset.from_json(found, bulk_data_uri_handler=lambda _: None)  # pixels are not fetched

    def instance(self, study: str, series: str, instance: str) -> Dataset:
        """One instance, as it was stored."""
        with self._asking(f"instance {instance}"):
            return self.client.retrieve_instance(study, series, instance, media_types=AS_STORED)

    def download(self, study: str, series: str, folder: Path) -> list[Path]:
        """All instances of a series into a folder, as they were stored."""
        files = []
        start, before = time.monotonic(), self.seconds
        with self._asking(f"series {series}"):
            for ds in self.client.iter_series(study, series, media_types=AS_STORED):
                files.append(folder / f"{uuid4().hex}.dcm")  # an instance's UID could be anything
                ds.save_as(files[-1])
        self.seconds = before + time.monotonic() - start  # what comes as a stream takes its time after the answer began
        if not files:
            raise ArchiveError(f"the archive {self.name} lists series {series} but sends no instance of it")
        return files

    def store(self, ds: Dataset) -> None:
        """Store an instance.

        Raises:
            ArchiveError: not stored, as far as the archive says.
        """
        with self._asking("storing", verb="took no label"):
            answer = self.client.store_instances([ds])
        for failed in answer.get("FailedSOPSequence") or []:
            reason = failed.get("FailureReason", "unknown")
            raise ArchiveError(f"the archive {self.name} refused the label: failure reason {reason} (PS3.18 Annex I)")

    def _pages(self, search: Callable[..., list], filters: Mapping[str, Any], key: str) -> list[Dataset]:
        """All answers of a search; archives may cut them at a limit of their own, and some ignore `offset`."""
        found: dict[str, Dataset] = {}
        with self._asking("a search"):
            while True:
                page = [Dataset.from_json(ds) for ds in search(search_filters=dict(filters), offset=len(found))]
                new = {str(ds[key].value): ds for ds in page if str(ds[key].value) not in found}
                found |= new
                if not new or len(page) < PAGE:
                    return list(found.values())

    @contextmanager
    def _asking(self, what: str, verb: str = "did not answer") -> Iterator[None]:
        try:
            yield
        except FAILURES as error:
            response = getattr(error, "response", None)
            status = f"HTTP {response.status_code}" if response is not None else type(error).__name__
            logger.warning("%s: %s: %s", self.name, what, error)
            raise ArchiveError(f"the DICOM archive {self.name} {verb} ({what}: {status}); try again") from error

    def _waited(self, seconds: float) -> None:
        self.seconds += seconds
