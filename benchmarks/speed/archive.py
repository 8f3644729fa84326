"""How long an annotator waits between submitting a label and the next case, and how much of it is the archive's.

    python -m benchmarks.speed.archive SERIES_FOLDER [--labels 15] [--repeats 5]

Starts Orthanc (which must be installed) with copies of one DICOM series as several patients, saves labels through the
store that the server uses, and asks for the next sample after each. "archive" is the time between a request's first
byte and its answer's last; "here" is the rest; "processor" is the processor time of this process, which other programs
on the machine do not change. It keeps no results.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import typer

from lib.tasks import load_task
from support.dicom.archive import Archive
from support.dicom.stores import store_on
from support.helpers import read_nifti


def main(series: Path, labels: int = 15, repeats: int = 5, task: str = "amos22-ct") -> None:
    """Print the split of a save and of the next sample, in seconds: the median and the largest of all repeats."""
    chosen = load_task(task)
    with tempfile.TemporaryDirectory() as name, Archive(Path(name) / "orthanc") as archive:
        folder = Path(name)
        for number in range(repeats + 1):
            copy(series, folder / str(number), number)
            archive.store(folder / str(number))
        store = store_on(archive, folder / "cache", chosen)
        rows: dict[str, list[tuple[float, float, float]]] = {"save": [], "next sample": [], "both": []}
        image = store.get_unlabeled_images()[0]
        for _ in range(repeats):
            shape = read_nifti(store.get_image_uri(image)).shape
            file = folder / "label.nii.gz"
            mask = drawn(shape, list(chosen.label_values.values())[:labels])
            nib.save(nib.Nifti1Image(mask, read_nifti(store.get_image_uri(image)).affine), file)
            start, before, busy = time.perf_counter(), store.archive.seconds, time.process_time()
            store.save_label(image, str(file), "final", {"user": "benchmark"})
            middle, saved, half = time.perf_counter(), store.archive.seconds, time.process_time()
            image = store.get_unlabeled_images()[0]
            store.get_image_uri(image)
            store.get_image_info(image)
            end, after, done = time.perf_counter(), store.archive.seconds, time.process_time()
            rows["save"].append((saved - before, middle - start - (saved - before), half - busy))
            rows["next sample"].append((after - saved, end - middle - (after - saved), done - half))
            rows["both"].append((after - before, end - start - (after - before), done - busy))
        print(f"{shape[0]}x{shape[1]}x{shape[2]} voxels, {labels} labels, {repeats} repeats; seconds, median (largest)")
        for what, times in rows.items():
            archives, here, processor = zip(*times, strict=True)
            print(f"{what:<12} archive {span(archives)}   here {span(here)}   processor {span(processor)}")


def span(seconds: tuple[float, ...]) -> str:
    return f"{statistics.median(seconds):.2f} ({max(seconds):.2f})"


def copy(series: Path, folder: Path, number: int) -> None:
    """The series as another patient's."""
    folder.mkdir()
    uids: dict[str, str] = {}
    for file in series.iterdir():
        ds = pydicom.dcmread(file)
        ds.PatientID = ds.PatientName = f"BENCHMARK-{number}"
        for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "SOPInstanceUID"):
            setattr(ds, name, uids.setdefault(f"{ds[name].value}", pydicom.uid.generate_uid()))
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        ds.save_as(folder / file.name)


def drawn(shape: tuple[int, ...], values: list[int]) -> np.ndarray:
    """Ellipsoids of organ size beside each other, each over most slices."""
    mask = np.zeros(shape, np.uint8)
    grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij", sparse=True)
    for number, value in enumerate(values):
        centre = (-0.6 + 0.3 * (number % 5), -0.5 + 0.45 * (number // 5), 0.0)
        distance = sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, (0.14, 0.2, 0.9), strict=True))
        mask[distance < 1] = value
    return mask


if __name__ == "__main__":
    typer.run(main)
