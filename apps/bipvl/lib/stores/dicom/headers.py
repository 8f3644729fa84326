"""What a segmentation (SEG) takes over from the headers of its image, without what is not valid DICOM there.

Names, dates and the like of a patient and a study must be the same in all their objects; values that no date or number
can be are left out, as whoever reads the SEG could not use them either. Identifiers stay as they are.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache
from uuid import NAMESPACE_OID, uuid5

from pydicom.config import RAISE
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence as Items
from pydicom.uid import UID
from pydicom.valuerep import DA, DT, TM, validate_value

from lib.volumes.series import UNREADABLE

logger = logging.getLogger(__name__)
warnings.filterwarnings("ignore", "Invalid value for VR|The value length", UserWarning, module="pydicom")

OF_A_SLICE = (
    *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Rows", "Columns"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"),
)
TYPE_2 = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime"),
    *("AccessionNumber", "ReferringPhysicianName"),
)  # must be there but may be empty; archives of de-identified images leave them out
CHECKED = ("AS", "CS", "DA", "DS", "DT", "IS", "PN", "TM", "UI", "UR")  # text of any length can be written and read
TIMES = {"DA": DA, "DT": DT, "TM": TM}
CHOICES = {"PatientSex": ("M", "F", "O")}
COMPRESSION = ("LossyImageCompressionRatio", "LossyImageCompressionMethod")
PIXELS = 0x7FE0


def source_headers(headers: Sequence[Dataset], distance: float) -> list[Dataset]:
    """Headers of slices with all that a SEG needs of them, and nothing that cannot be written. The log says once for
    each series what was left out or made up.

    Args:
        headers: of one volume; the first one speaks for the patient and the study.
        distance: between slices, mm; stands for a thickness that is not told.
    """
    first = headers[0]
    series, left_out = str(first.SeriesInstanceUID), list[str]()
    patient = _valid(first, left_out)
    for name in TYPE_2:
        if name not in patient:
            setattr(patient, name, "")
    if str(patient.get("LossyImageCompression")) == "01" and not all(patient.get(name) for name in COMPRESSION):
        del patient.LossyImageCompression  # what is said of it is not complete
    frame = _frame_of_reference(headers, series)
    made = []
    for header in headers:
        one = patient if header is first else Dataset()
        for name in OF_A_SLICE:
            one[name] = header[name]
        one.FrameOfReferenceUID = frame
        one.SliceThickness = patient.get("SliceThickness") or round(distance, 6)
        made.append(one)
    if left_out:
        names = ", ".join(dict.fromkeys(left_out))
        _tell(f"series {series}: left out of its segmentations, as the values are not valid DICOM: {names}")
    return made


def _valid(header: Dataset, left_out: list[str]) -> Dataset:
    """The elements that can be written, without pixels and private ones; `left_out` gets the names of others."""
    made = Dataset()
    for tag in [tag for tag, _ in header.items()]:
        if tag.is_private or tag.group >= PIXELS:
            continue
        try:
            element = header[tag]
            if element.VR == "SQ":
                element = DataElement(tag, "SQ", Items([_valid(item, left_out) for item in element.value]))
            else:
                _check(element)
        except UNREADABLE:
            left_out.append(_name_of(tag, header))
            continue
        made[tag] = element
    return made


def _check(element: DataElement) -> None:
    """Raises ValueError if a value cannot be what its kind of element says."""
    if element.VR not in CHECKED or element.is_empty:
        return
    several = isinstance(element.value, MultiValue)
    if several and element.VR in ("PN", *TIMES):
        raise ValueError("several values")
    if element.VR == "PN":
        return
    for value in element.value if several else [element.value]:
        text = str(value)
        if text and element.keyword != "SOPInstanceUID":
            validate_value(element.VR, text, RAISE)
            if element.VR in TIMES:
                TIMES[element.VR](text)
            if element.VR == "UI" and not UID(text).is_valid:
                raise ValueError("not a UID")
            if text not in CHOICES.get(element.keyword, (text,)):
                raise ValueError("not one of the values that the standard knows")


def _name_of(tag: int, header: Dataset) -> str:
    item = header.get_item(tag)
    keyword = DataElement(tag, "UN", b"").keyword
    return f"{keyword or tag} ({getattr(item, 'VR', None) or 'unknown kind'})"


def _frame_of_reference(headers: Iterable[Dataset], series: str) -> str:
    """The frame of reference of all slices, or one of the series' own: a SEG must name one, images need not."""
    found = sorted({str(ds.get("FrameOfReferenceUID") or "") for ds in headers})
    if len(found) == 1 and UID(found[0]).is_valid:
        return found[0]
    problem = "is missing" if found == [""] else "is not valid" if len(found) == 1 else "is not the same in all slices"
    _tell(f"series {series}: FrameOfReferenceUID {problem}: its segmentations name one that is made from the series'")
    return f"2.25.{uuid5(NAMESPACE_OID, series).int}"  # PS3.5 B.2


@lru_cache(maxsize=4096)
def _tell(text: str) -> None:
    logger.warning("%s", text)
