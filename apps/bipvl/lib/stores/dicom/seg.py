"""DICOM segmentations (SEG, PS3.3 A.51): written from a task's names, codes and colours, read back by segment name.

The number of a segment means nothing: every program numbers in its own way. Nothing here asks the archive.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import highdicom as hd
import highdicom._modules  # tables that it would load, for seconds, when the first label is saved
import numpy as np
from highdicom.content import AlgorithmIdentificationSequence, PixelMeasuresSequence
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentDescription
from highdicom.sr import CodedConcept
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from skimage.color import rgb2lab

from lib.stores.dicom.headers import source_headers
from lib.stores.errors import StoreError
from lib.tasks import Label, Task
from lib.volumes.itk import LPS_TO_RAS
from lib.volumes.series import SeriesError, Volume

logging.getLogger("highdicom").setLevel(logging.WARNING)  # a line for every module of every SEG
warnings.filterwarnings("ignore", "The string .* is unlikely to represent the intended person name")

MANUFACTURER = "BiPVL Label"
SERIES_NUMBER = 300
PRIVATE_GROUP, DECLARED = 0x0071, 0x01  # the classes that an annotator looked for, if these are not all
ANATOMY = CodedConcept("123037004", "SCT", "Anatomical Structure")
MORPHOLOGY = CodedConcept("49755003", "SCT", "Morphologically Abnormal Structure")
LESIONS = frozenset({"108369006", "52988006", "79654002", "126952004", "4147007", "86049000"})
MODIFIERS = {  # of a structure: its side, its part
    "left": ("7771000", "Left"),
    "right": ("24028007", "Right"),
    "anterior": ("255549009", "Anterior"),
    "posterior": ("255551008", "Posterior"),
}
AI = CodedConcept("123110", "DCM", "Artificial Intelligence")
GRID_TOLERANCE = 0.1  # voxels


@dataclass(frozen=True)
class MadeBy:
    """Who drew a segment: a person (`version` None), or this version of the task's model."""

    version: int | None = None
    accepted: bool = False  # by a person who changed nothing

    @property
    def kind(self) -> SegmentAlgorithmTypeValues:
        if self.version is None:
            return SegmentAlgorithmTypeValues.MANUAL
        return SegmentAlgorithmTypeValues.SEMIAUTOMATIC if self.accepted else SegmentAlgorithmTypeValues.AUTOMATIC


@dataclass(frozen=True)
class Segments:
    """What a SEG shows on the grid of its image.

    names: of the segments, as their labels say.
    index: (columns, rows, slices), 0 for nothing, i for `names[i - 1]`.
    declared: the classes that the annotator looked for, None for all.
    """

    names: tuple[str, ...]
    index: np.ndarray
    declared: list[str] | None


# --- writing ----------------------------------------------------------------------------------------------------------


