"""DICOM series for tests: made up, small, of any orientation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

AXIAL = (1, 0, 0, 0, 1, 0)


def make_series(
    folder: Path,
    shape: tuple[int, int, int] = (9, 7, 5),
    *,
    orientation: tuple[float, ...] = AXIAL,
    spacing: tuple[float, float, float] = (1.5, 0.8, 3.0),
    origin: tuple[float, float, float] = (-20.0, 11.0, 4.0),
    modality: str = "CT",
    patient: str = "P1",
    study: str | None = None,
    descending: bool = False,
    seed: int = 0,
    without: tuple[str, ...] = (),
) -> str:
    """Write a series and return its UID.

    Args:
        shape: columns, rows, slices.
        orientation: of rows and columns, LPS.
        spacing: between columns, rows and slices, mm.
        descending: number the slices against their normal, as feet-first scanners do.
        without: keywords to leave out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    series, study, frame = generate_uid(), study or generate_uid(), generate_uid()
    pixels = np.random.default_rng(seed).integers(-1000, 1000, size=shape[::-1]).astype(np.int16)
    normal = np.cross(orientation[:3], orientation[3:])
    for k in range(shape[2]):
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.is_little_endian, ds.is_implicit_VR = True, False
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CTImageStorage if modality == "CT" else MRImageStorage
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study, series, frame
        ds.PatientID, ds.PatientName, ds.PatientBirthDate, ds.PatientSex = patient, f"{patient}^", "", "O"
        ds.StudyDate, ds.StudyTime, ds.StudyID, ds.AccessionNumber = "20200101", "120000", "1", ""
        ds.ReferringPhysicianName, ds.Manufacturer, ds.Modality = "", "made up", modality
        ds.SeriesNumber, ds.InstanceNumber = 1, shape[2] - k if descending else k + 1
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.ImageOrientationPatient = [f"{x:.12g}"[:16] for x in orientation]
        ds.ImagePositionPatient = [f"{x:.9g}"[:16] for x in np.array(origin) + normal * spacing[2] * k]
        ds.PixelSpacing, ds.SliceThickness = [spacing[1], spacing[0]], spacing[2]
        ds.Rows, ds.Columns = shape[1], shape[0]
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
        ds.RescaleIntercept, ds.RescaleSlope = 0, 1
        ds.PixelData = pixels[k].tobytes()
        for name in without:
            if name in ds:
                delattr(ds, name)
        # Names in an order that is not that of the slices.
        ds.save_as(folder / f"{(k * 7) % 101:03}-{series[-6:]}.dcm", write_like_original=False)
    return str(series)


def with_uids(source: Path, folder: Path, seed: str = "j2k") -> str:
    """A copy of a series whose UIDs are blank, with UIDs; returns the series'."""
    folder.mkdir(parents=True, exist_ok=True)
    study, series, frame = (generate_uid(entropy_srcs=[seed, what]) for what in ("study", "series", "frame"))
    for number, file in enumerate(sorted(source.iterdir())):
        ds = pydicom.dcmread(file, force=True)
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study, series, frame
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[seed, str(number)])
        ds.save_as(folder / f"{number}.dcm")
    return str(series)
