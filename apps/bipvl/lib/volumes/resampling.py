"""Probabilities on the network's grid to decisions on a file's grid whose axes are parallel to it, as they nearly
always are: linear interpolation is then one interpolation per axis, and most voxels need none.

A voxel between eight network voxels of one and the same decision gets that decision: if a class is the most probable
one at all corners, it is so in every mixture of them, and a probability above one half at all corners is above it
between them. Only voxels near a border between classes are interpolated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

ALIGNED = 1e-4  # voxels: headers keep affines in float32
BORDER = 0.5 + 1e-3  # voxels: a voxel reaches half its side beyond its centre
DENSE = 0.25  # share of voxels from which on interpolating all of a slab is faster than picking them


def parallel_axes(to_source: Tensor) -> tuple[int, int, int] | None:
    """Which source axis each target axis runs along, given the affine (4, 4) from target to source voxels.

    Returns None if some target axis crosses several source axes (a sheared grid).
    """
    matrix = to_source[:3, :3].abs()
    first, second, third = matrix.argmax(0).tolist()
    others = matrix.clone()
    others[[first, second, third], [0, 1, 2]] = 0
    if {first, second, third} != {0, 1, 2} or others.max() > 1e-6 * matrix.max():
        return None
    return first, second, third


class Grid:
    """A target grid over a map, axes parallel.

    Args:
        source: (channels, h, w, d).
        to_source: (4, 4), from target to source voxels.
        axes: `parallel_axes(to_source)`.
        shape: the target's.
        decide: values (channels, …, …, …) to decisions of the same trailing shape.

    Attributes:
        box: slices of the target that lie within the source, at most half a source voxel beyond its outer centres.
    """

    def __init__(
        self,
        source: Tensor,
        to_source: Tensor,
        axes: Sequence[int],
        shape: Sequence[int],
        decide: Callable[[Tensor], Tensor],
    ) -> None:
        self.source = source.permute(0, *(1 + a for a in axes))  # axes in the target's order
        self.decide = decide
        self.ticks, box = [], []
        for target, (a, size) in enumerate(zip(axes, shape, strict=True)):
            last = source.shape[1 + a] - 1
            at = to_source[a, target] * torch.arange(size, dtype=torch.float64) + to_source[a, 3]
            inside = ((at >= -BORDER) & (at <= last + BORDER)).nonzero()[:, 0].tolist()
            box.append(slice(inside[0], inside[-1] + 1) if inside else slice(0, 0))
            self.ticks.append(_Ticks(at[box[-1]].clamp(0, last), last, source.device))
        self.box = tuple(box)
        self.decided = decide(self.source).to(torch.int32)  # at the source's voxels
        self.mixed = _mixed(self.decided, [not ticks.aligned for ticks in self.ticks])

    def decisions(self, start: int, stop: int) -> Tensor:
        """Decisions at `start` to `stop` of the box's last axis: (*the box's first two sides, stop - start)."""
        ticks = [*self.ticks[:2], self.ticks[2].part(start, stop)]
        result, mixed = self.decided, self.mixed
        for axis in (2, 1, 0):
            result, mixed = (x.index_select(axis, ticks[axis].below) for x in (result, mixed))
        places = mixed.nonzero().T  # (3, n)
        if places.shape[1] > DENSE * mixed.numel():
            return self.decide(self._interpolated(ticks))
        if places.shape[1]:
            decided = self.decide(self._picked(ticks, places)[:, :, None, None])[:, 0, 0]
            result[tuple(places)] = decided.to(result.dtype)
        return result

    def _interpolated(self, ticks: list[_Ticks]) -> Tensor:
        x = self.source
        for axis in (2, 1, 0):
            t = ticks[axis]
            below = x.index_select(1 + axis, t.below)
            if t.aligned:
                x = below
            else:
                above = x.index_select(1 + axis, t.above)
                x = below.lerp_(above, t.weight.to(x).view(-1, *[1] * (2 - axis)))
        return x

    def _picked(self, ticks: list[_Ticks], places: Tensor) -> Tensor:
        """Values at single voxels: places (3, n) to (channels, n)."""
        flat = self.source.reshape(len(self.source), -1)
        strides = self.source.shape[2] * self.source.shape[3], self.source.shape[3], 1
        total = flat.new_zeros(len(flat), places.shape[1])
        for corner in product(*((0,) if t.aligned else (0, 1) for t in ticks)):
            index, weight = torch.zeros_like(places[0]), flat.new_ones(places.shape[1])
            for t, place, stride, upper in zip(ticks, places, strides, corner, strict=True):
                index += (t.above if upper else t.below)[place] * stride
                if not t.aligned:
                    weight *= (t.weight if upper else 1 - t.weight).to(weight)[place]
            total += flat[:, index] * weight
        return total


class _Ticks:
    """Where the voxels of one target axis lie between those of its source axis: at (n,) from 0 to `last`."""

    def __init__(self, at: Tensor, last: int, device: torch.device) -> None:
        nearest = at.round()
        self.aligned = not len(at) or bool((at - nearest).abs().max() < ALIGNED)
        self.below = (nearest if self.aligned else at.floor().clamp(max=max(last - 1, 0))).long().to(device)
        self.above = (self.below + 1).clamp(max=last)
        self.weight = at.to(device, torch.float32) - self.below if not self.aligned else torch.zeros(0)

    def part(self, start: int, stop: int) -> _Ticks:
        part = object.__new__(_Ticks)
        part.aligned = self.aligned
        part.below, part.above, part.weight = (x[start:stop] for x in (self.below, self.above, self.weight))
        return part


def _mixed(decided: Tensor, between: Sequence[bool]) -> Tensor:
    """Where a voxel and its next neighbours along the axes that are interpolated do not all agree."""
    low, high = decided, decided
    for axis, needed in enumerate(between):
        if needed and decided.shape[axis] > 1:
            n = decided.shape[axis]
            following = torch.arange(1, n + 1, device=decided.device).clamp(max=n - 1)
            low = torch.minimum(low, low.index_select(axis, following))
            high = torch.maximum(high, high.index_select(axis, following))
    return low != high
