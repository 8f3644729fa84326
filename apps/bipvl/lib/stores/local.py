"""The studies folder: images, their labels and what is known about them (`.labelfolder`).

Layout and JSON are MONAI Label's own. Images and labels are listed from disk whenever they are asked for: a file added
by hand appears without a restart, and if the JSON is lost, nothing else is.
"""

from __future__ import annotations

import copy
import logging
import os
import tempfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NoReturn

from lib.files import FINAL
from lib.stores.cases import CLICKS, declared, make_case
from lib.stores.document import Record, digest, stage_copy, sync_folder
from lib.stores.errors import ConflictError, NotInStoreError, ReadOnlyError, StoreError
from lib.stores.export import zip_cases
from lib.stores.interface import Store
from lib.stores.labelfiles import check_new_id, check_tag, facts, files_of
from lib.stores.labelfolder import LabelFolder, refuse_change, refused
from lib.stores.renaming import Renaming, planned, rename_class
from lib.stores.uploads.checks import check_image_file, check_label_file, plain, same_volume, suffix_of
from lib.stores.uploads.numbering import check_trainable, renumber, without_errors
from lib.tasks import Task
from lib.volumes.folders import image_id as id_of
from lib.volumes.folders import newest, twins, usable, volumes

__all__ = ["ConflictError", "LocalStore", "NotInStoreError", "ReadOnlyError", "StoreError", "check_new_id", "check_tag"]

logger = logging.getLogger(__name__)


