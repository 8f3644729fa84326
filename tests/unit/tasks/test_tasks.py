"""The tasks that ship: they load, names and values go together, sides are kept, and reading them needs no torch."""

import json
import subprocess
import sys

import pytest

from lib.tasks import TASKS_DIR, list_tasks, load_task, task_from_dict

SHIPPED = ("acdc-mr", "amos22-ct", "hippocampus-mr", "mmwhs-ct", "mmwhs-mr", "msd-brain", "quickstart")
MMWHS = {
    "left ventricle": (1, 500),
    "right ventricle": (2, 600),
    "left atrium": (3, 420),
    "right atrium": (4, 550),
    "myocardium": (5, 205),
    "ascending aorta": (6, 820),
    "pulmonary artery": (7, 850),
}
AMOS = (
    "spleen",
    "right kidney",
    "left kidney",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior vena cava",
    "pancreas",
    "right adrenal gland",
    "left adrenal gland",
    "duodenum",
    "bladder",
    "prostate/uterus",
)


# What ships


def test_the_shipped_tasks_are_these_seven():
    assert tuple(list_tasks()) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_task_loads_under_its_file_name(name):
    task = load_task(name)
    assert task.name == name
    assert len(task.text_rows()) == len(task.classes)
    assert all(len(row) == 6 for row in task.text_rows())


@pytest.mark.parametrize("name", SHIPPED)
def test_values_are_contiguous_from_1(name):
    """3D Slicer names the segments of a label map by position."""
    values = list(load_task(name).label_values.values())
    assert values == list(range(1, len(values) + 1))


@pytest.mark.parametrize("name", SHIPPED)
def test_colors_differ(name):
    task = load_task(name)
    assert len({label.color for label in task.labels.values()}) == len(task.labels)
    assert len({region.color for region in (task.regions or {}).values()}) == len(task.regions or {})


def test_amos_follows_the_numbering_of_the_data_set():
    assert load_task("amos22-ct").label_values == {name: value for value, name in enumerate(AMOS, 1)}


@pytest.mark.parametrize("name", ["mmwhs-ct", "mmwhs-mr"])
def test_mmwhs_reads_raw_and_contiguous_values_as_the_same_label(name):
    task = load_task(name)
    expected = {value: label for label, pair in MMWHS.items() for value in pair}
    assert task.value_names == expected
    assert task.label_values == {label: pair[0] for label, pair in MMWHS.items()}


@pytest.mark.parametrize("name", ["mmwhs-ct", "mmwhs-mr"])
def test_mmwhs_value_205_meets_the_text_of_the_myocardium(name):
    """Pairing labels and text by position would give value 205 the sentences of a ventricle."""
    task = load_task(name)
    label = task.value_names[205]
    assert label == "myocardium"
    assert task.value_names[500] == "left ventricle"
    row = task.text_rows()[task.classes.index(label)]
    assert row[0] == f"The myocardium in {'a CT' if name == 'mmwhs-ct' else 'an MR'} image."
    assert "muscle" in " ".join(row)


def test_the_two_mmwhs_tasks_share_names_and_values_but_no_sentence():
    ct, mr = load_task("mmwhs-ct"), load_task("mmwhs-mr")
    assert ct.value_names == mr.value_names
    sentences = [{s for row in task.text_rows() for s in row} for task in (ct, mr)]
    assert not sentences[0] & sentences[1]


def test_msd_brain_regions_are_unions_of_named_labels():
    task = load_task("msd-brain")
    assert task.overlapping
    assert task.channels == ("FLAIR", "T1", "T1Gd", "T2")
    assert task.label_values == {"edema": 1, "non-enhancing tumor": 2, "enhancing tumor": 3}
    assert task.classes == ("tumor core", "whole tumor", "enhancing tumor")
    assert task.out_channels == 3
    values = {n: {task.label_values[label] for label in r.labels} for n, r in (task.regions or {}).items()}
    assert values == {"tumor core": {2, 3}, "whole tumor": {1, 2, 3}, "enhancing tumor": {3}}


def test_exclusive_classes_have_a_background_channel():
    assert load_task("amos22-ct").out_channels == 16
    assert not load_task("amos22-ct").overlapping


@pytest.mark.parametrize(
    ("name", "spacing", "intensity", "channels"),
    [
        ("amos22-ct", (1.5, 1.5, 2.0), ("range", -175, 250), 1),
        ("mmwhs-ct", (1.5, 1.5, 2.0), ("range", 0, 400), 1),
        ("mmwhs-mr", (1.5, 1.5, 2.0), ("nonzero", None, None), 1),
        ("msd-brain", (1.0, 1.0, 1.0), ("nonzero", None, None), 4),
    ],
)
def test_preprocessing_is_that_of_the_paper(name, spacing, intensity, channels):
    task = load_task(name)
    assert task.spacing == spacing
    assert (task.intensity.mode, task.intensity.low, task.intensity.high) == intensity
    assert len(task.channels) == channels
    assert task.patch == (96, 96, 96)
    assert task.model.feature_size == 48
    assert task.model.text == "emilyalsentzer/Bio_ClinicalBERT"


@pytest.mark.parametrize("name", SHIPPED)
def test_no_task_with_sides_is_flipped_left_to_right(name):
    task = load_task(name)
    sideless = name in ("hippocampus-mr", "msd-brain")
    assert bool(task.lateralised) != sideless
    assert ("left-right" in task.augmentation.flip) == sideless


@pytest.mark.parametrize("name", ["hippocampus-mr", "quickstart"])
def test_the_quickstart_needs_no_download(name):
    assert load_task(name).model.text in ("scratch", "minilm"), "MiniLM is installed with the app"


@pytest.mark.parametrize("name", SHIPPED)
def test_round_trip_through_json(name):
    task = load_task(name)
    assert task_from_dict(json.loads(json.dumps(task.to_dict()))) == task


def test_tasks_and_their_check_import_neither_torch_nor_monailabel():
    code = (
        "import sys, lib.tasks, lib.tasks.check; lib.tasks.check.check(lib.tasks.load_task('quickstart')); "
        "print(sorted({'torch', 'monai', 'monailabel', 'transformers'} & set(sys.modules)))"
    )
    app = TASKS_DIR.parent / "apps" / "bipvl"
    done = subprocess.run([sys.executable, "-c", code], cwd=app, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
