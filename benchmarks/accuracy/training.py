"""Networks, training and evaluation of the accuracy benchmark: one loop for every model, made of the app's parts.

Preprocessing, patches, augmentation, losses, sliding windows, restoration and metrics are those of `lib`, so that what
is compared is the network alone. Models without text are trained with the segmentation loss only.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.networks.nets import DynUNet
from monai.utils import set_determinism
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from benchmarks.accuracy.data import Patches
from benchmarks.accuracy.settings import SUPERVISED, Run
from lib.files import write_atomic
from lib.model.alignment import unit
from lib.model.losses import class_maps_loss, segmentation_loss
from lib.model.nets import BiPVLSeg, build_model
from lib.model.nets.bipvl import Output
from lib.model.nets.heads import LEVELS, FixedHead
from lib.model.nets.pretrained import load_vision_weights
from lib.model.nets.text import Sentences
from lib.model.nets.vision import build_vision
from lib.model.predict import predict
from lib.tasks import Task
from lib.trainers.objective import TrainingNetwork
from lib.trainers.recipe import build_schedule, descend
from lib.volumes.metrics import METRICS, Row, evaluate_volumes, summary
from lib.volumes.reading import align_label, read_volume
from lib.volumes.transforms import restore

POINTS = 30  # of the recorded curves
VALIDATIONS = 10  # of them that also score the validation patients
SAVE_SECONDS = 300  # between two states that a stopped training goes on from
PROBE_PATCHES = 2


# Networks -------------------------------------------------------------------------------------------------------------


class VisionOnly(nn.Module):
    """A network of MONAI behind the interface of `lib.model.predict.predict`; it reads no text.

    Args:
        name: of the network.
        task: sizes and classes.
        supervised: predict class maps at the decoder's three lower resolutions in training, as BiPVL-Seg does, from a
            channel a class.
    """

    def __init__(self, name: str, task: Task, supervised: bool = False) -> None:
        super().__init__()
        self.maps: nn.ModuleList | None = None
        self.rows = len(task.classes), len(task.text_rows()[0])
        spec, channels = task.model, len(task.channels)
        if name == "dynunet":
            strides = [[1] * 3, *[[2] * 3] * 4]
            widths = [spec.feature_size * 2**n for n in range(5)]
            self.net: nn.Module = DynUNet(
                3, channels, task.out_channels, [[3] * 3] * 5, strides, strides[1:], filters=widths, res_block=True
            )
        else:
            backbone = build_vision(task, name)
            self.net = nn.Sequential(backbone, FixedHead(backbone.feature_width, task.out_channels))
            load_vision_weights(backbone, task)
            if supervised:
                levels = backbone.decoder_widths[:LEVELS]
                self.maps = nn.ModuleList(
                    nn.Sequential(ChannelNorm(width), nn.Conv3d(width, task.out_channels, 1)) for width in levels
                )

    def forward(self, image: Tensor, sentences: Sentences | None = None) -> Output:
        maps: list[Tensor] = []
        if self.maps is None or not self.training:
            logits = self.net(image)
        else:
            backbone: Any
            backbone, head = self.net.children()
            *coarse, features = backbone.decoded(image)
            logits = head(features)
            maps = [m(x) for m, x in zip(self.maps, coarse, strict=True)]
        nothing = logits.new_zeros(len(image), *self.rows, 1)
        return Output(logits, maps, nothing, nothing, nothing[:, :, 0], nothing[..., 0], nothing[:, :, 0])


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each place, as the class maps of BiPVL-Seg have it."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class VisionTraining(nn.Module):
    """The segmentation loss of a network without text."""

    def __init__(self, model: VisionOnly, task: Task) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, image: Tensor, label: Tensor) -> dict[str, Tensor]:
        output = self.model(image)
        loss = segmentation_loss(output.logits, label, self.task.overlapping)
        parts = {"segmentation": loss.detach()}
        if output.class_maps:
            maps = class_maps_loss(output.class_maps, label, self.task.overlapping)
            loss, parts["class_embedding"] = loss + maps, maps.detach()
        return {"loss": loss, **parts}


def build_network(run: Run, task: Task) -> TrainingNetwork | VisionTraining:
    """Network and objective, with the weights of the run's seed."""
    set_determinism(run.seed)
    if run.model == "bipvl":
        return TrainingNetwork(build_model(task), task)
    return VisionTraining(VisionOnly(run.model, task, run.variant == SUPERVISED), task)


def optimizer_of(network: TrainingNetwork | VisionTraining, task: Task) -> torch.optim.AdamW:
    """AdamW, with the app's groups if there is text."""
    recipe = task.training
    groups: list[dict[str, Any]] = [{"params": list(network.parameters())}]
    if isinstance(network, TrainingNetwork):
        groups = network.parameter_groups()
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)