def write_seg(
    mask: np.ndarray,
    volume: Volume,
    task: Task,
    *,
    tag: str,
    when: datetime,
    software: str,
    author: str = "",
    made_by: Mapping[str, MadeBy] | None = None,
    declared: Sequence[str] | None = None,
) -> Dataset:
    """A SEG of the labels that a mask shows.

    Args:
        mask: (columns, rows, slices) values of the task on the grid of `volume`. If it is all background, a segment
            without voxels for each class of `declared`, or of the task.
        tag: written as content label.
        made_by: label name to who drew it; a person if nothing is said.
        declared: the classes that the annotator looked for, None for all.

    Raises:
        SeriesError: no SEG can refer to the image; the message says why.
    """
    assert mask.shape == volume.shape, "the mask is on the grid of its volume"
    values = [int(v) for v in np.flatnonzero(np.bincount(mask.ravel()))]
    names = [name for name, label in task.labels.items() if label.value in values]
    distance = float(np.linalg.norm(volume.affine[:3, 2]))
    headers = source_headers(volume.headers, distance)
    if names:
        numbers = np.zeros(max(values) + 1, np.uint8 if len(names) < 256 else np.uint16)
        numbers[[task.label_values[name] for name in names]] = range(1, len(names) + 1)
        pixels = numbers[mask].transpose(2, 1, 0)
    else:
        names = [name for name in task.labels if declared is None or name in declared] or list(task.labels)
        headers = headers[:1]
        pixels = np.zeros((1, *volume.shape[1::-1], len(names)), np.uint8)
    who = made_by or {}
    segments = [_description(number, name, task, who.get(name, MadeBy())) for number, name in enumerate(names, start=1)]
    first = headers[0]
    spacing, thickness = [float(x) for x in first.PixelSpacing], float(first.SliceThickness)
    measures = PixelMeasuresSequence(spacing, thickness, round(distance, 6))
    try:
        made: Dataset = Segmentation(
            headers,
            pixels,
            "BINARY",
            segments,
            series_instance_uid=hd.UID(),
            series_number=SERIES_NUMBER,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer=MANUFACTURER,
            manufacturer_model_name="BiPVL-Seg",
            software_versions=software,
            device_serial_number=task.name,
            content_label="".join(c if c.isalnum() else "_" for c in tag.upper())[:16],
            content_description=f"{task.name}, {tag}"[:64],
            content_creator_name=f"{_plain(author)}^" if author else None,
            pixel_measures=measures,
            omit_empty_frames=bool(pixels.any()),
            series_description=f"{MANUFACTURER}: {task.name}, {tag}"[:64],
        )
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:  # what highdicom holds against it
        raise SeriesError(f"series {first.SeriesInstanceUID}: no SEG can refer to it: {error}") from error
    if str(volume.headers[0].get("LossyImageCompression")) == "01":
        made.LossyImageCompression = "01"  # even if its ratio and method are not known
    made.SpecificCharacterSet = "ISO_IR 192"  # UTF-8: names of people and of labels in any script
    date, time = when.strftime("%Y%m%d"), when.strftime("%H%M%S.%f")
    for what in ("InstanceCreation", "Content", "Series"):
        setattr(made, f"{what}Date", date)
        setattr(made, f"{what}Time", time)
    if declared is not None:
        block = made.private_block(PRIVATE_GROUP, MANUFACTURER.upper(), create=True)
        block.add_new(DECLARED, "LO", [_plain(name) for name in declared])
    return made


def _description(number: int, name: str, task: Task, who: MadeBy) -> SegmentDescription:
    label: Label = task.labels[name]
    identification = None
    if who.version is not None:
        version = str(who.version) if who.version else "untrained"
        identification = AlgorithmIdentificationSequence(f"BiPVL-Seg {task.name}", AI, version)
    lesion = label.snomed.code in LESIONS
    made = SegmentDescription(
        number,
        _plain(name),
        MORPHOLOGY if lesion else ANATOMY,
        CodedConcept(label.snomed.code, "SCT", label.snomed.meaning[:64]),
        who.kind,
        algorithm_identification=identification,
    )
    if modifiers := [MODIFIERS[word] for word in (label.snomed.laterality, label.snomed.part) if word]:
        items = Items([CodedConcept(code, "SCT", meaning) for code, meaning in modifiers])
        made.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = items
    made.RecommendedDisplayCIELabValue = _cielab(label.color)
    return made


def _cielab(color: Sequence[int]) -> list[int]:
    """PS3.3 C.10.7.1.1: L* from 0 to 100, a* and b* from -128 to 127, each as 16 bits."""
    lightness, a, b = rgb2lab(np.array([[color]], np.uint8))[0, 0]
    return [round(lightness / 100 * 65535), round((a + 128) / 255 * 65535), round((b + 128) / 255 * 65535)]


def _plain(text: str) -> str:
    """Without the characters that separate values and parts of names in DICOM."""
    return "".join(" " if c in "\\^=" or not c.isprintable() else c for c in text)[:64]