class LocalStore(Store):
    """A folder of images and labels, safe between threads and processes.

    Args:
        folder: made if it does not exist.
        read_only: refuse every change; a folder that cannot be written to does the same by itself.
        tasks: of this server; labels that come with names are kept in their values.

    Raises:
        StoreError: the folder does not exist and cannot be made.
    """

    dicom = False

    def __init__(self, folder: str | Path, read_only: bool = False, tasks: Sequence[Task] = ()) -> None:
        self.tasks = tuple(tasks)
        self._kept = LabelFolder(Path(folder), read_only)
        self._infos, self._labels = self._kept.infos, self._kept.labels
        self.folder = self._kept.path
        self._told: set[str] = set()

    @property
    def read_only(self) -> bool:
        return self._kept.read_only

    # What there is ------------------------------------------------------------------------------------------------

    def name(self) -> str:
        return self._infos.read().name

    def set_name(self, name: str) -> None:
        self._kept.set_name(name)

    def description(self) -> str:
        return self._infos.read().description

    def set_description(self, description: str) -> None:
        self._kept.set_description(description)

    def list_images(self) -> list[str]:
        """Ids in order, as they are on disk now, without those that are `left_out`."""
        return list(self._images())

    def left_out(self) -> dict[str, str]:
        return usable(self.folder)[1]

    def report(self) -> None:
        """Say in the log which files of the folder count for nothing."""
        self._kept.report()

    def get_labeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Images with a final label; like MONAI Label's own store, whatever `label_tag` and `labels` say."""
        final = volumes(self._labels.folder / FINAL)
        return [case for case in self._images() if case in final]

    def get_unlabeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Images without a final label."""
        final = volumes(self._labels.folder / FINAL)
        return [case for case in self._images() if case not in final]

    def datalist(self, full_path: bool = True) -> list[dict[str, Any]]:
        """Cases with a final label: `id`, `image`, `label` and, if the label declares its classes, `annotated`."""
        final, infos = volumes(self._labels.folder / FINAL), self._infos.read()
        cases = []
        for case, image in self._images().items():
            if case not in final:
                continue
            label = newest(final[case])
            info = infos.label(case, FINAL, label).info
            made = make_case(case, image, label, info.get("annotated"), info.get("label_names"), info.get(CLICKS))
            if not full_path:
                made["image"], made["label"] = (str(p.relative_to(self.folder)) for p in (image, label))
            cases.append(dict(made))
        return cases

    def get_image(self, image_id: str, params: Any = None) -> BytesIO:
        return BytesIO(self._image(image_id).read_bytes())

    def get_image_uri(self, image_id: str) -> str:
        return str(self._image(image_id))

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        path = self._image(image_id)
        return {**facts(path), **copy.deepcopy(self._infos.read().image(image_id).info), "path": str(path)}

    def get_label(self, label_id: str, label_tag: str, params: Any = None) -> BytesIO:
        return BytesIO(self._kept.label(label_id, label_tag).read_bytes())

    def get_label_uri(self, label_id: str, label_tag: str) -> str:
        return str(self._kept.label(label_id, label_tag))

    def get_label_info(self, label_id: str, label_tag: str) -> dict[str, Any]:
        return self._kept.label_info(label_id, label_tag, self._kept.label(label_id, label_tag))

    def get_labels_by_image_id(self, image_id: str) -> dict[str, str]:
        """Tag to label id, which is the image's id."""
        return dict.fromkeys(self._kept.tags_of(image_id), image_id)

    def get_label_by_image_id(self, image_id: str, tag: str) -> str:
        """The label's id, empty if there is no such label."""
        return image_id if self._labels.of(image_id, check_tag(tag)) else ""

    def status(self) -> dict[str, Any]:
        """How many images there are and how many are labelled; and, if there are any, what counts for nothing."""
        images = self._images()
        tags = {tag: sum(case in images for case in volumes(self._labels.folder / tag)) for tag in self._labels.tags()}
        return {
            "total": len(images),
            "completed": tags.get(FINAL, 0),
            "label_tags": {t: n for t, n in tags.items() if n},
            **self._kept.counts_for_nothing(),
        }

    def json(self) -> dict[str, Any]:
        """All images and labels with their infos, in the schema of `datastore_v2.json`, and what `status` adds."""
        infos = self._infos.read()
        return {
            **infos.model_dump(exclude={"objects", "announced"}),
            "objects": self._kept.objects(infos),
            **self._kept.counts_for_nothing(),
        }

    def get_dataset_archive(self, limit_cases: int | None) -> str:
        """A temporary ZIP of the labelled cases, for the caller to delete.

        Raises:
            NotInStoreError: no case is labelled.
        """
        return zip_cases(self.datalist(), self._infos.read().model_dump_json(indent=2), limit_cases)

    def refresh(self) -> None:
        """Nothing to do: every answer is read from disk."""

    # Changes ------------------------------------------------------------------------------------------------------

    def add_image(self, image_id: str | None, image_filename: str, image_info: dict[str, Any] | None) -> str:
        """Put an image into the folder. None is ever replaced by another one: somebody may be drawing on it.

        Raises:
            StoreError: an id that cannot be a file name, or not a volume.
            ConflictError: the id belongs to another image, or to a file with another extension.
        """
        source = Path(image_filename)
        suffix = refused(suffix_of, source)
        case = check_new_id(image_id or id_of(source))
        info = refused(plain, image_info)
        refused(check_image_file, source)
        target = self.folder / f"{case}{suffix}"
        if id_of(target) != case:
            raise StoreError(f"image id {case!r}: in {target.name!r} a reader would take {id_of(target)!r} for the id")
        with self._kept.writing():
            others = [p.name for p in files_of(self.folder, case) if p != target]
            if others:
                raise ConflictError(f"image id {case!r} belongs to {others[0]}; choose another id")
            if case in self.left_out():
                raise ConflictError(f"image {case!r} cannot be used: {self.left_out()[case]}")
            if not target.exists():
                staged = stage_copy(source, self.folder)
                try:
                    os.replace(staged, target)
                finally:
                    staged.unlink(missing_ok=True)
                sync_folder(self.folder)
            elif digest(target) != digest(source) and not same_volume(target, source):
                raise ConflictError(
                    f"there is another image {case!r} already: give yours another name (3D Slicer: rename the volume)"
                )
            with self._infos.change() as document:
                document.entry(case).image = Record(ext=suffix, info={**info, **facts(target)})
        return case

    def remove_image(self, image_id: str) -> None:
        """Delete an image; its labels go into the history."""
        with self._kept.writing():
            path = self._image(image_id)
            self._labels.retire(image_id)
            path.unlink()
            sync_folder(self.folder)
            with self._infos.change() as document:
                document.objects.pop(image_id, None)

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any] | None) -> str:
        """Make an uploaded file the label of an image; the one that was there goes into the history.

        Args:
            label_info: what the client sent; `annotated` may name the classes that the label was drawn for,
                `label_info` the values of the file, `model` the task they belong to.

        Raises:
            StoreError: not a label of this image: unreadable, another grid, a wrong declaration, values that training
                would refuse; or the image is not there any more. The file is kept in `labels/rejected`.
            OSError: e.g. the disk is full: the label that was there is untouched.
        """
        tag, source = check_tag(label_tag), Path(label_filename)
        if self.read_only:
            refuse_change()
        try:
            self._keep_label(image_id, source, tag, label_info)
        except ValueError as error:
            if not self._may_be_image(image_id):
                raise
            user = label_info.get("user") if isinstance(label_info, dict) else None
            self._labels.reject(image_id, source, user, error)
        return image_id

    def keep_map(self, image_id: str, file: Path, info: dict[str, Any]) -> None:
        """Keep what a model computed for an image under the tag `uncertainty`, in place of an earlier one."""
        with self._kept.writing():
            self._image(image_id)
            self._kept.put_map(image_id, file, info)

    def remove_label(self, label_id: str, label_tag: str) -> None:
        """Take a label away, into the history."""
        self._kept.remove_label(label_id, label_tag)

    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        """Add to what is known about an image."""
        news = refused(plain, info)
        with self._kept.writing():
            path = self._image(image_id)
            self._kept.note_image(image_id, path.name[len(image_id) :], facts(path), news)

    def update_label_info(self, label_id: str, label_tag: str, info: dict[str, Any]) -> None:
        """Add to what is known about a label; `annotated` is checked as in `save_label`, None takes it away."""
        self._kept.note_label(label_id, label_tag, info, self.tasks)

    def rename_class(self, renaming: Renaming, only_list: bool = False) -> list[str]:
        """Let the labels follow a class that got another name in its task; returns their places in the folder."""
        if only_list:
            return planned(self._labels, self._infos.read(), renaming)
        with self._kept.writing():
            return rename_class(self._labels, self._infos, renaming)

    # For inference ------------------------------------------------------------------------------------------------

    def propose(self, image_id: str, model: str, version: int, mask: Path) -> None:
        """Nothing to do: a label of a folder does not say who drew which class."""

    def as_seg(self, image_id: str, model: str, version: int, mask: Path) -> NoReturn:
        raise StoreError("a DICOM segmentation is offered for the images of a DICOMweb archive only")

    # How ----------------------------------------------------------------------------------------------------------

    def _keep_label(self, case: str, source: Path, tag: str, label_info: dict[str, Any] | None) -> None:
        image = self._image(case)
        before, info = _signature(image), plain(label_info)
        if info.get("annotated") is not None:
            declared(info["annotated"])
        drawn = check_label_file(source, image, case)
        renumbered = renumber(source, drawn, info, self.tasks)
        if tag == FINAL:
            changed = renumbered.changed if renumbered else None
            check_trainable(drawn if changed is None else changed, info, self.tasks)
        with tempfile.TemporaryDirectory() as folder, self._kept.writing():
            if _signature(self._image(case)) != before:
                raise ConflictError(f"image {case!r} was replaced in the meantime")
            if renumbered:
                info["label_names"] = renumbered.names
                source = renumbered.file(source, Path(folder), image)
            elif tag == FINAL and self.tasks and (exact := without_errors(drawn)):
                source = exact.file(source, Path(folder), image)
            self._labels.put(case, tag, source, info)

    def _images(self) -> dict[str, Path]:
        images, problems = usable(self.folder)
        for problem in problems.values():
            if problem not in self._told:
                self._told.add(problem)
                logger.warning("%s: %s", self.folder, problem)
        return images

    def _image(self, case: str) -> Path:
        paths = files_of(self.folder, case)
        if len(paths) > 1:
            raise ConflictError(twins(case, paths))
        if not paths:
            images, problems = usable(self.folder)
            if case in problems:
                raise ConflictError(f"image {case!r} cannot be used: {problems[case]}")
            raise NotInStoreError(f"unknown image {str(case)[:80]!r}; the datastore has {len(images)} images")
        return paths[0]

    def _may_be_image(self, case: str) -> bool:
        """Whether an image can have, or has had, this id: what was drawn on it is kept even if it is gone."""
        try:
            return check_new_id(case) == case
        except StoreError:  # a name that somebody gave it by hand
            return bool(files_of(self.folder, case)) or case in self._infos.read().objects


def _signature(path: Path) -> tuple[int, int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise ConflictError(f"the image {path.name} cannot be read: {error.strerror}") from error
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
