"""The end of a round: its model and the served one are scored by the same code on cases that neither was trained on,
and the next version is published, served or only kept."""

from __future__ import annotations

import importlib.metadata
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lib.files import now
from lib.model import checkpoints
from lib.model.checkpoints import CheckpointError, restore_model
from lib.model.nets import BiPVLSeg
from lib.model.nets.reading import KEY as PLACES
from lib.model.refining import KEY, WAYS, Kept, Way, restore_refiner, to_entry, usable_refiner
from lib.model.reports.page import Examined, round_report, write_report
from lib.model.reviews import Reviews
from lib.model.versions import Versions
from lib.tasks import Task
from lib.trainers import rounds
from lib.trainers.evaluation import CaseScores, find_places, score_cases, unseen_wordings
from lib.trainers.gate import Clicks, Decision, Unseen, decide
from lib.trainers.gate import Curves as AnyCurves
from lib.trainers.objective import unwrapped
from lib.trainers.options import limit_of
from lib.trainers.refiner.clicks import CLICKS, Curves, Robot
from lib.trainers.refiner.stage import Network, Told, train_stage
from lib.trainers.rounds import Round
from lib.trainers.tracking import Tracker
from lib.upstream import Context, TrainTask

logger = logging.getLogger(__name__)

WITHOUT_VALIDATION = 2  # training cases in the report of a round that has no others
FOR_PLACES = 4  # training cases in which the places of classes are looked for
PACKAGES = ("torch", "monai", "monailabel", "transformers")


def judge(
    candidate: dict[str, Any],
    task: Task,
    versions: Versions,
    training: Sequence[dict[str, Any]],
    validation: Sequence[dict[str, Any]],
    request: dict[str, Any],
    device: torch.device,
    examined: Examined | None = None,
    told: Told = lambda *_: None,
) -> tuple[Decision, dict[str, Any]]:
    """Decide whether a round's model may take the place of the served version.

    With validation cases both models are scored on those that neither was trained on. Without, cross-validation stands
    in: the candidate's score of a case is that of the fold that left it out. The served version's is its own if it
    never saw the case, else that of its own cross-validation, if that ran with the same epochs.

    A robot user clicks on the first `gate_clicks` of the cases that a model is scored on. Each version answers as it
    would in the app. A candidate with a refiner answers both ways, and is served with the better one.

    If the task keeps wordings aside, both models are scored with them too (`unseen_wordings`).

    Args:
        candidate: the round's checkpoint, with its manifest.
        training, validation: the round's cases.
        request: gate_margin, gate_min_cases, gate_unjudged, gate_clicks, gate_reading.
        examined: is told of every case that the candidate is scored on.
        told: hears how it goes; may raise to stop.

    Returns:
        The decision, and what the manifest says of it.
    """
    manifest = candidate["manifest"]
    folds = manifest["metrics"].get("cross_validation")
    served, number, note = _served(versions, task, device)
    served_seen = set(versions.seen(number)) if number is not None else set()
    ours: CaseScores
    theirs: CaseScores | None = CaseScores() if number is not None else None
    ways: dict[Way, Curves] = {}
    their_clicks: Curves = {}
    limit = request["gate_clicks"]
    left_out = [c["id"] for c in validation if c["id"] in served_seen | set(manifest["seen"])]
    if left_out:
        logger.info("Left out of the comparison, because a model was trained on them: %s", ", ".join(left_out))
    if validation or not folds:
        cases = [c for c in validation if c["id"] not in left_out]
        model, own_task = restore_model(candidate)
        kept = restore_refiner(candidate, model)
        robot = _robot(limit, cases, kept, WAYS if kept else ("evidence",), "Clicks on this version's masks", told)
        ours = score_cases(model.to(device), own_task, cases, examined, robot, unseen_wordings(task, own_task))
        ways = robot.curves
        if served and theirs is not None:
            theirs, their_clicks = _score_served(served, f"version {number}", task, cases, limit, told)
    else:
        ours = CaseScores(folds["scores"], folds["shown"], folds.get("unseen", {}))
        ways = {"evidence": folds.get("clicks", {})}
        if served and theirs is not None:
            new = [c for c in training if c["id"] not in served_seen]
            theirs, their_clicks = _score_served(served, f"version {number}", task, new, limit, told)
            theirs.dice |= _earlier_folds(versions, number, folds, served_seen, "scores")
            theirs.unseen |= _earlier_folds(versions, number, folds, served_seen, "unseen")
            their_clicks |= _earlier_folds(versions, number, folds, served_seen, "clicks")
    way = better(ways)
    decision = decide(
        theirs.dice if theirs is not None else None,
        ours.dice,
        task.classes,
        margin=request["gate_margin"],
        min_cases=request["gate_min_cases"],
        unjudged=request["gate_unjudged"],
        shown=ours.shown,
        clicks=Clicks(CLICKS, their_clicks if number is not None else None, ways[way]),
        unseen=Unseen(theirs.unseen if theirs is not None else None, ours.unseen, limit_of(request["gate_reading"])),
    )
    report = {
        **decision.to_dict(),
        "answered_by": way,
        "ways": {name: _after(curves) for name, curves in ways.items() if curves},
        "reason": note or decision.reason,
        "against": number,
        "method": "validation" if validation or not folds else "cross-validation",
        "margin": request["gate_margin"],
        "left_out": left_out,
    }
    return decision, report


