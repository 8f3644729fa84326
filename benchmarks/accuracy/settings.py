"""What the accuracy benchmark runs: sizes, models, variants, and the matrix of runs in the order of their priority."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lib.model.nets.vision import BACKBONES
from lib.tasks import Task, load_task

VISION_ONLY = ("swin_unetr", "swin_unetr_v2", "unetr", "unet", "unetpp", "dynunet", "mednext", "resenc")
MODELS = ("bipvl", *VISION_ONLY)
HEADS = ("fixed", "text")

# A size that two CPU cores can train many times. Everything that is not named here is the task's own.
SMALL: dict[str, Any] = {
    "spacing": [3.0, 3.0, 4.0],
    "patch": [64, 64, 32],
    "overlap": 0.25,
    "model.feature_size": 12,
    "model.swin_heads": 1,
    "model.text": "scratch",
    "model.scratch": {"layers": 12, "width": 48, "heads": 4},
    "model.projection": 64,
    "training.learning_rate": 1e-2,
    "training.language_learning_rate": 1e-4,
    "training.patches_per_case": 1,
}
# Likewise for the abdomen, whose volumes are larger: one patch holds most of one.
ABDOMEN: dict[str, Any] = {**SMALL, "spacing": [6.0, 6.0, 6.0]}
SMALL_ITERATIONS = 200
# Short-axis images have the heart in their middle: the field holds 99.5% of what is labelled, one patch the field.
FIELDS: dict[str, tuple[float, float]] = {"small": (192.0, 192.0)}
FEW = (4, 8, 16)  # training patients of the learning curve, besides all
SIZES: dict[str, dict[str, Any]] = {"small": SMALL, "paper": {}, "task": {}}  # task: one that is small by itself

# The paper's Table 3 (ablations) and Table 2 (text formats), text of the wrong class already in training, what
# Swin UNETR gains from class maps of its decoder without any text, and the text head with steps that know some classes.
ABLATIONS: dict[str, dict[str, Any]] = {
    "paper-embedding": {"model.class_embedding": "last"},
    "no-local": {"training.local_weight": 0.0},
    "no-alignment": {"training.local_weight": 0.0, "training.global_weight": 0.0},
    "late-fusion": {"model.fusion": "late"},
    "no-fusion": {"model.fusion": "identity"},
}
FORMATS: dict[str, dict[str, Any]] = {name: {"model.text_format": name} for name in ("ambiguous", "definition", "name")}
SHUFFLED = "shuffled-training"
SUPERVISED = "deep-supervision"
DROPPED = "drop-classes"
VARIANTS: dict[str, dict[str, Any]] = {
    **{"": {}, **ABLATIONS, **FORMATS, SHUFFLED: {}, SUPERVISED: {}},
    DROPPED: {"training.drop_classes": 0.3},
}


@dataclass(frozen=True)
class Run:
    """One training and its evaluation.

    Attributes:
        task: name of a shipped task.
        model: `bipvl`, or a vision-only network.
        head: of `bipvl`; ignored by the others.
        variant: a key of `VARIANTS`.
        train_patients: how many patients train; None for all of the split's.
        seed: of weights, patches and augmentation. The split does not depend on it.
        size: `small`, `paper` or `task`.
        fold: 0, 1 or 2 of three-fold cross-validation; None for the fixed split.
        iterations: training steps; None for the size's own.
        overrides: further values of the task, in sorted (dotted key, value) pairs.
    """

    task: str
    model: str
    head: str = "fixed"
    variant: str = ""
    train_patients: int | None = None
    seed: int = 0
    size: str = "small"
    fold: int | None = None
    iterations: int | None = None
    overrides: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        choices = (("model", MODELS), ("head", HEADS), ("variant", tuple(VARIANTS)), ("size", tuple(SIZES)))
        for name, valid in choices:
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} {getattr(self, name)!r}: valid are {', '.join(v or repr(v) for v in valid)}")
        if self.variant and self.model != "bipvl" and self.variant != SUPERVISED:
            raise ValueError(f"variant {self.variant!r} changes the text, and {self.model!r} reads none")
        if self.variant == SUPERVISED and self.model not in BACKBONES:
            raise ValueError(f"variant {self.variant!r}: valid models are {', '.join(BACKBONES)}")
        if self.fold not in (None, 0, 1, 2):
            raise ValueError(f"fold {self.fold}: valid are 0, 1, 2")

    @property
    def name(self) -> str:
        """File name of the result, without suffix: differs wherever the run differs."""
        parts = [self.task, self.size, f"{self.model}-{self.head}" if self.model == "bipvl" else self.model]
        parts += [self.variant] if self.variant else []
        parts += [f"n{self.train_patients}"] if self.train_patients is not None else []
        parts += [f"fold{self.fold}"] if self.fold is not None else []
        parts += [f"i{self.iterations}"] if self.iterations is not None else []
        parts += [f"{key.split('.')[-1]}={str(value).replace('/', '-')}" for key, value in self.overrides]
        return "_".join([*parts, f"s{self.seed}"])

    def task_of(self) -> Task:
        """The task at the run's size, with the variant's changes.

        Raises:
            TaskError: unknown task or value.
        """
        changes = {**SIZES[self.size], **VARIANTS[self.variant], **dict(self.overrides)}
        if self.model == "bipvl":
            changes["model.head"] = self.head
        elif self.model in ("swin_unetr_v2", "unetr", "unet", "unetpp"):
            changes["model.vision"] = self.model
        task = load_task(self.task, changes)
        return with_shuffled_text(task) if self.variant == SHUFFLED else task

    @property
    def field(self) -> tuple[float, float] | None:
        """mm left-right and posterior-anterior around the image's centre that the networks see; None for all."""
        return FIELDS.get(self.size)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "overrides": dict(self.overrides)}


