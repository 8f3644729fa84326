"""The studies folder: images, their labels (`.labelfiles`) and what is known about them (`.document`).

Layout and JSON are MONAI Label's own. Images and labels are listed from disk whenever they are asked for: a file added
by hand appears without a restart, and nothing is lost where the JSON is.
"""

from __future__ import annotations

import copy
import errno
import logging
import os
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock, Timeout

from lib.stores.cases import declared, make_case, newest, volumes
from lib.stores.cases import image_id as id_of
from lib.stores.document import STAGED, Infos, Record, digest, stage_copy, sync_folder
from lib.stores.errors import ConflictError, NotInStoreError, ReadOnlyError, StoreError
from lib.stores.labelfiles import LabelFiles, check_new_id, check_tag, facts, files_of
from lib.stores.uploads.checks import check_image_file, check_label_file, plain, same_volume, suffix_of
from lib.stores.uploads.numbering import renumber
from lib.tasks import Task
from lib.upstream import Datastore

__all__ = ["ConflictError", "LocalStore", "NotInStoreError", "ReadOnlyError", "StoreError", "check_new_id", "check_tag"]

logger = logging.getLogger(__name__)

FINAL, UNCERTAINTY = "final", "uncertainty"
READ_ONLY_ERRORS = (errno.EROFS, errno.EACCES, errno.EPERM)
LOCK_SECONDS = 120


