"""The app: which tasks, stores and web side stand behind MONAI Label's endpoints, and what its hooks do."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from fastapi import HTTPException

from lib import upstream
from lib.activelearning import strategies
from lib.activelearning.leases import DEFAULT_MINUTES, Leases, Offer
from lib.activelearning.scoring import CaseScoring, scoring_methods
from lib.activelearning.scoring.background import METHOD, Background
from lib.activelearning.scoring.methods import SERVER
from lib.activelearning.scoring.turns import Turns
from lib.app.web.access.options import CONF_KEYS
from lib.app.web.common import known_image
from lib.app.web.install import install
from lib.app.web.sessions import Sessions
from lib.files import FINAL, ORIGINAL
from lib.infers import BatchInfer, BiPVLInfer, InteractiveInfer
from lib.infers.images import Images
from lib.infers.interactive import ClickInfer, ScribbleInfer
from lib.infers.models import Loaded
from lib.infers.sessions import Interaction
from lib.infers.work import Work
from lib.interaction.memory import Memory, OutdatedError
from lib.model.allocator import keep_freed_memory
from lib.model.checkpoints import CheckpointError
from lib.model.predict import Prediction, Watch
from lib.model.shipped import start_from_shipped
from lib.options import boolean
from lib.stores.dicom.store import DicomStore
from lib.stores.interface import Store
from lib.stores.labelfolder import UNCERTAINTY
from lib.stores.local import LocalStore
from lib.tasks import Task, TaskError, load_task
from lib.trainers import BiPVLTrain
from lib.upstream import MONAILabelApp, ScoringMethod, Strategy, settings
from lib.volumes.folders import why_empty
from lib.volumes.series import SeriesError

logger = logging.getLogger(__name__)

keep_freed_memory()  # of the server, of its training process and of the command line

VERSION = "0.1.0"
DEFAULT_TASK = "quickstart"
TASK_KEYS = ("patch", "spacing", "overlap")
APP_KEYS = ("models", "config", "model_dir", "lease_minutes", "score_cases", "interaction", "server_mode")
SCORED_CASES = 200
NICENESS = 10  # of a process that scores


class BiPVLApp(MONAILabelApp):
    """Wires tasks to MONAI Label.

    `--conf models <task>[,<task>…]` selects shipped tasks, `--conf config <file>` serves a user's own, and a dotted
    `--conf model.feature_size 12` changes one value of every selected task. Without either, `quickstart` is served.
    `--conf lease_minutes 60` is how long a case that one annotator was offered is not offered to others; 0: not at all.
    `--conf score_cases 200` is how many unlabelled cases are scored in the background; 0: none.
    `--conf interaction false` offers neither clicks nor scribbles, and rounds have nothing to do with them.

    Raises:
        lib.tasks.TaskError: at start-up, for an unknown task or a file that cannot be used.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        _check_keys(conf)
        self.tasks = _select(conf)
        self.model_dir = Path(conf.get("model_dir") or Path(app_dir) / "model")
        self.leases = Leases(self.model_dir / "leases.json", conf.get("lease_minutes", DEFAULT_MINUTES))
        self.score_cases = _score_cases(conf)
        self.interactive = _interactive(conf)
        self.turns = Turns(self.model_dir / "requests.lock")
        self.batch = BatchInfer(self.model_dir / "batch_infer.json")
        self.background: Background | None = None  # of a server only
        logger.info("Tasks: %s", ", ".join(f"{t.name} ({len(t.classes)} classes)" for t in self.tasks.values()))
        super().__init__(
            app_dir=app_dir,
            studies=studies,
            conf=conf,
            name=f"BiPVL Label - {', '.join(self.tasks)}",
            description="Text-guided 3D segmentation with BiPVL-Seg: correct the mask, press train, get a better one",
            version=VERSION,
        )
        self._fill_scores = upstream.take_over_scoring(self)

    @property
    def models(self) -> Mapping[str, BiPVLInfer]:
        """Inference by name of the task."""
        return {name: task for name, task in upstream.models(self).items() if isinstance(task, BiPVLInfer)}

    @property
    def interactions(self) -> Mapping[str, InteractiveInfer]:
        """Clicks and scribbles, by the name that clients send them to."""
        return {name: task for name, task in upstream.models(self).items() if isinstance(task, InteractiveInfer)}

    @property
    def trainers(self) -> Mapping[str, BiPVLTrain]:
        """Training by name of the task; none if MONAI_LABEL_TASKS_TRAIN is false."""
        return upstream.trainers(self)

    @property
    def strategies(self) -> Mapping[str, Strategy]:
        """Ways to choose the next case, by name."""
        return upstream.strategies(self)

    @property
    def scoring_methods(self) -> Mapping[str, ScoringMethod]:
        """Ways to score cases, by name."""
        return upstream.scoring_methods(self)

    def datastore(self) -> Store:
        """The images and labels that this server works on."""
        return cast(Store, super().datastore())

    def init_datastore(self) -> Store:
        if self.studies.startswith(("http://", "https://")):
            with upstream.dicom_store(partial(DicomStore, tasks=tuple(self.tasks.values()), software=VERSION)):
                return cast(Store, super().init_datastore())
        store = LocalStore(self.studies, settings.MONAI_LABEL_DATASTORE_READ_ONLY, tuple(self.tasks.values()))
        if not store.list_images() and (hint := why_empty(store.folder)):
            logger.warning("%s: no images: %s", self.studies, hint)
        store.report()
        return store

    def on_init_complete(self) -> None:
        """Called by MONAI Label's server only, before it accepts connections."""
        for name, task in self.tasks.items():
            start_from_shipped(task, self.models[name].versions)
        install(self)
        os.environ[SERVER] = str(os.getpid())
        method = self.scoring_methods.get(METHOD)
        wanted = self.score_cases and self._fill_scores and not self.datastore().read_only
        if wanted and isinstance(method, CaseScoring):
            self.background = Background(method, self.datastore())
            self.background.start()
        super().on_init_complete()

    def _load_sessions(self, load: bool = False) -> Sessions | None:
        folder = settings.MONAI_LABEL_SESSION_PATH.strip() or Path.home() / ".cache" / "monailabel" / "sessions"
        return Sessions(Path(folder), settings.MONAI_LABEL_SESSION_EXPIRY) if load else None

    def init_infers(self) -> dict[str, BiPVLInfer | InteractiveInfer]:
        engines = {name: BiPVLInfer(task, self.model_dir / name) for name, task in self.tasks.items()}
        found: dict[str, BiPVLInfer | InteractiveInfer] = dict(engines)
        memory, images = Memory(), Images()
        for name, engine in engines.items() if self.interactive else ():
            # An underscore cannot be in the name of a task.
            shared = Interaction(engine, memory, images)
            found |= {f"{name}_{kind.SUFFIX}": kind(shared) for kind in (ClickInfer, ScribbleInfer)}
        return found

    def init_trainers(self) -> dict[str, BiPVLTrain]:
        return {name: BiPVLTrain(task, self.model_dir / name, self.interactive) for name, task in self.tasks.items()}

    def init_batch_infer(self) -> BatchInfer:
        return self.batch

    def init_strategies(self) -> dict[str, Strategy]:
        return strategies(list(self.tasks), lambda model: self.models[model].served())

    def init_scoring_methods(self) -> dict[str, ScoringMethod]:
        # Whoever asks for scores gets them, even if none are made in the background.
        limit = self.score_cases or SCORED_CASES
        return scoring_methods(self.models, self.tasks, self.model_dir, limit)

    def scoring(self, request: dict[str, Any], datastore: Any = None) -> dict[str, Any]:
        """Run a scoring method. MONAI Label gives it a process of its own, which takes what others leave of the CPU."""
        os.nice(NICENESS)
        return super().scoring(request, datastore)

    def next_sample(self, request: dict[str, Any]) -> dict[str, Any]:
        """The case to annotate next, leased to whoever asks (`who` or `client_id`), with its `path` and what is
        known about it (`info`); empty if none is free."""
        strategy = request.get("strategy") or "random"
        if strategy not in self.strategies:
            raise HTTPException(404, f"unknown strategy {strategy!r}; valid are {', '.join(self.strategies)}")
        person = str(request.get("who") or request.get("client_id") or "")
        while True:
            with self.leases.lock:
                offer = Offer(self.datastore(), self.leases.taken(person))
                found = self.strategies[strategy]({**request, "strategy": strategy}, offer)
                if not found or not found.get("id"):
                    return {}
                self.leases.lease(found["id"], person)
            try:
                path = self.datastore().get_image_uri(found["id"])
                info = self.datastore().get_image_info(found["id"])
                break
            except Exception as error:  # nobody works on what could not be had
                self.leases.release(found["id"])
                if not isinstance(error, SeriesError):  # a series that is not a volume; its store offers it only once
                    raise
        if self.background:
            self.background.wake()
        return {**found, "path": path, "info": info}

    def on_save_label(self, image_id: str, label_id: str) -> None:
        """A final label ends the lease of its case."""
        if self.datastore().get_label_by_image_id(image_id, FINAL):
            self.leases.release(image_id)

    def infer(
        self,
        request: dict[str, Any],
        datastore: Store | None = None,
        person: str | None = None,
        watch: Watch | None = None,
    ) -> dict[str, Any]:
        """Segment an image of the datastore, never another file. What a user got wrong is an answer that says so.

        Args:
            person: who gets the mask, and may go on with clicks.
            watch: told how it goes.
        """
        store = datastore or self.datastore()
        image = known_image(store, str(request.get("image")))
        path = Path(store.get_image_uri(image))
        work = None if person is None else Work(person, image, path)
        result = self.infer_file(request, path, work, watch, image)
        params, mask = result["params"], Path(result["file"])
        places = params.pop("doubts")  # which no label needs to be kept with
        try:
            store.propose(image, request["model"], params["model_version"], mask)
            if request.get("save_label"):
                info = {"model": request["model"], "params": params}
                store.save_label(image, result["file"], request.get("label_tag") or ORIGINAL, info)
            if file := params.get("uncertainty_map"):
                params["uncertainty_map"] = self._keep_map(store, image, request["model"], params, file)
            params["doubts"] = places
        except BaseException:  # nobody learns where they are
            for left in (mask, params.get("uncertainty_map")):
                if isinstance(left, (str, Path)):
                    Path(left).unlink(missing_ok=True)
            raise
        return result

    def _keep_map(
        self, store: Store, image: str, model: str, params: dict[str, Any], file: str
    ) -> dict[str, str] | None:
        """Where clients find the uncertainty map of an image; None, and a warning, if it cannot be kept."""
        unit = "percent of the largest entropy"
        info = {"model": model, "model_version": params["model_version"], "unit": unit}
        try:
            store.keep_map(image, Path(file), info)
            return {"label": image, "tag": UNCERTAINTY, "unit": unit}
        except (ValueError, OSError) as error:  # the mask is worth more
            params["warnings"].append(f"the uncertainty map could not be kept: {error}")
            return None
        finally:
            Path(file).unlink(missing_ok=True)

    def infer_file(
        self,
        request: dict[str, Any],
        path: Path,
        work: Work | None = None,
        watch: Watch | None = None,
        image: str | None = None,
    ) -> dict[str, Any]:
        """Segment a file or a DICOM folder. The caller removes the result's `file` and what its `uncertainty_map`
        names.

        Args:
            work: who gets the mask, and may go on with clicks.
            watch: told how it goes.
            image: the file's id, if it is in the datastore: where the model doubts is then kept, and among `params`.
        """
        model = str(request.get("model"))
        if model not in self.models:
            raise HTTPException(404, f"unknown model {model!r}; valid are {', '.join(self.models)}")
        clicks = self.interactions.get(f"{model}_{ClickInfer.SUFFIX}")
        engine, places = self.models[model], {}

        def made(loaded: Loaded, task: Task, found: Prediction, meta: Mapping[str, Any], labels: np.ndarray) -> None:
            if clicks and work:
                clicks.interaction.remember(work, loaded, task, found, meta, labels)
            if image is not None:
                only = engine.options["label_subset"].read(request.get("label_subset"))
                places.update(engine.note_doubts(image, loaded.version, task, found, meta, only))

        with _refusals(), self.turns.request():
            file, params = engine({**request, "image": str(path)}, made=made, watch=watch)
        if clicks and work:
            params["mask_state"] = clicks.interaction.state(work)
        if image is not None:
            params["doubts"] = places
        return {"label": file, "file": file, "tag": ORIGINAL, "params": params}

    def doubts(self, model: str, image: str, watch: Watch | None = None) -> dict[str, Any]:
        """Where the served version doubts in an image of the datastore, as `Reviews.get`: what is kept, else by a pass
        of the model."""
        engine = self.models[model]
        if not (served := engine.served()):
            raise HTTPException(404, f"{model}: no version is published yet, and untrained weights are sure of nothing")
        kept = engine.reviews.get(image)
        if kept and kept["version"] == served:
            return kept
        path = Path(self.datastore().get_image_uri(image))
        with _refusals(), self.turns.request():
            loaded, prediction, meta, _ = engine.predict(path, None, upstream.device_list()[0], watch)
            return engine.note_doubts(image, loaded.version, loaded.task, prediction, meta)

    def interact(self, request: dict[str, Any], work: Work, watch: Watch | None = None) -> dict[str, Any]:
        """Answer a person's clicks or scribbles. The caller removes the result's `file`."""
        task = self.interactions[str(request.get("model"))]
        with _refusals(), self.turns.request():
            file, params = task.respond(request, work, watch)
        return {"label": str(file), "file": str(file), "tag": ORIGINAL, "params": params}

    def work(self, person: str, image: str) -> Work:
        """What a person works on, with the label that was submitted last."""
        store = self.datastore()
        label = store.get_label_by_image_id(image, FINAL)
        uri = store.get_label_uri(label, FINAL) if label else ""
        return Work(person, image, Path(store.get_image_uri(image)), Path(uri) if uri else None)

    def asked(self, person: str, image: str) -> list[dict[str, Any]]:
        """What a person prompted on an image since their last label."""
        clicks = (task for task in self.interactions.values() if isinstance(task, ClickInfer))
        return [record for task in clicks for record in task.interaction.asked(person, image)]

    def submitted(self, person: str, image: str) -> None:
        """A person's label is saved: their clicks go on from it."""
        for task in self.interactions.values():
            if isinstance(task, ClickInfer):
                try:
                    task.interaction.submitted(self.work(person, image))
                except ValueError as error:  # a label of another task
                    logger.info("%s: clicks do not go on from the submitted label: %s", image, error)


