"""DICOM series for tests: made up, small, of any orientation."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

DCIODVFY = shutil.which("dciodvfy")
needs_dciodvfy = pytest.mark.skipif(
    DCIODVFY is None, reason="dciodvfy is not installed (Debian, Ubuntu: apt-get install dicom3tools)"
)
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
    pixels: np.ndarray | None = None,
    more: Mapping[str, Any] | None = None,
) -> str:
    """Write a series and return its UID.

    Args:
        shape: columns, rows, slices.
        orientation: of rows and columns, LPS.
        spacing: between columns, rows and slices, mm.
        descending: number the slices against their normal, as feet-first scanners do.
        without: keywords to leave out.
        pixels: (slices, rows, columns) int16; default noise.
        more: keywords to add.
    """
    folder.mkdir(parents=True, exist_ok=True)
    series, study, frame = generate_uid(), study or generate_uid(), generate_uid()
    if pixels is None:
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
        for name, value in (more or {}).items():
            setattr(ds, name, value)
        for name in without:
            if name in ds:
                delattr(ds, name)
        # Names in an order that is not that of the slices.
        ds.save_as(folder / f"{(k * 7) % 101:03}-{series[-6:]}.dcm", write_like_original=False)
    return str(series)


def series_of(image: nib.Nifti1Image, folder: Path, patient: str, **more: Any) -> str:
    """An MR image whose axes are those of the patient, as a series; returns its UID.

    Args:
        more: keywords to add.
    """
    image = nib.as_closest_canonical(image)
    values, spacing = np.asarray(image.dataobj), np.diag(image.affine)[:3]
    assert np.array_equal(image.affine[:3, :3], np.diag(spacing)), "oblique"
    # DICOM's first two axes run to the left and to the back, NIfTI's to the right and to the front.
    first = image.affine @ [values.shape[0] - 1, values.shape[1] - 1, 0, 1]
    pixels = np.rint(values[::-1, ::-1].T).astype(np.int16)
    low, high = np.percentile(pixels, (1, 99))
    window = {"WindowCenter": round((low + high) / 2), "WindowWidth": round(high - low)}
    columns, rows, slices = values.shape
    return make_series(
        folder,
        (columns, rows, slices),
        spacing=(spacing[0], spacing[1], spacing[2]),
        origin=(-first[0], -first[1], first[2]),
        modality="MR",
        patient=patient,
        pixels=pixels,
        more={**window, **more},
    )


def with_uids(source: Path, folder: Path, seed: str = "j2k") -> str:
    """A copy of a series whose UIDs are blank, with UIDs; returns the series'."""
    folder.mkdir(parents=True, exist_ok=True)
    study, series, frame = (generate_uid(entropy_srcs=[seed, what]) for what in ("study", "series", "frame"))
    for number, file in enumerate(sorted(source.iterdir())):
        ds = pydicom.dcmread(file, force=True)
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study, series, frame
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[seed, str(number)])
        ds.save_as(folder / f"{number}.dcm")
    return str(series)


def dcmqi_seg(
    folder: Path,
    mask: np.ndarray,
    affine: np.ndarray,
    names: Mapping[int, str],
    target: Path,
    kind: str = "binary",
    **more: Any,
) -> Path:
    """A SEG made by dcmqi, as 3D Slicer and many programs make theirs.

    Args:
        folder: of the series' files.
        mask: values on the grid of the series.
        names: value to segment name, in the order of the segments' numbers.
        kind: `binary`, or `labelmap`, the newer form.
        more: further keys of dcmqi's description.
    """
    code = {"CodingSchemeDesignator": "SCT"}
    segments = [
        {
            "labelID": value,
            "SegmentLabel": name,
            "SegmentDescription": name,
            "SegmentAlgorithmType": "MANUAL",
            "SegmentedPropertyCategoryCodeSequence": {**code, "CodeValue": "85756007", "CodeMeaning": "Tissue"},
            "SegmentedPropertyTypeCodeSequence": {**code, "CodeValue": "85756007", "CodeMeaning": "Tissue"},
            "recommendedDisplayRGBValue": [128, 174, 128],
        }
        for value, name in names.items()
    ]
    described = {
        "ContentCreatorName": "Reader1",
        "ClinicalTrialSeriesID": "1",
        "ClinicalTrialTimePointID": "1",
        "SeriesDescription": "Segmentation",
        "SeriesNumber": "300",
        "InstanceNumber": "1",
        "segmentAttributes": [segments],
        "ContentLabel": "SEGMENTATION",
        "ContentDescription": "another program",
        "ClinicalTrialCoordinatingCenterName": "dcmqi",
        "BodyPartExamined": "",
        **more,
    }
    label, meta = target.with_suffix(".nii.gz"), target.with_suffix(".json")
    nib.save(nib.Nifti1Image(mask, affine), label)
    meta.write_text(json.dumps(described))
    command = [str(Path(sys.executable).with_name("itkimage2segimage")), "--skip", "1", "--inputImageList", str(label)]
    command += ["--inputDICOMDirectory", str(folder), "--outputDICOM", str(target), "--inputMetadata", str(meta)]
    command += ["--segmentationType", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert target.exists(), done.stdout + done.stderr
    return target


def iod_errors(file: Path) -> list[str]:
    """What dciodvfy holds against a file."""
    assert DCIODVFY, "mark the test with needs_dciodvfy"
    done = subprocess.run([DCIODVFY, str(file)], capture_output=True, text=True, check=False)
    return [line for line in done.stderr.splitlines() if line.startswith("Error")]
