"""The options of an inference request, of one image and of many: the tables, and what one request asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lib.files import ORIGINAL
from lib.model.refining import WAYS
from lib.model.versions import Versions
from lib.options import GPUS, Choice, Device, Number, Option, OptionTable, Switch, Text, from_json, shown
from lib.tasks import Task, meant
from lib.upstream import device_list

SERVED = "served"
OWN_WAY = "version"  # to answer clicks
RESULT_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".seg.nrrd", ".mha")


@dataclass(frozen=True)
class _Version(Option):
    """A published version, or the served one."""

    published: Versions | None = None

    @property
    def offer(self) -> list[str]:
        numbers = self.published.numbers() if self.published else []
        return [SERVED, *(str(number) for number in reversed(numbers))]

    @property
    def valid(self) -> str:
        return f"{SERVED}, or a number"

    def convert(self, value: Any) -> str | int | None:
        assert self.published is not None
        return SERVED if value == SERVED else self.published.resolve(value)


@dataclass(frozen=True)
class _Labels(Option):
    """Names of labels, as a list or separated by commas."""

    labels: tuple[str, ...] = ()

    @property
    def valid(self) -> str:
        return "names of labels, separated by commas"

    def read(self, value: Any) -> list[str] | None:
        if not isinstance(value, (str, list, tuple, type(None))):
            raise ValueError(f"{self.name}: expected names of labels, got {shown(value)}")
        names = value.split(",") if isinstance(value, str) else list(value or [])
        names = [str(name).strip() for name in names if str(name).strip()]
        known = []
        for name in names:
            if not (label := meant(name, self.labels)):
                raise ValueError(f"{self.name}: unknown label {shown(name)}; valid are {', '.join(self.labels)}")
            known.append(label)
        return known or None


@dataclass(frozen=True)
class _Sentences(Option):
    """Sentences for one request, as an object or as its JSON."""

    @property
    def valid(self) -> str:
        return "class → attribute → sentence, as JSON"

    def convert(self, value: Any) -> dict[str, Any] | None:
        if isinstance(value, str):
            try:
                value = from_json(value)
            except ValueError as error:
                raise ValueError(f"{self.name}: {error}") from None
        if not isinstance(value, dict):
            raise ValueError(f"{self.name}: expected {self.valid}, got {type(value).__name__}")
        return value or None


@dataclass(frozen=True)
class _Entries(Option):
    """A list of objects."""

    @property
    def valid(self) -> str:
        return "list of objects"

    def read(self, value: Any) -> list[dict[str, Any]] | None:
        if value is not None and not (isinstance(value, list) and all(isinstance(entry, dict) for entry in value)):
            raise ValueError(f"{self.name}: expected a list of objects")
        return value


@dataclass(frozen=True)
class _Points(Option):
    """A list of voxels, checked against the image where it is known (`lib.interaction.prompts`)."""

    @property
    def valid(self) -> str:
        return "list of [i, j, k]"

    def read(self, value: Any) -> list[Any] | None:
        if value is not None and not isinstance(value, list):
            raise ValueError(f"{self.name}: expected a list of [i, j, k], got {type(value).__name__}")
        return value


@dataclass(frozen=True)
class _Box(Option):
    """Both ends of a box along each axis, checked against the image where it is known (`lib.interaction.boxes`)."""

    @property
    def valid(self) -> str:
        return "[i0, i1, j0, j1, k0, k1]"

    def read(self, value: Any) -> list[Any] | None:
        if value is not None and not isinstance(value, list):
            raise ValueError(f"{self.name}: expected {self.valid}, got {type(value).__name__}")
        return value


@dataclass(frozen=True)
class _Label(Option):
    """A label of the task."""

    labels: tuple[str, ...] = ()

    @property
    def valid(self) -> str:
        return "name of a label"

    def convert(self, value: Any) -> str:
        if not (label := meant(str(value), self.labels)):
            raise ValueError(f"{self.name}: unknown label {str(value)[:80]!r}; valid are {', '.join(self.labels)}")
        return label


def infer_options(task: Task, published: Versions | None) -> OptionTable:
    """The table of `POST /infer/<task>`.

    Args:
        published: the task's versions; None: the table only describes.
    """
    return OptionTable(
        Device("device", device_list()[0], "where to run", said="the first GPU, else the CPU"),
        _Version("model_version", SERVED, "an older version, to compare with", published=published),
        Number(
            "overlap",
            task.overlap,
            "share of a window that overlaps the next; less is faster",
            said="the task's",
            low=0,
            below=1,
        ),
        Switch("tta", False, "average over the flips that the task was trained with"),
        _Labels("label_subset", "", "the other labels become background", said="all", labels=tuple(task.labels)),
        Switch("largest_component", False, "keep only the largest piece of each label"),
        Switch("uncertainty_map", False, "also keep the entropy of each voxel as a volume"),
        _Sentences("concepts", "", "other sentences for this request", said="the version's"),
        *_answer_options(),
        Switch("save_label", False, "keep the mask as a label of the image", shown=False),
        Text("label_tag", ORIGINAL, "the tag of that label", shown=False),
        _Entries("label_info", None, "no effect; 3D Slicer sends it", said="none", shown=False),
    )


def _answer_options() -> tuple[Option, ...]:
    """Of an answer; 3D Slicer and OHIF set them by themselves."""
    return (
        Choice(
            "result_extension",
            RESULT_SUFFIXES[0],
            "format of the mask",
            said="`.nii` for a `.nii`, else `.nii.gz`",
            shown=False,
            choices=RESULT_SUFFIXES,
        ),
        Switch("result_compress", False, "no effect; 3D Slicer sends it", shown=False),
    )


def click_options(task: Task) -> OptionTable:
    """The table of `POST /infer/<task>_clicks`: points, as 3D Slicer sends them with each click."""
    return OptionTable(
        Device("device", device_list()[0], "where to run", said="the first GPU, else the CPU"),
        _Label(
            "label",
            None,
            "what the points are about",
            said="none: it must be sent",
            shown=False,
            labels=tuple(task.labels),
        ),
        _Points(
            "foreground", [], "voxels that belong to the label, all that were clicked so far", said="none", shown=False
        ),
        _Points("background", [], "voxels that do not", said="none", shown=False),
        _Points("kept", [], "voxels that stay as they are", said="none", shown=False),
        Choice(
            "space",
            "voxels",
            "what points and box count: voxels of the image's file, or DICOM's millimetres",
            shown=False,
            choices=("voxels", "lps"),
        ),
        Switch("reset_state", False, "forget the mask that the server keeps, and start from the model's", shown=False),
        Text(
            "mask_state", "", "go on from this mask only, `mask_state` of an answer; else 409", said="any", shown=False
        ),
        Switch("settled", False, "what was answered so far stays: its points are not sent again", shown=False),
        _Entries("label_info", None, "`name` and `value` of a map that comes along", said="the task's", shown=False),
        *_part_options(),
        *_answer_options(),
    )


def _part_options() -> tuple[Option, ...]:
    """Of an answer that concerns a part of the image."""
    return (
        _Box("roi", [], "nothing changes outside of this box; both ends are in it", said="none", shown=False),
        Switch("box", False, "send back only the box of what has changed, with all labels in it", shown=False),
        Choice(
            "answer_by",
            OWN_WAY,
            "which way: the version's better one, `evidence` without training, or its `refiner`",
            choices=(OWN_WAY, *WAYS),
        ),
    )


def scribble_options(task: Task) -> OptionTable:
    """The table of `POST /infer/<task>_scribbles`: a label map of all segments comes with it."""
    return OptionTable(
        Device("device", device_list()[0], "where to run", said="the first GPU, else the CPU"),
        _Label(
            "selected_label_name",
            None,
            "what the strokes are about",
            said="none: it must be sent",
            shown=False,
            labels=tuple(task.labels),
        ),
        _Entries(
            "label_info",
            None,
            "`name` and `id` of each value of the label map",
            said="none: it must be sent",
            shown=False,
        ),
        *_part_options(),
        *_answer_options(),
    )


def batch_options(infer: OptionTable) -> OptionTable:
    """The table of `POST /batch/infer/<task>`: that of one image, and how the work is shared out."""
    return OptionTable(
        *(option for option in infer.values() if option.shown or option.name == "label_tag"),
        Switch("multi_gpu", True, "use several GPUs, if there are several"),
        GPUS,
        Number("max_workers", 1, "images at a time; 0: a quarter of the cores", low=0),
        Number("max_batch_size", 0, "at most this many images; 0: all", low=0),
    )


@dataclass
class Options:
    """What one request asks for, checked.

    version: the one asked for, None for the served one.
    overlap: None for that of the version's task.
    """

    version: int | None
    overlap: float | None
    tta: bool
    classes: tuple[str, ...]
    largest_component: bool
    uncertainty_map: bool
    concepts: dict[str, Any]

    @classmethod
    def of(cls, read: Mapping[str, Any], task: Task) -> Options:
        """From what a table has read of a request."""
        version = read.get("model_version", SERVED)
        return cls(
            version=None if version == SERVED else version,
            overlap=read.get("overlap"),
            tta=read.get("tta", False),
            classes=tuple(read.get("label_subset", task.labels)),
            largest_component=read.get("largest_component", False),
            uncertainty_map=read.get("uncertainty_map", False),
            concepts=read.get("concepts", {}),
        )
