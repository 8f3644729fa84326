"""From a label map and the prompts of one class to the next label map: what a server and a robot user both call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lib.interaction import boxes
from lib.interaction.answer import Refine, Settings, answer
from lib.interaction.boxes import Box
from lib.interaction.memory import Change
from lib.interaction.prompts import Prompts
from lib.interaction.regions import put


def respond(
    labels: np.ndarray,
    value: int,
    image: np.ndarray,
    spacing: Sequence[float],
    prompts: Prompts,
    settings: Settings,
    margin: Callable[[Box], np.ndarray],
    features: Callable[[Box], np.ndarray] | None = None,
    limits: Box | None = None,
    kept: np.ndarray | None = None,
    refine: Refine | None = None,
) -> tuple[np.ndarray, Change]:
    """Answer the prompts of one class.

    Args:
        labels: (H, W, D), as it is before the prompts.
        value: of the class.
        image: (channels, H, W, D), intensities.
        spacing: mm per voxel.
        prompts: at least one, in voxels of the image.
        settings: of the answer.
        margin: log odds of the class in a box.
        features: of the decoder in a box, (width, …).
        limits: a box that holds all prompts; nothing changes outside of it.
        kept: (n, 3) voxels that stay as they are, but for those that are prompted.
        refine: of a trained refiner, which needs features.

    Returns:
        The new map, and what changed.
    """
    box = boxes.common(boxes.around(prompts.all, settings.around, spacing, labels.shape), limits)
    near = prompts.moved(boxes.corner(box))
    before = labels[box]
    mask = before == value
    wanted = answer(
        margin(box),
        image[:, box[0], box[1], box[2]],
        mask,
        spacing,
        near,
        settings,
        features(box) if features else None,
        refine,
        (before > 0) & ~mask,
    )
    after = put(before, value, wanted, near.inside, near.outside)
    if kept is not None:
        stays = np.zeros(after.shape, bool)
        stays[tuple((kept[boxes.holds(box, kept)] - boxes.corner(box)).T)] = True
        stays[tuple(near.all.T)] = False
        after[stays] = before[stays]
    result = labels.copy()
    result[box] = after
    return result, Change(box, before.copy(), after)
