"""The studies of a DICOMweb archive. Images and final labels are the archive's; a folder here keeps copies of them.

<series>.nii.gz, dicom/<series>/     an image and the headers of its slices
labels/final/<series>.nii.gz         the newest segmentation (SEG) of the image, in the values of its task
labels/<other tag>/                  labels of other tags, which are never sent to the archive
labels/history/, labels/rejected/    as in a folder of studies: nothing that was drawn is deleted
segmentations.json, proposals.json   what is known about the archive's SEGs, and about the model's masks
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset

from lib.files import FINAL
from lib.stores.cases import CLICKS, make_case
from lib.stores.dicom.archive import Archive, ArchiveError, SeriesEntry
from lib.stores.dicom.cache import ImageCache
from lib.stores.dicom.copies import Copies, facts_of
from lib.stores.dicom.labels import modalities
from lib.stores.dicom.listing import Listings, check_uid
from lib.stores.dicom.proposals import Proposals
from lib.stores.dicom.saving import Saving
from lib.stores.errors import BusyError, ConflictError, NotInStoreError, StoreError
from lib.stores.export import zip_cases
from lib.stores.interface import Store
from lib.stores.labelfiles import check_tag, keep_copy
from lib.stores.labelfolder import LabelFolder, refuse_change, refused
from lib.stores.uploads.checks import plain
from lib.stores.uploads.names import task_for, task_named
from lib.tasks import Task
from lib.upstream import DICOMwebClient, md5_digest, settings
from lib.volumes.series import SeriesError

logger = logging.getLogger(__name__)


class DicomStore(Store):
    """The archive's series of the tasks' modalities, and the labels drawn on them. Ids are series instance UIDs.

    A final label is a DICOM SEG in the archive; of several the newest counts, whoever wrote it, and the older ones are
    its history. Nothing is deleted, neither there nor here: what the archive does not list does not count, and stays.

    Args:
        client: MONAI Label's, with address and account.
        search_filter: which series are images, if the environment says so; else the modalities of `tasks`.
        cache_path: where folders of archives are; None: in the user's cache.
        tasks: what this server segments, in order.
        software: this app's version, written into SEGs.
    """

    dicom = True

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
        self.tasks = tuple(tasks)
        self._read_only = settings.MONAI_LABEL_DATASTORE_READ_ONLY
        self._kept = LabelFolder(home / md5_digest(client.base_url))  # copies are made in any case
        self._infos, self._labels, self.folder = self._kept.infos, self._kept.labels, self._kept.path
        self._archive = Archive(client, settings.MONAI_LABEL_DICOMWEB_PROXY_TIMEOUT)
        self._images = ImageCache(self._kept, self._archive)
        self._copies = Copies(self._kept, self._images, self._archive, self.tasks)
        chosen = "MONAI_LABEL_DICOMWEB_SEARCH_FILTER" in settings.model_fields_set
        filters = [search_filter] if chosen else [{"Modality": m} for m in modalities(tasks)]
        self._listings = Listings(self._archive, filters, self._is_label, self.folder / "segmentations.json")
        proposals = Proposals(self.folder / "proposals.json")
        parts = (self._archive, self._images, self._copies, self._listings, proposals)
        self._saving = Saving(*parts, self.tasks, software)
        logger.info("Archive %s: series of %s; copies in %s", self._archive.name, filters, self.folder)

    @property
    def archive(self) -> Archive:
        """The archive, and how long was waited for it."""
        return self._archive

    @property
    def read_only(self) -> bool:
        return self._read_only

    # What there is ------------------------------------------------------------------------------------------------

    def name(self) -> str:
        return self._archive.name

    def set_name(self, name: str) -> None:
        """Kept, but an archive is called by its address."""
        self._check_changes()
        self._kept.set_name(name)

    def description(self) -> str:
        return self._infos.read().description

    def set_description(self, description: str) -> None:
        self._check_changes()
        self._kept.set_description(description)

    def list_images(self) -> list[str]:
        """Series instance UIDs of the images, as the archive lists them now."""
        return list(self._listings.now().images)

    def left_out(self) -> dict[str, str]:
        """None: a series that turns out not to be a volume is listed, and says so when it is asked for."""
        return {}

    def get_labeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Images with a SEG in the archive that shows a class of this server's tasks."""
        listing = self._listings.now()
        return [uid for uid in listing.images if uid in listing.labels]

    def get_unlabeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Images without such a SEG, apart from series that turned out not to be volumes."""
        listing = self._listings.now()
        images = listing.images.items()
        return [uid for uid, entry in images if uid not in listing.labels and not self._images.unusable(entry)]

    def datalist(self, full_path: bool = True) -> list[dict[str, Any]]:
        """Cases with a final label, downloaded if they are not here: `id`, `image`, `label`, `annotated`, `task`.

        A label that cannot be read is left out, and the log says why.
        """
        cases = []
        for uid in self.get_labeled_images():
            try:
                label, info = self._final(uid)
                image = self._image(uid)
            except (ArchiveError, BusyError):
                raise
            except (StoreError, SeriesError) as error:
                logger.warning("The label of %s is left out: %s", uid, error)
                continue
            made = dict(make_case(uid, image, label, info.get("annotated"), clicks=info.get(CLICKS)))
            if not full_path:
                made["image"], made["label"] = (str(p.relative_to(self.folder)) for p in (image, label))
            cases.append({**made, "task": info["task"]})
        return cases

    def get_image(self, image_id: str, params: Any = None) -> BytesIO:
        return BytesIO(self._image(image_id).read_bytes())

    def get_image_uri(self, image_id: str) -> str:
        return str(self._image(image_id))

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        """What the archive lists and what was noted; nothing is downloaded."""
        return {**self._infos.read().image(image_id).info, **self._entry(image_id).info}

    def get_label(self, label_id: str, label_tag: str, params: Any = None) -> BytesIO:
        return BytesIO(self._label(label_id, label_tag).read_bytes())

    def get_label_uri(self, label_id: str, label_tag: str, image_id: str = "") -> str:
        return str(self._label(label_id, label_tag))

    def get_label_info(self, label_id: str, label_tag: str) -> dict[str, Any]:
        return self._kept.label_info(label_id, label_tag, self._label(label_id, label_tag))

    def get_labels_by_image_id(self, image_id: str) -> dict[str, str]:
        """Tag to label id, which is the image's id."""
        tags = [tag for tag in self._kept.tags_of(check_uid(image_id)) if tag != FINAL]
        labelled = image_id in self._listings.now().labels
        return dict.fromkeys([*tags, FINAL] if labelled else tags, image_id)

    def get_label_by_image_id(self, image_id: str, tag: str) -> str:
        """The label's id, empty if there is no such label."""
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
                labels[FINAL] = {"ext": ".nii.gz", "info": facts_of(listing.labels[uid][0])}
            image = {"ext": ".nii.gz", "info": {**infos.image(uid).info, **entry.info}}
            objects[uid] = {"image": image, "labels": labels}
        return {**infos.model_dump(exclude={"objects", "announced"}), "name": self.name(), "objects": objects}

    def get_dataset_archive(self, limit_cases: int | None) -> str:
        """A temporary ZIP of the labelled cases, for the caller to delete.

        Raises:
            NotInStoreError: no case is labelled.
        """
        return zip_cases(self.datalist(), self._infos.read().model_dump_json(indent=2), limit_cases)

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
            label_filename: NIfTI, NRRD or MetaImage on the image's grid, `.bin` (a byte per voxel in the image's
                order), or `.dcm`, a SEG of the image.
            label_info: what the client sent: `label_info` names the values of the file, `annotated` the classes that
                were looked for, `model` the task; `user` is who sends it.

        Raises:
            StoreError: not a label of this image; the file is kept in `labels/rejected`.
            ArchiveError: the archive did not take it; the file is kept in `labels/history`.
            BusyError: others have been at work on the series for too long; it is kept there, too.
        """
        check_uid(image_id)
        tag, source = check_tag(label_tag), Path(label_filename)
        self._check_changes()
        user = label_info.get("user") if isinstance(label_info, dict) else None
        suffix = "".join(c for c in "".join(source.suffixes)[-20:] if c.isalnum() or c == ".")
        kept = keep_copy(source, self.folder / "labels" / "history" / tag / image_id, user, suffix)
        try:
            with self._images.lock(image_id):
                self._saving.save(self._entry(image_id), source, tag, label_info)
        except (ArchiveError, BusyError) as error:
            raise type(error)(f"{error}. The drawing is kept as {kept.relative_to(self.folder)}") from error
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
        self._check_changes()
        self._kept.remove_label(label_id, label_tag)

    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        """Add to what is known about an image."""
        self._check_changes()
        entry, news = self._entry(image_id), refused(plain, info)
        with self._kept.writing():
            self._kept.note_image(entry.uid, ".nii.gz", {}, news)

    def update_label_info(self, label_id: str, label_tag: str, info: dict[str, Any]) -> None:
        """Add to what is known about a label; `annotated` is checked as in `save_label`, None takes it away."""
        self._check_changes()
        with self._images.lock(check_uid(label_id)):  # nothing replaces the label while it is looked up and noted
            self._label(label_id, label_tag)
            self._kept.note_label(label_id, label_tag, info, self.tasks)

    def keep_map(self, image_id: str, file: Path, info: dict[str, Any]) -> None:
        """Keep what a model computed for an image under the tag `uncertainty`, in place of an earlier one."""
        self._check_changes()
        self._image(image_id)
        with self._kept.writing():
            self._kept.put_map(image_id, file, info)

    # For inference ------------------------------------------------------------------------------------------------

    def propose(self, image_id: str, model: str, version: int, mask: Path) -> None:
        """Remember the model's mask of an image: what a person leaves as it is will be saved as the model's."""
        task = task_named(model, self.tasks)
        try:
            self._saving.propose(self._entry(image_id), task, version, mask)
        except (StoreError, SeriesError) as error:  # the archive went down: the mask is worth more than the note
            logger.warning("The mask of %s will count as drawn by hand: %s", image_id, error)

    def as_seg(self, image_id: str, model: str, version: int, mask: Path) -> Dataset:
        """The model's mask of an image as a SEG, which no archive has yet and which does not count as a label."""
        return self._saving.draft(self._entry(image_id), task_named(model, self.tasks), version, mask)

    # How ----------------------------------------------------------------------------------------------------------

    def _check_changes(self) -> None:
        if self._read_only:
            refuse_change()

    def _entry(self, uid: str) -> SeriesEntry:
        check_uid(uid)
        images = self._listings.now().images
        if uid not in images:
            raise NotInStoreError(f"unknown image {uid!r}; the archive has {len(images)} images of the tasks' kind")
        return images[uid]

    def _image(self, case: str) -> Path:
        return self._images.image(self._entry(case))

    def _label(self, case: str, label_tag: str) -> Path:
        check_uid(case)
        return self._final(case)[0] if check_tag(label_tag) == FINAL else self._kept.label(case, label_tag)

    def _is_label(self, names: Iterable[str]) -> bool:
        return task_for(names, self.tasks) is not None

    def _final(self, uid: str) -> tuple[Path, dict[str, Any]]:
        """The copy of the newest SEG of an image, and what is known about it."""
        entry, listing = self._entry(uid), self._listings.now()
        if uid not in listing.labels:
            raise NotInStoreError(f"image {uid!r} has no label of tag {FINAL!r} in the archive")
        return self._copies.final(entry, listing.labels[uid][0])
