"""The train task: MONAI's engine, run through MONAI Label's BasicTrainTask, on the whole model and its three losses."""

from __future__ import annotations

import datetime
import importlib.metadata
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from ignite.contrib.handlers import ProgressBar
from ignite.engine import Engine, Events
from ignite.handlers import EarlyStopping
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import LrScheduleHandler, MeanDice, ValidationHandler, from_engine, stopping_fn_from_metric
from monai.networks.utils import one_hot
from monai.transforms import Compose
from monai.utils import set_determinism
from monailabel.interfaces.datastore import Datastore
from monailabel.tasks.train.basic_train import BasicTrainTask, Context
from torch import Tensor

from lib import versions
from lib.cases import audit, image_id
from lib.nets import build_model
from lib.segment import predict
from lib.split import split_cases
from lib.tasks import Task
from lib.trainers.objective import TrainingNetwork, unwrapped
from lib.trainers.tracking import Tracker
from lib.transforms import augment, load
from lib.versions import Versions, write_json

logger = logging.getLogger(__name__)

# Eq. (15) drives sigma to the root of its loss: a loss that nearly vanishes for a while would get a weight of
# thousands, and its next large value would drown the others. At the floor the weight is 50.
LOG_SIGMA_FLOOR = math.log(0.1)
PACKAGES = ("torch", "monai", "monailabel", "transformers")


