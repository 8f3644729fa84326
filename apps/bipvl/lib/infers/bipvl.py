"""The inference task: a volume in, a mask on the same grid out, and what the text had to do with it."""

from __future__ import annotations

import logging
import tempfile
import threading
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import set_determinism

from lib.infers.explain.agreement import own_fit
from lib.infers.options import Options
from lib.model import checkpoints
from lib.model.checkpoints import CheckpointError, DamagedCheckpoint
from lib.model.nets import BiPVLSeg, build_model
from lib.model.predict import Prediction, predict
from lib.model.versions import Versions
from lib.tasks import ATTRIBUTES, Task, TaskError, task_from_dict
from lib.tasks.revisions import newest_text
from lib.upstream import InferTask, InferType, device_list, name_to_device, strtobool
from lib.volumes import masks
from lib.volumes.transforms import largest_components, load, restore, restore_map

logger = logging.getLogger(__name__)

LOADED_MODELS = 2  # the served version and one that somebody compares it with
GPU_WINDOWS = 4  # windows a forward pass on a GPU; on a CPU batching windows gains nothing


@dataclass
class _Loaded:
    """A model in memory: its version (0: fresh weights), the file it came from, and what users should know of it."""

    version: int
    model: BiPVLSeg
    task: Task
    file: tuple[int, ...]
    warnings: list[str] = field(default_factory=list)


@dataclass(repr=False)
class _Run:
    """What the steps of one request share. MONAI Label copies and logs requests: neither may copy or print a model."""

    options: Options
    version: int
    model: BiPVLSeg
    task: Task
    warnings: list[str]

    def __deepcopy__(self, memo: dict) -> _Run:
        return self

    def __repr__(self) -> str:
        return repr(self.options)


