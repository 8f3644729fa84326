"""The studies of a DICOMweb archive. Images and final labels are the archive's; a folder here keeps copies of them.

<series>.nii.gz, dicom/<series>/     an image and the headers of its slices
labels/final/<series>.nii.gz         the newest segmentation (SEG) of the image, in the values of its task
labels/<other tag>/                  labels of other tags, which are never sent to the archive
labels/history/, labels/rejected/    as in a folder of studies: nothing that was drawn is deleted
segmentations.json, proposals.json   what is known about the archive's SEGs, and about the model's masks
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset

from lib.stores.cases import declared, make_case
from lib.stores.dicom.archive import Archive, ArchiveError, SeriesEntry
from lib.stores.dicom.cache import ImageCache
from lib.stores.dicom.labels import by_name, modalities, task_of, task_of_seg, uploaded_seg, voxels_of
from lib.stores.dicom.listing import Listings, Segmentation, description
from lib.stores.dicom.proposals import Proposals
from lib.stores.dicom.seg import MadeBy, read_seg, write_seg
from lib.stores.errors import ConflictError, NotInStoreError, StoreError
from lib.stores.labelfiles import check_tag, keep_copy
from lib.stores.local import FINAL, LocalStore
from lib.stores.uploads.checks import plain
from lib.stores.uploads.names import named_values, task_for, task_named, to_task_values
from lib.stores.uploads.numbering import segment_names
from lib.tasks import Task
from lib.upstream import DICOMwebClient, md5_digest, settings
from lib.volumes.masks import write_mask
from lib.volumes.reading import read_header
from lib.volumes.series import SeriesError, Volume

logger = logging.getLogger(__name__)

UID = re.compile(r"[0-9]+(\.[0-9]+)*")
MAX_UID = 64
EMPTY = (
    "the label is empty. If none of its structures is in the image, say so: send 'annotated' with the names of the "
    "classes that you looked for. Otherwise draw, and submit again"
)


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


class DicomStore(LocalStore):
    """The archive's series of the tasks' modalities, and the labels drawn on them. Ids are series instance UIDs.

    A final label is a DICOM SEG in the archive; of several the newest counts, whoever wrote it, and the older ones are
    its history. Nothing is deleted, neither there nor here: what the archive does not list does not count, and stays.

    Args:
        client: MONAI Label's, with address and account.
        search_filter: which series are images, where the environment says so; else the modalities of `tasks`.
        cache_path: where folders of archives are; None: in the user's cache.
        tasks: what this server segments, in order.
        software: this app's version, written into SEGs.
    """

    def __init__(
        self,
        client: DICOMwebClient,
        search_filter: Mapping[str, Any],
        cache_path: str | None = None,
        fetch_by_frame: bool = False,
        convert_to_nifti: bool = True,
        *,
        tasks: Sequence[Task],
        software: str,
    ) -> None:
        if fetch_by_frame or not convert_to_nifti:
            logger.warning("This app downloads whole series and reads NIfTI; the environment asks for something else")
        home = Path(cache_path) if cache_path else Path.home() / ".cache" / "monailabel" / "dicom"
        super().__init__(home / md5_digest(client.base_url), tasks=tasks)
        self._refuses = settings.MONAI_LABEL_DATASTORE_READ_ONLY  # copies are made all the same
        self._software = software
        self._archive = Archive(client, settings.MONAI_LABEL_DICOMWEB_PROXY_TIMEOUT)
        self._cache = ImageCache(self.folder, self._archive)
        chosen = "MONAI_LABEL_DICOMWEB_SEARCH_FILTER" in settings.model_fields_set
        filters = [search_filter] if chosen else [{"Modality": m} for m in modalities(tasks)]
        self._listings = Listings(self._archive, filters, self._is_label, self.folder / "segmentations.json")
        self._proposals = Proposals(self.folder / "proposals.json")
        logger.info("Archive %s: series of %s; copies in %s", self._archive.name, filters, self.folder)

    @property
    def archive(self) -> Archive:
        """The archive, and how long was waited for it."""
        return self._archive

    # What there is ------------------------------------------------------------------------------------------------

    def name(self) -> str:
        return self._archive.name

    def list_images(self) -> list[str]:
        """Series instance UIDs of the images, as the archive lists them now."""
        return list(self._listings.now().images)

    def get_labeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Images with a SEG in the archive that shows a class of this server's tasks."""
        listing = self._listings.now()
        return [uid for uid in listing.images if uid in listing.labels]

    def get_unlabeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Images without such a SEG, apart from series that turned out to be no volumes."""
        listing = self._listings.now()
        images = listing.images.items()
        return [uid for uid, entry in images if uid not in listing.labels and not self._cache.unusable(entry)]

    def datalist(self, full_path: bool = True) -> list[dict[str, Any]]:
        """Cases with a final label, downloaded where they are not here: `id`, `image`, `label`, `annotated`, `task`.

        A label that cannot be read is left out, and the log says why.
        """
        cases = []
        for uid in self.get_labeled_images():
            try:
                label, info = self._final(uid)
                image = self._image(uid)
            except ArchiveError:
                raise
            except (StoreError, SeriesError) as error:
                logger.warning("The label of %s is left out: %s", uid, error)
                continue
            made = dict(make_case(uid, image, label, info.get("annotated")))
            if not full_path:
                made["image"], made["label"] = (str(p.relative_to(self.folder)) for p in (image, label))
            cases.append({**made, "task": info["task"]})
        return cases

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        """What the archive lists and what was noted; nothing is downloaded."""
        return {**self._infos.read().image(image_id).info, **self._entry(image_id).info}

    def get_label_uri(self, label_id: str, label_tag: str, image_id: str = "") -> str:
        return str(self._label(label_id, label_tag))

    def get_labels_by_image_id(self, image_id: str) -> dict[str, str]:
        """Tag to label id, which is the image's id."""
        tags = {t: i for t, i in super().get_labels_by_image_id(check_uid(image_id)).items() if t != FINAL}
        return {**tags, **({FINAL: image_id} if image_id in self._listings.now().labels else {})}

    def get_label_by_image_id(self, image_id: str, tag: str) -> str:
        """The label's id, empty where there is no such label."""
        return self.get_labels_by_image_id(image_id).get(check_tag(tag), "")

    def status(self) -> dict[str, Any]:
        listing = self._listings.now()
        here = {t: sum(bool(self._labels.of(uid, t)) for uid in listing.images) for t in self._labels.tags()}
        tags = {**here, FINAL: len(listing.labels)}
        return {
            "total": len(listing.images),
            "completed": len(listing.labels),
            "label_tags": {tag: count for tag, count in sorted(tags.items()) if count},
        }

    def refresh(self) -> None:
        """Ask the archive now; without it, answers are up to a second old."""
        self._listings.now(fresh=True)

    def json(self) -> dict[str, Any]:
        """All images with their labels, in the schema of `datastore_v2.json`."""
        listing, infos = self._listings.now(), self._infos.read()
        objects: dict[str, Any] = {}
        for uid, entry in listing.images.items():
            tags = {tag: self._labels.of(uid, tag) for tag in self._labels.tags() if tag != FINAL}
            labels = {t: {"ext": ".nii.gz", "info": infos.label(uid, t, p[-1]).info} for t, p in tags.items() if p}
            if uid in listing.labels:
                labels[FINAL] = {"ext": ".nii.gz", "info": _facts(listing.labels[uid][0])}
            image = {"ext": ".nii.gz", "info": {**infos.image(uid).info, **entry.info}}
            objects[uid] = {"image": image, "labels": labels}
        return {**infos.model_dump(exclude={"objects", "announced"}), "name": self.name(), "objects": objects}

    # Changes ------------------------------------------------------------------------------------------------------

    def add_image(self, image_id: str | None, image_filename: str, image_info: dict[str, Any] | None) -> str:
        raise ConflictError("images come from the archive: store the DICOM series there")

    def remove_image(self, image_id: str) -> None:
        check_uid(image_id)
        raise ConflictError("images belong to the archive: remove the series there")

    def save_label(
        self,
        image_id: str,
        label_filename: str,
        label_tag: str,
        label_info: dict[str, Any] | None,
        label_id: str = "",
    ) -> str:
        """Make an uploaded file the label of an image: with the tag `final` as a SEG in the archive, else only here.

        Args:
            label_filename: NIfTI, NRRD or MetaImage on the image's grid, `.bin` (a byte a voxel in the image's order),
                or `.dcm`, a SEG of the image.
            label_info: what the client sent: `label_info` names the values of the file, `annotated` the classes that
                were looked for, `model` the task; `user` is who sends it.

        Raises:
            StoreError: no label of this image; the file is kept in `labels/rejected`.
            ArchiveError: the archive did not take it; the file is kept in `labels/history`.
        """
        check_uid(image_id)
        tag, source = check_tag(label_tag), Path(label_filename)
        if self._refuses:
            self._refuse_change()
        user = label_info.get("user") if isinstance(label_info, dict) else None
        with self._cache.lock(image_id):
            suffix = "".join(c for c in "".join(source.suffixes)[-20:] if c.isalnum() or c == ".")
            kept = keep_copy(source, self.folder / "labels" / "history" / tag / image_id, user, suffix)
            try:
                self._save(image_id, source, tag, label_info)
            except ArchiveError as error:
                raise ArchiveError(f"{error}. The drawing is kept as {kept.relative_to(self.folder)}") from error
            except ValueError as error:
                kept.unlink()
                self._labels.reject(image_id, source, user, error)
            kept.unlink()
        return image_id

    def remove_label(self, label_id: str, label_tag: str) -> None:
        """Take a label away, into the history; a final one can only be removed from the archive, or replaced."""
        check_uid(label_id)
        if check_tag(label_tag) == FINAL:
            self._label(label_id, FINAL)
            raise ConflictError("a final label belongs to the archive: submit a better one, or remove the SEG there")
        super().remove_label(label_id, label_tag)

    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        """Add to what is known about an image."""
        entry, news = self._entry(image_id), plain(info)
        with self._writing(), self._infos.change() as document:
            record = document.entry(entry.uid).image
            record.ext, record.info = ".nii.gz", {**record.info, **news}

    # For inference ------------------------------------------------------------------------------------------------

    def propose(self, image_id: str, model: str, version: int, mask: Path) -> None:
        """Remember the model's mask of an image: what a person leaves as it is will be saved as the model's."""
        task = task_named(model, self.tasks)
        try:
            volume = self._cache.volume(self._entry(image_id))
            voxels = voxels_of(mask, volume, self._cache.path(image_id), image_id)
            self._proposals.add(image_id, task, version, voxels)
        except (
            StoreError,
            SeriesError,
        ) as error:  # the archive went down meanwhile: the mask is worth more than the note
            logger.warning("The mask of %s will count as drawn by hand: %s", image_id, error)

    def as_seg(self, image_id: str, model: str, version: int, mask: Path) -> Dataset:
        """The model's mask of an image as a SEG, which no archive has yet and which counts as no label."""
        task, volume = task_named(model, self.tasks), self._cache.volume(self._entry(image_id))
        return write_seg(
            voxels_of(mask, volume, self._cache.path(image_id), image_id),
            volume,
            task,
            tag="original",
            when=datetime.now(),
            software=self._software,
            made_by={name: MadeBy(version) for name in task.labels},
        )

    # How ----------------------------------------------------------------------------------------------------------

    def _entry(self, uid: str) -> SeriesEntry:
        check_uid(uid)
        images = self._listings.now().images
        if uid not in images:
            raise NotInStoreError(f"unknown image {uid!r}; the archive has {len(images)} images of the tasks' kind")
        return images[uid]

    def _image(self, case: str) -> Path:
        return self._cache.image(self._entry(case))

    def _label(self, case: str, label_tag: str) -> Path:
        check_uid(case)
        return self._final(case)[0] if check_tag(label_tag) == FINAL else super()._label(case, label_tag)

    def _is_label(self, names: Iterable[str]) -> bool:
        return task_for(names, self.tasks) is not None

    def _final(self, uid: str) -> tuple[Path, dict[str, Any]]:
        """The copy of the newest SEG of an image, made anew where there is a newer one, and what is known about it."""
        entry, listing = self._entry(uid), self._listings.now()
        if uid not in listing.labels:
            raise NotInStoreError(f"image {uid!r} has no label of tag {FINAL!r} in the archive")
        seg = listing.labels[uid][0]
        task = task_of_seg(seg.names, seg.task, self.tasks)
        assert task, "a listed label has a task"
        with self._cache.lock(uid):
            volume = self._cache.volume(entry)
            paths = self._labels.of(uid, FINAL)
            if paths:
                info = self._infos.read().label(uid, FINAL, paths[-1]).info
                if info.get("segmentation") == seg.instance and info.get("read_as") == _reading(volume.shape, task):
                    return paths[-1], info
            found = read_seg(self._archive.instance(seg.study, seg.series, seg.instance), volume)
            mask, looked_for = by_name(found, f"SEG {seg.instance}", task)
            info = {**_facts(seg), "annotated": looked_for}
            return self._copy(uid, FINAL, mask, task, {k: v for k, v in info.items() if v is not None})

    def _copy(self, uid: str, tag: str, mask: np.ndarray, task: Task, info: dict[str, Any]) -> tuple[Path, dict]:
        """Put a label into the folder; the one that was there goes into the history."""
        info = {**info, "task": task.name, "read_as": _reading(mask.shape, task)}
        with tempfile.TemporaryDirectory() as folder:
            file, image = Path(folder) / f"{uid}.nii.gz", self._cache.path(uid)
            kind = np.uint8 if mask.max(initial=0) < 256 else np.uint16
            write_mask(file, mask.astype(kind), read_header(image).affine.numpy(), str(image), {})
            with self._writing():
                self._labels.put(uid, tag, file, info)
        return self._labels.of(uid, tag)[-1], info

    # Saving -------------------------------------------------------------------------------------------------------

    def _save(self, uid: str, source: Path, tag: str, label_info: dict[str, Any] | None) -> None:
        info = plain(label_info)
        looked_for = declared(info["annotated"]) if info.get("annotated") is not None else None
        entry = self._entry(uid)
        volume = self._cache.volume(entry)
        mask, task, said = self._received(source, uid, volume, info)
        looked_for = said if looked_for is None else looked_for
        if looked_for is not None:
            task.annotated(looked_for)
            info["annotated"] = looked_for
        if tag != FINAL:
            self._copy(uid, tag, mask, task, info)
            return
        if not mask.any() and looked_for is None:
            raise StoreError(EMPTY)
        kept = self._proposals.unchanged(uid, task, mask)
        latest = self._listings.now(fresh=True).labels.get(uid)
        when = datetime.now()
        if latest:  # a clock that was set back must not make this label an old one
            when = max(when, datetime.fromisoformat(latest[0].created) + timedelta(milliseconds=1))
        ds = write_seg(
            mask,
            volume,
            task,
            tag=FINAL,
            when=when,
            software=self._software,
            author=str(info.get("user") or ""),
            made_by={name: MadeBy(version, accepted=True) for name, version in kept.items()},
            declared=looked_for,
        )
        self._archive.store(ds)
        seg = description(ds)
        try:
            self._copy(uid, FINAL, mask, task, {**info, **_facts(seg)})
        except OSError as error:
            logger.warning("SEG %s is in the archive; its copy here failed: %s", seg.instance, error)
        self._listings.add(seg)

    def _received(
        self, source: Path, uid: str, volume: Volume, info: dict[str, Any]
    ) -> tuple[np.ndarray, Task, list[str] | None]:
        """An upload in the values of its task, and the classes that it declares."""
        if source.suffix.lower() == ".dcm":
            found = uploaded_seg(source, uid, volume)
            names: dict[int, str] | None = dict(enumerate(found.names, start=1))
            mask, said = found.index, found.declared
        else:
            mask, said = voxels_of(source, volume, self._cache.path(uid), uid), None
            names = segment_names(source) or named_values(info.get("label_info"))
        task = task_of(info, names, mask, self.tasks)
        return to_task_values(mask, names, task), task, said


def _reading(shape: Sequence[int], task: Task) -> dict[str, Any]:
    """What a copy of a SEG depends on beside the SEG: the grid, and the values of the task."""
    return {"shape": list(shape), "task": task.name, "values": task.label_values}


def _facts(seg: Segmentation) -> dict[str, Any]:
    """What an info says about the SEG that a label is a copy of."""
    return {
        "segmentation": seg.instance,
        "SeriesInstanceUID": seg.series,
        "StudyInstanceUID": seg.study,
        "created": seg.created,
        "segments": list(seg.names),
    }
