"""How a round steps: a warm-up and one half-cosine, and gradients that are clipped part by part."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lib.model.losses import UncertaintyWeights
from lib.tasks import Training

# Eq. (15) drives sigma to the root of its loss: a loss that nearly vanishes for a while would get a weight of
# thousands, and its next large value would drown the others. At the floor the weight is 50.
LOG_SIGMA_FLOOR = math.log(0.1)
CLIP = 1.0  # largest norm of the gradient of one parameter group


def build_schedule(optimizer: Optimizer, steps: int, recipe: Training) -> LambdaLR:
    """Rates over `steps` optimiser steps, to be stepped after each: a linear rise over the first `warm_up` share of
    them, then one half-cosine down to `min_learning_rate`.

    The paper has the half-cosine alone. The first gradients are twenty times the later ones, and Adam at its full rate
    lets them drive the deep stages of a network from scratch into one constant vector (docs/research/decisions.md).
    """
    warm, least = round(steps * recipe.warm_up), recipe.min_learning_rate
    return LambdaLR(optimizer, [partial(_share, steps, warm, least / g["lr"]) for g in optimizer.param_groups])


def _share(steps: int, warm: int, least: float, step: int) -> float:
    """What of the full rate step number `step` has, counted from 0."""
    if step < warm:
        return (step + 1) / (warm + 1)
    progress = min(1.0, (step - warm) / (steps - warm))
    return least + (1 - least) * (1 + math.cos(math.pi * progress)) / 2


def clip_gradients(optimizer: Optimizer) -> list[float]:
    """Clip each parameter group to a norm of `CLIP`; returns the norms before.

    Not all of them together: a loss that jumps would scale down the gradients of parts that it says nothing about, and
    Adam keeps that for a thousand steps.
    """
    return [float(torch.nn.utils.clip_grad_norm_(group["params"], CLIP)) for group in optimizer.param_groups]


def descend(loss: Tensor, optimizer: Optimizer, uncertainty: UncertaintyWeights | None = None) -> None:
    """One optimiser step down a loss, its gradients clipped and the sigmas held above their floor."""
    loss.backward()
    clip_gradients(optimizer)
    optimizer.step()
    if uncertainty is not None:
        with torch.no_grad():
            uncertainty.log_sigma.clamp_(min=LOG_SIGMA_FLOOR)
