"""Options of requests: what is sent becomes what is meant, and what cannot be meant is refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lib.activelearning.scoring.methods import case_options, dice_options
from lib.activelearning.strategies import SEED, next_case_options, strategies
from lib.infers import BiPVLInfer
from lib.infers.options import RESULT_SUFFIXES, batch_options, click_options, infer_options, scribble_options
from lib.model.nets.vision import BACKBONES
from lib.model.versions import CheckpointError, Versions
from lib.options import Choice, Device, Number, OptionTable, Switch, Text, boolean, from_json
from lib.tasks import UNJUDGED, VISION_BACKBONES, load_task
from lib.trainers import BiPVLTrain
from lib.trainers.options import train_options
from lib.trainers.roundtask import RoundTask
from lib.volumes import masks
from support import ROOT
from support.helpers import tiny_task

PAGE = (ROOT / "docs" / "using" / "requests.md").read_text()
TABLE = OptionTable(
    Switch("mirror", True, "flip"),
    Number("epochs", 5, "how long", low=1),
    Number("rate", 0.5, "how fast", low=0, below=1),
    Number("seed", -1, "of what is random"),
    Text("name", "run", "a folder", pattern="[a-z]+", expected="small letters"),
    Choice("colour", "red", "of the pen", choices=("blue", "red")),
    Text("mode", "", "sent by clients", shown=False),
)


@pytest.mark.parametrize(
    ("sent", "meant"),
    [
        ({"mirror": "false"}, {"mirror": False}),
        ({"mirror": [True, False]}, {"mirror": True}),
        ({"epochs": "7"}, {"epochs": 7}),
        ({"epochs": 7.0}, {"epochs": 7}),
        ({"epochs": "1e2"}, {"epochs": 100}),
        ({"seed": "9007199254740993"}, {"seed": 9007199254740993}),
        ({"rate": 0}, {"rate": 0.0}),
        ({"rate": ["0.25", "0.5"]}, {"rate": 0.25}),
        ({"colour": ["blue", "red"]}, {"colour": "blue"}),
        ({"name": "mine", "client_id": "ada"}, {"name": "mine", "client_id": "ada"}),
        ({key: "" for key in TABLE}, {}),
        ({key: None for key in TABLE}, {}),
    ],
)
def test_what_is_sent_becomes_what_is_meant(sent, meant):
    assert TABLE.read(sent) == meant
    assert TABLE.read(TABLE.read(sent)) == meant, "twice is as once: the web reads, and who does the work"
    defaults = {"mirror": True, "epochs": 5, "rate": 0.5, "seed": -1, "name": "run", "colour": "red", "mode": ""}
    assert TABLE.full(sent) == defaults | meant


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        ({"mirror": "perhaps"}, "mirror: expected true or false, got 'perhaps'"),
        ({"mirror": {}}, "mirror: expected true or false, got {}"),
        ({"epochs": "many"}, "epochs: expected a whole number, got 'many'"),
        ({"epochs": True}, "epochs: expected a whole number, got True"),
        ({"epochs": 1.5}, "epochs: expected a whole number, got 1.5"),
        ({"epochs": "inf"}, "epochs: expected a whole number, got 'inf'"),
        ({"epochs": 0}, "epochs: 0 is too small; the least is 1"),
        ({"epochs": []}, "epochs: an empty list says nothing"),
        ({"rate": "nan"}, "rate: expected a number from 0 to below 1, got 'nan'"),
        ({"rate": 1}, "rate 1.0: valid is 0 up to, but not including, 1"),
        ({"rate": -0.5}, "rate -0.5: valid is 0 up to, but not including, 1"),
        ({"name": "../up"}, "name: expected small letters, got '../up'"),
        ({"name": 7}, "name: expected small letters, got 7"),
        ({"colour": "green"}, "colour: 'green'; valid are blue, red"),
        ({"colour": "g" * 9000}, f"colour: '{'g' * 98}…; valid are blue, red"),
        ({"mirror": "g" * 9000}, f"mirror: expected true or false, got '{'g' * 98}…"),
        ({"epochs": "9" * 6000}, f"epochs: expected a whole number, got '{'9' * 98}…"),
        ({"epochs": 10**5000}, "epochs: expected a whole number, got an int"),
        ({"name": "G" * 9000}, f"name: expected small letters, got '{'G' * 98}…"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(sent, reason):
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}$"):
        TABLE.read(sent)


def test_clients_are_offered_what_is_shown_the_default_first():
    offer = TABLE.offer()
    assert offer == {"mirror": True, "epochs": 5, "rate": 0.5, "seed": -1, "name": "run", "colour": ["red", "blue"]}
    assert TABLE.full(offer) == TABLE.full({}), "sent back as it came, nothing changes"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ('{"a": [[' + "9" * 6000 + ", 1, 1]]}", "a number of 6000 digits; valid are at most 300"),
        ("-" + "9" * 301, "a number of 301 digits; valid are at most 300"),
        ("[" * 90000, "lists and objects in one another, too deep"),
    ],
)
def test_what_is_no_json_is_said_in_words(text, reason):
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}$"):
        from_json(text)


def test_json_may_hold_any_number_that_is_one_elsewhere():
    assert from_json("[" + "9" * 300 + ", -1, 2.5, 1e3]") == [10**300 - 1, -1, 2.5, 1000.0]


def test_devices_are_those_of_this_machine():
    device = Device("device", "cpu", "where")
    assert [device.read(name) for name in ("cpu", ["cpu"], "cuda", "")] == ["cpu", "cpu", "cuda", None]
    for name in ("cuda:999", "abacus", 0):
        with pytest.raises(ValueError, match="^device: .*; valid are .*cpu"):
            device.read(name)


def test_switches_of_the_environment_are_read_alike():
    assert [boolean("x", word) for word in ("true", "1", "on", "no", "False", "", None)] == [True] * 3 + [False] * 4


# The tables ---------------------------------------------------------------------------------------------------------


def test_a_requests_own_readings(tmp_path):
    table = infer_options(tiny_task(), Versions(tmp_path))
    read = table.read({"label_subset": "liver, aorta", "concepts": '{"liver": {"shape": "A wedge."}}'})
    assert read == {"label_subset": ["liver", "aorta"], "concepts": {"liver": {"shape": "A wedge."}}}
    assert table.read({"label_subset": ["Spleen"], "model_version": "served"})["label_subset"] == ["spleen"]
    assert table.read({"label_subset": [], "concepts": {}, "model_version": ""}) == {}
    with pytest.raises(ValueError, match="label_subset: unknown label 'livr'; valid are liver, spleen, aorta"):
        table.read({"label_subset": ["liver", "livr"]})
    with pytest.raises(ValueError, match="concepts: expected class → attribute → sentence, as JSON, got list"):
        table.read({"concepts": "[1]"})
    with pytest.raises(ValueError, match="label_info: expected a list of objects"):
        table.read({"label_info": [1]})
    with pytest.raises(CheckpointError, match="model version '9': valid are 'served' and none yet"):
        table.read({"model_version": "9"})


def test_a_run_is_named_like_no_file_beside_the_versions():
    """Two checks disagreed: one took v0001.pt, the name of a version's file."""
    table = train_options(tiny_task(), "sqlite:///mlflow.db")
    assert table.read({"name": "Round_2-b"})["name"] == "Round_2-b"
    for name in ("v0001.pt", "split.json", "..", "a/b", "-a", "ä", "x" * 65, "Concepts"):
        with pytest.raises(
            ValueError, match="name: expected up to 64 letters, digits, dashes and underscores; not concepts, got"
        ):
            table.read({"name": name})


