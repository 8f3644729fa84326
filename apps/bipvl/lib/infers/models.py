"""Which versions are in memory, and which one answers."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from dataclasses import dataclass, field, replace

from monai.utils import set_determinism

from lib.model import checkpoints
from lib.model.checkpoints import CheckpointError, DamagedCheckpoint
from lib.model.nets import BiPVLSeg, build_model
from lib.model.nets.reading import Places, describe, misread, places_in
from lib.model.refining import Kept, usable_refiner
from lib.model.versions import Versions
from lib.tasks import Task, task_from_dict

logger = logging.getLogger(__name__)

LOADED_MODELS = 2  # the served version and one that somebody compares it with


@dataclass
class Loaded:
    """A model in memory: its version (0: fresh weights), the file it came from, what users should know of it, its
    refiner and the places of its classes, if it has them."""

    version: int
    model: BiPVLSeg
    task: Task
    file: tuple[int, ...]
    warnings: list[str] = field(default_factory=list)
    refiner: Kept | None = None
    places: Places | None = None

    @property
    def features_wanted(self) -> bool:
        """Whether clicks on its masks will need the decoder's features: its refiner answers them."""
        return self.refiner is not None and self.refiner.answers

    def misreadings(self, task: Task) -> dict[str, str]:
        """What to tell people of a text that this version would draw as something else, or as nothing: a sentence for
        each class. Of a version that does not know its classes' places, and of its own text, there is nothing to tell.

        Args:
            task: with the text.
        """
        if self.places is None or task.concepts.hash == self.task.concepts.hash:
            return {}
        return describe(misread(self.model, self.places, task), self.version)


class Models:
    """The models of a task that are in memory. Safe to use from several threads.

    Args:
        task: as the server has it now; versions may have been trained with other sentences or classes.
        versions: what is published.
    """

    def __init__(self, task: Task, versions: Versions) -> None:
        self.task = task
        self.versions = versions
        self._models: OrderedDict[tuple[int, str], Loaded] = OrderedDict()
        self._answered = 0  # the version that the last request got
        self._lock = threading.Lock()

    def served(self) -> int:
        """The served version, 0 if there is none or the pointer is damaged: a list of models must not fail."""
        try:
            return self.versions.served or 0
        except CheckpointError as error:
            logger.error("%s", error)
            return 0

    def get(self, wanted: int | None, device: str) -> Loaded:
        """The model of a version on a device; None: the served one.

        If the served file is damaged or gone, its copy in memory answers, else the next best whole version, and a
        warning says so. Fresh weights answer only if nothing was ever published. The lock is held while a model is
        found or loaded, so that none is loaded twice, and never while one is used.
        """
        with self._lock:
            if wanted is not None:
                return self._load(wanted, device)
            loaded = self._served_model(device)
            self._answered = loaded.version
            return loaded

    def _served_model(self, device: str) -> Loaded:
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

    def _instead(self, missed: int, device: str, failures: list[DamagedCheckpoint]) -> Loaded:
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

    def _warned(self, loaded: Loaded, warning: str) -> Loaded:
        logger.error("%s: %s", self.task.name, warning)
        return replace(loaded, warnings=[*loaded.warnings, warning])

    def _load(self, version: int, device: str) -> Loaded:
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
            known = task_from_dict(checkpoint["task"], str(path)).respelled(task).classes
            new = [c for c in task.classes if c not in known]
            if new:
                warnings.append(f"version {version} never saw a label of {', '.join(new)}: found by description alone")
            kept = usable_refiner(checkpoint, model, path), places_in(checkpoint, model)
            self._models[key] = Loaded(version, model.to(device), task, file, warnings, *kept)
        return self._used(key)

    def _fresh(self, device: str) -> Loaded:
        key = (0, device)
        if key not in self._models:
            set_determinism(0)
            self._models[key] = Loaded(0, build_model(self.task).to(device).eval(), self.task, ())
        return self._used(key)

    def _used(self, key: tuple[int, str]) -> Loaded:
        self._models.move_to_end(key)
        while len(self._models) > LOADED_MODELS:
            self._models.popitem(last=False)
        return self._models[key]

    def clear(self) -> None:
        """Forget all of them."""
        with self._lock:
            self._models.clear()
