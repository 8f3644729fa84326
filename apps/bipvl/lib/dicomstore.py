"""MONAI Label's store of a DICOMweb archive, with what keeps annotators' work safe on top."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

from monailabel.datastore.dicom import DICOMWebDatastore

from lib.labelfiles import StoreError, check_tag, keep_copy

UID = re.compile(r"[0-9]+(\.[0-9]+)*")
MAX_UID = 64


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


class DicomStore(DICOMWebDatastore):
    """As MONAI Label's, but ids and tags are checked, one change is made at a time, and a submitted label is kept in
    `labels/history/<tag>/<series>` of the local folder before anything is sent: a failing upload loses nothing.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._one_change = threading.RLock()  # MONAI Label's own methods call each other
        super().__init__(*args, **kwargs)

    def get_image_uri(self, image_id: str) -> str:
        return super().get_image_uri(check_uid(image_id))

    def get_label_uri(self, label_id: str, label_tag: str, image_id: str = "") -> str:
        if image_id:
            check_uid(image_id)
        return super().get_label_uri(check_uid(label_id), check_tag(label_tag), image_id)

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        with self._one_change:
            return super().add_image(check_uid(image_id), image_filename, image_info)

    def remove_image(self, image_id: str) -> None:
        with self._one_change:
            super().remove_image(check_uid(image_id))

    def save_label(
        self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any], label_id: str = ""
    ) -> str:
        """Send a label to the archive.

        Raises:
            StoreError: not a series UID, or not a tag.
        """
        check_uid(image_id)
        tag, source, info = check_tag(label_tag), Path(label_filename), label_info or {}
        with self._one_change:
            history = Path(self._datastore_path) / "labels" / "history" / tag / image_id
            keep_copy(source, history, info.get("user"), "".join(source.suffixes)[-20:])
            saved = super().save_label(image_id, label_filename, tag, info, label_id)
            # Lists of series are cached for hours: without this the case would be offered again.
            type(self).get_labeled_images.cache.clear()  # type: ignore[attr-defined]
        return saved

    def remove_label(self, label_id: str, label_tag: str) -> None:
        with self._one_change:
            super().remove_label(check_uid(label_id), check_tag(label_tag))

    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        with self._one_change:
            super().update_image_info(image_id, info)

    def update_label_info(self, label_id: str, label_tag: str, info: dict[str, Any]) -> None:
        with self._one_change:
            super().update_label_info(label_id, label_tag, info)