@contextmanager
def _refusals() -> Iterator[None]:
    """What a request gets wrong, as HTTP says it. A checkpoint's error passes: it says whose fault it is."""
    try:
        yield
    except CheckpointError:
        raise
    except OutdatedError as error:
        raise HTTPException(409, str(error)) from error
    except ValueError as error:
        raise HTTPException(400, str(error)) from error


def _check_keys(conf: dict[str, str]) -> None:
    valid = (*APP_KEYS, *TASK_KEYS, *CONF_KEYS)
    for key in conf:
        if "." not in key and key not in valid:
            raise TaskError(
                f"--conf {key}: unknown key; valid are {', '.join(valid)}, and dotted ones of the task file"
            )


def _score_cases(conf: dict[str, str]) -> int:
    given = conf.get("score_cases", SCORED_CASES)
    try:
        number = int(given)
    except ValueError:
        number = -1
    if number < 0:
        raise TaskError(f"--conf score_cases {given}: expected a number of cases, 0 for none")
    return number


def _interactive(conf: dict[str, str]) -> bool:
    try:
        return boolean("--conf interaction", conf.get("interaction", True))
    except ValueError as error:
        raise TaskError(str(error)) from None


def _select(conf: dict[str, str]) -> dict[str, Task]:
    overrides = {key: value for key, value in conf.items() if "." in key or key in TASK_KEYS}
    names: list[str] = [n.strip() for n in conf.get("models", "").split(",") if n.strip()]
    if conf.get("config"):
        names.append(conf["config"])
    tasks = [load_task(name, overrides) for name in names or [DEFAULT_TASK]]
    return {task.name: task for task in tasks}