class LocalStore(Datastore):
    """A folder of images and labels, safe between threads and processes.

    Args:
        folder: made where it does not exist.
        read_only: refuse every change; a folder that cannot be written to does the same by itself.
        tasks: of this server; labels that come with names are kept in their values.

    Raises:
        StoreError: the folder does not exist and cannot be made.
    """

    def __init__(self, folder: str | Path, read_only: bool = False, tasks: Sequence[Task] = ()) -> None:
        self.tasks = tuple(tasks)
        self.folder = Path(folder).resolve()
        self.read_only = read_only
        self._infos = Infos(self.folder)
        self._labels = LabelFiles(self.folder, self._infos)
        self._threads = threading.Lock()
        self._told: set[str] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{self.folder}: cannot be used as the folder of studies: {error.strerror}") from error
        try:
            with self._writing():
                for left in (*self.folder.glob(f"{STAGED}*"), *self._labels.folder.glob(f"*/{STAGED}*")):
                    left.unlink(missing_ok=True)  # of a server that was killed while saving
                self._infos.set_damaged_aside()
        except (StoreError, OSError) as error:
            logger.warning("%s", error)

    # What there is ------------------------------------------------------------------------------------------------

    def name(self) -> str:
        return self._infos.read().name

    def set_name(self, name: str) -> None:
        with self._writing(), self._infos.change() as document:
            document.name = name

    def description(self) -> str:
        return self._infos.read().description

    def set_description(self, description: str) -> None:
        with self._writing(), self._infos.change() as document:
            document.description = description

    def list_images(self) -> list[str]:
        """Ids in order, as they are on disk now. Two images of one id are left out, and the log says so."""
        return list(self._images())

    def get_labeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Images with a final label; like MONAI Label's own store, whatever `label_tag` and `labels` say."""
        final = volumes(self._labels.folder / FINAL)
        return [case for case in self._images() if case in final]

    def get_unlabeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Images without a final label."""
        final = volumes(self._labels.folder / FINAL)
        return [case for case in self._images() if case not in final]

    def datalist(self, full_path: bool = True) -> list[dict[str, Any]]:
        """Cases with a final label: `id`, `image`, `label` and, where the label declares its classes, `annotated`."""
        final, infos = volumes(self._labels.folder / FINAL), self._infos.read()
        cases = []
        for case, image in self._images().items():
            if case not in final:
                continue
            label = newest(final[case])
            info = infos.label(case, FINAL, label).info
            made = make_case(case, image, label, info.get("annotated"), info.get("label_names"))
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
        return BytesIO(self._label(label_id, label_tag).read_bytes())

    def get_label_uri(self, label_id: str, label_tag: str) -> str:
        return str(self._label(label_id, label_tag))

    def get_label_info(self, label_id: str, label_tag: str) -> dict[str, Any]:
        path = self._label(label_id, label_tag)
        record = self._infos.read().label(label_id, check_tag(label_tag), path)
        return {**facts(path), **copy.deepcopy(record.info)}

    def get_labels_by_image_id(self, image_id: str) -> dict[str, str]:
        """Tag to label id, which is the image's id."""
        return {tag: image_id for tag in self._labels.tags() if self._labels.of(image_id, tag)}

    def get_label_by_image_id(self, image_id: str, tag: str) -> str:
        """The label's id, empty where there is no such label."""
        return image_id if self._labels.of(image_id, check_tag(tag)) else ""

    def status(self) -> dict[str, Any]:
        images = self._images()
        tags = {tag: sum(case in images for case in volumes(self._labels.folder / tag)) for tag in self._labels.tags()}
        return {
            "total": len(images),
            "completed": tags.get(FINAL, 0),
            "label_tags": {t: n for t, n in tags.items() if n},
        }

    def json(self) -> dict[str, Any]:
        """All images and labels with their infos, in the schema of `datastore_v2.json`."""
        infos, labels = self._infos.read(), {tag: volumes(self._labels.folder / tag) for tag in self._labels.tags()}
        objects: dict[str, Any] = {}
        for case, path in self._images().items():
            known = infos.image(case).info
            image = {"ext": path.name[len(case) :], "info": {**facts(path), **known}}
            objects[case] = {"image": image, "labels": {}}
            for tag in (t for t in labels if case in labels[t]):
                label = newest(labels[tag][case])
                record = {**facts(label), **infos.label(case, tag, label).info}
                objects[case]["labels"][tag] = {"ext": label.name[len(case) :], "info": record}
        return {**infos.model_dump(exclude={"objects", "announced"}), "objects": copy.deepcopy(objects)}

    def get_dataset_archive(self, limit_cases: int | None) -> str:
        """A temporary ZIP of the labelled cases, for the caller to delete.

        Raises:
            NotInStoreError: no case is labelled.
        """
        cases = self.datalist()
        if not cases:
            raise NotInStoreError("no image has a final label yet: there is nothing to download")
        cases = cases[:limit_cases] if limit_cases and limit_cases > 0 else cases
        with tempfile.NamedTemporaryFile(suffix=".zip", delete=False) as file:
            try:
                with zipfile.ZipFile(file, "w", strict_timestamps=False) as archive:
                    for case in cases:
                        for kind in ("image", "label"):
                            archive.write(case[kind], f"{kind}/{Path(case[kind]).name}")
                    archive.writestr("metadata.json", self._infos.read().model_dump_json(indent=2))
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
        return file.name

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
        suffix = _refused(suffix_of, source)
        case = check_new_id(image_id or id_of(source))
        info = _refused(plain, image_info)
        _refused(check_image_file, source)
        target = self.folder / f"{case}{suffix}"
        if id_of(target) != case:
            raise StoreError(f"image id {case!r}: in {target.name!r} a reader would take {id_of(target)!r} for the id")
        with self._writing():
            others = [p.name for p in files_of(self.folder, case) if p != target]
            if others:
                raise ConflictError(f"image id {case!r} belongs to {others[0]}; choose another id")
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
        with self._writing():
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
            StoreError: not a label of this image: unreadable, another grid, a wrong declaration. The file is kept.
            OSError: e.g. the disk is full: the label that was there is untouched.
        """
        tag, source = check_tag(label_tag), Path(label_filename)
        if self.read_only:
            self._refuse_change()
        image = self._image(image_id)
        before = _signature(image)
        user = label_info.get("user") if isinstance(label_info, dict) else None
        try:
            info = plain(label_info)
            if info.get("annotated") is not None:
                declared(info["annotated"])
            drawn = check_label_file(source, image, image_id)
            renumbered = renumber(source, drawn, info, self.tasks)
        except ValueError as error:
            self._labels.reject(image_id, source, user, error)
        with tempfile.TemporaryDirectory() as folder, self._writing():
            if _signature(self._image(image_id)) != before:
                self._labels.reject(image_id, source, user, ConflictError(f"image {image_id!r} was replaced meanwhile"))
            if renumbered:
                info["label_names"] = renumbered.names
                source = renumbered.file(source, Path(folder), image)
            self._labels.put(image_id, tag, source, info)
        return image_id

    def keep_map(self, image_id: str, file: Path, info: dict[str, Any]) -> None:
        """Keep what a model computed for an image under the tag `uncertainty`, in place of an earlier one."""
        with self._writing():
            self._image(image_id)
            self._labels.put(image_id, UNCERTAINTY, file, info, history=False)

    def remove_label(self, label_id: str, label_tag: str) -> None:
        """Take a label away, into the history."""
        with self._writing():
            self._label(label_id, label_tag)
            self._labels.retire(label_id, check_tag(label_tag))

    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        """Add to what is known about an image."""
        news = _refused(plain, info)
        with self._writing():
            path = self._image(image_id)
            with self._infos.change() as document:
                record = document.entry(image_id).image
                record.ext = path.name[len(image_id) :]
                record.info = {**facts(path), **record.info, **news}
                record.info.pop("path", None)  # of this machine

    def update_label_info(self, label_id: str, label_tag: str, info: dict[str, Any]) -> None:
        """Add to what is known about a label; `annotated` is checked as in `save_label`, None takes it away."""
        news = _refused(plain, info)
        if news.get("annotated") is not None:
            _refused(declared, news["annotated"])
        with self._writing():
            path, tag = self._label(label_id, label_tag), check_tag(label_tag)
            with self._infos.change() as document:
                record = document.label(label_id, tag, path).model_copy(deep=True)
                record.ext = path.name[len(label_id) :]
                record.info = {**facts(path), **record.info, **news}
                document.settle(label_id, tag, record)

    # How ----------------------------------------------------------------------------------------------------------

    def _images(self) -> dict[str, Path]:
        images = {}
        for case, paths in volumes(self.folder).items():
            if len(paths) == 1:
                images[case] = paths[0]
            elif case not in self._told:
                self._told.add(case)
                logger.warning("%s: %s", self.folder, _twins(case, paths))
        return images

    def _image(self, case: str) -> Path:
        paths = files_of(self.folder, case)
        if not paths:
            raise NotInStoreError(f"unknown image {str(case)[:80]!r}; the datastore has {len(self._images())} images")
        if len(paths) > 1:
            raise ConflictError(_twins(case, paths))
        return paths[0]

    def _label(self, case: str, label_tag: str) -> Path:
        tag = check_tag(label_tag)
        paths = self._labels.of(case, tag)
        if not paths:
            raise NotInStoreError(
                f"no label {str(case)[:80]!r} with tag {tag!r}; tags are {', '.join(self._labels.tags()) or 'none'}"
            )
        return newest(paths)

    def _refuse_change(self, reason: str = "the server was told so (MONAI_LABEL_DATASTORE_READ_ONLY)") -> NoReturn:
        raise ReadOnlyError(f"the studies can only be read, nothing can be saved: {reason}")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One change at a time, among threads and processes."""
        if self.read_only:
            self._refuse_change()
        if not self.folder.is_dir():
            raise ConflictError(f"{self.folder.name}: the folder of studies is not there at the moment")
        try:
            with self._threads, FileLock(self.folder / ".lock", timeout=LOCK_SECONDS):
                yield
        except Timeout:
            raise ConflictError(f"another program has held {self.folder.name}/.lock for {LOCK_SECONDS} s") from None
        except OSError as error:
            if error.errno in READ_ONLY_ERRORS:
                self._refuse_change(str(error.strerror))
            raise


def _signature(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _twins(case: str, paths: list[Path]) -> str:
    return f"image id {case!r} belongs to {' and '.join(p.name for p in paths)}: left out until one is renamed"


def _refused(check: Callable[[Any], Any], value: Any) -> Any:
    """Run a check, its refusal as a StoreError."""
    try:
        return check(value)
    except ValueError as error:
        raise StoreError(str(error)) from error
