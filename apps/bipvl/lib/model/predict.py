"""From a preprocessed image to class probabilities: the one way to predict, for requests, validation and evaluation."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from monai.data import MetaTensor
from monai.data.utils import dense_patch_slices
from monai.inferers import sliding_window_inference
from torch import Tensor
from torch.nn import functional as F

from lib.model.alignment import unit
from lib.model.nets.bipvl import BiPVLSeg, Output
from lib.model.nets.text import Sentences
from lib.tasks import AXES, Task

logger = logging.getLogger(__name__)

CERTAIN = 10.0  # logit of background in a window without any content
AIR = -900.0  # HU; air is -1000, aerated lung about -850
PART = 32  # slices of the volume that are turned into probabilities at once
NOISE = 3  # voxels per side over which the noise of a CT is averaged before it is compared with AIR


@dataclass
class Prediction:
    """The result on the network's grid.

    probabilities: (channels, h, w, d) float32, background first if classes exclude each other.
    concept_weights: (C, K), w_k of Eq. (4), mean over windows weighted by the class's probability mass.
    similarity: (C, C), cosine of the text T of each class (rows) and the vision vector V of each (columns), weighted
        likewise by the column's class. The paper's Fig. 2d.
    windows, skipped: how many windows the volume has, and how many of them held nothing but background.
    features: (width, h, w, d) float16 on the CPU, of the decoder, stitched as the logits are; if they were asked for.
    text: (C, P), T of Eq. (4), mean over windows weighted likewise; likewise.
    """

    probabilities: Tensor
    concept_weights: Tensor
    similarity: Tensor
    windows: int
    skipped: int
    features: Tensor | None = None
    text: Tensor | None = None

    @property
    def alignment(self) -> Tensor:
        """(C,), cosine of each class's text and its own vision vector."""
        return self.similarity.diagonal()

    @property
    def overlapping(self) -> bool:
        """Whether there is no background channel."""
        return len(self.probabilities) == len(self.similarity)

    def found(self) -> Tensor:
        """(C,) boolean: which classes the prediction shows anywhere."""
        p, classes = self.probabilities, len(self.similarity)
        if self.overlapping:
            return (p > 0.5).flatten(1).any(1).cpu()
        seen = [part.max(0).indices.unique() for part in p.split(PART, dim=1)]
        return torch.isin(torch.arange(1, classes + 1), torch.cat(seen).cpu())

    def entropy(self) -> Tensor:
        """(h, w, d) predictive entropy of each voxel, 0 to 1: of its channels if classes exclude each other, the
        mean of the classes' binary entropies if they overlap."""
        result = torch.empty(self.probabilities.shape[1:], device=self.probabilities.device)
        for p, part in zip(self.probabilities.split(PART, dim=1), result.split(PART), strict=True):
            if self.overlapping:
                part.copy_((torch.special.entr(p) + torch.special.entr(1 - p)).mean(0) / math.log(2))
            else:
                part.copy_(torch.special.entr(p).sum(0) / math.log(len(p)))
        return result.clamp_(0, 1)

    def uncertainty(self) -> float:
        """Mean predictive entropy over the foreground, 0 to 1. A voxel counts by its probability of being foreground,
        so that a model that is not sure enough to draw anything is uncertain, not certain of nothing."""
        p = self.probabilities
        foreground = p.amax(0) if self.overlapping else 1 - p[0]
        mass = float(foreground.sum(dtype=torch.float64))
        return float((foreground * self.entropy()).sum(dtype=torch.float64)) / mass if mass > 0 else 0.0


Watch = Callable[[int, int], None]  # windows done, windows in all; may raise to stop


def window_count(shape: Sequence[int], patch: Sequence[int], overlap: float) -> int:
    """How many windows MONAI's sliding-window inference slides over a volume of this shape."""
    size = [max(n, p) for n, p in zip(shape, patch, strict=True)]
    # As monai.inferers.utils._get_scan_interval.
    steps = [p if p == n else max(1, int(p * (1 - overlap))) for p, n in zip(patch, size, strict=True)]
    return len(dense_patch_slices(size, patch, steps))


