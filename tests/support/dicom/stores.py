"""Stores on a real archive, as the server makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
from monailabel.datastore.dicom import DICOMwebClientX

from lib.stores.dicom.store import DicomStore
from lib.tasks import Task
from support.dicom.archive import Archive
from support.dicom.dicoms import dcmqi_seg
from support.helpers import read_nifti, tiny_task

SHAPE = (9, 7, 5)
TASK = tiny_task()  # liver 1, spleen 2, aorta 3


def store_on(archive: Archive, cache: Path, *tasks: Task, search_filter: dict[str, Any] | None = None) -> DicomStore:
    """A store whose copies are in a folder of its own, as on a machine of its own."""
    return DicomStore(DICOMwebClientX(url=archive.url), search_filter or {}, str(cache), tasks=tasks, software="test")


def label_file(store: DicomStore, image: str, mask: np.ndarray, target: Path) -> Path:
    """A mask (columns, rows, slices) as an annotator's file on the grid of an image."""
    nib.save(nib.Nifti1Image(mask, read_nifti(store.get_image_uri(image)).affine), target)
    return target


def label_of(store: DicomStore, image: str) -> np.ndarray:
    """The final label as training gets it."""
    return np.asarray(read_nifti(store.get_label_uri(image, "final")).dataobj)


def counted(store: DicomStore) -> tuple[int, list[str], list[str], list[str]]:
    return (
        store.status()["completed"],
        store.get_labeled_images(),
        store.get_unlabeled_images(),
        [case["id"] for case in store.datalist()],
    )


def seg_of(store: DicomStore, series: str, mask: np.ndarray, folder: Path, name: str, **more: str) -> Path:
    """A SEG by another program that numbers its segments the other way round."""
    numbers = np.array([0, 3, 2, 1], np.uint8)[mask]
    names = {1: "aorta", 2: "spleen", 3: "liver"}
    shown = {value: names[value] for value in names if value in numbers}
    affine = read_nifti(store.get_image_uri(series)).affine
    return dcmqi_seg(folder / "series", numbers, affine, shown, folder / f"{name}.dcm", **more)


def dated(file: Path, time_of_day: str) -> Path:
    ds = pydicom.dcmread(file)
    ds.ContentDate, ds.ContentTime = "20260131", time_of_day
    ds.save_as(file)
    return file
