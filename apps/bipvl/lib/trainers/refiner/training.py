"""Training of the refiner: simulated corrections on cases that the frozen network has segmented.

A network is nearly right on the patients that it was trained with, and people correct what is wrong. So errors are made
larger: smooth noise is added to the margin before the mask is taken from it. Where another network is known that had
not been trained on a case, half of the simulations begin with that one's errors. Then a robot corrects one to five
times, the refiner answers each time, and learns from its last answer. Of what people prompted on a case, a part comes
first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from lib.interaction import boxes
from lib.interaction.answer import respect
from lib.interaction.boxes import Box
from lib.interaction.evidence import Reach, evidence, scaled
from lib.interaction.guidance import guidance
from lib.interaction.prompts import Prompts
from lib.interaction.regions import obey
from lib.interaction.robot import Correction, click, scribble
from lib.model.nets.refiner import Refiner
from lib.trainers.refiner.cases import Segmented

ROUNDS = 5  # most corrections of one simulation
NOISE = 3.0  # log odds, most of the smooth noise
NOISY = 0.8  # share of the simulations that have some
REAL = 0.5  # share that begins with the errors of a network that had not been trained on the case, if there is one
ASKED = 0.25  # share that begins where a person prompted, if one did
GRAIN = (4.0, 15.0)  # mm, of its bumps
# mm around an error that a simulation sees: from one to the other. Answers see 16 mm around all prompts together, and
# what a network's norms make of a box depends on its size.
HALF = (10.0, 20.0)
LEARNING_RATE = 1e-3
WARM_UP = 0.05
DRAWN = 1.0  # as of the answer's settings
VAIN = 1000  # draws without an error after which there is none to be expected
FEWEST = 4  # voxels of an error that is worth a correction
AROUND = 20.0  # mm around reference and mask of a label in which errors are made
COARSE = 2.0  # steps of the noise's grid per standard deviation of a bump
NOTHING = Prompts(*np.zeros((2, 0, 3), np.int64))


@dataclass(frozen=True)
class Scene:
    """A box of one class before a correction; arrays as in `Segmented`; asked: what a person prompted there first."""

    label: str
    image: np.ndarray
    truth: np.ndarray
    margin: np.ndarray
    mask: np.ndarray
    others: np.ndarray
    features: np.ndarray
    spacing: tuple[float, float, float]
    text: Tensor
    asked: Prompts


def scene(case: Segmented, choose: np.random.Generator) -> Scene | None:
    """A box with an error in it, None if a draw found none."""
    label = str(choose.choice(list(case.margins)))
    value = case.values[label]
    case = _around_label(case, label)
    shape = case.truth.shape
    truth = case.truth == value
    whole: Box = (slice(0, shape[0]), slice(0, shape[1]), slice(0, shape[2]))
    known = case.errors if label in case.errors and choose.random() < REAL else case.margins
    margin = known[label].on(case.meta, whole)
    asked = case.asked.get(label)
    led = asked is not None and choose.random() < ASKED
    if known is not case.errors and not led and choose.random() < NOISY:
        margin = margin + noise(shape, case.spacing, choose)
    wrong = (margin > 0) != truth
    place = _asked_place(asked, wrong, truth, choose) if led and asked is not None else None
    if place is None:
        place, asked = _wrong_place(wrong, choose), None
    if place is None:
        return None
    box = boxes.around(place[None], choose.uniform(*HALF), case.spacing, shape)
    mask = margin[box] > 0
    others = (case.truth[box] != value) & (case.truth[box] > 0) & ~mask
    image = case.image[:, box[0], box[1], box[2]]
    first = NOTHING if asked is None else _true(asked.within(box), truth).moved(boxes.corner(box))
    return Scene(
        *(label, image, truth[box], margin[box], mask, others, case.features_in(box), case.spacing, case.text[label]),
        first,
    )


def _around_label(case: Segmented, label: str) -> Segmented:
    """The part of a case around reference and mask of a label: far from them all is right, and would take time."""
    value = case.values[label]
    shown = (case.truth == value) | (case.labels == value)
    if not shown.any():
        return case
    box = boxes.of_change(shown)
    ends = np.array([[part.start, part.stop - 1] for part in box]).T
    return case.within(boxes.around(ends, AROUND, case.spacing, shown.shape))


def _wrong_place(wrong: np.ndarray, choose: np.random.Generator) -> np.ndarray | None:
    """A voxel of an error that is worth a correction, large ones first; None if there is none."""
    parts, count = ndimage.label(wrong)
    sizes = np.bincount(parts.ravel())[1:]
    if not count or sizes.max() < FEWEST:
        return None
    part = choose.choice(count, p=np.where(sizes >= FEWEST, sizes, 0) / sizes[sizes >= FEWEST].sum()) + 1
    places = np.argwhere(parts == part)
    return places[choose.integers(len(places))]


def _asked_place(
    asked: Prompts, wrong: np.ndarray, truth: np.ndarray, choose: np.random.Generator
) -> np.ndarray | None:
    """A voxel that a person prompted, that is wrong here too, and that is in the reference as prompted."""
    points = _true(asked, truth).all
    points = points[wrong[tuple(points.T)]]
    return points[choose.integers(len(points))] if len(points) else None


def _true(asked: Prompts, truth: np.ndarray) -> Prompts:
    """Prompts that the reference agrees with; who prompted may have thought better of some."""
    inside, outside = asked.inside, asked.outside
    return Prompts(inside[truth[tuple(inside.T)]], outside[~truth[tuple(outside.T)]])


def noise(shape: Sequence[int], spacing: Sequence[float], choose: np.random.Generator) -> np.ndarray:
    """Smooth noise: bumps of one size, of a strength up to `NOISE` log odds.

    It is drawn on a grid as coarse as the bumps allow: a filter as wide as they are would take seconds.
    """
    grain = choose.uniform(*GRAIN) / np.asarray(spacing)  # voxels
    step = np.maximum(1.0, grain / COARSE)
    small = [int(np.ceil(size / s)) + 1 for size, s in zip(shape, step, strict=True)]
    drawn = ndimage.gaussian_filter(choose.standard_normal(small).astype(np.float32), grain / step)
    places = np.meshgrid(*(np.arange(n) / s for n, s in zip(shape, step, strict=True)), indexing="ij", sparse=True)
    found = ndimage.map_coordinates(drawn, np.broadcast_arrays(*places), order=1)
    return (found / max(float(found.std()), 1e-6) * choose.uniform(0, NOISE)).astype(np.float32)


def next_correction(
    mask: np.ndarray, truth: np.ndarray, spacing: Sequence[float], choose: np.random.Generator
) -> Correction | None:
    """What a person does next: half of them click, precisely or beside the middle, half of them scribble."""
    kind = choose.random()
    if kind < 0.4:
        return scribble(mask, truth, spacing, choose)
    return click(mask, truth, spacing, choose if kind < 0.75 else None, miss=(0.0, 6.0))


def inputs(found: Scene, prompts: Prompts, reach: Reach) -> tuple[np.ndarray, np.ndarray]:
    """Of the refiner: margin with evidence (h, w, d), and guidance."""
    base = respect(found.margin, found.mask, DRAWN)
    said = evidence(base, scaled(found.image), found.spacing, prompts.inside, prompts.outside, reach)
    maps = guidance(base, found.image, found.mask, found.others, found.spacing, prompts)
    return base + said, maps


def answered(refiner: Refiner, found: Scene, prompts: Prompts, reach: Reach) -> tuple[Tensor, Tensor]:
    """The refined margin (1, h, w, d), and the one without the refiner."""
    base, maps = (torch.from_numpy(part).float()[None] for part in inputs(found, prompts, reach))
    features = torch.from_numpy(found.features)[None]
    return base + refiner(maps, features, found.text[None], found.spacing), base


def simulate(refiner: Refiner, found: Scene, reach: Reach, choose: np.random.Generator) -> Prompts | None:
    """Prompts of one to `ROUNDS` corrections, each of what the refiner's answer to those before got wrong."""
    prompts, mask = found.asked, found.mask
    for _ in range(int(choose.integers(1, ROUNDS + 1)) - bool(len(prompts))):
        if len(prompts):
            with torch.no_grad():
                margin, _ = answered(refiner, found, prompts, reach)
            mask = obey(found.mask, margin[0].numpy() > 0, prompts.inside, prompts.outside)
        correction = next_correction(mask, found.truth, found.spacing, choose)
        if correction is None:
            break
        kinds = [prompts.inside, prompts.outside]
        place = 0 if correction.belongs else 1
        kinds[place] = np.unique(np.concatenate([kinds[place], correction.points]), axis=0)
        prompts = Prompts(*kinds)
    return prompts if len(prompts) else None


