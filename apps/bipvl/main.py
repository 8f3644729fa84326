"""BiPVL Label: the MONAI Label app (`monailabel start_server --app apps/bipvl`), and the same work without a server.

    python apps/bipvl/main.py train|infer|evaluate|concepts|tasks|studies --help

MONAI Label loads this file with the app folder on `sys.path` only while it loads, so everything is imported here.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from monailabel.interfaces.app import MONAILabelApp
from monailabel.tasks.activelearning.first import First
from monailabel.tasks.activelearning.random import Random

from lib.infers import BiPVLInfer
from lib.tasks import Task, load_task
from lib.trainers import BiPVLTrain

logger = logging.getLogger(__name__)

DEFAULT_TASK = "quickstart"


class BiPVLApp(MONAILabelApp):
    """Wires tasks to MONAI Label.

    `--conf models <task>[,<task>…]` selects shipped tasks, `--conf config <file>` serves a user's own, and a dotted
    `--conf model.feature_size 12` changes one value of every selected task. Without either, `quickstart` is served.

    Raises:
        lib.tasks.TaskError: at start-up, for an unknown task or a file that cannot be used.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        self.tasks = _select(conf)
        self.model_dir = Path(conf.get("model_dir") or Path(app_dir) / "model")
        logger.info("Tasks: %s", ", ".join(f"{t.name} ({len(t.classes)} classes)" for t in self.tasks.values()))
        super().__init__(
            app_dir=app_dir,
            studies=studies,
            conf=conf,
            name=f"BiPVL Label - {', '.join(self.tasks)}",
            description="Text-guided 3D segmentation with BiPVL-Seg: correct the mask, press train, get a better one",
            version="0.1.0",
        )

    def init_infers(self) -> dict[str, BiPVLInfer]:
        return {name: BiPVLInfer(task, self.model_dir / name) for name, task in self.tasks.items()}

    def init_trainers(self) -> dict[str, BiPVLTrain]:
        return {name: BiPVLTrain(task, self.model_dir / name) for name, task in self.tasks.items()}

    def init_strategies(self) -> dict[str, Any]:
        return {"random": Random(), "first": First()}

    def infer(self, request: dict[str, Any], datastore: Any = None) -> dict[str, Any]:
        """As MONAI Label's, but what a user got wrong is an answer that says so (404 or 400), not a bare 500."""
        model, image = request.get("model"), request.get("image")
        if model not in self._infers:
            raise HTTPException(404, f"unknown model {model!r}; valid are {', '.join(self._infers)}")
        store = datastore or self.datastore()
        if isinstance(image, str) and not Path(image).exists() and image not in store.list_images():
            raise HTTPException(404, f"unknown image {image!r}; the datastore has {len(store.list_images())} images")
        try:
            return super().infer(request, datastore)
        except ValueError as error:
            logger.exception("Inference refused")
            raise HTTPException(400, str(error)) from error


def _select(conf: dict[str, str]) -> dict[str, Task]:
    overrides = {key: value for key, value in conf.items() if "." in key or key in ("patch", "spacing", "overlap")}
    names: list[str] = [n.strip() for n in conf.get("models", "").split(",") if n.strip()]
    if conf.get("config"):
        names.append(conf["config"])
    tasks = [load_task(name, overrides) for name in names or [DEFAULT_TASK]]
    return {task.name: task for task in tasks}


if __name__ == "__main__":
    from lib.cli import cli

    sys.exit(cli())
