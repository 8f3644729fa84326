"""The data of the accuracy benchmark: finding the cases of a data set, splitting them by patient, drawing patches."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import CenterSpatialCropd, Compose
from torch import Tensor
from torch.utils.data import Dataset

from lib.files import write_atomic
from lib.tasks import Task
from lib.volumes.augmentation import augment
from lib.volumes.transforms import apply, load

SPLIT_SEED = 2025  # the same split for every model and every seed
SHARES = (40, 8, 12)  # of 60: training, validation, test
# Of a task whose split has other shares. Its crops count as patients, but two may be of one person: 11 of the 60 test
# crops have their twin in the other parts (`benchmarks.shipped_model.person`).
SPLITS = {"hippocampus-mr": (120, 22, 60)}


@dataclass(frozen=True)
class Split:
    """Cases (`id`, `patient`, `image`, `label`), no patient in two parts."""

    training: list[dict[str, str]]
    validation: list[dict[str, str]]
    test: list[dict[str, str]]


def find_cases(folder: Path) -> list[dict[str, str]]:
    """The labelled volumes of a data set's folder.

    Known layouts: `imagesTr` and `labelsTr` with equal names (AMOS22, Medical Segmentation Decathlon), or `images` and
    `labels`; `X_image` beside `X_label` (MM-WHS), `X` beside `X_gt` (ACDC, in one folder or one per patient). Files end
    in .nii or .nii.gz. The patient is what comes before `_frame`, and else the case itself.

    Raises:
        ValueError: no pair found.
    """
    pairs: list[tuple[Path, Path]] = []
    for images, labels in (("imagesTr", "labelsTr"), ("images", "labels")):
        found = ((p, folder / labels / p.name) for p in (folder / images).glob("*.nii*"))
        pairs += [(image, label) for image, label in found if label.is_file() and not image.name.startswith(".")]
    for image in [] if pairs else folder.rglob("*.nii*"):
        for own, other in (("_image.nii", "_label.nii"), (".nii", "_gt.nii")):
            label = image.with_name(image.name.replace(own, other))
            if label != image and label.is_file():
                pairs.append((image, label))
                break
    if not pairs:
        raise ValueError(
            f"{folder}: no labelled volume; expected imagesTr/X with labelsTr/X, images/X with labels/X, "
            "X_image with X_label, or X with X_gt (.nii or .nii.gz)"
        )
    cases = []
    for image, label in sorted(pairs):
        name = re.sub(r"(_image)?\.nii(\.gz)?$", "", image.name)
        cases.append({"id": name, "patient": name.split("_frame")[0], "image": str(image), "label": str(label)})
    return cases


def split_cases(
    cases: Sequence[dict[str, str]],
    train_patients: int | None = None,
    fold: int | None = None,
    shares: tuple[int, int, int] = SHARES,
) -> Split:
    """Split by patient, after a shuffle with a fixed seed.

    Args:
        cases: of `find_cases`.
        train_patients: the first so many patients of the training part; smaller sets are parts of larger ones.
        fold: 0, 1 or 2: that third is the test set, everything else trains, nothing validates. None: by `shares`.
        shares: of training, validation and test (`SPLITS`).

    Raises:
        ValueError: too few patients.
    """
    patients = sorted({case["patient"] for case in cases})
    random.Random(SPLIT_SEED).shuffle(patients)
    if fold is None:
        ends = [round(len(patients) * sum(shares[: i + 1]) / sum(shares)) for i in range(3)]
        parts = patients[: ends[0]], patients[ends[0] : ends[1]], patients[ends[1] :]
    else:
        parts = [p for i, p in enumerate(patients) if i % 3 != fold], [], patients[fold::3]
    if train_patients is not None and not 1 <= train_patients <= len(parts[0]):
        raise ValueError(f"train_patients {train_patients}: valid are 1 to {len(parts[0])}")
    if not parts[0] or not parts[2]:
        raise ValueError(f"{len(patients)} patient(s) are too few to split")
    parts = parts[0][:train_patients], parts[1], parts[2]
    return Split(*([case for p in part for case in cases if case["patient"] == p] for part in parts))


class Preprocessed(Dataset, Sequence[dict[str, MetaTensor]]):
    """Cases on the network's grid, kept on disk for every later run with the same preprocessing.

    An item is `image` (channels, h, w, d), with the metadata that `lib.volumes.transforms.restore` needs, and `label`.

    Args:
        task: how to preprocess.
        cases: of `find_cases`.
        cache: folder to keep them in.
        field: mm left-right and posterior-anterior around the centre to keep, in all volumes; what lies outside is
            neither trained on nor segmented, yet scored. None keeps all.
    """

    META = ("original_affine", "spatial_shape")

    def __init__(
        self, task: Task, cases: Sequence[dict[str, str]], cache: Path, field: tuple[float, float] | None = None
    ) -> None:
        size = [round(mm / spacing) for mm, spacing in zip(field, task.spacing, strict=False)] if field else [-1, -1]
        self.crop = CenterSpatialCropd(["image", "label"], (*size, -1))
        self.cases, self.transforms = list(cases), load(task, label=True)
        key = task.model_dump_json(include={"spacing", "intensity", "labels", "regions", "channels"})
        self.folder = cache / f"{task.name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, i: int) -> dict[str, MetaTensor]:  # type: ignore[override]  # takes no slice
        if i >= len(self):
            raise IndexError(i)
        path = self.folder / f"{self.cases[i]['id']}.pt"
        if not path.is_file():
            data = apply(self.transforms, {k: self.cases[i][k] for k in ("image", "label")})
            kept = {k: data[k].as_tensor().clone() for k in ("image", "label")}
            meta = {k: torch.as_tensor(data["image"].meta[k]) for k in self.META}
            kept |= {"affine": data["image"].affine, **meta}
            write_atomic(path, lambda file: torch.save(kept, file))
        kept = torch.load(path, weights_only=True)
        meta = {k: kept[k] for k in (*self.META, "affine")}
        cropped: dict[Any, Any] = self.crop({k: MetaTensor(kept[k], meta=dict(meta)) for k in ("image", "label")})
        return cropped


class Patches(Dataset):
    """Item i is the i-th training step's batch: its cases and its random numbers depend on seed and i alone. A third
    part says which classes each label was drawn for, if the volumes have `annotated`."""

    def __init__(self, task: Task, volumes: Any, steps: int, seed: int) -> None:
        self.volumes, self.steps, self.seed = volumes, steps, seed
        self.batch = task.training.batch_size
        self.transforms = Compose(augment(task, task.training.patches_per_case))

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        patches = []
        self.transforms.set_random_state(int(np.random.SeedSequence([self.seed, i]).generate_state(1)[0]))
        for number in range(i * self.batch, (i + 1) * self.batch):
            epoch, position = divmod(number, len(self.volumes))
            order = list(range(len(self.volumes)))
            random.Random(f"{self.seed} {epoch}").shuffle(order)
            patches += self.transforms(dict(self.volumes[order[position]]))
        batch = tuple(torch.stack([p[key].as_tensor() for p in patches]) for key in ("image", "label"))
        return (*batch, torch.stack([p["annotated"] for p in patches])) if "annotated" in patches[0] else batch