def with_shuffled_text(task: Task) -> Task:
    """The task in which each class has the text of the next one."""
    names = task.classes
    texts = {name: task.concepts.classes[names[(i + 1) % len(names)]] for i, name in enumerate(names)}
    return task.model_copy(update={"concepts": task.concepts.model_copy(update={"classes": texts})})


def matrix(task: str, size: str, seeds: int = 3, paper_protocol: bool = False) -> list[Run]:
    """All runs in the order of their priority.

    Args:
        task: name of a shipped task.
        size: `small` or `paper`.
        seeds: of the main comparison.
        paper_protocol: three folds of every model instead, without learning curve.
    """
    plain: dict[str, Any] = {"model": "swin_unetr"}
    fixed: dict[str, Any] = {"model": "bipvl"}
    text = {**fixed, "head": "text"}
    others = [m for m in VISION_ONLY if m != "swin_unetr"]
    if paper_protocol:
        models = [plain, fixed, text, *({"model": m} for m in others)]
        return [Run(task, size=size, fold=fold, **m) for m in models for fold in range(3)]
    supervised = {**plain, "variant": SUPERVISED}
    compared = (plain, fixed, text, supervised)
    dropped = {**text, "variant": DROPPED}
    runs = [Run(task, size=size, seed=s, **m) for s in range(seeds) for m in compared]
    runs += [Run(task, size=size, train_patients=n, **m) for n in FEW for m in compared]
    runs += [Run(task, "bipvl", variant=v, size=size) for v in ABLATIONS]
    runs += [Run(task, size=size, seed=s, **dropped) for s in range(seeds)]
    runs += [Run(task, "bipvl", variant=v, size=size) for v in (SHUFFLED, *FORMATS)]
    runs += [Run(task, m, size=size) for m in others]
    runs += [
        Run(task, size=size, train_patients=n, seed=s, **m) for s in range(1, seeds) for n in FEW for m in compared
    ]
    return runs