def _robot(limit: int, cases: Sequence[Any], kept: Kept | None, ways: Sequence[Way], what: str, told: Told) -> Robot:
    refiner = kept.refiner if kept else None
    return Robot(limit, len(cases), ways, refiner, lambda done, total: told(what, done, total))


def _score_served(
    served: tuple[BiPVLSeg, Task, Kept | None],
    name: str,
    task: Task,
    cases: Sequence[dict[str, Any]],
    limit: int,
    told: Told,
) -> tuple[CaseScores, Curves]:
    """Scores of the served version, also with the wordings that `task` keeps aside, and what came of clicks on its
    masks, answered as it answers them."""
    model, own_task, kept = served
    way: Way = kept.way if kept else "evidence"
    robot = _robot(limit, cases, kept, (way,), f"Clicks on the masks of {name}", told)
    scores = score_cases(model, own_task, cases, robot=robot, unseen=unseen_wordings(task, own_task))
    return scores, robot.curves[way]


def better(ways: Mapping[Way, AnyCurves]) -> Way:
    """The way to answer that came to the higher mean Dice after clicks; without figures, or if both are equal, the one
    without training."""
    means = {way: sum(after[1:]) for way, curves in ways.items() if (after := _after(curves))}
    return "refiner" if means.get("refiner", 0) > means.get("evidence", 0) else "evidence"


def _after(curves: AnyCurves) -> list[float]:
    """Mean Dice after each number of clicks; empty without figures."""
    rows, _ = Clicks(CLICKS, None, curves).rows()
    return [round(row.candidate, 4) for row in rows if row.candidate is not None]


def _served(
    versions: Versions, task: Task, device: torch.device
) -> tuple[tuple[BiPVLSeg, Task, Kept | None] | None, int | None, str | None]:
    """The served model with its own task and its refiner, its number, and why it cannot be compared with."""
    try:
        found = versions.read_served()
    except CheckpointError as error:
        logger.error("%s", error)
        return None, None, "no earlier version can be read"
    if found is None:
        return None, None, None
    number, checkpoint = found
    model, own_task = restore_model(checkpoint, versions.path(number), task)
    if own_task.classes != task.classes or own_task.channels != task.channels:
        return None, number, f"cannot judge: version {number} has other classes or channels"
    return (model.to(device), own_task, usable_refiner(checkpoint, model, versions.path(number))), number, None


def add_refiner(
    checkpoint: dict[str, Any],
    this: Round,
    task: Task,
    versions: Versions,
    steps: int,
    seed: int,
    device: torch.device,
    told: Told,
) -> None:
    """Train a refiner for a round's checkpoint and put it in. It goes on from that of the version before, if there is
    one."""
    model, own_task = restore_model(checkpoint)
    before, start = None, None
    if this.parent is not None:
        parent = versions.read(this.parent)
        earlier, its_task = restore_model(parent, versions.path(this.parent), task)
        kept = usable_refiner(parent, earlier, versions.path(this.parent))
        before, start = Network(earlier.to(device), its_task), kept.refiner if kept else None
    network = Network(model.to(device), own_task)
    refiner, said = train_stage(network, this.training, steps, seed, start, before, this.seen, told)
    checkpoint[KEY] = to_entry(refiner)
    checkpoint["manifest"]["refiner"] = said


def add_places(checkpoint: dict[str, Any], this: Round, device: torch.device) -> None:
    """Put the places of the classes into a round's checkpoint (`lib.model.nets.reading`)."""
    model, own_task = restore_model(checkpoint)
    if places := find_places(model.to(device), own_task, this.training[:FOR_PLACES]):
        checkpoint[PLACES] = places.to_entry()


def _earlier_folds(
    versions: Versions, number: int | None, folds: dict[str, Any], seen: set[str], what: str
) -> dict[str, Any]:
    """`scores`, `clicks` or `unseen` of the served version's own folds, for the cases that it was trained on in the
    end."""
    assert number is not None
    earlier = versions.manifest(number).get("metrics", {}).get("cross_validation") or {}
    same = ("method", "max_epochs", *(("wordings",) if what == "unseen" else ()))
    if any(earlier.get(key) != folds.get(key) for key in same):
        return {}
    return {case: dice for case, dice in earlier.get(what, {}).items() if case in seen and case in folds["scores"]}


