"""Active learning, simulated: which cases to label next, on a data set whose labels are all known.

    python -m benchmarks.active_learning run --data FOLDER        all runs not yet there, then the tables and the plot
    python -m benchmarks.active_learning tables                   docs/using/next-case.md and its plot

A run is one strategy with one seed: a few labelled patients, a training round, the strategy's choice of the next
patients, a round that continues from the previous one, and so on. All strategies of a seed share the first round. A run
is one line of the results. A stopped run continues where it stopped, and several processes may share one work folder.
"""

from __future__ import annotations

import json
import random
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import yaml

from benchmarks import ROOT, records
from benchmarks.accuracy.__main__ import claim, commit, hardware
from benchmarks.accuracy.data import Patches, Preprocessed, Split, find_cases, split_cases
from benchmarks.accuracy.settings import Run
from benchmarks.accuracy.training import build_network, optimizer_of, segment
from benchmarks.active_learning.report import SECTION, plot, read_results, tables
from benchmarks.documents import insert
from lib.activelearning.ranking import RANKINGS, choose
from lib.activelearning.scoring.cache import CaseScores
from lib.activelearning.scoring.forward import score_case
from lib.files import write_atomic
from lib.tasks import Task
from lib.trainers.objective import TrainingNetwork
from lib.trainers.recipe import build_schedule, descend
from lib.volumes.metrics import dice_of_classes
from lib.volumes.reading import align_label, read_volume
from lib.volumes.transforms import decode

RESULTS = records.RESULTS / "active-learning.jsonl"
WORK = Path.home() / ".cache" / "bipvl-accuracy"
DOCUMENT = ROOT / "docs" / "using" / "next-case.md"
PLOT = ROOT / "docs" / "images" / "plots" / "active-learning.png"
FIRST = "first-round"  # what all strategies of a seed begin with

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Simulation:
    """One run.

    Attributes:
        strategy: a key of `RANKINGS`, `random`, `first` (by patient's name), or `FIRST`: the first round alone.
        seed: of weights, patches, augmentation, the first patients and random choices. The split does not depend on it.
        task, head, size, overrides: as in `accuracy_settings.Run`.
        start, add, rounds: labelled patients at first, new ones per round, and how often new ones are chosen.
        first_steps, steps: training steps of the first round and of each later one.
    """

    strategy: str
    seed: int
    task: str = "acdc-mr"
    head: str = "text"
    size: str = "small"
    start: int = 4
    add: int = 4
    rounds: int = 5
    first_steps: int = 150
    steps: int = 50
    overrides: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        valid = ("random", "first", *RANKINGS, FIRST)
        if self.strategy not in valid:
            raise ValueError(f"strategy {self.strategy!r}: valid are {', '.join(valid)}")

    @property
    def network(self) -> Run:
        """The network and its task, as the accuracy benchmark describes them."""
        return Run(self.task, "bipvl", self.head, seed=self.seed, size=self.size, overrides=self.overrides)

    @property
    def name(self) -> str:
        return f"{self.task}_{self.size}_{self.head}_{self.strategy}_s{self.seed}"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "overrides": dict(self.overrides)}


class Bench:
    """Data and reference labels, read once for all runs of a process."""

    def __init__(self, spec: Simulation, data: Path, work: Path) -> None:
        self.task: Task = spec.network.task_of()
        self.split: Split = split_cases(find_cases(data))
        field = spec.network.field
        self.training = list(Preprocessed(self.task, self.split.training, work / "volumes", field))
        self.test = list(Preprocessed(self.task, self.split.test, work / "volumes", field))
        self.references = []
        for case in self.split.test:
            image = read_volume(case["image"])
            self.references.append(align_label(read_volume(case["label"]), image).numpy()[0])
        self.cases: dict[str, list[int]] = {}  # of each training patient, in the order of the file names
        for number, case in enumerate(self.split.training):
            self.cases.setdefault(case["patient"], []).append(number)


# One round -----------------------------------------------------------------------------------------------------------


def learn(network: TrainingNetwork, bench: Bench, patients: Sequence[str], steps: int, seed: int) -> dict[str, float]:
    """A round as the server's, starting from the weights there are. Returns the mean losses of the
    last ten steps."""
    volumes = [bench.training[i] for patient in patients for i in bench.cases[patient]]
    optimizer = optimizer_of(network, bench.task)
    schedule = build_schedule(optimizer, steps, bench.task.training)
    torch.manual_seed(seed)  # of what the network draws itself, such as noise
    network.train()
    losses: list[dict[str, float]] = []
    patches = Patches(bench.task, volumes, steps, seed)
    for image, label in (patches[i] for i in range(steps)):
        optimizer.zero_grad(set_to_none=True)
        parts = network(image, label)
        if not torch.isfinite(parts["loss"]):
            raise ValueError(f"the loss became {parts['loss'].item()}; lower training.learning_rate")
        descend(parts["loss"], optimizer, network.uncertainty)
        schedule.step()
        losses.append({name: float(value.detach()) for name, value in parts.items()})
    last = losses[-10:]
    return {name: round(sum(x[name] for x in last) / len(last), 4) for name in last[0]}


