"""What a person pointed at: voxels that belong to a class and voxels that do not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lib.interaction.boxes import Box, holds
from lib.options import shown
from lib.tasks import meant

FAR = 1e6  # mm
MAX_INDEX = 2**63  # of a voxel
MAX_POINTS = 20_000  # of one list: clicks and the voxels of some strokes; a map of strokes has no limit
POINTS_KEPT = 20  # of one answer and kind that are kept with a label


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

    def within(self, box: Box) -> Prompts:
        """Those in a box."""
        return Prompts(self.inside[holds(box, self.inside)], self.outside[holds(box, self.outside)])

    def moved(self, offset: Sequence[int]) -> Prompts:
        """The same voxels, counted from another corner."""
        return Prompts(self.inside - np.asarray(offset), self.outside - np.asarray(offset))

    @classmethod
    def of_points(cls, inside: Any, outside: Any, shape: Sequence[int], to_voxels: np.ndarray | None = None) -> Prompts:
        """From two lists of [i, j, k], as 3D Slicer sends them.

        Args:
            shape: of the image, in voxels.
            to_voxels: (4, 4), if the numbers are not voxels; a point then means the voxel that it is in.

        Raises:
            ValueError: no list of triples of numbers, a point outside the image, one in both lists, or too many.
        """
        found = cls(_points("foreground", inside, shape, to_voxels), _points("background", outside, shape, to_voxels))
        both = {tuple(p) for p in found.inside.tolist()} & {tuple(p) for p in found.outside.tolist()}
        if both:
            raise ValueError(
                f"the voxel {list(min(both))} is in `foreground` and in `background`; take one of them away"
            )
        return found

    @staticmethod
    def voxels(name: str, given: Any, shape: Sequence[int], to_voxels: np.ndarray | None = None) -> np.ndarray:
        """(n, 3) int64, from one list as `of_points`."""
        return _points(name, given, shape, to_voxels)

    @classmethod
    def of_maps(cls, inside: np.ndarray, outside: np.ndarray) -> Prompts:
        """From two boolean maps; a voxel in both counts as inside."""
        return cls(np.argwhere(inside), np.argwhere(outside & ~inside))


@dataclass(frozen=True)
class Asked:
    """One answer as it is kept with a label: what was prompted, of which version, and what it changed.

    kind: `clicks` or `scribbles`; way: that answered; box: of the voxels that changed, both ends belong to it, None if
    none did; changed: how many.
    """

    label: str
    kind: str
    version: int
    way: str
    prompts: Prompts
    box: tuple[tuple[int, int], ...] | None
    changed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, in voxels of the image; of a long stroke `POINTS_KEPT` evenly taken voxels of either kind."""
        inside, outside = (
            points[np.linspace(0, len(points) - 1, min(len(points), POINTS_KEPT)).astype(int)].tolist()
            for points in (self.prompts.inside, self.prompts.outside)
        )
        return {
            **{"label": self.label, "kind": self.kind, "version": self.version, "answered_by": self.way},
            **{"foreground": inside, "background": outside},
            **{"box": None if self.box is None else [list(ends) for ends in self.box], "changed": self.changed},
        }


def asked_before(records: Any, labels: Iterable[str], shape: Sequence[int]) -> dict[str, Prompts]:
    """What was prompted on each label, from what is kept with it (`Asked.to_dict`). What cannot be used is left out:
    the records may be of an older version, or edited by hand.

    Args:
        records: a list of them.
        labels: that there are.
        shape: of the image, in voxels.
    """
    found: dict[str, list[Prompts]] = {}
    for record in records if isinstance(records, list) else ():
        label = meant(str(record.get("label")), labels) if isinstance(record, dict) else None
        if label is not None:
            try:
                prompts = Prompts.of_points(record.get("foreground"), record.get("background"), shape)
            except ValueError:
                continue
            found.setdefault(label, []).append(prompts)

    def together(kinds: list[np.ndarray]) -> np.ndarray:
        return np.unique(np.concatenate(kinds), axis=0)

    return {
        label: Prompts(together([p.inside for p in given]), together([p.outside for p in given]))
        for label, given in found.items()
    }


def _points(name: str, given: Any, shape: Sequence[int], to_voxels: np.ndarray | None) -> np.ndarray:
    """(n, 3) int64, without repeats, in their order."""
    if given is None:
        given = []
    if not isinstance(given, (list, tuple)):
        raise ValueError(f"{name}: expected a list of [i, j, k], got {type(given).__name__}")
    if len(given) > MAX_POINTS:
        raise ValueError(f"{name}: {len(given)} points; valid are at most {MAX_POINTS}")
    points: list[tuple[int, ...]] = []
    for point in given if to_voxels is None else _moved(name, given, to_voxels):
        if not isinstance(point, (list, tuple)) or len(point) != 3 or not all(_whole(n) for n in point):
            raise ValueError(f"{name}: expected [i, j, k] in voxels, got {shown(point)}")
        voxel = tuple(int(n) for n in point)
        if not all(0 <= n < size for n, size in zip(voxel, shape, strict=True)):
            ends = ", ".join(f"0 to {size - 1}" for size in shape)
            raise ValueError(f"{name}: {list(voxel)} is outside the image; valid are {ends}")
        points.append(voxel)
    return np.array(list(dict.fromkeys(points)), np.int64).reshape(-1, 3)


def _moved(name: str, given: Sequence[Any], to_voxels: np.ndarray) -> list[list[int]]:
    """The voxels that points in millimetres are in."""
    try:
        points = np.array(given, float).reshape(-1, 3)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"{name}: expected [x, y, z] in millimetres, got {shown(given)}") from None
    if not np.isfinite(points).all() or (len(points) and np.abs(points).max() > FAR):
        raise ValueError(f"{name}: points that are infinite or kilometres away")
    return np.rint(points @ to_voxels[:3, :3].T + to_voxels[:3, 3]).astype(np.int64).tolist()


def _whole(number: Any) -> bool:
    if not isinstance(number, (int, float)) or isinstance(number, bool):
        return False
    return abs(number) < MAX_INDEX and float(number).is_integer()
