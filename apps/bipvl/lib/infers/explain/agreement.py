"""How well a mask fits what the network finds under its class's sentences.

The network gives each voxel a probability p of being what the sentences of a class describe. A mask claims more: that
all of its voxels are of the class, and that the voxels around it are not. Its fit is the geometric mean of the
probabilities that the claims are true, half of the weight inside, half in a band around it:

    fit(M) = exp(½ · mean over M of ln p  +  ½ · mean over band(M) of ln(1 − p))

1 is certain agreement, and a floor of 0.01 on each probability keeps single voxels from deciding. The fit of the
network's own mask says how clearly the image shows what the sentences say. That of a mask that somebody drew falls
if it is misplaced, too large or too small, but also if the case is hard; cases are therefore compared by

    agreement(M) = fit(M) / fit(own mask)

The band is the neighbourhood alone, so that a small structure in a large image is judged like a large one. How well
this finds errors, beside the cosine of T and V and other scores, is measured in docs/research/explanation.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BAND = 6.0  # mm along each axis; 9 and 15 find errors slightly less well (docs/research/explanation.md)
FLOOR = 0.01  # of a probability


class Judged(NamedTuple):
    """Of a drawn mask: its agreement, and its fit."""

    agreement: float
    fit: float


def fit(probability: Tensor, mask: Tensor, spacing: Sequence[float]) -> float | None:
    """Fit of a mask, 0.01 to 1; None for an empty one.

    Args:
        probability: (h, w, d), of being of the class.
        mask: (h, w, d) boolean, on the same device.
        spacing: mm of the grid.

    >>> p = torch.tensor([0.5, 0.8, 0.8, 0.5, 0.5]).view(5, 1, 1)
    >>> round(fit(p, p > 0.6, (9.0, 9.0, 9.0)), 4)  # √(0.8 · 0.5)
    0.6325
    """
    if not mask.any():
        return None
    margins = [round(BAND / mm) for mm in spacing]
    box = tuple(_slice(mask, axis, margin) for axis, margin in enumerate(margins))
    p, mask = probability[box].float(), mask[box]
    grown = mask[None].float()
    for axis, margin in enumerate(margins):
        size, padding = [1, 1, 1], [0, 0, 0]
        size[axis], padding[axis] = 2 * margin + 1, margin
        grown = F.max_pool3d(grown, size, stride=1, padding=padding)
    around = (grown[0] > 0) & ~mask
    inside = p[mask].clamp_min(FLOOR).log().mean()
    outside = (1 - p[around]).clamp_min(FLOOR).log().mean() if around.any() else 0.0
    return math.exp(float(inside + outside) / 2)


def own_masks(probabilities: Tensor, overlapping: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """For each class its probability and the mask that the network draws, both (h, w, d).

    Args:
        probabilities: (channels, h, w, d), background first unless classes overlap.
        overlapping: no background channel; a class is where its probability is above one half.
    """
    if overlapping:
        yield from ((p, p > 0.5) for p in probabilities)
    else:
        decided = probabilities.argmax(0)
        yield from ((probabilities[c], decided == c) for c in range(1, len(probabilities)))


def own_fit(probabilities: Tensor, overlapping: bool, spacing: Sequence[float]) -> list[float | None]:
    """Fit of the network's own mask of each class; None if it found nothing."""
    return [fit(p, mask, spacing) for p, mask in own_masks(probabilities, overlapping)]


def agreement(
    probabilities: Tensor, masks: Sequence[Tensor], overlapping: bool, spacing: Sequence[float]
) -> list[Judged | None]:
    """Agreement and fit of each class's drawn mask; None if nothing is drawn.

    1: as good as the network's own mask, and above 1 better. If the network finds nothing of a class, there is
    nothing to compare with, and the agreement is the fit itself.
    """
    found: list[Judged | None] = []
    for (p, own), mask in zip(own_masks(probabilities, overlapping), masks, strict=True):
        drawn = fit(p, mask.to(p.device), spacing)
        found.append(None if drawn is None else Judged(drawn / (fit(p, own, spacing) or 1.0), drawn))
    return found


def _slice(mask: Tensor, axis: int, margin: int) -> slice:
    """Where a mask lies along an axis, with a margin."""
    others = [n for n in range(mask.ndim) if n != axis]
    places = torch.nonzero(mask.any(others[1]).any(others[0])).flatten()
    return slice(max(int(places[0]) - margin, 0), int(places[-1]) + margin + 1)
