"""What a person pointed at: voxels that belong to a class and voxels that do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_POINTS = 1000  # of one list; a scribble is a map and has no limit


@dataclass(frozen=True)
class Prompts:
    """Voxels of an image that one class was said to hold or not to hold.

    inside, outside: (n, 3) int64, indices i, j, k.
    """

    inside: np.ndarray
    outside: np.ndarray

    def __len__(self) -> int:
        return len(self.inside) + len(self.outside)

    @property
    def all(self) -> np.ndarray:
        """(n, 3), both kinds."""
        return np.concatenate([self.inside, self.outside])

    def moved(self, offset: Sequence[int]) -> Prompts:
        """The same voxels, counted from another corner."""
        return Prompts(self.inside - np.asarray(offset), self.outside - np.asarray(offset))

    @classmethod
    def of_points(cls, inside: Any, outside: Any, shape: Sequence[int]) -> Prompts:
        """From two lists of [i, j, k], as 3D Slicer sends them.

        Args:
            shape: of the image, in voxels.

        Raises:
            ValueError: no list of triples of numbers, a point outside the image, one in both lists, or too many.
        """
        found = cls(_points("foreground", inside, shape), _points("background", outside, shape))
        both = {tuple(p) for p in found.inside.tolist()} & {tuple(p) for p in found.outside.tolist()}
        if both:
            raise ValueError(
                f"the voxel {list(min(both))} is in `foreground` and in `background`; take one of them away"
            )
        return found

    @classmethod
    def of_maps(cls, inside: np.ndarray, outside: np.ndarray) -> Prompts:
        """From two boolean maps; a voxel in both counts as inside."""
        return cls(np.argwhere(inside), np.argwhere(outside & ~inside))


def _points(name: str, given: Any, shape: Sequence[int]) -> np.ndarray:
    """(n, 3) int64, without repeats, in their order."""
    if given is None:
        given = []
    if not isinstance(given, (list, tuple)):
        raise ValueError(f"{name}: expected a list of [i, j, k], got {type(given).__name__}")
    if len(given) > MAX_POINTS:
        raise ValueError(f"{name}: {len(given)} points; valid are at most {MAX_POINTS}")
    points: list[tuple[int, ...]] = []
    for point in given:
        if not isinstance(point, (list, tuple)) or len(point) != 3 or not all(_whole(n) for n in point):
            raise ValueError(f"{name}: expected [i, j, k] in voxels, got {point!r}")
        voxel = tuple(int(n) for n in point)
        if not all(0 <= n < size for n, size in zip(voxel, shape, strict=True)):
            ends = ", ".join(f"0 to {size - 1}" for size in shape)
            raise ValueError(f"{name}: {list(voxel)} is outside the image; valid are {ends}")
        points.append(voxel)
    return np.array(list(dict.fromkeys(points)), np.int64).reshape(-1, 3)


def _whole(number: Any) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool) and float(number).is_integer()