# --- reading ----------------------------------------------------------------------------------------------------------


def is_seg(ds: Dataset) -> bool:
    """Whether a dataset is a segmentation, binary, fractional or as a label map."""
    return str(ds.get("SOPClassUID", "")) in ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")


def segment_labels(ds: Dataset) -> dict[int, str]:
    """Segment number to label; the background of a label map is left out."""
    items = ds.get("SegmentSequence") or []
    labels = {int(item.SegmentNumber): str(item.get("SegmentLabel") or "") for item in items}
    return {number: label for number, label in labels.items() if number}


def referenced_series(ds: Dataset) -> list[str]:
    """The series that a SEG says it was drawn on."""
    found = [str(item.get("SeriesInstanceUID", "")) for item in ds.get("ReferencedSeriesSequence") or []]
    for study in ds.get("StudiesContainingOtherReferencedInstancesSequence") or []:
        found += [str(item.get("SeriesInstanceUID", "")) for item in study.get("ReferencedSeriesSequence") or []]
    return [uid for uid in found if uid]


def source_instances(ds: Dataset) -> list[str]:
    """The slices that a SEG says it was drawn on: those that its frames name, and those of its references."""
    places = [
        ds,
        *(ds.get("SharedFunctionalGroupsSequence") or []),
        *(ds.get("PerFrameFunctionalGroupsSequence") or []),
    ]
    derived = [item for place in places for item in place.get("DerivationImageSequence") or []]
    sources = [item for place in (ds, *derived) for item in place.get("SourceImageSequence") or []]
    for series in ds.get("ReferencedSeriesSequence") or []:
        sources += series.get("ReferencedInstanceSequence") or []
    found = (str(item.get("ReferencedSOPInstanceUID") or "") for item in sources)
    return [uid for uid in dict.fromkeys(found) if uid]


def read_seg(ds: Dataset, volume: Volume) -> Segments:
    """Read a SEG of any program onto the grid of its image.

    Frames may be in any order, of any orientation along the image's axes, and cover part of the image.

    Raises:
        StoreError: not a SEG, another grid, or segments that share voxels; the message says which.
    """
    if not is_seg(ds):
        raise StoreError(f"not a DICOM segmentation: SOP class {ds.get('SOPClassUID', 'unknown')}")
    try:
        labels = segment_labels(ds)
        index = np.zeros(volume.shape, np.uint16)
        order = {number: i for i, number in enumerate(labels, start=1)}
        planes = _Planes(ds, volume)
        for frame, number, pixels in _frames(ds):
            if number not in order:
                raise StoreError(f"the segmentation shows segment {number}, which it does not describe")
            place = planes.place(frame, *np.nonzero(pixels))
            before = index[place]
            if (taken := before[(before > 0) & (before != order[number])]).any():
                other = list(labels.values())[int(taken[0]) - 1]
                raise StoreError(f"segments {other!r} and {labels[number]!r} share voxels; a voxel has one class")
            index[place] = order[number]
        block = ds.private_block(PRIVATE_GROUP, MANUFACTURER.upper()) if _has_block(ds) else None
        declared = [str(name) for name in np.atleast_1d(block[DECLARED].value)] if block else None
    except (AttributeError, KeyError, IndexError, TypeError, NotImplementedError, ValueError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"the DICOM segmentation cannot be read: {type(error).__name__}: {error}") from error
    return Segments(tuple(labels.values()), index, declared)


def _has_block(ds: Dataset) -> bool:
    try:
        return DECLARED in ds.private_block(PRIVATE_GROUP, MANUFACTURER.upper())
    except KeyError:
        return False


