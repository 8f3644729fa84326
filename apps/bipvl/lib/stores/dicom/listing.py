"""What an archive holds for this server: its images and the segmentations (SEG) drawn on them, as they are now.

One query lists the images (one per modality), one the SEGs. A SEG never changes, so each is described once and
remembered in a file. An answer is used for a second; what this server saves counts at once.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset

from lib.files import write_json
from lib.stores.dicom.archive import Archive, SeriesEntry
from lib.stores.dicom.seg import MANUFACTURER, referenced_series, segment_labels, source_instances
from lib.stores.errors import StoreError
from lib.stores.locks import Lock, Order

logger = logging.getLogger(__name__)

FRESH_SECONDS = 1.0
UNLISTED_SECONDS = 600.0  # how long an archive may take to list what it has taken
FAILED_SECONDS = 60.0  # until an archive is asked again for what it could not describe
DESCRIBED_AT_ONCE = 4
UID = re.compile(r"[0-9]+(\.[0-9]+)*")
MAX_UID = 64
EPOCH = "1970-01-01T00:00:00"


def check_uid(uid: Any) -> str:
    """A series instance UID; images and labels of an archive have no other ids.

    Raises:
        StoreError: anything else, which could lead out of the folder of downloads.
    """
    if not isinstance(uid, str) or len(uid) > MAX_UID or not UID.fullmatch(uid):
        raise StoreError(
            f"series {str(uid)[:80]!r}: expected a series instance UID, digits and dots, at most {MAX_UID}"
        )
    return uid


@dataclass(frozen=True)
class Segmentation:
    """One SEG: where it is, which series it was drawn on, when, and what its segments are called.

    draft: this app's own mask that nobody has looked at (`output=dicom_seg`); not a label.
    task: for which this app saved it; empty for others'.
    """

    study: str
    series: str
    instance: str
    images: tuple[str, ...]
    created: str
    names: tuple[str, ...]
    draft: bool = False
    task: str = ""


@dataclass(frozen=True)
class Listing:
    """Images by series UID in the archive's order, and for each the SEGs that are labels, the newest first."""

    images: Mapping[str, SeriesEntry]
    labels: Mapping[str, Sequence[Segmentation]] = field(default_factory=dict)


class Listings:
    """Asks the archive and remembers.

    Args:
        filters: of series that are images, one query each.
        is_label: whether segments of these names make a label for some task of this server.
        path: where descriptions of SEGs are kept.
    """

    def __init__(
        self,
        archive: Archive,
        filters: Sequence[Mapping[str, Any]],
        is_label: Callable[[Iterable[str]], bool],
        path: Path,
    ) -> None:
        self._archive, self._filters, self._is_label, self._path = archive, filters, is_label, path
        self._lock = Lock(Order.LISTING, "the list of what the archive holds")
        self._known = _read(path)
        self._own: dict[str, tuple[float, Segmentation]] = {}  # saved here, perhaps not listed yet
        self._failed: dict[str, float] = {}  # SEGs that the archive could not describe, and when
        self._told: set[str] = set()
        self._listing, self._asked = Listing({}), -FRESH_SECONDS

    def now(self, fresh: bool = False) -> Listing:
        """What there is, at most a second old, or just asked for.

        Raises:
            ArchiveError: the archive does not answer.
        """
        with self._lock:
            if fresh or time.monotonic() - self._asked >= FRESH_SECONDS:
                self._listing = self._ask()
                self._asked = time.monotonic()
            return self._listing

    def add(self, seg: Segmentation) -> None:
        """Count a SEG that the archive has just taken."""
        with self._lock:
            self._own[seg.instance] = (time.monotonic(), seg)
            self._remember({**self._known, seg.instance: seg})
            labels = {image: list(segs) for image, segs in self._listing.labels.items()}
            for image in seg.images:
                labels[image] = newest_first([*labels.get(image, []), seg])
            self._listing = Listing(self._listing.images, labels)

    def _ask(self) -> Listing:
        images = {entry.uid: entry for query in self._filters for entry in self._archive.series(query)}
        images = {uid: entry for uid, entry in images.items() if self._is_image(entry)}
        listed = {seg[2]: seg for seg in self._archive.segmentations()}
        studies = {entry.study for entry in images.values()}
        again = time.monotonic() - FAILED_SECONDS
        self._failed = {uid: when for uid, when in self._failed.items() if when > again}
        unknown = (seg for uid, seg in listed.items() if uid not in self._known and uid not in self._failed)
        new = [seg for seg in unknown if seg[0] in studies]
        if new:
            self._describe(new)
        late = time.monotonic() - UNLISTED_SECONDS
        self._own = {uid: kept for uid, kept in self._own.items() if uid not in listed and kept[0] > late}
        labels: dict[str, list[Segmentation]] = {}
        for uid in (*listed, *self._own):
            seg = self._known.get(uid)
            if seg is None or seg.draft:
                continue
            if not self._is_label(seg.names):
                names = ", ".join(seg.names) or "none"
                self._tell(f"SEG {uid} is not a label here: no task knows a segment of {names}")
                continue
            for image in seg.images:
                if image in images:
                    labels.setdefault(image, []).append(seg)
        return Listing(images, {image: newest_first(segs) for image, segs in labels.items()})

    def _is_image(self, entry: SeriesEntry) -> bool:
        try:
            check_uid(entry.uid)
        except StoreError as error:
            self._tell(f"Left out: {error}")
            return False
        return entry.instances is None or entry.instances > 1

    def _describe(self, new: Sequence[tuple[str, str, str]]) -> None:
        def described(seg: tuple[str, str, str]) -> Segmentation | None:
            try:
                return self._described(seg)
            except (AttributeError, TypeError, ValueError) as error:  # also ArchiveError
                logger.warning("SEG %s is left out for now: %s", seg[2], error)
                self._failed[seg[2]] = time.monotonic()
                return None

        with ThreadPoolExecutor(DESCRIBED_AT_ONCE) as pool:
            found = [seg for seg in pool.map(described, new) if seg]
        for seg in found:
            if not seg.images:
                self._tell(f"SEG {seg.instance} is not a label here: it does not say on which series it was drawn")
        self._remember({**self._known, **{seg.instance: seg for seg in found}})

    def _described(self, seg: tuple[str, str, str]) -> Segmentation:
        """One that names no series is looked up by the first and the last slice that it names."""
        ds = self._archive.describe(*seg)
        found = description(ds)
        slices = [] if found.images else source_instances(ds)
        series = dict.fromkeys(
            self._archive.series_of(found.study, uid) for uid in dict.fromkeys(slices[:1] + slices[-1:])
        )
        return replace(found, images=tuple(uid for uid in series if uid)) if slices else found

    def _remember(self, known: dict[str, Segmentation]) -> None:
        self._known = known
        try:
            write_json(self._path, {uid: asdict(seg) for uid, seg in known.items()})
        except OSError as error:
            logger.warning("%s cannot be written, so SEGs are described again after a restart: %s", self._path, error)

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            logger.warning("%s", text)