def refiner_loss(margin: Tensor, truth: Tensor) -> Tensor:
    """Binary cross-entropy and Dice of one box: (1, h, w, d) each."""
    target = truth.float()
    p = margin.sigmoid()
    dice = 1 - (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)
    return F.binary_cross_entropy_with_logits(margin, target) + dice


def train_refiner(
    refiner: Refiner,
    cases: Sequence[Segmented],
    steps: int,
    seed: int,
    reach: Reach,
    told: Callable[[int, dict[str, float]], None] = lambda *_: None,
    every: int = 50,
) -> None:
    """Train in place.

    Args:
        refiner: on the CPU.
        cases: what to correct.
        steps: simulations, one per step.
        seed: of everything random.
        reach: of the evidence that it adds to.
        told: hears of the step and of the mean losses since the last call, with and without the refiner.
        every: steps between calls.

    Raises:
        ValueError: the cases have no errors, and noise makes none.
    """
    optimizer = torch.optim.AdamW(refiner.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    losses: list[tuple[float, float]] = []
    for step, (found, prompts) in enumerate(_simulations(refiner, cases, seed, reach), 1):
        margin, before = answered(refiner, found, prompts, reach)
        truth = torch.from_numpy(found.truth)[None]
        loss = refiner_loss(margin, truth)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(refiner.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append((float(loss.detach()), float(refiner_loss(before, truth))))
        if step % every == 0 or step == steps:
            means = np.mean(losses, axis=0)
            told(step, {"refiner": round(float(means[0]), 4), "evidence": round(float(means[1]), 4)})
            losses.clear()
        if step == steps:
            return


def _rate(step: int, steps: int) -> float:
    warm = max(1, round(steps * WARM_UP))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _simulations(
    refiner: Refiner, cases: Sequence[Segmented], seed: int, reach: Reach
) -> Iterator[tuple[Scene, Prompts]]:
    choose, vain = np.random.default_rng(seed), 0
    while vain < VAIN:
        vain += 1
        found = scene(cases[int(choose.integers(len(cases)))], choose)
        prompts = None if found is None else simulate(refiner, found, reach, choose)
        if found is not None and prompts is not None:
            vain = 0
            yield found, prompts
    raise ValueError(f"{VAIN} draws from {len(cases)} case(s) found no error that a refiner could learn to correct")
