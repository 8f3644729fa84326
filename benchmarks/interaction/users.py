"""Robot users at work on one class of one case."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import ndimage

from lib.interaction.prompts import Prompts
from lib.interaction.regions import NEIGHBOURS
from lib.interaction.robot import Correction, click, scribble
from lib.trainers.refiner.cases import Segmented
from lib.trainers.refiner.clicks import dice

USERS = ("precise", "sloppy", "scribbles")
Answer = Callable[[Segmented, str, Prompts], np.ndarray]  # a case, its label, all prompts so far: the map


def work(
    case: Segmented, label: str, value: int, user: str, answer: Answer, interactions: int, seed: int = 0
) -> dict[str, Any]:
    """Correct one class until nothing is wrong, at most `interactions` times.

    Returns:
        `dice` after 0, 1, … interactions (the last value stays once nothing is wrong); `seconds` of each; `outside`,
        voxels changed that are connected to no prompt of theirs; `disobeyed`, prompted voxels that are not as prompted.
    """
    choose = np.random.default_rng([seed, zlib.crc32(f"{case.name} {label}".encode())])
    truth, start = case.truth == value, case.labels
    labels = start
    inside, outside = np.zeros((2, 0, 3), np.int64)
    dices, seconds, strays, disobeyed = [dice(labels == value, truth)], [], 0, 0
    for _ in range(interactions):
        found = _next(user, labels == value, truth, case, choose)
        if found is None:
            break
        if found.belongs:
            inside = np.concatenate([inside, found.points])
        else:
            outside = np.concatenate([outside, found.points])
        begin = time.perf_counter()
        labels = answer(case, label, Prompts(inside, outside))
        seconds.append(round(time.perf_counter() - begin, 4))
        dices.append(dice(labels == value, truth))
        strays += stray(start == value, labels == value, inside, outside)
        disobeyed += int((labels[tuple(inside.T)] != value).sum() + (labels[tuple(outside.T)] == value).sum())
    dices += [dices[-1]] * (interactions + 1 - len(dices))
    return {"dice": dices, "seconds": seconds, "outside": strays, "disobeyed": disobeyed}


def _next(
    user: str, mask: np.ndarray, truth: np.ndarray, case: Segmented, choose: np.random.Generator
) -> Correction | None:
    if user == "scribbles":
        return scribble(mask, truth, case.spacing, choose)
    return click(mask, truth, case.spacing, choose if user == "sloppy" else None)


def stray(before: np.ndarray, after: np.ndarray, inside: np.ndarray, outside: np.ndarray) -> int:
    """Changed voxels in connected parts of the change that no prompt of their kind lies in."""
    count = 0
    for change, points in ((after & ~before, inside), (before & ~after, outside)):
        parts, number = ndimage.label(change, structure=NEIGHBOURS)
        own = np.zeros(number + 1, bool)
        own[parts[tuple(points.T)]] = True
        own[0] = True
        count += int((~own[parts]).sum())
    return count
