"""Eq. 4: which of its concepts carry a class, and the text vector that they make.

The network uses them (the text head reads the text vector) and so do the losses and the explanations of a request.
Symbols: B batch, C foreground classes, K concepts per class, P width of the common space.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

_P = ParamSpec("_P")
_MIN_NORM = 1e-8  # below it a vector counts as zero: its cosine is 0 and its gradient stays bounded


def upcast(value: Any) -> Any:
    """A half-precision tensor as float32; a MetaTensor as a plain tensor, so that no metadata is sliced along."""
    if not isinstance(value, Tensor):
        return value
    value = value.as_subclass(Tensor)
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def full_precision(function: Callable[_P, Tensor]) -> Callable[_P, Tensor]:
    """Compute in float32 or better. Upcasting alone is not enough: autocast would take matmuls back to half."""

    @wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> Tensor:
        device = next(v.device for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        with torch.autocast(device.type, enabled=False):
            return function(*map(upcast, args), **{k: upcast(v) for k, v in kwargs.items()})  # type: ignore[arg-type]

    return wrapper


def unit(vectors: Tensor) -> Tensor:
    """L2-normalise the last dimension."""
    return F.normalize(vectors, dim=-1, eps=_MIN_NORM)


@full_precision
def concept_weights(concepts: Tensor, vision: Tensor) -> Tensor:
    r"""How much each concept of a class agrees with what is seen, Eq. 4.

    .. math:: w_k = \frac{\exp \cos(t'_k, V')}{\sum_{k'=1}^{K} \exp \cos(t'_{k'}, V')}

    The sum runs over the K concepts of one class, never over classes.

    Args:
        concepts: (B, C, K, P), projected concept rows t'_k; any length, normalised here.
        vision: (B, C, P), the projected vector V' of each class.

    Returns:
        (B, C, K), summing to 1 over K.

    >>> concepts = torch.eye(2).view(1, 1, 2, 2)
    >>> [round(w, 4) for w in concept_weights(concepts, torch.tensor([[[1.0, 0.0]]])).flatten().tolist()]  # e : 1
    [0.7311, 0.2689]
    """
    return torch.einsum("bckp,bcp->bck", unit(concepts), unit(vision)).softmax(-1)


@full_precision
def aggregate_text(concepts: Tensor, weights: Tensor) -> Tensor:
    r"""The text vector of each class, Eq. 4: T = sum_k w_k t_k.

    Args:
        concepts: (B, C, K, P), projected concept rows t_k.
        weights: (B, C, K), from `concept_weights`.

    Returns:
        (B, C, P), not normalised.
    """
    return torch.einsum("bckp,bck->bcp", concepts, weights)