def _frames(ds: Dataset) -> Iterator[tuple[int, int, np.ndarray]]:
    """Frame, segment number and (rows, columns) pixels."""
    groups = ds.PerFrameFunctionalGroupsSequence
    kind = str(ds.get("SegmentationType", "BINARY"))
    if len(groups) != int(ds.get("NumberOfFrames", 1)):
        raise StoreError(f"the segmentation has {ds.get('NumberOfFrames', 1)} frames and describes {len(groups)}")
    for frame, pixels in enumerate(_pixels(ds)):
        if kind == "LABELMAP":
            for number in np.flatnonzero(np.bincount(pixels.ravel())):
                if number:
                    yield frame, int(number), pixels == number
            continue
        if kind == "FRACTIONAL":
            pixels = pixels.astype(np.uint32) * 2 >= int(ds.MaximumFractionalValue)
        item = _group(ds, frame, "SegmentIdentificationSequence")
        yield frame, int(item.ReferencedSegmentNumber), pixels


def _pixels(ds: Dataset) -> Iterator[np.ndarray]:
    """Frame by frame: a bit per pixel would become a byte per pixel, which is hundreds of megabytes for all frames."""
    frames, shape = int(ds.get("NumberOfFrames", 1)), (int(ds.Rows), int(ds.Columns))
    if ds.BitsAllocated != 1 or ds.file_meta.TransferSyntaxUID.is_compressed:
        yield from ds.pixel_array.reshape(frames, *shape)
        return
    packed, size = np.frombuffer(ds.PixelData, np.uint8), shape[0] * shape[1]
    for frame in range(frames):
        first, skip = divmod(frame * size, 8)
        bits = np.unpackbits(packed[first : first + (skip + size + 7) // 8], bitorder="little")
        yield bits[skip : skip + size].reshape(shape)


def _group(ds: Dataset, frame: int, name: str) -> Dataset:
    """A functional group of a frame, its own or the one that all frames share."""
    own = ds.PerFrameFunctionalGroupsSequence[frame].get(name)
    if own:
        return own[0]
    shared = ds.get("SharedFunctionalGroupsSequence")
    if shared and shared[0].get(name):
        return shared[0][name].value[0]
    raise StoreError(f"frame {frame + 1} of the segmentation has no {name}")


class _Planes:
    """Where the pixels of a SEG's frames lie in the image."""

    def __init__(self, ds: Dataset, volume: Volume) -> None:
        self._ds, self._shape = ds, volume.shape
        self._to_index = np.linalg.inv(LPS_TO_RAS @ volume.affine)

    def place(self, frame: int, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, ...]:
        """Indices of the image's voxels for some pixels of a frame."""
        ds = self._ds
        position = np.array([*_group(ds, frame, "PlanePositionSequence").ImagePositionPatient, 1], float)
        direction = np.array(_group(ds, frame, "PlaneOrientationSequence").ImageOrientationPatient, float)
        spacing = [float(x) for x in _group(ds, frame, "PixelMeasuresSequence").PixelSpacing]
        origin = (self._to_index @ position)[:3]
        along_row = self._to_index[:3, :3] @ direction[:3] * spacing[1]
        along_column = self._to_index[:3, :3] @ direction[3:] * spacing[0]
        last = np.array([along_row * (ds.Columns - 1), along_column * (ds.Rows - 1)])
        steps = np.round([along_row, along_column])
        off = max(
            np.abs(origin - np.round(origin)).max(),
            np.abs(last - steps * [[ds.Columns - 1], [ds.Rows - 1]]).max(),
        )
        if not off <= GRID_TOLERANCE or not (np.abs(steps).sum(axis=1) == 1).all():
            raise StoreError(
                f"the segmentation is not on the grid of its image: frame {frame + 1} lies up to {off:.3g} voxels off"
            )
        place = np.round(origin)[:, None] + np.outer(steps[0], columns) + np.outer(steps[1], rows)
        index = place.astype(np.int64)
        if index.size and ((index < 0).any() or (index >= np.array(self._shape)[:, None]).any()):
            raise StoreError(f"the segmentation extends beyond its image in frame {frame + 1}")
        return tuple(index)
