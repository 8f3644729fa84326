"""One round: MONAI's engine, run through MONAI Label's train task, on the whole model and its three losses."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ignite.contrib.handlers import ProgressBar
from ignite.engine import Engine, Events
from ignite.handlers import EarlyStopping
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import LrScheduleHandler, MeanDice, ValidationHandler, from_engine, stopping_fn_from_metric
from monai.transforms import Compose
from monai.utils import set_determinism
from torch import Tensor

from lib.files import write_json
from lib.model import checkpoints
from lib.model.nets import TextAssets, build_model
from lib.model.nets.vision import lay_out
from lib.model.reports.page import Examined
from lib.model.versions import Versions
from lib.stores.cases import audit
from lib.tasks import Task
from lib.trainers import rounds
from lib.trainers.evaluation import masks, score_cases, unseen_wordings
from lib.trainers.judging import checkpoint_of, publish
from lib.trainers.objective import TrainingNetwork, unwrapped
from lib.trainers.recipe import build_schedule, descend
from lib.trainers.refiner.clicks import Robot
from lib.trainers.rounds import Fold, Round
from lib.trainers.split import split_cases
from lib.trainers.tracking import Tracker
from lib.upstream import Context, Datastore, TrainTask
from lib.volumes.augmentation import augment
from lib.volumes.folders import image_id
from lib.volumes.transforms import load

logger = logging.getLogger(__name__)

STATS = "train_stats.json"  # in the task's folder
FOLDS = range(2, 5)  # with so few cases each validates once, in cross-validation; with more, some always do


class RoundTask(TrainTask):
    """One round of training, or one fold of its cross-validation: one object per round holds what its steps share.

    Args:
        task: what to segment, with the sentences to read.
        model_dir: the task's folder for versions, runs and the remembered split.
        this: the round, if it is prepared already; `pre_process` prepares it otherwise.
    """

    this: Round

    def __init__(self, task: Task, model_dir: Path, this: Round | None = None) -> None:
        if this is not None:
            self.this = this
        self.task = task
        self.folder = model_dir
        self.versions = Versions(model_dir)
        super().__init__(
            str(model_dir),
            f"Train BiPVL-Seg on {task.description}",
            find_unused_parameters=task.training.text_interval > 1,
            labels=task.label_values,
            stats_path=str(model_dir / STATS),
        )

    # What MONAI Label calls, in its order ------------------------------------------------------------------------

    def pre_process(self, request: dict[str, Any], datastore: Datastore) -> list[dict[str, Any]]:
        cases = [{**case, "id": case.get("id") or image_id(case["image"])} for case in datastore.datalist()]
        if not cases:
            raise ValueError("nothing to train on: no image has a final label yet; submit at least one label")
        report = audit(self.task, cases)
        logger.info("Labels of %d case(s):\n%s", len(cases), report.table())
        report.check()
        usable: list[dict[str, Any]] = [dict(case) for case in report.usable]
        problems = {c.case["id"]: c.problem for c in report.cases if c.problem}
        self.this = self._begin(request, usable, {"table": report.table(), "problems": problems})
        return usable

    def _begin(self, request: dict[str, Any], cases: list[dict[str, Any]], report: dict[str, Any]) -> Round:
        """Which cases train and validate, and what the round starts from."""
        by_id = {case["id"]: case for case in cases}
        training, validation = split_cases(list(by_id), request["val_split"], self.folder / "split.json")
        if not training:
            raise ValueError(
                f"all {len(by_id)} labelled case(s) are kept for validation ({self.folder / 'split.json'}); "
                "label another case"
            )
        this = Round(report, [by_id[i] for i in training], [by_id[i] for i in validation], Examined(self.task))
        this.identity = rounds.identity(self.task, request, training, validation)
        run = self.folder / request["name"]
        if request["resume"]:
            this.saved = rounds.load_saved(run / rounds.LAST, this.identity)
        if this.saved:
            this.parent, this.seen = this.saved["parent"], this.saved["seen"]
            this.cross_validation = this.saved["cross_validation"]
            return this
        if request["resume"]:
            logger.info("There is no round to resume: the last one was completed, or never began. A new one begins")
        for left in (rounds.LAST, rounds.BEST):  # of a round that was stopped
            (run / left).unlink(missing_ok=True)
        served = self.versions.read_served() if request["pretrained"] else None
        if served:
            this.parent, checkpoint = served
            checkpoints.check_same_task(checkpoint, self.task, self.versions.path(this.parent))
            this.seen = self.versions.seen(this.parent)
        return this

    def train(self, rank: int, world_size: int, request: dict[str, Any], datalist: list[dict[str, Any]]) -> Any:
        if self.this.fold is None:
            self._cross_validate(rank, world_size, request, datalist)
        return super().train(rank, world_size, request, datalist)

    def _cross_validate(self, rank: int, world_size: int, request: dict[str, Any], datalist: list) -> None:
        """Train a fold for each case, if there are so few that none can be set aside."""
        this = self.this
        count = len(this.training)
        if not this.validation and count in FOLDS and request["cross_validate"] and not request["multi_gpu"]:
            epochs = math.ceil(request["max_epochs"] / count)
            this.cross_validation = this.cross_validation or {
                **{"method": "leave-one-out", "max_epochs": request["max_epochs"], "epochs": epochs},
                **{"scores": {}, "shown": {}},
            }
            for number, case in enumerate(sorted(this.training, key=lambda c: c["id"]), 1):
                if case["id"] not in this.cross_validation["scores"]:
                    start = None if case["id"] in this.seen else this.parent
                    self._train_fold(Fold(number, count, case, start), epochs, rank, world_size, request, datalist)
            logger.info("All folds are trained; now the round's own model, on all %d cases", count)
        elif not this.validation:
            logger.warning(
                "No validation: %d labelled case(s) at val_split %s leave none. The last epoch's model is taken.",
                count,
                request["val_split"],
            )
        if this.saved and this.saved["fold"]:
            this.saved = None  # it was a fold's

    def _train_fold(
        self, fold: Fold, epochs: int, rank: int, world_size: int, request: dict[str, Any], datalist: list
    ) -> None:
        this = self.this
        start = "fresh weights" if fold.start is None else f"version {fold.start}"
        logger.info("%s: %d epochs without %s, from %s", fold, epochs, fold.held_out["id"], start)
        saved = this.saved if this.saved and this.saved["fold"] == fold.number else None
        nested = {
            **request,
            "max_epochs": epochs,
            "tracking": "None",
            "run_id": f"{request['run_id']}_fold{fold.number}",
        }
        try:
            own = RoundTask(self.task, self.folder, replace(this, fold=fold, validation=[], saved=saved))
            own.train(rank, world_size, nested, datalist)
        finally:
            self.cleanup(nested)

    def partition_datalist(self, context: Context, shuffle: bool = False) -> tuple[list, list]:
        this = self.this
        training = [case for case in this.training if this.fold is None or case["id"] != this.fold.held_out["id"]]
        names = [", ".join(case["id"] for case in cases) or "none" for cases in (training, this.validation)]
        logger.info("Training on %s; validating on %s", *names)
        return training, this.validation

    def network(self, context: Context) -> TrainingNetwork:
        network = self._network(context)
        lay_out(network, context.device)
        return network

    def _network(self, context: Context) -> TrainingNetwork:
        set_determinism(int(context.request["seed"]))
        this = self.this
        if this.saved:
            state = this.saved["state"]
            network = TrainingNetwork(build_model(self.task, TextAssets(**state["text"])), self.task)
            network.load_state_dict(state["network"])
            logger.info("Resuming after epoch %d", state["epoch"])
            return network
        start = this.start
        if start is None:
            return TrainingNetwork(build_model(self.task), self.task)
        checkpoint = self.versions.read(start)
        logger.info("Starting from version %d", start)
        if self.task.model.vision_weights:
            logger.info("model.vision_weights is not read: only a round from fresh weights does (pretrained false)")
        network = TrainingNetwork(build_model(self.task, checkpoints.text_assets(checkpoint)), self.task)
        checkpoints.load_weights(network.model, checkpoint)
        if "uncertainty" in checkpoint:
            network.uncertainty.load_state_dict(checkpoint["uncertainty"])
        return network

    def optimizer(self, context: Context) -> torch.optim.Optimizer:
        rate, decay = float(context.request["learning_rate"]), self.task.training.weight_decay
        groups = unwrapped(context.network).parameter_groups(rate)
        if self.this.start is not None:
            share = float(context.request["continued_rate"])
            groups = [{**group, "lr": share * group.get("lr", rate)} for group in groups]
        return torch.optim.AdamW(groups, lr=rate, weight_decay=decay)

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

    def evaluator(self, context: Context) -> SupervisedEvaluator | None:
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

    def trainer(self, context: Context) -> SupervisedTrainer:
        loader = self.train_data_loader(context)
        # Stepped every iteration, over all iterations of the run.
        schedule = build_schedule(context.optimizer, context.max_epochs * len(loader), self.task.training)
        context.schedule = schedule
        handlers: list[Any] = [LrScheduleHandler(schedule, print_lr=False, epoch_level=False)]  # type: ignore[arg-type]
        if context.evaluator:
            interval = min(int(context.request["val_interval"]), context.max_epochs)
            handlers.append(ValidationHandler(interval, context.evaluator, epoch_level=True))
        trainer = SupervisedTrainer(
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
        transforms, seed = loader.dataset.transform, int(context.request["seed"])
        trainer.add_event_handler(Events.EPOCH_STARTED, lambda e: rounds.reseed(transforms, seed, e.state.epoch))
        trainer.add_event_handler(Events.EPOCH_STARTED, unwrapped(context.network).model.text.begin_epoch)
        return trainer

    def _train_step(self, engine: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        device = engine.state.device
        image, label = (batch[k].as_tensor().to(device, non_blocking=True) for k in ("image", "label"))
        annotated = batch["annotated"].to(device)
        engine.network.train()
        engine.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            parts = engine.network(image, label, annotated)
        if not torch.isfinite(parts["loss"]):
            raise ValueError(
                f"the loss became {parts['loss'].item()} in epoch {engine.state.epoch}; lower learning_rate"
            )
        descend(parts["loss"], engine.optimizer, unwrapped(engine.network).uncertainty)
        return {**parts, "loss": parts["loss"].detach()}

    def _validate_case(self, engine: Any, batch: dict[str, Any]) -> list[dict[str, Tensor]]:
        network = unwrapped(engine.network).eval()
        rows = []
        for image, label, annotated in zip(batch["image"], batch["label"], batch["annotated"], strict=True):
            pred, truth = masks(network.model, self.task, image, label)
            # MeanDice leaves empty labels out, and so what a label was not drawn for.
            known = annotated.cpu().float()[:, None, None, None]
            rows.append({"pred": pred * known, "label": truth * known})
        return rows

    # Progress, checkpoints, publishing ----------------------------------------------------------------------------

    def finalize(self, context: Context) -> None:
        this = self.this
        stop = self._early_stopping(context)
        rounds.restore(this, context, stop)
        if context.local_rank != 0:
            return
        tracker = Tracker(context, self.task, str(this.fold or ""), (this.saved or {}).get("state", {}).get("history"))
        best = Path(context.output_dir) / rounds.BEST
        interval = int(context.request["val_interval"])

        def after_validation(engine: Any) -> None:
            if engine.state.best_metric_epoch == engine.state.epoch:
                checkpoints.save(checkpoint_of(this, context, self.task), best)

        def tell() -> None:
            write_json(self.stats_file, {**tracker.stats(), "audit": this.audit})

        def told(what: str, done: int, total: int) -> None:
            stats = {**tracker.stats(), "audit": this.audit, "doing": {"what": what, "done": done, "total": total}}
            write_json(self.stats_file, stats)
            tracker.note(what, done, total)

        def after_epoch(engine: Engine) -> None:
            tell()
            epoch, last = engine.state.epoch, engine.state.max_epochs
            if (epoch == 1 or epoch % interval == 0) and epoch != last:
                rounds.save_progress(this, context, rounds.snapshot(context, tracker.history, stop))

        def finish(_: Engine) -> None:
            if this.fold:
                self._finish_fold(context)
                return
            outcome = publish(this, context, self.task, self.versions, tracker, told)
            write_json(self.stats_file, {**tracker.stats(), **outcome})

        if context.evaluator:
            # ValidationHandler runs the evaluator for one epoch and sets its epoch number to the trainer's.
            context.evaluator.add_event_handler(Events.COMPLETED, after_validation)
        if context.request.get("progress"):  # a terminal is watching
            bar = ProgressBar(desc=str(this.fold or "Training"), persist=True)
            bar.attach(
                context.trainer, None, lambda o: {"loss": float(o["loss"])}, Events.EPOCH_COMPLETED, Events.COMPLETED
            )
        # Before the tracker closes: what the gate says is tracked too.
        context.trainer.add_event_handler(Events.COMPLETED, finish)
        tracker.attach(context.trainer, context.evaluator, tell)
        context.trainer.add_event_handler(Events.EPOCH_COMPLETED, after_epoch)

    def _early_stopping(self, context: Context) -> EarlyStopping | None:
        if not context.evaluator or context.request["early_stop_patience"] <= 0:
            return None
        stop = EarlyStopping(
            context.request["early_stop_patience"],
            stopping_fn_from_metric(self.VAL_METRIC_MEAN_DICE),
            context.trainer,
        )
        context.evaluator.add_event_handler(Events.COMPLETED, stop)
        return stop

    def _finish_fold(self, context: Context) -> None:
        this = self.this
        assert this.fold is not None and this.cross_validation is not None
        robot = Robot(int(this.fold.number <= context.request["gate_clicks"]), 1)
        cases, unseen = [this.fold.held_out], unseen_wordings(self.task, self.task)
        found = score_cases(unwrapped(context.network).model, self.task, cases, this.examined, robot, unseen)
        this.cross_validation["scores"] |= found.dice
        this.cross_validation["shown"] |= found.shown
        this.cross_validation.setdefault("clicks", {}).update(robot.curves["evidence"])
        if found.unseen:
            this.cross_validation.setdefault("unseen", {}).update(found.unseen)
            this.cross_validation["wordings"] = found.wordings
        (dice,) = found.dice.values()
        logger.info(
            "%s: Dice of %s: %s",
            this.fold,
            this.fold.held_out["id"],
            ", ".join(f"{name} {value:.3f}" for name, value in dice.items()),
        )
        rounds.save_progress(this, context, None)
