"""Models that come with the app: what a task starts with until something has been trained here.

`apps/bipvl/shipped/<task>.pt` becomes version 1 of its task if the model folder holds no version yet. From then on
it is a version like any other: the first round starts from it, the gate compares with it, users can go back to it.
"""

from __future__ import annotations

import logging
from pathlib import Path

from filelock import FileLock, Timeout

from lib.model.checkpoints import CheckpointError, load
from lib.model.versions import Versions
from lib.tasks import Task, task_from_dict

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).resolve().parents[2] / "shipped"
# A model fits a task only if all of these are as it was trained with. Sentences may have changed, and training may.
SAME = ("name", "modality", "channels", "labels", "regions", "spacing", "intensity", "patch", "model")


def start_from_shipped(task: Task, versions: Versions, folder: Path = FOLDER) -> int | None:
    """Publish the task's shipped model as the first version, if there is one that fits and none is published yet.

    What prevents it is logged: the task then starts from fresh weights, as a task without a shipped model does.

    Returns:
        The version, None if nothing was published.
    """
    path = folder / f"{task.name}.pt"
    if versions.started or not path.is_file():
        return None
    try:
        checkpoint = load(path)
        theirs = task_from_dict(checkpoint["task"], str(path))
        changed = [key for key in SAME if getattr(theirs, key) != getattr(task, key)]
        if changed:
            logger.info(
                "%s: the shipped model has another %s; it starts from fresh weights", task.name, ", ".join(changed)
            )
            return None
        versions.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(versions.folder / ".shipped.lock", timeout=60):  # a server and a command line may start at once
            if versions.started:
                return None
            number = versions.publish(checkpoint, why="shipped with the app")
    except (CheckpointError, OSError, Timeout) as error:
        logger.error("%s: the shipped model cannot be used, so it starts from fresh weights: %s", task.name, error)
        return None
    logger.info("%s: starts with the model that is shipped with the app, as version %d", task.name, number)
    return number