def dice_on_test(network: TrainingNetwork, bench: Bench) -> dict[str, Any]:
    """Dice on the test patients, on the grid of their files: of each class and their mean, and of each case."""
    found = segment(network.model, bench.task, bench.test)
    scored = [
        dice_of_classes(bench.task, mask, reference, case["id"])
        for mask, reference, case in zip(found, bench.references, bench.split.test, strict=True)
    ]
    classes = {name: round(float(np.nanmean([s[name] for s in scored])), 4) for name in bench.task.classes}
    cases = {
        c["id"]: round(float(np.nanmean(list(s.values()))), 4) for c, s in zip(bench.split.test, scored, strict=True)
    }
    return {"dice": round(float(np.mean(list(classes.values()))), 4), "classes": classes, "cases": cases}


def score_patients(
    network: TrainingNetwork, bench: Bench, patients: Sequence[str]
) -> tuple[dict[str, CaseScores], dict[str, float]]:
    """Scores of patients, of the first case of each, and the Dice that the network has there, on its own grid: what the
    scores are to foretell."""
    scores, truth = {}, {}
    network.model.eval()
    for patient in patients:
        data = bench.training[bench.cases[patient][0]]
        scores[patient], prediction = score_case(network.model, data["image"], bench.task)
        mask = decode(prediction.probabilities, bench.task).numpy()
        values = dice_of_classes(bench.task, mask, _values(data["label"], bench.task))
        truth[patient] = round(float(np.nanmean(list(values.values()))), 4)
    return scores, truth


def _values(label: torch.Tensor, task: Task) -> np.ndarray:
    """A preprocessed label of exclusive classes (1, h, w, d) as label values."""
    assert not task.overlapping, "the simulation is for classes that exclude each other"
    table = np.array([0, *task.label_values.values()])
    return table[label.as_subclass(torch.Tensor).numpy()[0].astype(int)]


# A run ---------------------------------------------------------------------------------------------------------------


def first_round(spec: Simulation, bench: Bench, results: Path, work: Path) -> tuple[TrainingNetwork, dict[str, Any]]:
    """Network and record of the first round of a seed, trained if that has not been done."""
    own = replace(spec, strategy=FIRST, rounds=0)
    saved, weights = records.find(results, own.name), work / "active-learning" / f"{own.name}.pt"
    network = build_network(own.network, bench.task)
    assert isinstance(network, TrainingNetwork)
    if saved and weights.is_file() and saved["run"] == own.to_dict():
        network.load_state_dict(torch.load(weights, weights_only=True))
        return network, saved
    patients = sorted(bench.cases)
    random.Random(f"first {spec.seed}").shuffle(patients)
    found = one_round(network, bench, patients[: spec.start], spec.first_steps, spec.seed * 1000)
    write_atomic(weights, lambda file: torch.save(network.state_dict(), file))
    result = {"run": own.to_dict(), "name": own.name, "rounds": [found], **facts()}
    records.put(results, result)
    return network, result


def one_round(network: TrainingNetwork, bench: Bench, patients: Sequence[str], steps: int, seed: int) -> dict[str, Any]:
    """Train, and score on the test patients."""
    start, cpu = time.perf_counter(), time.process_time()
    losses = learn(network, bench, patients, steps, seed)
    trained = time.process_time() - cpu
    result = {"labelled": list(patients), "losses": losses, **dice_on_test(network, bench)}
    seconds = {"training_cpu": round(trained, 1), "all": round(time.perf_counter() - start, 1)}
    return {**result, "seconds": seconds}