class _Windows:
    """The predictor that sliding-window inference calls: skips empty windows and collects what the text saw."""

    def __init__(
        self,
        model: BiPVLSeg,
        task: Task,
        sentences: Sentences | None,
        flips: list[tuple[int, ...]],
        keep_features: bool = False,
        watch: Watch | None = None,
        total: int = 0,
    ) -> None:
        self.watch, self.total = watch, total
        self.model, self.task, self.sentences, self.flips = model, task, sentences, flips
        self.keep_features = keep_features
        self.channels = len(task.channels)
        self.windows = self.skipped = 0
        self.mass: Any = None  # of each class over all windows (C,)
        self.weights: Any = None
        self.cosine: Any = None
        self.text: Any = None

    def __call__(self, patches: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """(B, channels, …), after the image's channels that of `content`, if there is one, to logits, and to the
        decoder's features if they are kept."""
        if self.watch:
            self.watch(self.windows, self.total)
        full = self._shown(patches)
        patches = patches[:, : self.channels]
        self.windows += len(patches)
        self.skipped += int((~full).sum())
        logits = patches.new_zeros(len(patches), self.task.out_channels, *patches.shape[2:], dtype=torch.float32)
        logits[~full] = -CERTAIN
        if not self.task.overlapping:
            logits[~full, 0] = CERTAIN
        features: Tensor | None = None
        if full.any():
            output, logits[full] = self._run(patches[full])
            features = output.features
        if not self.keep_features:
            return logits
        kept = logits.new_zeros(len(patches), self.model.vision.feature_width, *patches.shape[2:])
        if features is not None:
            kept[full] = features.float()
        return logits, kept

    def _shown(self, patches: Tensor) -> Tensor:
        """(B,) boolean: which windows show anything. One of a single constant value (air, or the zeros around a
        skull-stripped brain) does not."""
        flat = patches.flatten(2)
        varied = (flat.amax(-1) - flat.amin(-1))[:, : self.channels] > 0
        return varied.any(1) & (flat[:, self.channels :] > 0).any(-1).all(1)

    def _run(self, patches: Tensor) -> tuple[Output, Tensor]:
        output = self.model(patches, self.sentences)
        logits = output.logits.float()
        for axes in self.flips:
            flipped = self.model(patches.flip(axes), self.sentences)
            logits = logits + flipped.logits.float().flip(axes)
        logits = logits / (1 + len(self.flips))
        self._collect(output, logits)
        return output, logits

    def _collect(self, output: Output, logits: Tensor) -> None:
        p = logits.sigmoid() if self.task.overlapping else logits.softmax(1)[:, 1:]
        mass = p.flatten(2).sum(-1).double()  # (B, C)
        cosine = torch.einsum("bcp,bdp->bcd", unit(output.text.float()), unit(output.vision.float()))
        means = (mass[..., None] * output.weights).sum(0), (mass[:, None] * cosine).sum(0)
        parts = mass.sum(0), *means, (mass[..., None] * output.text).sum(0)
        if self.mass is None:
            self.mass, self.weights, self.cosine, self.text = parts
        else:
            self.mass, self.weights, self.cosine, self.text = (
                a + b for a, b in zip((self.mass, self.weights, self.cosine, self.text), parts, strict=True)
            )


def content(image: Tensor, task: Task) -> Tensor | None:
    """Where a preprocessed CT shows anything but noisy air: (1, h, w, d), 0 or 1.

    Only a task that looks below -900 HU needs this: for any other air is clipped to one constant value. Noise is
    averaged away before voxels are compared, and what is found grows by as much as averaging may have taken from it.

    Returns None if the task needs none.
    """
    low, high = task.intensity.low, task.intensity.high
    if task.modality != "CT" or low is None or high is None or low >= AIR:
        return None
    smooth = F.avg_pool3d(image[None], NOISE, stride=1, padding=NOISE // 2, count_include_pad=False)
    found = (smooth > (AIR - low) / (high - low)).any(1, keepdim=True).float()
    return F.max_pool3d(found, 2 * NOISE - 1, stride=1, padding=NOISE - 1)[0]


@torch.no_grad()
def predict(
    model: BiPVLSeg,
    image: Tensor,
    task: Task,
    overlap: float | None = None,
    window_batch: int = 1,
    tta: bool = False,
    sentences: Sentences | None = None,
    progress: Callable[[str], None] = logger.warning,
    half: bool | None = None,
    keep_features: bool = False,
    watch: Watch | None = None,
) -> Prediction:
    """Segment one preprocessed volume with sliding windows of the task's patch.

    Args:
        model: on the device to use, in evaluation mode.
        image: (channels, h, w, d), preprocessed, on any device; may be smaller than the patch.
        task: patch, classes, overlap.
        overlap: share of a window that neighbours share, 0 to below 1; default the task's.
        window_batch: windows per forward pass.
        tta: average over the flips that the task was trained with.
        sentences: text in place of the task's own.
        progress: told when memory runs short and a smaller setting is tried.
        half: compute in bfloat16; default: on a GPU, not on a CPU. Stitching and probabilities stay in float32.
        keep_features: also stitch the decoder's features, which take as much memory as `width` classes.
        watch: told before each pass how many windows are done, and how many there are.

    Raises:
        ValueError: overlap out of range.
        torch.OutOfMemoryError: even one window at a time, stitched on the CPU, does not fit.
    """
    assert not model.training, "in training mode dropout would draw part of the mask by chance"
    overlap = task.overlap if overlap is None else overlap
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap {overlap}: valid is 0 up to, but not including, 1")
    image = image.as_tensor() if isinstance(image, MetaTensor) else image
    shown = content(image, task)
    given = image if shown is None else torch.cat([image, shown])
    device = next(model.parameters()).device
    flips: list[tuple[int, ...]] = [(2 + AXES.index(a),) for a in task.augmentation.flip] if tta else []
    settings = [(window_batch, device), (1, device), (1, torch.device("cpu"))]
    for attempt, (batch, stitch) in enumerate(settings):
        total = window_count(image.shape[1:], task.patch, overlap)
        windows = _Windows(model, task, sentences, flips, keep_features, watch, total)
        try:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" if half is None else half):
                found = sliding_window_inference(
                    given[None],
                    task.patch,
                    batch,
                    windows,
                    overlap=overlap,
                    mode="gaussian",
                    sw_device=device,
                    device=stitch,
                )
            break
        except torch.OutOfMemoryError:
            if attempt == len(settings) - 1:
                raise
            progress(
                f"out of memory with {batch} windows at a time, stitched on {stitch}; trying {settings[attempt + 1]}"
            )
            torch.cuda.empty_cache()
    logits, features = found if keep_features else (found, None)
    features = None if features is None else features[0].half().cpu()
    probabilities = logits[0].float()  # in place and in parts: on a large volume each copy takes gigabytes
    for part in probabilities.split(PART, dim=1):
        part.copy_(part.sigmoid() if task.overlapping else part.softmax(0))
    rows = len(task.classes), len(task.text_rows()[0])
    if windows.mass is None:
        return Prediction(
            probabilities,
            torch.full(rows, 1 / rows[1]),
            torch.zeros(rows[0], rows[0]),
            windows.windows,
            windows.skipped,
            features,
            torch.zeros(rows[0], model.project_text.out_features) if keep_features else None,
        )
    mass = windows.mass.clamp_min(1e-12).cpu()
    return Prediction(
        probabilities,
        (windows.weights.cpu() / mass[:, None]).float(),
        (windows.cosine.cpu() / mass).float(),
        windows.windows,
        windows.skipped,
        features,
        (windows.text.cpu() / mass[:, None]).float() if keep_features else None,
    )
