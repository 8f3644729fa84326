"""The inference task: a volume in, a mask on the same grid out, and what the text had to do with it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lib.files import now
from lib.infers.explain.doubts import described, doubts
from lib.infers.models import Loaded, Models
from lib.infers.options import Options, infer_options
from lib.infers.segmentation import Made, Segmentation, label_info
from lib.model.nets import BiPVLSeg
from lib.model.predict import Prediction, Watch, predict
from lib.model.reviews import Reviews
from lib.model.versions import Versions
from lib.options import OptionTable
from lib.tasks import Task, TaskError
from lib.tasks.revisions import newest_text
from lib.upstream import InferInterface, InferType, device_list, name_to_device
from lib.volumes.transforms import apply, load, restore

logger = logging.getLogger(__name__)


class BiPVLInfer(InferInterface):
    """Segment with a published version of BiPVL-Seg; before the first training with fresh weights, and a warning.

    Args:
        task: what to segment.
        model_dir: the task's folder of versions.
    """

    def __init__(self, task: Task, model_dir: Path) -> None:
        self.task = task
        self.versions = Versions(model_dir)
        self.models = Models(task, self.versions)
        self.reviews = Reviews(model_dir)
        super().__init__(InferType.SEGMENTATION, task.label_values, 3, f"BiPVL-Seg: {task.description}")

    # What clients see ---------------------------------------------------------------------------------------------

    def is_valid(self) -> bool:
        return True

    def get_path(self, validate: bool = True) -> str | None:
        served = self.served()
        return str(self.versions.path(served)) if served else None

    def served(self) -> int:
        """The served version, 0 if there is none or the pointer is damaged."""
        return self.models.served()

    def config(self) -> dict[str, Any]:
        """Options as clients show them."""
        return self.options.offer()

    @property
    def options(self) -> OptionTable:
        """What a request may ask for, with the versions that there are now."""
        return infer_options(self.task, self.versions)

    def info(self) -> dict[str, Any]:
        return {
            **super().info(),
            "labels": self.labels,
            "label_info": label_info(self.task),
            "version": self.served(),
        }

    # The request --------------------------------------------------------------------------------------------------

    def __call__(
        self,
        request: dict[str, Any],
        callbacks: dict | None = None,
        made: Made | None = None,
        watch: Watch | None = None,
    ) -> tuple[str | None, dict[str, Any]]:
        """Run one request.

        Args:
            made: hears of the mask and of what it was made from.
            watch: told how it goes.

        Raises:
            ValueError: an option or an image that cannot be used; the message says what and what is valid.
            CheckpointError: the version asked for is damaged, or no published version is whole.
        """
        chosen = {"device": device_list()[0], **self.options.read(request)}
        options = Options.of(chosen, self.task)
        device = name_to_device(chosen["device"])
        loaded = self.models.get(options.version, device)
        task = loaded.task
        if options.concepts:
            if task.model.text_format not in ("concepts", "definition"):
                raise TaskError(
                    f"concepts: this model reads the text format {task.model.text_format!r}, not attributes"
                )
            task = task.with_concepts(options.concepts)
        # Nothing is computed for classes that were not asked for, by versions that learned to do without their rivals;
        # others draw a class too large if nothing competes with it (docs/research/text.md), so the rest is hidden.
        if task.model.head == "text" and task.training.drop_classes > 0:
            task = task.only(options.classes)
        misread = loaded.misreadings(task).values() if options.concepts else ()
        warnings = [*loaded.warnings, *self._other_text(loaded), *misread]
        return Segmentation(options, loaded, task, self.task, warnings, made, watch)(chosen, callbacks)

    def predict(
        self,
        path: Path,
        version: int | None,
        device: str,
        watch: Watch | None = None,
        features: bool | None = None,
    ) -> tuple[Loaded, Prediction, Mapping[str, Any], np.ndarray]:
        """Segment a file with a version, None for the served one, with all defaults: what answers, what it found, where
        that lies (`lib.volumes.transforms.restore`) and the mask (H, W, D) on the grid of the file.

        Args:
            features: also keep the decoder's features; default: if the version's refiner answers clicks.

        Raises:
            ValueError, CheckpointError: as a request.
        """
        loaded = self.models.get(version, name_to_device(device))
        data = apply(load(loaded.task, label=False), {"image": str(path)})
        if features is None:
            features = loaded.features_wanted
        prediction = predict(loaded.model, data["image"], loaded.task, watch=watch, keep_features=features)
        return loaded, prediction, data["image"].meta, restore(prediction.probabilities, data["image"], loaded.task)

    def note_doubts(
        self,
        image: str,
        version: int,
        task: Task,
        prediction: Prediction,
        meta: Mapping[str, Any],
        only: Collection[str] | None = None,
    ) -> dict[str, Any]:
        """Keep where a prediction doubts, for whoever opens the image. Untrained weights are sure of nothing, so there
        is nothing to look at.

        Args:
            image: its id in the datastore.
            version, task, prediction, meta: of a mask, as `made` hears of it.
            only: labels that were asked for; None: all.

        Returns:
            As `Reviews.get`.
        """
        found = doubts(prediction.probabilities, task.overlapping, task.spacing) if version else []
        places = [place for place in described(found, task, meta) if only is None or place["label"] in only]
        try:
            return self.reviews.keep(image, version, places)
        except OSError as error:  # the mask is worth more
            logger.warning("%s: the places where version %d doubts could not be kept: %s", image, version, error)
            return {"version": version, "time": now(), "places": [{**place, "answers": []} for place in places]}

    def misreadings(self, text: Task) -> dict[str, str]:
        """`Loaded.misreadings` of the served version; nothing before the first version."""
        loaded = self.models.get(None, name_to_device(device_list()[0]))
        return loaded.misreadings(text) if loaded.version else {}

    def _other_text(self, loaded: Loaded) -> list[str]:
        """A warning if the next round will read sentences other than this version's."""
        try:
            newest = newest_text(self.task, self.versions.folder)
        except TaskError as error:
            return [str(error)]
        if not loaded.version or loaded.task.concepts.hash == newest.concepts.hash:
            return []
        return [f"version {loaded.version} reads the sentences it was trained with; the next round reads newer ones"]

    # Models -------------------------------------------------------------------------------------------------------

    def loaded(self, device: str) -> tuple[int, BiPVLSeg, Task]:
        """What answers requests now: version, model and its task. Not to be changed if requests use it too."""
        found = self.models.get(None, device)
        return found.version, found.model, found.task

    def clear_cache(self) -> None:
        """Forget the models in memory."""
        self.models.clear()

    clear = clear_cache