class BiPVLTrain(BasicTrainTask):
    """Train BiPVL-Seg on the labelled cases and publish the round's best model.

    A round starts from the served version (`pretrained`), validates on cases that never train, keeps the model with the
    best validation Dice (without validation: the last one), and publishes it as the next version.

    Args:
        task: what to segment.
        model_dir: the task's folder for versions, runs and the remembered split.
    """

    def __init__(self, task: Task, model_dir: Path) -> None:
        self.task = task
        self.folder = model_dir
        self.versions = Versions(model_dir)
        recipe = task.training
        super().__init__(
            str(model_dir),
            f"Train BiPVL-Seg on {task.description}",
            config={
                "name": "train",
                "max_epochs": recipe.epochs,
                "train_batch_size": recipe.batch_size,
                "patches_per_case": recipe.patches_per_case,
                "learning_rate": recipe.learning_rate,
                "val_interval": recipe.val_interval,
                "dataset": ["CacheDataset", "PersistentDataset", "Dataset"],
                "seed": 0,
            },
            labels=task.label_values,
            tracking_uri=f"sqlite:///{model_dir / 'mlflow.db'}",
        )

    # What MONAI Label calls, in its order ------------------------------------------------------------------------

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Run a round.

        Raises:
            ValueError: no usable labelled case (with a table of what is wrong with each), or an option out of range.
        """
        # A client may send back an option's whole list of choices: its first entry is meant.
        chosen = {k: v[0] if isinstance(v, list) and v else v for k, v in {**self._config, **request}.items()}
        return super().__call__(_checked(chosen), datastore)

    def pre_process(self, request: dict[str, Any], datastore: Datastore) -> list[dict[str, Any]]:
        cases = [{**case, "id": case.get("id") or image_id(case["image"])} for case in datastore.datalist()]
        if not cases:
            raise ValueError("nothing to train on: no image has a final label yet; submit at least one label")
        report = audit(self.task, cases)
        logger.info("Labels of %d case(s):\n%s", len(cases), report.table())
        report.check()
        return [{k: case[k] for k in ("id", "image", "label")} for case in report.usable]

    def partition_datalist(self, context: Context, shuffle: bool = False) -> tuple[list, list]:
        by_id = {case["id"]: case for case in context.datalist}
        share = float(context.request["val_split"])
        training, validation = split_cases(list(by_id), share, self.folder / "split.json")
        if not training:
            raise ValueError(
                f"all {len(by_id)} labelled case(s) are kept for validation ({self.folder / 'split.json'}); "
                "label another case"
            )
        if not validation:
            logger.warning(
                "No validation: %d labelled case(s) at val_split %s leave none. The last epoch's model is published "
                "without a score.",
                len(training),
                share,
            )
        logger.info("Training on %s; validating on %s", ", ".join(training), ", ".join(validation) or "none")
        return [by_id[i] for i in training], [by_id[i] for i in validation]

    def network(self, context: Context) -> TrainingNetwork:
        set_determinism(int(context.request["seed"]))
        checkpoint = None
        if context.pretrained and self.versions.served is not None:
            path = self.versions.path(self.versions.served)
            checkpoint = versions.load(path)
            versions.check_same_task(checkpoint, self.task, path)
            logger.info("Starting from version %d", self.versions.served)
        network = TrainingNetwork(
            build_model(self.task, versions.text_assets(checkpoint) if checkpoint else None), self.task
        )
        if checkpoint:
            network.model.load_state_dict(checkpoint["model"])
            network.uncertainty.load_state_dict(checkpoint["uncertainty"])
        return network

    def optimizer(self, context: Context) -> torch.optim.Optimizer:
        """AdamW in three groups: vision, language, and the sigmas, which do not decay.

        The paper has one rate, and so do the defaults. Narrow networks from scratch need a rate for the vision side at
        which a BERT collapses (all sentences become one vector), so the language side has a rate of its own.
        """
        model, recipe = context.network.model, self.task.training
        vision = [*model.vision.parameters(), *model.head.parameters()]
        known = {id(p) for p in vision}
        language = [p for p in model.parameters() if id(p) not in known]
        groups: list[dict[str, Any]] = [
            {"params": vision},
            {"params": language, "lr": recipe.language_learning_rate},
            {"params": list(context.network.uncertainty.parameters()), "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=float(context.request["learning_rate"]), weight_decay=recipe.weight_decay)

    def loss_function(self, context: Context) -> None:
        return None  # the loss is part of TrainingNetwork

    def train_pre_transforms(self, context: Context) -> Compose:
        transforms = Compose(
            [*load(self.task, label=True), *augment(self.task, int(context.request["patches_per_case"]))]
        )
        return transforms.set_random_state(int(context.request["seed"]))

    def val_pre_transforms(self, context: Context) -> Compose:
        return Compose(load(self.task, label=True))

    def train_post_transforms(self, context: Context) -> None:
        return None

    def val_inferer(self, context: Context) -> None:
        return None

    # The engines --------------------------------------------------------------------------------------------------

    def _create_evaluator(self, context: Context) -> SupervisedEvaluator | None:
        if not context.val_datalist:
            return None
        per_class = MeanDice(output_transform=from_engine(["pred", "label"]), reduction="mean_batch")
        return SupervisedEvaluator(
            device=context.device,
            val_data_loader=self.val_data_loader(context),
            network=context.network,
            iteration_update=self._validate_case,
            key_val_metric={self.VAL_METRIC_MEAN_DICE: MeanDice(output_transform=from_engine(["pred", "label"]))},
            additional_metrics={"val_class_dice": per_class},
            decollate=False,
        )

    def _create_trainer(self, context: Context) -> SupervisedTrainer:
        loader = self.train_data_loader(context)
        # One run is one half-cosine: stepped every iteration, over all iterations of the run.
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            context.optimizer, context.max_epochs * len(loader), self.task.training.min_learning_rate
        )
        handlers: list[Any] = [LrScheduleHandler(schedule, print_lr=False, epoch_level=False)]  # type: ignore[arg-type]
        if context.evaluator:
            interval = min(int(context.request["val_interval"]), context.max_epochs)
            handlers.append(ValidationHandler(interval, context.evaluator, epoch_level=True))
        return SupervisedTrainer(
            device=context.device,
            max_epochs=context.max_epochs,
            train_data_loader=loader,
            network=context.network,
            optimizer=context.optimizer,
            loss_function=None,  # type: ignore[arg-type]  # _train_step calls the network for its loss
            iteration_update=self._train_step,
            train_handlers=handlers,
            decollate=False,
        )

    def _train_step(self, engine: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        device = engine.state.device
        image, label = (batch[k].as_tensor().to(device, non_blocking=True) for k in ("image", "label"))
        engine.network.train()
        engine.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            parts = engine.network(image, label)
        if not torch.isfinite(parts["loss"]):
            raise ValueError(
                f"the loss became {parts['loss'].item()} in epoch {engine.state.epoch}; lower learning_rate"
            )
        parts["loss"].backward()
        torch.nn.utils.clip_grad_norm_(engine.network.parameters(), 1.0)
        engine.optimizer.step()
        with torch.no_grad():
            unwrapped(engine.network).uncertainty.log_sigma.clamp_(min=LOG_SIGMA_FLOOR)
        return {**parts, "loss": parts["loss"].detach()}

    def _validate_case(self, engine: Any, batch: dict[str, Any]) -> list[dict[str, Tensor]]:
        network = unwrapped(engine.network).eval()
        rows = []
        for image, label in zip(batch["image"], batch["label"], strict=True):
            probabilities = predict(network.model, image, self.task).probabilities.cpu()
            label = label.as_tensor().cpu()
            if self.task.overlapping:
                rows.append({"pred": (probabilities > 0.5).float(), "label": label.float()})
            else:
                channels = self.task.out_channels
                rows.append(
                    {
                        "pred": one_hot(probabilities.argmax(0, keepdim=True), channels, dim=0)[1:],
                        "label": one_hot(label, channels, dim=0)[1:],
                    }
                )
        return rows

    # Progress, checkpoints, publishing ----------------------------------------------------------------------------

    def finalize(self, context: Context) -> None:
        if context.local_rank != 0:
            return
        run = Path(context.output_dir)
        tracker = Tracker(context, self.task)
        best = run / "best.pt"
        best.unlink(missing_ok=True)  # of an earlier round

        def checkpoint() -> dict[str, Any]:
            network = unwrapped(context.network)
            return versions.checkpoint_of(
                network.model, self.task, self._manifest(context), uncertainty=network.uncertainty.state_dict()
            )

        def after_validation(engine: Any) -> None:
            if engine.state.best_metric_epoch == engine.state.epoch:
                versions.save(checkpoint(), best)

        def after_epoch(_: Engine) -> None:
            write_json(Path(self._stats_path), tracker.stats())

        def publish(_: Engine) -> None:
            version = self.versions.publish(versions.load(best) if best.is_file() else checkpoint())
            best.unlink(missing_ok=True)
            write_json(Path(self._stats_path), {**tracker.stats(), "version": version})
            logger.info("Published version %d of %s", version, self.task.name)

        if context.evaluator:
            # ValidationHandler runs the evaluator for one epoch and sets its epoch number to the trainer's.
            context.evaluator.add_event_handler(Events.COMPLETED, after_validation)
            if context.request["early_stop_patience"] > 0:
                stop = EarlyStopping(
                    context.request["early_stop_patience"],
                    stopping_fn_from_metric(self.VAL_METRIC_MEAN_DICE),
                    context.trainer,
                )
                context.evaluator.add_event_handler(Events.COMPLETED, stop)
        tracker.attach(context.trainer, context.evaluator)
        if context.request.get("progress"):  # a terminal is watching
            bar = ProgressBar(desc="Training", persist=True)
            bar.attach(
                context.trainer, None, lambda o: {"loss": float(o["loss"])}, Events.EPOCH_COMPLETED, Events.COMPLETED
            )
        context.trainer.add_event_handler(Events.EPOCH_COMPLETED, after_epoch)
        context.trainer.add_event_handler(Events.COMPLETED, publish)

    def _manifest(self, context: Context) -> dict[str, Any]:
        metrics = {}
        if context.evaluator:
            scores = context.evaluator.state.metrics
            metrics = {
                "mean_dice": scores.get(self.VAL_METRIC_MEAN_DICE),
                "class_dice": _per_class(self.task, scores.get("val_class_dice")),
            }
        return {
            "task": self.task.name,
            "concepts": self.task.concepts.hash,
            "trained_on": [c["id"] for c in context.train_datalist],
            "validated_on": [c["id"] for c in context.val_datalist],
            "epoch": context.trainer.state.epoch,
            "seed": int(context.request["seed"]),
            "metrics": metrics,
            "packages": {p: importlib.metadata.version(p) for p in PACKAGES},
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.time() - context.start_ts, 1),
        }


def _checked(request: dict[str, Any]) -> dict[str, Any]:
    """Numbers that arrive as text become numbers; values that cannot work are refused by name."""
    for key, kind, low in (
        ("max_epochs", int, 1),
        ("train_batch_size", int, 1),
        ("patches_per_case", int, 1),
        ("val_interval", int, 1),
        ("learning_rate", float, 1e-12),
        ("val_split", float, 0),
        ("seed", int, 0),
        ("early_stop_patience", int, -1),
    ):
        try:
            request[key] = kind(request[key])
        except (TypeError, ValueError):
            raise ValueError(f"{key}: expected a number, got {request[key]!r}") from None
        if request[key] < low:
            raise ValueError(f"{key}: {request[key]} is too small; the least is {low}")
    return request


def _per_class(task: Task, values: Any) -> dict[str, float | None]:
    """Class name to Dice; None where the validation cases do not hold the class."""
    if values is None:
        return {}
    numbers = torch.as_tensor(values).flatten().tolist()
    return {name: None if n != n else round(n, 4) for name, n in zip(task.classes, numbers, strict=True)}