def description(ds: Dataset) -> Segmentation:
    """What a SEG says of itself, its pixels aside."""
    tag, ours = str(ds.get("ContentLabel", "")), str(ds.get("Manufacturer", "")) == MANUFACTURER
    return Segmentation(
        study=str(ds.StudyInstanceUID),
        series=str(ds.SeriesInstanceUID),
        instance=str(ds.SOPInstanceUID),
        images=tuple(dict.fromkeys(referenced_series(ds))),
        created=created(ds),
        names=tuple(segment_labels(ds).values()),
        draft=ours and tag != "FINAL",
        task=str(ds.get("DeviceSerialNumber", "")) if ours else "",
    )


def created(ds: Dataset) -> str:
    """When a SEG was made, as ISO text in this machine's time zone: by its content, else its instance, else its series.

    Times without a zone, which most programs write, are taken as this machine's; OHIF writes UTC and does not say so.
    """
    zone = str(ds.get("TimezoneOffsetFromUTC") or "") or ("+0000" if _is_ohif(ds) else "")
    for what in ("Content", "InstanceCreation", "Series"):
        date, time_of_day = str(ds.get(f"{what}Date") or ""), str(ds.get(f"{what}Time") or "")
        whole, _, part = time_of_day.replace(":", "").strip().partition(".")  # HHMMSS.FFFFFF, or less from the right
        try:
            text = f"{date.replace('.', '').strip()}{whole:0<6}.{part:0<6}"
            when = datetime.strptime(text[:21], "%Y%m%d%H%M%S.%f")
        except ValueError:
            continue
        return _local(when, zone).isoformat()
    return EPOCH


def _is_ohif(ds: Dataset) -> bool:
    """Whether dcmjs wrote it, OHIF's library, which names no maker: its values if a program gives none."""
    said = (
        ds.get(name) for name in ("Manufacturer", "ManufacturerModelName", "SoftwareVersions", "DeviceSerialNumber")
    )
    return tuple(str(value) for value in said) == ("Unspecified", "Unspecified", "0", "1")


def _local(when: datetime, offset: str) -> datetime:
    try:
        sign, hours, minutes = {"+": 1, "-": -1}[offset[:1]], int(offset[1:3]), int(offset[3:5])
        zone = timezone(sign * timedelta(hours=hours, minutes=minutes))
        return when.replace(tzinfo=zone).astimezone().replace(tzinfo=None)
    except (KeyError, ValueError):
        return when


def newest_first(segs: Iterable[Segmentation]) -> list[Segmentation]:
    """SEGs of one image; equal times are ordered by UID, so that every server finds the same one the newest."""
    return sorted(segs, key=lambda seg: (datetime.fromisoformat(seg.created), seg.instance), reverse=True)


def _read(path: Path) -> dict[str, Segmentation]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {
            uid: Segmentation(**{**seg, "images": tuple(seg["images"]), "names": tuple(seg["names"])})
            for uid, seg in found.items()
            if seg["images"]  # others are asked again, an archive may have got their series meanwhile
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        logger.warning("%s cannot be read, so SEGs are described again: %s", path, error)
        return {}