# Training -------------------------------------------------------------------------------------------------------------


def precision(device: torch.device, kind: str) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16, enabled=kind == "bf16")


def train(
    network: TrainingNetwork | VisionTraining,
    task: Task,
    patches: Patches,
    probe: Sequence[tuple[Tensor, ...]],
    device: torch.device,
    kind: str,
    workers: int = 0,
    state: Path | None = None,
    validate: Callable[[nn.Module], dict[str, float]] | None = None,
) -> dict[str, list]:
    """Train in place; the last weights count, nothing is selected. Returns the curves.

    A training that was stopped goes on from its file of state, to the same weights as if it had not been stopped.

    Args:
        network: on the device.
        task: recipe.
        patches: the batches, one per step.
        probe: batches on which alignment and concept weights are measured.
        kind: `bf16` or `float32`.
        workers: processes that prepare batches.
        state: file that the training's state is kept in until it ends; None: nowhere.
        validate: the mean Dice of validation patients, for the curve `validation`, with the steps `validated`; and for
            `aside` with the wordings that training never reads.

    Raises:
        ValueError: the loss is not finite.
    """
    optimizer = optimizer_of(network, task)
    steps = len(patches)
    schedule = build_schedule(optimizer, steps, task.training)
    curves: dict[str, list] = {}
    window: list[dict[str, float]] = []
    every = max(1, steps // POINTS)
    done, random = 0, None
    parts_of_state = {"network": network, "optimizer": optimizer, "schedule": schedule}
    if state and state.is_file():
        kept = torch.load(state, map_location=device, weights_only=True)
        for name, part in parts_of_state.items():
            part.load_state_dict(kept[name])
        done, curves, window = kept["step"], kept["curves"], kept["window"]
        random = kept["random"].cpu()
        print(f"goes on after step {done}", flush=True)
    saved = time.monotonic()
    left = iter(DataLoader(Subset(patches, range(done, steps)), batch_size=None, num_workers=workers))
    if random is not None:
        torch.set_rng_state(random)  # the loader has drawn a number
    for step, batch in enumerate(left, done + 1):
        network.train()
        optimizer.zero_grad(set_to_none=True)
        with precision(device, kind):
            parts = network(*(part.to(device) for part in batch))
        if not torch.isfinite(parts["loss"]):
            raise ValueError(f"the loss became {parts['loss'].item()} at step {step}; lower training.learning_rate")
        descend(parts["loss"], optimizer, network.uncertainty if isinstance(network, TrainingNetwork) else None)
        schedule.step()
        window.append({name: float(value.detach()) for name, value in parts.items()})
        if step % every == 0 or step == steps:
            point = {name: round(sum(w[name] for w in window) / len(window), 4) for name in window[0]}
            point["step"] = step
            if isinstance(network, TrainingNetwork):
                point |= {name: round(value, 4) for name, value in network.sigmas().items()}
                point |= text_state(network.model, probe, device, kind)
            for name, value in point.items():
                curves.setdefault(name, []).append(value)
            print(json.dumps({k: v for k, v in point.items() if k not in ("weights", "similarity")}), flush=True)
            window.clear()
        if validate and (step % max(1, steps // VALIDATIONS) == 0 or step == steps):
            curves.setdefault("validated", []).append(step)
            found = {name: round(value, 4) for name, value in validate(network.model).items()}
            for name, value in found.items():
                curves.setdefault(name, []).append(value)
            print(json.dumps({"step": step, **found}), flush=True)
        if state and time.monotonic() - saved > SAVE_SECONDS:
            kept = {name: part.state_dict() for name, part in parts_of_state.items()}
            kept |= {"step": step, "curves": curves, "window": window, "random": torch.get_rng_state()}
            write_atomic(state, partial(torch.save, kept))
            saved = time.monotonic()
    return curves


@torch.no_grad()
def text_state(model: BiPVLSeg, probe: Sequence[tuple[Tensor, ...]], device: torch.device, kind: str) -> dict[str, Any]:
    """Concept weights w_k (C, K) and the cosines of T and V of all classes (C, C), mean over the probe's patches; the
    spread of the class rows, 0 if all sentences have become one vector."""
    model.eval()
    weights, similarity, spread = [], [], []
    for image, *_ in probe:
        with precision(device, kind):
            output = model(image.to(device))
        weights.append(output.weights.float())
        similarity.append(unit(output.text.float()) @ unit(output.vision.float()).mT)
        rows = unit(output.concept_rows.float().mean(2))
        spread.append(1 - (rows @ rows.mT).mean((1, 2)))
    return {
        "weights": _rounded(torch.cat(weights).mean(0)),
        "similarity": _rounded(torch.cat(similarity).mean(0)),
        "spread": round(float(torch.cat(spread).mean()), 4),
    }


# Evaluation -----------------------------------------------------------------------------------------------------------


def segment(
    model: nn.Module, task: Task, volumes: Iterable[Any], sentences: Sentences | None = None
) -> Iterator[np.ndarray]:
    """The label volume of each preprocessed case, on the grid of its file; `sentences` in place of the task's own."""
    model.eval()
    for data in volumes:
        prediction = predict(model, data["image"], task, sentences=sentences)  # type: ignore[arg-type]
        yield restore(prediction.probabilities, data["image"], task)


def score(task: Task, cases: Sequence[dict[str, str]], found: Iterable[np.ndarray]) -> list[Row]:
    """Compare label volumes with the cases' label files, on the files' grid."""
    rows = []
    for case, volume in zip(cases, found, strict=True):
        image = read_volume(case["image"])
        reference = align_label(read_volume(case["label"]), image).numpy()[0]
        spacing = np.linalg.norm(image.affine.numpy()[:3, :3], axis=0).tolist()
        rows += evaluate_volumes(task, volume, reference, spacing, case["id"])
    return rows


def scores(rows: Sequence[Row]) -> dict[str, Any]:
    """Means of each class and of the classes, and each case's three numbers; null if not counted."""
    means = {
        name: {m: _plain(values[m].mean) for m in METRICS} | {"n": values["dice"].n}
        for name, values in summary(rows).items()
    }
    cases: dict[str, dict[str, list]] = {}
    for row in rows:
        cases.setdefault(row.case, {})[row.name] = [_plain(getattr(row, m)) for m in METRICS]
    return {"mean": means, "cases": cases}


def derangements(n: int, limit: int = 4) -> Iterator[tuple[int, ...]]:
    """Orders of n classes in which none keeps its place; the cyclic shifts if there are more than `limit`."""
    if n <= 4 and sum(1 for p in permutations(range(n)) if all(i != j for i, j in enumerate(p))) <= limit:
        yield from (p for p in permutations(range(n)) if all(i != j for i, j in enumerate(p)))
    else:
        yield from (tuple((i + shift) % n for i in range(n)) for shift in range(1, min(n, limit + 1)))


def texts(task: Task) -> list[dict[str, Any]]:
    """The texts of the ablation: `kind`, `rows`, and for shuffled ones `order`, whose class's text each class got."""
    own = task.text_rows()
    found: list[dict[str, Any]] = [{"kind": "own", "rows": own}]
    for order in derangements(len(own)):
        found.append({"kind": "shuffled", "rows": [own[j] for j in order], "order": list(order)})
    found.append({"kind": "names only", "rows": [[name] * len(own[0]) for name in task.classes]})
    found.append({"kind": "empty", "rows": [[""] * len(own[0])] * len(own)})
    return found


def ablate_text(
    model: BiPVLSeg, task: Task, cases: Sequence[dict[str, str]], volumes: Sequence[Any]
) -> list[dict[str, Any]]:
    """Score a trained model with its own text, shuffled between the classes, names only, and no text at all.

    Returns:
        A dictionary a text: `kind`, `cases`, `mean` by the class that a mask is called, and for shuffled text also
        `order`, and `follows`: by the class whose sentences it got.
    """
    results = []
    for text in texts(task):
        found = list(segment(model, task, volumes, model.text.tokenize(text["rows"])))
        result = {"kind": text["kind"], "cases": len(cases), "mean": scores(score(task, cases, found))["mean"]}
        if "order" in text and not task.overlapping:
            table = following(task, text["order"])
            follows = scores(score(task, cases, (table[volume] for volume in found)))
            result |= {"order": text["order"], "follows": follows["mean"]}
        results.append(result)
        dice = result["mean"]["mean"]["dice"], result.get("follows", {}).get("mean", {}).get("dice")
        print(f"text {text['kind']}: Dice {dice[0]}" + (f", by sentence {dice[1]}" if dice[1] is not None else ""))
    return results


def following(task: Task, order: Sequence[int]) -> np.ndarray:
    """A table from each label value to that of the class whose sentences it got: class i got those of `order[i]`."""
    values = list(task.label_values.values())
    table = np.arange(max(values) + 1)
    table[values] = [values[j] for j in order]
    return table


def seconds_since(start: float) -> float:
    return round(time.perf_counter() - start, 1)


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


def _rounded(values: Tensor) -> list:
    return [[round(v, 3) for v in row] for row in values.tolist()]