@pytest.mark.parametrize("name", ["quickstart", "amos22-ct"])
def test_what_clients_see_is_what_is_checked(name, tmp_path):
    task = load_task(name, {"model.text": "scratch", "model.text_frozen": "none"})
    infer, train = BiPVLInfer(task, tmp_path), BiPVLTrain(task, tmp_path)
    assert infer.info()["config"] == infer.options.offer()
    assert train.info()["config"] == train.options.offer()
    assert set(RoundTask(task, tmp_path).defaults) <= set(train.options), "MONAI Label's own, too"
    assert "sqlite" not in str(train.info()), "a path of the server"
    assert train.checked({}) == train.options.full({}), "defaults pass their own check"
    found = strategies([name], lambda _: 0)
    assert found["random"].info()["config"] == {"seed": -1} and found["first"].info()["config"] == {}
    assert found["diverse"].info()["config"] == {"model": [name], "seed": -1}


def test_names_that_stand_in_two_places_agree():
    assert tuple(BACKBONES) == VISION_BACKBONES, "an adapter a backbone of the task files"
    assert set(masks.SUFFIXES) < set(RESULT_SUFFIXES)
    assert train_options(tiny_task(), "")["gate_unjudged"].offer == list(UNJUDGED)


def _tables() -> dict[str, OptionTable]:
    infer = infer_options(load_task("quickstart"), None)
    return {
        "Segmenting an image": infer,
        "Segmenting many images": batch_options(infer),
        "Clicks": click_options(load_task("quickstart")),
        "Scribbles": scribble_options(load_task("quickstart")),
        "Next Sample": next_case_options([]),
        "Scoring": OptionTable(*case_options([]).values()),
        "Scoring with `dice`": dice_options([""]),
        "Training": train_options(load_task("quickstart"), ""),
    }


@pytest.mark.parametrize("title", _tables())
def test_the_page_of_options_has_the_tables(title: str) -> None:
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    table = _tables()[title].markdown()
    assert table in section, f"put this table into docs/using/requests.md:\n\n## {title}\n\n{table}"


def test_the_page_has_no_other_table(tmp_path: Path) -> None:
    tables = re.findall(r"^\| option \|.*?\n\n", PAGE + "\n", re.MULTILINE | re.DOTALL)
    rows: list[Any] = re.findall(r"^\| `(\w+)`", "".join(tables), re.MULTILINE)
    assert len(rows) == sum(len(table) for table in _tables().values())
    assert SEED.name in rows
