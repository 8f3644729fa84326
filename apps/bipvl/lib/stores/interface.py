"""What this app asks of a store beyond MONAI Label's interface; a folder and an archive both answer it."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset

from lib.upstream import Datastore


class Store(Datastore):
    """Images and their labels.

    dicom: whether images are DICOM series, so that labels may come and be asked for as DICOM segmentations (SEG).
    """

    dicom: bool

    @property
    @abstractmethod
    def read_only(self) -> bool:
        """Whether every change is refused."""

    @abstractmethod
    def left_out(self) -> dict[str, str]:
        """Images that are there and cannot be used, by id, and why: they are not among `list_images`."""

    @abstractmethod
    def keep_map(self, image_id: str, file: Path, info: dict[str, Any]) -> None:
        """Keep what a model computed for an image under the tag `uncertainty`, in place of an earlier one."""

    @abstractmethod
    def propose(self, image_id: str, model: str, version: int, mask: Path) -> None:
        """Hear of a mask that a version of a model made for an image."""

    @abstractmethod
    def as_seg(self, image_id: str, model: str, version: int, mask: Path) -> Dataset:
        """A model's mask of an image as a SEG, which does not count as a label.

        Raises:
            StoreError: the images are not DICOM series.
        """