def publish(
    this: Round,
    context: Context,
    task: Task,
    versions: Versions,
    tracker: Tracker,
    told: Told = lambda *_: None,
) -> dict[str, Any]:
    """Publish the round's best model as the next version, served if the gate lets it pass, else kept. Before, it gets a
    refiner, if the round is to train one.

    Args:
        told: hears how it goes; may raise to stop.

    Returns:
        What the statistics say of it.
    """
    best = Path(context.output_dir) / rounds.BEST
    checkpoint = checkpoints.load(best) if best.is_file() else checkpoint_of(this, context, task)
    if steps := context.request["refiner"]:
        try:
            add_refiner(checkpoint, this, task, versions, steps, int(context.request["seed"]), context.device, told)
        except Exception:  # the network was trained for hours, and is as good without
            logger.exception("The refiner could not be trained: the version has none")
    try:
        add_places(checkpoint, this, context.device)
    except Exception:  # without them nobody is warned of texts that are misread
        logger.exception("The version does not know its classes' places")
    cases = this.training, this.validation
    decision, gate = judge(checkpoint, task, versions, *cases, context.request, context.device, this.examined, told)
    manifest = {**checkpoint["manifest"], "gate": gate, "time": now()}
    if KEY in checkpoint:
        checkpoint[KEY]["answers"] = gate["answered_by"] == "refiner"
    manifest["seconds"] = round(time.time() - context.start_ts, 1)
    version = versions.publish({**checkpoint, "manifest": manifest}, decision.publish, f"round: {gate['reason']}")
    _report(this, checkpoint, version, context, task, versions, tracker)
    for left in (rounds.LAST, rounds.BEST):
        (Path(context.output_dir) / left).unlink(missing_ok=True)
    outcome = {"version": version, "served": versions.served, "gate": gate, "audit": this.audit}
    tracker.tag("gate", f"{'published' if decision.publish else 'kept'}: {gate['reason']}")
    logger.info("Version %d compared with version %s:\n%s", version, gate["against"] or "none", decision.table())
    if decision.publish:
        logger.info("Published version %d of %s: %s", version, task.name, gate["reason"])
    else:
        logger.warning(
            "Version %d of %s is kept, not served: %s. To serve it: POST /model/%s/versions/%d/serve, or on the "
            "command line: versions serve %d --task %s",
            *(version, task.name, gate["reason"], task.name, version, version, task.name),
        )
    return outcome


def _report(
    this: Round,
    checkpoint: dict[str, Any],
    version: int,
    context: Context,
    task: Task,
    versions: Versions,
    tracker: Tracker,
) -> None:
    """Write the version's report beside it. What goes wrong is logged: the version is published all the same."""
    try:
        examined = this.examined
        scored = "Cases that this model was not trained on, on the network's grid; surface Dice at 2 mm."
        if this.cross_validation:
            scored = "Each case by the model of the fold that left it out, on the network's grid; surface Dice at 2 mm."
        if not examined.rows:
            model, own_task = restore_model(checkpoint)
            some = this.training[:WITHOUT_VALIDATION]
            score_cases(model.to(context.device), own_task, some, examined)
            scored = (
                f"No case was set aside. These are {len(some)} of the cases that the model WAS trained on: they show "
                "that it learns, not how good it is."
            )
        manifests = versions.manifests()
        parent = next(m for m in manifests if m["version"] == version).get("parent")
        doubts = Reviews(versions.folder).summary(parent) if parent else ""
        page = round_report(task, version, manifests, tracker.history, examined, scored, doubts)
        write_report(page, versions.report(version))
        logger.info("Report: %s", versions.report(version))
    except Exception:
        logger.exception("Version %d has no report", version)


def checkpoint_of(this: Round, context: Context, task: Task) -> dict[str, Any]:
    """The network as it is now, as a checkpoint with its manifest."""
    network = unwrapped(context.network)
    return checkpoints.checkpoint_of(
        network.model, task, manifest_of(this, context, task), uncertainty=network.uncertainty.state_dict()
    )


def manifest_of(this: Round, context: Context, task: Task) -> dict[str, Any]:
    """What the checkpoint says of the round."""
    trained_on = [c["id"] for c in context.train_datalist]
    metrics: dict[str, Any] = {}
    if context.evaluator:
        scores = context.evaluator.state.metrics
        mean = float(scores.get(TrainTask.VAL_METRIC_MEAN_DICE, math.nan))
        metrics = {
            "mean_dice": None if math.isnan(mean) else mean,
            "class_dice": _per_class(task, scores.get("val_class_dice")),
        }
    if this.cross_validation:
        metrics["cross_validation"] = this.cross_validation
    return {
        "task": task.name,
        "concepts": task.concepts.hash,
        "parent": this.parent,
        "trained_on": trained_on,
        "validated_on": [c["id"] for c in context.val_datalist],
        "seen": sorted({*this.seen, *trained_on}),
        "epoch": context.trainer.state.epoch,
        "seed": int(context.request["seed"]),
        "options": {key: context.request[key] for key in rounds.MATCHING},
        "metrics": metrics,
        "packages": {p: importlib.metadata.version(p) for p in PACKAGES},
        "time": now(),
        "seconds": round(time.time() - context.start_ts, 1),
    }


def _per_class(task: Task, values: Any) -> dict[str, float | None]:
    """Class name to Dice; None if the validation cases do not hold the class."""
    if values is None:
        return {}
    numbers = torch.as_tensor(values).flatten().tolist()
    return {name: None if n != n else round(n, 4) for name, n in zip(task.classes, numbers, strict=True)}