def execute(spec: Simulation, bench: Bench, results: Path, work: Path) -> None:
    """One run, written when it is whole."""
    network, first = first_round(spec, bench, results, work)
    rounds: list[dict[str, Any]] = [dict(first["rounds"][0])]
    labelled = list(rounds[0]["labelled"])
    draw = random.Random(f"{spec.strategy} {spec.seed}")
    for number in range(1, spec.rounds + 1):
        pool = sorted(set(bench.cases) - set(labelled))
        if spec.strategy in RANKINGS:
            scores, truth = score_patients(network, bench, [*pool, *labelled])
            known = [scores[p] for p in labelled]
            chosen = choose(RANKINGS[spec.strategy], {p: scores[p] for p in pool}, known, spec.add)
            rounds[-1]["pool"] = {
                p: {
                    "entropy": round(scores[p].entropy, 5),
                    "alignment": round(scores[p].alignment, 5),
                    "dice": truth[p],
                }
                for p in pool
            }
            rounds[-1]["chosen"] = {p: round(value, 5) for p, value in chosen}
        else:
            names = draw.sample(pool, min(spec.add, len(pool))) if spec.strategy == "random" else pool[: spec.add]
            rounds[-1]["chosen"] = dict.fromkeys(names)
        labelled += rounds[-1]["chosen"]
        rounds.append(one_round(network, bench, labelled, spec.steps, spec.seed * 1000 + number))
        print(f"{spec.name}: {len(labelled)} patients, Dice {rounds[-1]['dice']}", flush=True)
    records.put(results, {"run": spec.to_dict(), "name": spec.name, "rounds": rounds, **facts()})


def facts() -> dict[str, Any]:
    packages = {p: version(p) for p in ("torch", "monai", "transformers")}
    return {"hardware": hardware(torch.device("cpu")), "commit": commit(), "packages": packages}


@app.command("run")
def run_command(
    data: Annotated[Path, typer.Option(help="folder of the data set")],
    task: Annotated[str, typer.Option(help="name of a shipped task")] = Simulation.task,
    strategies: Annotated[str, typer.Option(help="comma-separated")] = f"random,{','.join(RANKINGS)}",
    seeds: int = 3,
    head: str = Simulation.head,
    size: str = Simulation.size,
    start: Annotated[int, typer.Option(help="labelled patients of the first round")] = Simulation.start,
    add: Annotated[int, typer.Option(help="patients chosen per round")] = Simulation.add,
    rounds: Annotated[int, typer.Option(help="rounds after the first")] = Simulation.rounds,
    first_steps: Annotated[int, typer.Option(help="training steps of the first round")] = Simulation.first_steps,
    steps: Annotated[int, typer.Option(help="training steps of every later round")] = Simulation.steps,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value of the task")] = None,
    results: Annotated[Path, typer.Option(help="JSON Lines, one run per line")] = RESULTS,
    work: Annotated[Path, typer.Option(help="preprocessed volumes, first rounds, claims")] = WORK,
    document: Annotated[Path | None, typer.Option(help="where the tables go")] = DOCUMENT,
    image: Annotated[Path, typer.Option(help="the plot")] = PLOT,
) -> None:
    """Do all runs that are not done. Seed by seed, so that a stopped matrix compares all strategies."""
    pairs = tuple(sorted((k, yaml.safe_load(v)) for k, v in (s.split("=", 1) for s in set_ or [])))
    bench: Bench | None = None
    for seed in range(seeds):
        for strategy in strategies.split(","):
            spec = Simulation(strategy, seed, task, head, size, start, add, rounds, first_steps, steps, pairs)
            if done(results, spec) or not claim(work / "claims" / f"active-learning-{spec.name}"):
                continue
            try:
                bench = bench or Bench(spec, data, work)
                begun = time.perf_counter()
                execute(spec, bench, results, work)
                print(f"done: {spec.name}, {time.perf_counter() - begun:.0f} s", flush=True)
            except Exception:  # one failed run must not end the matrix
                print(f"failed: {spec.name}\n{traceback.format_exc()}", flush=True)
            finally:
                (work / "claims" / f"active-learning-{spec.name}").unlink()
    if document:
        tables_command(task, size, head, results, document, image)


def done(results: Path, spec: Simulation) -> bool:
    """Whether a run's result is there, and of the same settings.

    Raises:
        ValueError: of other settings, which must not be mixed in one table.
    """
    found = records.find(results, spec.name)
    if found and found["run"] != json.loads(json.dumps(spec.to_dict())):
        raise ValueError(f"{results}: {spec.name} ran with other settings; remove its line, or name another --results")
    return found is not None


@app.command("tables")
def tables_command(
    task: str = Simulation.task,
    size: str = Simulation.size,
    head: str = Simulation.head,
    results: Annotated[Path, typer.Option(help="JSON Lines, one run per line")] = RESULTS,
    document: Annotated[Path | None, typer.Option(help="where the tables go")] = DOCUMENT,
    image: Annotated[Path, typer.Option(help="the plot")] = PLOT,
) -> None:
    """Write tables and plot of all finished runs."""
    found = read_results(results, task, size, head)
    if document:
        insert(document, SECTION, tables(found))
        plot(found, image)
    else:
        print(tables(found))


if __name__ == "__main__":
    app()
