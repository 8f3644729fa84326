"""The schema of a task file: labels, regions, intensities and network, checked against each other and against how it is
trained (`lib.tasks.training`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from lib.tasks.concepts import ATTRIBUTES, Concepts, StrictModel, TaskError, TextFormat
from lib.tasks.names import check_names, meant
from lib.tasks.training import Augmentation, Training
from lib.tasks.wording import markup

Backbone = Literal["swin_unetr", "swin_unetr_v2", "unetr", "unet", "unetpp", "resenc", "mednext"]
VISION_BACKBONES: tuple[Backbone, ...] = get_args(Backbone)
Frozen = Literal["none", "lower", "all"]  # of the text encoder: nothing, embeddings and stage 1, or all of it


class Snomed(StrictModel):
    """A SNOMED CT concept, and its DICOM modifiers: `laterality` of paired structures, `part` of divided ones."""

    code: Annotated[str, Field(pattern=r"^\d{6,18}$")]
    meaning: str
    laterality: Literal["left", "right"] | None = None
    part: Literal["anterior", "posterior"] | None = None


class Label(StrictModel):
    """One structure that annotators draw.

    `value` is what the app reads and writes; `file_values` are further values that stand for the same structure in the
    label files of a public data set (MM-WHS: 500 for the left ventricle).
    """

    value: Annotated[int, Field(ge=1, le=65535)]
    file_values: tuple[Annotated[int, Field(ge=1, le=65535)], ...] = ()
    snomed: Snomed
    color: tuple[
        Annotated[int, Field(ge=0, le=255)], Annotated[int, Field(ge=0, le=255)], Annotated[int, Field(ge=0, le=255)]
    ]


class Region(StrictModel):
    """A class of an overlapping task: a union of labels."""

    labels: Annotated[tuple[str, ...], Field(min_length=1)]
    snomed: Snomed
    color: tuple[int, int, int]


class Intensity(StrictModel):
    """`range`: clip to [low, high] and scale to [0, 1]. `nonzero`: zero mean and unit variance of each channel's
    non-zero voxels (paper, Table 4)."""

    mode: Literal["range", "nonzero"]
    low: float | None = None
    high: float | None = None

    @model_validator(mode="after")
    def _limits(self) -> Intensity:
        if self.mode == "range" and (self.low is None or self.high is None or self.low >= self.high):
            raise ValueError("mode 'range' needs low < high")
        if self.mode == "nonzero" and (self.low is not None or self.high is not None):
            raise ValueError("mode 'nonzero' takes neither low nor high")
        return self


class ScratchText(StrictModel):
    """Size of the BERT that `text: scratch` builds. The defaults are small enough for two CPU cores."""

    layers: Annotated[int, Field(ge=4)] = 12
    width: Annotated[int, Field(ge=8)] = 96
    heads: Annotated[int, Field(ge=1)] = 4
    max_tokens: Annotated[int, Field(ge=16)] = 256

    @model_validator(mode="after")
    def _divisible(self) -> ScratchText:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be divisible by heads {self.heads}")
        return self


class ModelSpec(StrictModel):
    """The network. `text` is a hub name, a local folder, `minilm`, or `scratch`; `vision_weights` is a file of weights
    that others trained, with which fresh networks start (`lib.model.nets.pretrained`)."""

    vision: Backbone = "swin_unetr"
    feature_size: Annotated[int, Field(ge=4)] = 48
    swin_heads: Annotated[int, Field(ge=1)] = 3  # of stage 1, doubled each stage; small models are faster with 1
    text: str = "emilyalsentzer/Bio_ClinicalBERT"
    text_frozen: Frozen = "none"  # what of the text encoder never learns
    vision_weights: Annotated[str, Field(min_length=1)] | None = None
    text_format: TextFormat = "concepts"
    scratch: ScratchText = ScratchText()
    fusion: Literal["bifusion", "late", "identity"] = "bifusion"  # late: at the last stage only
    fusion_attention: Literal["windowed", "full"] = "windowed"
    projection: Annotated[int, Field(ge=8)] = 256
    head: Literal["fixed", "text"] = "text"  # logits from the class's sentences, or a channel per class (paper)
    head_text: Literal["fused", "plain"] = "fused"  # what the text head reads: T and D, or D alone
    class_embedding: Literal["decoder", "last"] = "decoder"  # class maps of the decoder, or of V_4 (paper)
    checkpointing: bool = False

    @model_validator(mode="after")
    def _reads(self) -> ModelSpec:
        if self.head == "text" and self.class_embedding == "last":
            raise ValueError("class_embedding 'last' has a channel per class: it needs head 'fixed'")
        return self

    @model_validator(mode="after")
    def _learns(self) -> ModelSpec:
        if self.text == "scratch" and self.text_frozen != "none":
            raise ValueError(f"text_frozen {self.text_frozen!r}: text 'scratch' has nothing learnt that could be kept")
        return self

    @model_validator(mode="after")
    def _swin_width(self) -> ModelSpec:
        if self.vision.startswith("swin") and self.feature_size % self.swin_heads:
            raise ValueError(f"swin_heads {self.swin_heads} must divide feature_size {self.feature_size}")
        if self.vision.startswith("swin") and self.feature_size % 12:
            raise ValueError(f"feature_size {self.feature_size}: {self.vision} needs a multiple of 12")
        return self


class Task(StrictModel):
    """A segmentation task: labels, network, preprocessing, training, and the text of its classes."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    description: str
    modality: str
    channels: Annotated[tuple[str, ...], Field(min_length=1)]
    labels: Annotated[dict[str, Label], Field(min_length=1)]
    regions: dict[str, Region] | None = None
    spacing: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]
    intensity: Intensity
    patch: tuple[Annotated[int, Field(ge=16)], Annotated[int, Field(ge=16)], Annotated[int, Field(ge=16)]] = (
        96,
        96,
        96,
    )
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    model: ModelSpec = ModelSpec()
    training: Training = Training()
    augmentation: Augmentation = Augmentation()
    concepts: Concepts

    @model_validator(mode="after")
    def _consistent(self) -> Task:
        check_names(self.labels, "labels")
        check_names(self.regions or {}, "regions")
        for name in self.regions or {}:
            if (label_name := meant(name, self.labels)) not in (None, name):
                raise ValueError(f"regions: {name!r} and the label {label_name!r} count as one name; rename one")
        values: dict[int, str] = {}
        for name, label in self.labels.items():
            for value in {label.value, *label.file_values}:
                if value in values:
                    raise ValueError(f"labels: value {value} belongs to both {values[value]!r} and {name!r}")
                values[value] = name
        for name, region in (self.regions or {}).items():
            for label_name in region.labels:
                if label_name not in self.labels:
                    raise ValueError(
                        f"regions.{name}: unknown label {label_name!r}; valid are {', '.join(self.labels)}"
                    )
        if self.model.vision.startswith("swin") and any(p % 32 for p in self.patch):
            raise ValueError(f"patch {self.patch}: {self.model.vision} needs multiples of 32")
        if self.model.vision.startswith("swin") and all(p == 32 for p in self.patch):
            raise ValueError(f"patch {self.patch}: {self.model.vision} needs more than 32 voxels on one axis at least")
        if any(p % 16 for p in self.patch):
            raise ValueError(f"patch {self.patch}: {self.model.vision} needs multiples of 16")
        if "left-right" in self.augmentation.flip and self.lateralised:
            raise ValueError(
                f"augmentation.flip: 'left-right' would turn {self.lateralised[0]!r} into its twin while the text "
                "keeps its side; remove it"
            )
        missing = [c for c in self.classes if c not in self.concepts.classes]
        if missing:
            raise ValueError(f"concepts: no text for class {missing[0]!r} (classes: {', '.join(self.classes)})")
        extra = [c for c in self.concepts.classes if c not in self.classes]
        if extra:
            raise ValueError(f"concepts: text for unknown class {extra[0]!r} (classes: {', '.join(self.classes)})")
        for name in self.classes:
            sentences = self.concepts.classes[name].sentences
            if set(sentences) != set(ATTRIBUTES):
                raise ValueError(
                    f"concepts.classes.{name}: attributes {sorted(sentences)}; "
                    f"every class has exactly {', '.join(ATTRIBUTES)}"
                )
        if self.model.text_format == "ambiguous":
            counts = {len(self.concepts.classes[c].ambiguous) for c in self.classes}
            if counts == {0} or len(counts) > 1:
                raise ValueError(
                    "model.text_format 'ambiguous': every class needs the same number of `ambiguous` sentences"
                )
        return self

    @property
    def overlapping(self) -> bool:
        """True if classes are regions that may share voxels."""
        return self.regions is not None

    @property
    def classes(self) -> tuple[str, ...]:
        """The foreground classes of the network, in channel order."""
        return tuple(self.regions if self.regions is not None else self.labels)

    @property
    def out_channels(self) -> int:
        """Channels of the logits: one per class, and background first if classes exclude each other."""
        return len(self.classes) + (0 if self.overlapping else 1)

    @property
    def varied(self) -> bool:
        """True if training steps read more than the task's own sentences (`lib.trainers.objective.wordings`)."""
        recipe, texts = self.training, self.concepts.classes.values()
        worded = self.vary_wording > 0 and any(text.variants for text in texts)
        reads = self.model.head == "text" and self.model.text_format == "concepts"
        return reads and (worded or recipe.typing_errors > 0 or recipe.absent > 0)

    @property
    def vary_wording(self) -> float:
        """Share of the steps that draw among the wordings of each sentence; by default all, and none with a text
        encoder from scratch, which learns words by heart."""
        given = self.training.vary_wording
        return float(self.model.text != "scratch") if given is None else given

    @property
    def lateralised(self) -> tuple[str, ...]:
        """The labels that have a side."""
        return tuple(
            n
            for n, v in self.labels.items()
            if v.snomed.laterality or {"left", "right"} & set(n.lower().replace("-", " ").split())
        )

    @property
    def label_values(self) -> dict[str, int]:
        """Label name to the value that the app reads and writes."""
        return {name: label.value for name, label in self.labels.items()}

    @property
    def value_names(self) -> dict[int, str]:
        """Every value that a label file may hold, background aside, to the label's name."""
        return {v: name for name, label in self.labels.items() for v in (label.value, *label.file_values)}

    def annotated(self, names: Sequence[str] | None) -> tuple[bool, ...]:
        """Which classes a label that declares `names` was annotated for, in channel order; None declares all.

        A region counts if it is named itself or all its labels are.

        Raises:
            TaskError: an unknown name, or no name at all.
        """
        if names is None:
            return (True,) * len(self.classes)
        known = self.named(names)
        parts = {name: region.labels for name, region in (self.regions or {}).items()}
        return tuple(c in known or (c in parts and set(parts[c]) <= set(known)) for c in self.classes)

    def named(self, names: Sequence[str]) -> list[str]:
        """The classes and labels that a label's `annotated` means, as this task spells them.

        Raises:
            TaskError: an unknown name, or no name at all.
        """
        valid = list(dict.fromkeys((*self.classes, *self.labels)))
        known = {name: meant(name, valid) for name in names}
        unknown = [name for name, found in known.items() if found is None]
        if unknown or not known:
            found = f"unknown class {unknown[0]!r}" if unknown else "no class is named"
            raise TaskError(f"annotated: {found}; valid are {', '.join(valid)}")
        return [found for found in known.values() if found is not None]

    def text_rows(self) -> list[list[str]]:
        """C lists of K sentences, in channel order, in the task's text format."""
        return self.concepts.rows(self.classes, self.model.text_format)

    def with_concepts(self, override: dict[str, Any]) -> Task:
        """This task with other sentences for some classes (class → attribute → sentence).

        Raises:
            TaskError: unknown class or attribute, an empty sentence, or markup in one.
        """
        if not isinstance(override, dict):
            raise TaskError(f"concepts: expected class → attribute → sentence, got {type(override).__name__}")
        classes = dict(self.concepts.classes)
        for given, sentences in override.items():
            name = meant(str(given), classes)
            if name is None:
                raise TaskError(f"concepts: unknown class {given!r}; valid are {', '.join(classes)}")
            if not isinstance(sentences, dict):
                raise TaskError(f"concepts.{name}: expected attribute → sentence, got {type(sentences).__name__}")
            for attribute, sentence in sentences.items():
                if attribute not in ATTRIBUTES:
                    raise TaskError(
                        f"concepts.{name}: unknown attribute {attribute!r}; valid are {', '.join(ATTRIBUTES)}"
                    )
                if not isinstance(sentence, str) or not sentence.strip():
                    raise TaskError(f"concepts.{name}.{attribute}: expected a sentence, got {sentence!r}")
                if found := markup(sentence):
                    raise TaskError(f"concepts.{name}.{attribute}: sentences are plain text; found {found}")
            text = classes[name]
            classes[name] = text.model_copy(update={"sentences": {**text.sentences, **sentences}})
        return self.model_copy(update={"concepts": self.concepts.model_copy(update={"classes": classes})})

    def only(self, names: Sequence[str]) -> Task:
        """This task with some of its classes, in its own order: what a network with the text head is asked for then.

        Overlapping classes stay together: it takes all regions to tell the labels within them apart.
        """
        if self.overlapping:
            return self
        labels = {name: label for name, label in self.labels.items() if name in names}
        texts = {name: text for name, text in self.concepts.classes.items() if name in names}
        concepts = self.concepts.model_copy(update={"classes": texts})
        return self.model_copy(update={"labels": labels, "concepts": concepts})

    def extended(self, current: Task) -> Task:
        """The task that a network with the text head was trained for, with the classes that its task has by now.

        A class that it knows keeps the sentences that it was trained with; a new one brings its own.
        """
        texts = {name: self.concepts.classes.get(name, text) for name, text in current.concepts.classes.items()}
        update = {"labels": current.labels, "regions": current.regions}
        return self.model_copy(update={**update, "concepts": self.concepts.model_copy(update={"classes": texts})})

    def respelled(self, current: Task) -> Task:
        """This task with the names that `current` writes in another way (`lib.tasks.names.folded`)."""
        valid = dict.fromkeys((*current.labels, *current.classes))
        spelling = {name: meant(name, valid) or name for name in (*self.labels, *self.classes)}
        labels = {spelling[name]: label for name, label in self.labels.items()}
        regions = self.regions and {
            spelling[name]: region.model_copy(update={"labels": tuple(spelling[part] for part in region.labels)})
            for name, region in self.regions.items()
        }
        texts = {spelling[name]: text for name, text in self.concepts.classes.items()}
        concepts = self.concepts.model_copy(update={"classes": texts})
        return self.model_copy(update={"labels": labels, "regions": regions, "concepts": concepts})

    def to_dict(self) -> dict[str, Any]:
        """Plain data from which `task_from_dict` rebuilds the task without any file."""
        return self.model_dump(mode="json")
