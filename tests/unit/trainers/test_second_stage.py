"""The second stage of a round: a refiner beside weights that stay as they are, and what answers clicks then."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lib.infers import BiPVLInfer
from lib.infers.images import Images
from lib.infers.interactive import ClickInfer
from lib.infers.sessions import Interaction
from lib.infers.work import Work
from lib.interaction import memory
from lib.interaction.memory import Memory
from lib.model.checkpoints import CheckpointError, restore_model
from lib.model.refining import KEY, restore_refiner
from lib.model.versions import RefusedCheckpoint, Versions
from lib.trainers import BiPVLTrain, judging
from lib.volumes.folders import image_id
from support.helpers import read_nifti
from support.training import BOXES, Cases, box_case

ROUND = {"val_split": 0.25, "patches_per_case": 2, "tracking": "None", "device": "cpu", "max_epochs": 2}
CLICKED = {**ROUND, "gate_clicks": 1, "refiner": 3}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    folder = tmp_path_factory.mktemp("boxes")
    return Cases(box_case(folder, number) for number in range(4))


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory, cases: Cases) -> tuple[Path, Versions]:
    """Version 1 without a refiner, 2 and 3 with one; each begins where the one before ended, but with other cases."""
    folder = tmp_path_factory.mktemp("models") / BOXES.name
    BiPVLTrain(BOXES, folder)({**ROUND, "learning_rate": 1e-2}, Cases(cases[:2]))
    for seed in (1, 2):
        BiPVLTrain(BOXES, folder)({**CLICKED, "seed": seed, "gate_unjudged": "publish", "gate_margin": 1}, cases)
    return folder, Versions(folder)


def test_a_round_leaves_a_refiner_in_its_version(rounds: tuple[Path, Versions]) -> None:
    _, versions = rounds
    assert KEY not in versions.read(1)
    second, third = (versions.manifest(n)["refiner"] for n in (2, 3))
    assert (second["steps"], second["cases"], second["warm"]) == (3, 3, False)
    assert second["real_errors"] == 3 - len(set(versions.manifest(1)["seen"]) & set(versions.manifest(2)["trained_on"]))
    assert second["real_errors"] > 0 and third["real_errors"] == 0, "version 2 has seen what version 3 trains on"
    served_then = versions.manifest(3)["parent"]
    assert third["warm"] is (served_then == 2)
    checkpoint = versions.read(2)
    model, _ = restore_model(checkpoint)
    kept = restore_refiner(checkpoint, model)
    assert kept is not None and kept.refiner.out.weight.abs().max() > 0, "it has learned something"


def test_the_gate_s_figures_are_kept(rounds: tuple[Path, Versions]) -> None:
    _, versions = rounds
    gate = versions.manifest(2)["gate"]
    assert [row["clicks"] for row in gate["clicks"]] == [0, 1, 3, 5] and len(gate["clicked"]) == 1
    assert all(row["served"] is not None and row["candidate"] is not None for row in gate["clicks"])
    assert set(gate["ways"]) == {"evidence", "refiner"} and gate["answered_by"] in gate["ways"]
    best = max(gate["ways"].values(), key=lambda after: sum(after[1:]))
    assert sum(gate["ways"][gate["answered_by"]][1:]) == pytest.approx(sum(best[1:]))
    assert versions.read(2)[KEY]["answers"] is (gate["answered_by"] == "refiner")
    assert versions.manifest(1)["gate"]["clicks"] == []


def test_the_network_is_bit_for_bit_as_without_a_refiner(
    rounds: tuple[Path, Versions], tmp_path: Path, cases: Cases
) -> None:
    _, versions = rounds
    folder = tmp_path / BOXES.name
    Versions(folder).publish(versions.read(1))
    BiPVLTrain(BOXES, folder)({**ROUND, "seed": 1, "gate_unjudged": "publish", "gate_margin": 1}, cases)
    plain, refined = Versions(folder).read(2), versions.read(2)
    assert KEY not in plain and KEY in refined
    assert plain["model"].keys() == refined["model"].keys()
    assert all(torch.equal(tensor, refined["model"][name]) for name, tensor in plain["model"].items())


def test_people_who_do_not_click_cost_nothing(tmp_path: Path, cases: Cases) -> None:
    trainer = BiPVLTrain(BOXES, tmp_path / BOXES.name, interaction=False)
    trainer(CLICKED, cases)
    assert KEY not in trainer.versions.read(1)
    assert trainer.stats()["gate"]["clicks"] == [] and "refiner" not in trainer.versions.manifest(1)


def test_a_round_that_is_stopped_in_its_second_stage_publishes_nothing(
    tmp_path: Path, cases: Cases, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, seen = BiPVLTrain(BOXES, tmp_path / BOXES.name), []
    train: Any = judging.train_stage

    def stopped(*given: Any) -> Any:
        *others, told = given

        def stop(what: str, done: int, total: int) -> None:
            told(what, done, total)
            seen.append((what, trainer.stats()["doing"]))
            raise KeyboardInterrupt

        return train(*others, stop)

    monkeypatch.setattr(judging, "train_stage", stopped)
    with pytest.raises(KeyboardInterrupt):
        trainer(CLICKED, cases)
    assert seen == [("Cases for the refiner", {"what": "Cases for the refiner", "done": 0, "total": 3})]
    assert trainer.versions.numbers() == [] and trainer.versions.served is None


# Answers ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def refined(rounds: tuple[Path, Versions]) -> int:
    """A version whose refiner answers by itself, whatever the figures said."""
    checkpoint = rounds[1].read(2)
    checkpoint[KEY]["answers"] = True
    return rounds[1].publish(checkpoint)


@pytest.fixture
def interaction(rounds: tuple[Path, Versions], refined: int) -> Interaction:
    rounds[1].serve(refined, why="test")
    return Interaction(BiPVLInfer(BOXES, rounds[0]), Memory(), Images())


def work_on(cases: Cases) -> Work:
    return Work("ann", image_id(cases[0]["image"]), Path(cases[0]["image"]))


def click(interaction: Interaction, work: Work, **more: Any) -> tuple[np.ndarray, dict[str, Any]]:
    given = {"label": "liver", "device": "cpu", "foreground": [[4, 5, 5]], "background": [[14, 14, 14]], **more}
    file, result = ClickInfer(interaction).respond(given, work)
    mask = np.asarray(read_nifti(file).dataobj)
    file.unlink()
    return mask, result


def test_the_refiner_answers_and_obeys(interaction: Interaction, cases: Cases) -> None:
    mask, result = click(interaction, work_on(cases))
    assert result["answered_by"] == "refiner" and mask[4, 5, 5] == 1 and mask[14, 14, 14] == 0
    other, result = click(interaction, work_on(cases), answer_by="evidence")
    assert result["answered_by"] == "evidence" and other[4, 5, 5] == 1


def test_a_mask_s_own_pass_keeps_what_the_refiner_reads(
    interaction: Interaction, cases: Cases, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, engine = work_on(cases), interaction.engine
    file, _ = engine({"image": str(work.path), "device": "cpu"}, made=partial(interaction.remember, work))
    assert file is not None
    Path(file).unlink()

    def computed(*_: Any) -> Any:
        raise AssertionError("a window was computed again")

    monkeypatch.setattr(engine, "predict", computed)
    assert click(interaction, work)[1]["answered_by"] == "refiner"


def test_an_image_too_large_for_the_refiner_is_answered_without_it(
    interaction: Interaction, cases: Cases, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, _ = interaction.session(work_on(cases), "liver", "cpu", afresh=False)
    assert session.features is not None
    monkeypatch.setattr(memory, "SESSION_BYTES", session.nbytes - 1)
    _, result = click(interaction, work_on(cases))
    assert result["answered_by"] == "evidence" and "too large for the refiner" in result["warnings"][0]


def test_a_version_without_a_refiner_says_so(
    rounds: tuple[Path, Versions], cases: Cases, interaction: Interaction
) -> None:
    rounds[1].serve(1, why="test")
    assert click(interaction, work_on(cases))[1]["answered_by"] == "evidence"
    with pytest.raises(ValueError, match="answer_by: version 1 has no refiner; valid is evidence"):
        click(interaction, work_on(cases), answer_by="refiner")


def test_a_refiner_that_does_not_fit_costs_itself_alone(
    rounds: tuple[Path, Versions], tmp_path: Path, cases: Cases, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = rounds[1].read(2)
    checkpoint[KEY]["weights"].pop("out.bias")
    versions = Versions(tmp_path / BOXES.name)
    versions.publish(checkpoint)
    own = Interaction(BiPVLInfer(BOXES, versions.folder), Memory(), Images())
    assert click(own, work_on(cases))[1]["answered_by"] == "evidence"
    assert "the refiner does not fit" in caplog.text
    with pytest.raises(RefusedCheckpoint, match="the refiner does not fit"):
        versions.adopt(versions.path(1), BOXES)
    checkpoint = rounds[1].read(2)
    checkpoint[KEY]["weights"]["out.bias"][:] = torch.nan
    model, _ = restore_model(checkpoint)
    with pytest.raises(CheckpointError, match="the refiner hold NaN"):
        restore_refiner(checkpoint, model)
