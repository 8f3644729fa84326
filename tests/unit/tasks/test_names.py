"""Names of classes: which are one, and which a task may have."""

from __future__ import annotations

import json
import unicodedata

import pytest

from lib.infers.options import Options, infer_options
from lib.tasks import Task, TaskError, folded, list_tasks, load_task, meant, task_from_dict
from lib.tasks.revisions import Revisions
from support.helpers import label, tiny_overlapping_task, tiny_task

KIDNEYS = ("left kidney", "right kidney")


def kidneys(*names: str) -> Task:
    return tiny_task(labels={name: label(value) for value, name in enumerate(names or KIDNEYS, 1)})


@pytest.mark.parametrize(
    "name", ["left kidney", "Left Kidney", "LEFT-KIDNEY", "left_kidney", " left   kidney ", "left-_kidney"]
)
def test_case_hyphens_underscores_and_spaces_do_not_matter(name):
    assert meant(name, KIDNEYS) == "left kidney"


@pytest.mark.parametrize("name", ["leftkidney", "kidney", "left kidneys", "", "left.kidney"])
def test_anything_else_is_unknown(name):
    assert meant(name, KIDNEYS) is None


def test_a_letter_counts_however_unicode_composes_it():
    assert folded(unicodedata.normalize("NFD", "Dünndarm")) == folded("DÜNNDARM") == folded("dünndarm")
    assert folded("Groß") == folded("GROSS")


def test_of_two_that_are_one_the_same_spelling_is_meant():
    assert meant("A b", ["a-b", "A b"]) == "A b"
    assert meant("a_b", ["a-b", "A b"]) is None


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("x" * 65, "has 65 characters"),
        ("a\\b", r"holds '\\\\'"),
        ("a=b", "holds '='"),
        ("a,b", "holds ','"),
        ("a^b", r"holds '\^'"),
        ("a\tb", "cannot be seen"),
        ("a\u200bb", "cannot be seen"),
        ("", "is empty"),
        ("- _", "is empty"),
        (" liver", "begins or ends with a space"),
        ("Background", "means the background"),
        ("BACK-GROUND", None),
        ("x" * 64, None),
        ("prostate/uterus", None),
        ("Bauchspeicheldrüse (Kopf)", None),
    ],
)
def test_names_that_clients_or_archives_cannot_carry_are_refused_when_a_task_is_loaded(name, problem):
    if problem is None:
        assert kidneys("liver", name).classes == ("liver", name)
    else:
        with pytest.raises(TaskError, match=f"tests: labels: .*{problem}.*valid are up to 64 visible characters"):
            kidneys("liver", name)


def test_two_classes_with_one_name_are_refused():
    with pytest.raises(TaskError, match="labels: 'left kidney' and 'Left-Kidney' count as one name"):
        kidneys("left kidney", "Left-Kidney")
    data = tiny_overlapping_task().to_dict()
    data["regions"]["Edema"] = data["regions"].pop("whole tumour")
    data["concepts"]["classes"]["Edema"] = data["concepts"]["classes"].pop("whole tumour")
    with pytest.raises(TaskError, match="regions: 'Edema' and the label 'edema' count as one name"):
        task_from_dict(data)
    data["regions"]["background"] = data["regions"].pop("Edema")
    data["concepts"]["classes"]["background"] = data["concepts"]["classes"].pop("Edema")
    with pytest.raises(TaskError, match="regions: 'background' means the background"):
        task_from_dict(data)


@pytest.mark.parametrize("name", list_tasks())
def test_every_shipped_name_can_be_used(name):
    task = load_task(name)
    for label_name in task.labels:
        assert meant(label_name.upper().replace(" ", "-"), task.labels) == label_name


def test_what_clients_declare_select_and_describe_is_compared_in_the_same_way(tmp_path):
    task = kidneys()
    assert task.annotated(["Left-Kidney"]) == (True, False)
    assert task.named(["RIGHT_KIDNEY", "left kidney"]) == ["right kidney", "left kidney"]
    chosen = Options.of(infer_options(task, None).read({"label_subset": "Right-Kidney"}), task)
    assert chosen.classes == ("right kidney",)
    own = task.with_concepts({"Left_Kidney": {"shape": "A bean."}})
    assert own.concepts.classes["left kidney"].sentences["shape"] == "A bean."
    regions = tiny_overlapping_task()
    assert regions.annotated(["Whole-Tumour"]) == (True, False, False)
    assert regions.annotated(["Enhancing_Tumour", "NON-enhancing tumour"]) == (False, True, True)


def test_sentences_stay_with_a_class_that_is_written_in_another_way(tmp_path):
    before = kidneys()
    Revisions(before, tmp_path).save(before.with_concepts({"left kidney": {"shape": "A bean."}}), 0, "ann", "shape")
    now = kidneys("Left-Kidney", "right kidney")
    text = Revisions(now, tmp_path).text(1)
    assert text.concepts.classes["Left-Kidney"].sentences["shape"] == "A bean."
    assert json.dumps(text.to_dict())


def test_a_task_takes_over_the_spelling_of_another():
    before, now = kidneys(), kidneys("Left-Kidney", "aorta")
    task = before.respelled(now)
    assert task.classes == ("Left-Kidney", "right kidney")
    assert task.label_values == {"Left-Kidney": 1, "right kidney": 2}
    assert task.text_rows() == before.text_rows()
    data = tiny_overlapping_task().to_dict()
    data["labels"]["EDEMA"] = data["labels"].pop("edema")
    data["regions"]["whole tumour"]["labels"] = ["EDEMA", "non-enhancing tumour", "enhancing tumour"]
    regions = tiny_overlapping_task().respelled(task_from_dict(data))
    assert set(regions.labels) == {"EDEMA", "non-enhancing tumour", "enhancing tumour"}
    assert regions.regions["whole tumour"].labels[0] == "EDEMA"
