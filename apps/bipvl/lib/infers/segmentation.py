"""One inference request on its way through MONAI Label's steps, and what its answer says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np

from lib.files import temporary_file
from lib.infers.explain.agreement import own_fit
from lib.infers.models import Loaded
from lib.infers.options import Options
from lib.model.predict import Prediction, Watch, predict
from lib.options import boolean
from lib.tasks import ATTRIBUTES, Task
from lib.upstream import InferTask, InferType, write_itk
from lib.volumes import masks
from lib.volumes.transforms import largest_components, load, restore, restore_map

GPU_WINDOWS = 4  # windows per forward pass on a GPU; on a CPU batching windows gains nothing


# Model, task, prediction, where it lies, the mask: for who keeps them for clicks.
Made = Callable[[Loaded, Task, Prediction, Mapping[str, Any], np.ndarray], None]


class Segmentation(InferTask):
    """What the steps of one request share; MONAI Label calls them in the order in which they stand here.

    Args:
        options: of the request.
        loaded: the model that answers.
        task: what it is asked for: its classes, and the sentences it reads.
        served: the server's task, whose labels clients know.
        warnings: for the answer.
        made: hears of the mask and of what it was made from.
        watch: told how it goes.
    """

    def __init__(
        self,
        options: Options,
        loaded: Loaded,
        task: Task,
        served: Task,
        warnings: list[str],
        made: Made | None = None,
        watch: Watch | None = None,
    ) -> None:
        super().__init__(None, None, InferType.SEGMENTATION, served.label_values, 3, served.description)
        self.options, self.loaded, self.version, self.model = options, loaded, loaded.version, loaded.model
        self.task, self.served, self.warnings, self.made = task, served, warnings, made
        self.watch = watch

    def pre_transforms(self, data: dict[str, Any]) -> list:
        return load(self.task, label=False)

    def run_inferer(self, data: dict[str, Any], convert_to_batch: bool = True, device: str = "cuda") -> dict[str, Any]:
        data["pred"] = predict(
            self.model,
            data["image"],
            self.task,
            overlap=self.options.overlap,
            window_batch=GPU_WINDOWS if device.startswith("cuda") else 1,
            tta=self.options.tta,
            sentences=self.model.text.tokenize(self.task.text_rows()),
            keep_features=self.made is not None and self.loaded.features_wanted,
            watch=self.watch,
        )
        return data

    def inverse_transforms(self, data: dict[str, Any]) -> None:
        return None  # the mask is restored by affine, not by inverting transforms

    def post_transforms(self, data: dict[str, Any]) -> list:
        return [self._restore]

    def _restore(self, data: dict[str, Any]) -> dict[str, Any]:
        options, task = self.options, self.task
        prediction: Prediction = data["pred"]
        mask = restore(prediction.probabilities, data["image"], task)
        values = {name: task.label_values[name] for name in options.classes}
        mask = np.where(np.isin(mask, list(values.values())), mask, 0).astype(mask.dtype)
        if options.largest_component:
            mask = largest_components(mask, list(values.values()))
        data["result"] = self._result(prediction, mask)
        if options.uncertainty_map:
            data["uncertainty"] = restore_map(prediction.entropy(), data["image"])
        if self.made is not None:
            self.made(self.loaded, task, prediction, data["image"].meta, mask)
        data["pred"] = mask
        data["pred_meta_dict"] = {"affine": np.asarray(data["image"].meta["original_affine"])}
        return data

    def _result(self, prediction: Prediction, mask: np.ndarray) -> dict[str, Any]:
        task, warnings = self.task, list(self.warnings)
        if not self.version:
            warnings.append("no model is published yet: this mask comes from untrained weights; press train first")
        if self.options.tta and not task.augmentation.flip:
            warnings.append("tta: this task is trained without flips, so there is nothing to average over")
        counts = np.bincount(mask.ravel(), minlength=1 + max(task.label_values.values()))
        rows = ATTRIBUTES if task.model.text_format == "concepts" else range(prediction.concept_weights.shape[1])
        return {
            "model_version": self.version,
            "label_info": label_info(self.served),
            "voxels": {name: int(counts[value]) for name, value in task.label_values.items()},
            "concept_weights": {
                name: {str(row): round(w, 6) for row, w in zip(rows, weights, strict=True)}
                for name, weights in zip(task.classes, prediction.concept_weights.tolist(), strict=True)
            },
            "similarity": {
                name: {other: round(s, 6) for other, s in zip(task.classes, row, strict=True)}
                for name, row in zip(task.classes, prediction.similarity.tolist(), strict=True)
            },
            "alignment": {
                name: round(a, 6) for name, a in zip(task.classes, prediction.alignment.tolist(), strict=True)
            },
            "fit": {
                name: None if fit is None else round(fit, 4)
                for name, fit in zip(
                    task.classes, own_fit(prediction.probabilities, task.overlapping, task.spacing), strict=True
                )
            },
            "uncertainty": round(prediction.uncertainty(), 4),
            "windows": prediction.windows,
            "windows_skipped": prediction.skipped,
            "warnings": warnings,
        }

    def writer(self, data: dict[str, Any], extension: str | None = None, dtype: Any = None) -> tuple[Any, Any]:
        """The mask in a temporary file, and what the answer says. If it cannot be written, nothing is left behind."""
        mask, affine = data["pred"], data["pred_meta_dict"]["affine"]
        source = str(data.get("image_path", ""))
        suffix = extension or data.get("result_extension") or (".nii" if source.endswith(".nii") else ".nii.gz")
        with ExitStack() as files:
            if "uncertainty" in data:
                percent = np.rint(100 * data.pop("uncertainty")).astype(np.uint8)
                path = files.enter_context(temporary_file(".nii.gz"))
                masks.write_mask(path, percent, affine, source, {})
                data["result"]["uncertainty_map"] = str(path)
            if not boolean("result_write_to_file", data.get("result_write_to_file", True)):
                return mask, data["result"]
            path = files.enter_context(temporary_file(suffix))
            if suffix in masks.SUFFIXES:
                masks.write_mask(path, mask, affine, source, self.served.labels)
            else:  # MetaImage
                write_itk(mask, str(path), affine, mask.dtype, bool(data.get("result_compress")))
        return str(path), data["result"]


def label_info(task: Task) -> list[dict[str, Any]]:
    """Name, value, colour and code of each label, for clients."""
    return [
        {
            "name": name,
            "value": label.value,
            "color": list(label.color),
            "snomed": label.snomed.model_dump(exclude_none=True),
        }
        for name, label in task.labels.items()
    ]