class BiPVLInfer(InferTask):
    """Segment with a published version of BiPVL-Seg; before the first training with fresh weights, and a warning.

    Args:
        task: what to segment.
        model_dir: the task's folder of versions.
    """

    def __init__(self, task: Task, model_dir: Path) -> None:
        self.task = task
        self.versions = Versions(model_dir)
        self._models: OrderedDict[tuple[int, str], _Loaded] = OrderedDict()
        self._answered = 0  # the version that the last request got
        self._lock = threading.Lock()
        super().__init__(
            path=None,
            network=None,
            type=InferType.SEGMENTATION,
            labels=task.label_values,
            dimension=3,
            description=f"BiPVL-Seg: {task.description}",
            config={
                "overlap": task.overlap,
                "tta": False,
                "largest_component": False,
                "uncertainty_map": False,
                "label_subset": "",
                "concepts": "",
            },
        )

    # What clients see ---------------------------------------------------------------------------------------------

    def is_valid(self) -> bool:
        return True

    def get_path(self, validate: bool = True) -> str | None:
        served = self.served()
        return str(self.versions.path(served)) if served else None

    def served(self) -> int:
        """The served version, 0 where there is none or the pointer is damaged: a list of models must not fail."""
        try:
            return self.versions.served or 0
        except CheckpointError as error:
            logger.error("%s", error)
            return 0

    def config(self) -> dict[str, Any]:
        """Options with their defaults; of a list the first entry is the default, the others are the choices."""
        published = [str(n) for n in reversed(self.versions.numbers())]
        return {**self.defaults, "device": device_list(), "model_version": ["served", *published]}

    def info(self) -> dict[str, Any]:
        return {
            **super().info(),
            "labels": self.labels,
            "label_info": self._label_info(),
            "version": self.served(),
        }

    def _label_info(self) -> list[dict[str, Any]]:
        return [
            {
                "name": name,
                "value": label.value,
                "color": list(label.color),
                "snomed": label.snomed.model_dump(exclude_none=True),
            }
            for name, label in self.task.labels.items()
        ]

    # The request --------------------------------------------------------------------------------------------------

    def __call__(self, request: dict[str, Any], callbacks: dict | None = None) -> tuple[str | None, dict[str, Any]]:
        """Run one request.

        Raises:
            ValueError: an option or an image that cannot be used; the message says what and what is valid.
            CheckpointError: the version asked for is damaged, or no published version is whole.
        """
        chosen = {k: v[0] if isinstance(v, list) and v and k != "label_subset" else v for k, v in request.items()}
        chosen.setdefault("device", device_list()[0])
        options = Options.from_request(chosen, self.task, self.versions)
        device = name_to_device(chosen["device"])
        loaded = self._model(options.version, device)
        task = loaded.task
        if options.concepts:
            if task.model.text_format not in ("concepts", "definition"):
                raise TaskError(
                    f"concepts: this model reads the text format {task.model.text_format!r}, not attributes"
                )
            task = task.with_concepts(options.concepts)
        # A version that learned to do without a class's rivals computes only the classes asked for. Others draw a class
        # too large if nothing competes with it (docs/research/text.md), so they compute all and hide the rest.
        if task.model.head == "text" and task.training.drop_classes > 0:
            task = task.only(options.classes)
        run = _Run(options, loaded.version, loaded.model, task, [*loaded.warnings, *self._other_text(loaded)])
        return super().__call__({**chosen, "run": run}, callbacks)

    def _other_text(self, loaded: _Loaded) -> list[str]:
        """A warning where the next round will read other sentences than this version does."""
        try:
            newest = newest_text(self.task, self.versions.folder)
        except TaskError as error:
            return [str(error)]
        if not loaded.version or loaded.task.concepts.hash == newest.concepts.hash:
            return []
        return [f"version {loaded.version} reads the sentences it was trained with; the next round reads newer ones"]

    def pre_transforms(self, data: dict[str, Any]) -> list:
        return load(data["run"].task, label=False)

    def run_inferer(self, data: dict[str, Any], convert_to_batch: bool = True, device: str = "cuda") -> dict[str, Any]:
        run: _Run = data["run"]
        data["pred"] = predict(
            run.model,
            data["image"],
            run.task,
            overlap=run.options.overlap,
            window_batch=GPU_WINDOWS if device.startswith("cuda") else 1,
            tta=run.options.tta,
            sentences=run.model.text.tokenize(run.task.text_rows()),
        )
        return data

    def inverse_transforms(self, data: dict[str, Any]) -> None:
        return None  # the mask is restored by affine, not by inverting transforms

    def post_transforms(self, data: dict[str, Any]) -> list:
        return [self._restore]

    def _restore(self, data: dict[str, Any]) -> dict[str, Any]:
        run: _Run = data["run"]
        options, task = run.options, run.task
        prediction: Prediction = data["pred"]
        mask = restore(prediction.probabilities, data["image"], task)
        values = {name: task.label_values[name] for name in options.classes}
        mask = np.where(np.isin(mask, list(values.values())), mask, 0).astype(mask.dtype)
        if options.largest_component:
            mask = largest_components(mask, list(values.values()))
        data["result"] = self._result(prediction, mask, run)
        if options.uncertainty_map:
            data["uncertainty"] = restore_map(prediction.entropy(), data["image"])
        data["pred"] = mask
        data["pred_meta_dict"] = {"affine": np.asarray(data["image"].meta["original_affine"])}
        return data

    def _result(self, prediction: Prediction, mask: np.ndarray, run: _Run) -> dict[str, Any]:
        task, warnings = run.task, list(run.warnings)
        if not run.version:
            warnings.append("no model is published yet: this mask comes from untrained weights; press train first")
        if run.options.tta and not task.augmentation.flip:
            warnings.append("tta: this task is trained without flips, so there is nothing to average over")
        counts = np.bincount(mask.ravel(), minlength=1 + max(task.label_values.values()))
        rows = ATTRIBUTES if task.model.text_format == "concepts" else range(prediction.concept_weights.shape[1])
        return {
            "model_version": run.version,
            "label_info": self._label_info(),
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
        """NIfTI and NRRD by ourselves, MetaImage through MONAI Label's writer."""
        mask = data["pred"]
        source = str(data.get("image_path", ""))
        if "uncertainty" in data:
            percent = np.rint(100 * data.pop("uncertainty")).astype(np.uint8)
            with tempfile.NamedTemporaryFile(suffix=".nii.gz", delete=False) as file:
                masks.write_mask(Path(file.name), percent, data["pred_meta_dict"]["affine"], source, {})
            data["result"]["uncertainty_map"] = file.name
        suffix = extension or data.get("result_extension") or (".nii" if source.endswith(".nii") else ".nii.gz")
        if suffix not in masks.SUFFIXES or not strtobool(str(data.get("result_write_to_file", True))):
            return super().writer({**data, "result_dtype": mask.dtype}, extension, mask.dtype)
        with tempfile.NamedTemporaryFile(suffix=suffix, delete=False) as file:
            masks.write_mask(Path(file.name), mask, data["pred_meta_dict"]["affine"], source, self.task.labels)
        return file.name, data["result"]

    # Models -------------------------------------------------------------------------------------------------------

    def loaded(self, device: str) -> tuple[int, BiPVLSeg, Task]:
        """What answers requests now: version, model and its task. Not to be changed where requests use it too."""
        found = self._model(None, device)
        return found.version, found.model, found.task

    def _model(self, wanted: int | None, device: str) -> _Loaded:
        """The model of a version on a device; None: the served one.

        Where the served file is damaged or gone, its copy in memory answers, else the next best whole version, and a
        warning says so. Fresh weights answer only where nothing was ever published. The lock is held while a model is
        found or loaded, so that none is loaded twice, and never while one is used.
        """
        with self._lock:
            if wanted is not None:
                return self._load(wanted, device)
            loaded = self._served_model(device)
            self._answered = loaded.version
            return loaded

    def _served_model(self, device: str) -> _Loaded:
        failures: list[DamagedCheckpoint] = []
        candidates = [n] if (n := self.served()) else self.versions.candidates()
        for version in candidates:
            try:
                return self._load(version, device)
            except DamagedCheckpoint as error:
                failures.append(error)
        if not failures and not self._answered:
            return self._fresh(device)
        return self._instead(candidates[0] if candidates else self._answered, device, failures)

    def _instead(self, missed: int, device: str, failures: list[DamagedCheckpoint]) -> _Loaded:
        """What answers in place of a version that cannot be read."""
        for (version, _), kept in reversed(self._models.items()):
            if version == missed:
                return self._warned(
                    kept, f"the file of version {missed} is missing or damaged: its copy in memory answers"
                )
        for version in self.versions.candidates():
            try:
                loaded = self._load(version, device)
            except DamagedCheckpoint as error:
                failures.append(error)
                continue
            return self._warned(loaded, f"version {missed} is missing or damaged: version {version} answers instead")
        for (version, _), kept in reversed(self._models.items()):
            if version:
                return self._warned(kept, f"no version can be read: version {version} answers from memory")
        reasons = "; ".join(dict.fromkeys(str(f) for f in failures)) or f"{self.versions.folder}: no version is left"
        raise CheckpointError(f"no published version of {self.task.name!r} can be read ({reasons}); restore the folder")

    def _warned(self, loaded: _Loaded, warning: str) -> _Loaded:
        logger.error("%s: %s", self.task.name, warning)
        return replace(loaded, warnings=[*loaded.warnings, warning])

    def _load(self, version: int, device: str) -> _Loaded:
        key, path = (version, device), self.versions.path(version)
        try:
            stat = path.stat()
        except OSError as error:
            raise DamagedCheckpoint(f"{path}: cannot be read: {error.strerror}") from error
        file = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if key not in self._models or self._models[key].file != file:
            checkpoint = self.versions.read(version)
            checkpoints.check_same_task(checkpoint, self.task, path)
            model, task = checkpoints.restore_model(checkpoint, path, self.task)
            warnings = []
            new = [c for c in task.classes if c not in task_from_dict(checkpoint["task"], str(path)).classes]
            if new:
                warnings.append(f"version {version} never saw a label of {', '.join(new)}: found by description alone")
            self._models[key] = _Loaded(version, model.to(device).eval(), task, file, warnings)
        return self._used(key)

    def _fresh(self, device: str) -> _Loaded:
        key = (0, device)
        if key not in self._models:
            set_determinism(0)
            self._models[key] = _Loaded(0, build_model(self.task).to(device).eval(), self.task, ())
        return self._used(key)

    def _used(self, key: tuple[int, str]) -> _Loaded:
        self._models.move_to_end(key)
        while len(self._models) > LOADED_MODELS:
            self._models.popitem(last=False)
        return self._models[key]

    def clear_cache(self) -> None:
        with self._lock:
            self._models.clear()

    clear = clear_cache
