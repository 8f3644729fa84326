"""The answer to clicks and scribbles: from the model's margin to a mask that follows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lib.interaction.cut import graph_cut
from lib.interaction.evidence import Reach, distance, evidence, scaled
from lib.interaction.guidance import guidance
from lib.interaction.prompts import Prompts
from lib.interaction.refit import refit

BALL = 2.5  # mm around a click that count as clicked when a kernel is re-fitted
SURE = 2.0  # log odds from which a voxel of the present mask is an anchor
ANCHORS = 2000  # at most, of either kind
REACH = 27.0  # mm around prompts that an answer may change

# What a trained refiner adds to the margin of a box (h, w, d), from its guidance (CHANNELS, h, w, d) and the decoder's
# features (width, h, w, d).
Refine = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Settings:
    """Which steps an answer takes; the defaults are those that validation patients favour (docs/using/clicks.md).

    reach: of the evidence; None: none is added.
    pull: of the re-fit towards the kernel as it is; 0: no re-fit.
    fade: mm from the clicks at which a re-fit has lost its say.
    smooth: of the graph cut; 0: no cut.
    spread: of intensities in the cut, in standard deviations.
    drawn: log odds that the present mask has at least, wherever it differs from the model: what somebody drew.
    around: mm around the prompts that an answer may change.
    """

    reach: Reach | None = field(default_factory=Reach)
    pull: float = 0.0
    fade: float = 15.0
    smooth: float = 0.5
    spread: float = 0.5
    drawn: float = 1.0
    around: float = REACH


def respect(margin: np.ndarray, mask: np.ndarray, drawn: float) -> np.ndarray:
    """The margin with the sign of the present mask: where somebody drew something else than the model, at least
    `drawn` log odds speak for what is drawn."""
    sign = np.where(mask, 1.0, -1.0)
    return np.where(sign * margin > 0, margin, sign * drawn).astype(np.float32)


def answer(
    margin: np.ndarray,
    image: np.ndarray,
    mask: np.ndarray,
    spacing: Sequence[float],
    prompts: Prompts,
    settings: Settings,
    features: np.ndarray | None = None,
    refine: Refine | None = None,
    others: np.ndarray | None = None,
) -> np.ndarray:
    """The mask of one class as its prompts make it; what of it is taken over: `lib.interaction.regions.put`.

    Args:
        margin: (h, w, d), log odds of the class against its best rival, from the model.
        image: (channels, h, w, d), intensities.
        mask: (h, w, d) boolean, as it is before any of the prompts.
        spacing: mm per voxel.
        prompts: at least one.
        settings: the steps.
        features: (width, h, w, d) of the decoder, for a re-fit and a refiner.
        refine: of a trained refiner.
        others: (h, w, d) boolean, where other classes are; for a refiner.

    Returns:
        (h, w, d) boolean.
    """
    seen = scaled(image)
    base = respect(margin, mask, settings.drawn)
    changed = base
    if settings.pull and features is not None:
        changed = changed + _refitted(base, features, mask, spacing, prompts, settings)
    if settings.reach is not None:
        changed = changed + evidence(base, seen, spacing, prompts.inside, prompts.outside, settings.reach)
    if refine is not None:
        assert features is not None and others is not None
        changed = changed + refine(guidance(base, image, mask, others, spacing, prompts), features)
    if settings.smooth:
        wanted = graph_cut(seen.mean(0), changed, prompts.inside, prompts.outside, settings.smooth, settings.spread)
    else:
        wanted = changed > 0
    return wanted


def _refitted(
    base: np.ndarray,
    features: np.ndarray,
    mask: np.ndarray,
    spacing: Sequence[float],
    prompts: Prompts,
    settings: Settings,
) -> np.ndarray:
    """What a re-fit adds to the margin, faded out with the distance from the prompts."""
    flat = features.reshape(len(features), -1).astype(np.float32)
    flat = (flat - flat.mean(1, keepdims=True)) / (flat.std(1, keepdims=True) + 1e-6)
    flat = np.concatenate([flat, np.ones_like(flat[:1])])
    near, far = [], np.full(base.shape, np.inf)
    for points, belongs in ((prompts.inside, True), (prompts.outside, False)):
        away = distance(points, base.shape, spacing)
        # Of the ball, what still is as it was before the click: across a border lies what nobody spoke of.
        ball = (away <= BALL) & (mask != belongs)
        ball[tuple(points.T)] = True
        near.append(np.flatnonzero(ball))
        far = np.minimum(far, away)
    clicked = np.concatenate(near)
    anchors = _anchors(base, mask, clicked, far)
    index = np.concatenate([clicked, anchors])
    belongs = np.concatenate([np.repeat([True, False], [len(part) for part in near]), mask.ravel()[anchors]])
    weight = np.concatenate(
        [np.full(len(clicked), 1 / max(len(clicked), 1)), np.full(len(anchors), 1 / max(len(anchors), 1))]
    )
    change = refit(flat[:, index].T, base.ravel()[index], belongs, weight, settings.pull)
    return (np.exp(-0.5 * (far / settings.fade) ** 2) * (change @ flat).reshape(base.shape)).astype(np.float32)


def _anchors(base: np.ndarray, mask: np.ndarray, clicked: np.ndarray, far: np.ndarray) -> np.ndarray:
    """Voxels that the model is sure of and nobody spoke of, evenly taken from both sides: (n,) flat indices."""
    sure = (np.abs(base) >= SURE) & (far > 2 * BALL)
    sure.ravel()[clicked] = False
    sides = [np.flatnonzero(sure & side) for side in (mask, ~mask)]
    return np.concatenate([side[:: max(1, len(side) // ANCHORS)] for side in sides])
