"""A user's own task: two files, no Python, and every mistake in them is named with its file and key."""

import re
from pathlib import Path

import pytest
import yaml

from lib.tasks import ATTRIBUTES, CONCEPTS_DIR, TASKS_DIR, Task, TaskError, list_tasks, load_task, task_from_dict


@pytest.fixture
def own(tmp_path: Path):
    """Writes a user's own task, two files in one folder, from changed copies of shipped data; gives the task's path."""

    def write(task: dict | None = None, concepts: dict | None = None, base: str = "quickstart") -> Path:
        data = yaml.safe_load((TASKS_DIR / f"{base}.yaml").read_text())
        data.update(name="mine", concepts="mine-concepts.yaml", **(task or {}))
        text = yaml.safe_load((CONCEPTS_DIR / f"{base}.yaml").read_text())
        text.update(concepts or {})
        (tmp_path / "mine-concepts.yaml").write_text(yaml.safe_dump(text))
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(data, sort_keys=False))
        return path

    return write


def shipped_labels(base: str = "quickstart") -> dict:
    return yaml.safe_load((TASKS_DIR / f"{base}.yaml").read_text())["labels"]


def shipped_texts(base: str = "quickstart") -> dict:
    return yaml.safe_load((CONCEPTS_DIR / f"{base}.yaml").read_text())["classes"]


def error_of(path: Path | str, overrides: dict | None = None) -> str:
    with pytest.raises(TaskError) as caught:
        load_task(path, overrides)
    return str(caught.value)


def test_an_own_task_is_two_files(own):
    texts = shipped_texts()
    path = own(
        {"labels": {"liver": shipped_labels()["liver"]}},
        {"classes": {"liver": texts["liver"]}},
    )
    assert sorted(p.name for p in path.parent.iterdir()) == ["mine-concepts.yaml", "mine.yaml"]
    task = load_task(path)
    assert (task.name, task.classes, task.out_channels) == ("mine", ("liver",), 2)
    assert task.text_rows() == [[texts["liver"]["sentences"][a] for a in ATTRIBUTES]]


def test_a_review_may_be_dated_without_quotes(own):
    """YAML reads 2026-01-31 as a date, not as a string."""
    path = own()
    concepts = path.parent / "mine-concepts.yaml"
    text = concepts.read_text()
    concepts.write_text(text.replace("status: unreviewed", "status: reviewed\n  by: N. N.\n  date: 2026-01-31"))
    assert concepts.read_text() != text
    assert load_task(path).concepts.review.date == "2026-01-31"


def test_an_own_task_may_use_the_concepts_of_a_shipped_one(own):
    path = own({})
    (path.parent / "mine-concepts.yaml").unlink()
    path.write_text(path.read_text().replace("mine-concepts.yaml", "quickstart.yaml"))
    assert load_task(path).concepts == load_task("quickstart").concepts


def test_the_row_of_a_class_does_not_depend_on_the_order_of_the_concepts_file(own):
    reordered = dict(reversed(shipped_texts("mmwhs-ct").items()))
    path = own(concepts={"classes": reordered}, base="mmwhs-ct")
    assert load_task(path).text_rows() == load_task("mmwhs-ct").text_rows()


# Mistakes


def test_unknown_task_lists_the_valid_ones_and_hints():
    message = error_of("amos22ct")
    assert "'amos22ct'" in message
    assert all(name in message for name in list_tasks())
    assert "did you mean 'amos22-ct'" in message


def test_missing_task_file_is_named(tmp_path):
    assert str(tmp_path / "none.yaml") in error_of(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("change", "key", "hint"),
    [
        ({"spacin": [1, 1, 1]}, "spacin", "spacing"),
        ({"model": {"feature_sizes": 12}}, "model.feature_sizes", "feature_size"),
        ({"training": {"epoch": 3}}, "training.epoch", "epochs"),
        ({"model": {"scratch": {"layer": 4}}}, "model.scratch.layer", "layers"),
    ],
)
def test_misspelt_key_names_file_key_and_hint(own, change, key, hint):
    path = own(change)
    message = error_of(path)
    assert f"{path}: {key}: unknown key" in message
    assert f"did you mean {hint!r}" in message


def test_misspelt_key_of_a_label(own):
    labels = shipped_labels()
    labels["liver"]["colour"] = labels["liver"].pop("color")
    message = error_of(own({"labels": labels}))
    assert "labels.liver.colour: unknown key" in message
    assert "did you mean 'color'" in message
    assert "labels.liver.color: required key is missing" in message


def test_the_part_of_a_structure_is_one_that_dicom_can_say(own):
    labels = shipped_labels()
    labels["liver"]["snomed"]["part"] = "posterior"
    assert load_task(own({"labels": labels})).labels["liver"].snomed.part == "posterior"
    labels["liver"]["snomed"]["part"] = "back"
    message = error_of(own({"labels": labels}))
    assert "labels.liver.snomed.part" in message and "'anterior' or 'posterior'" in message


def test_misspelt_key_of_the_concepts_file(own):
    texts = shipped_texts()
    texts["liver"]["sentence"] = texts["liver"].pop("sentences")
    path = own(concepts={"classes": texts})
    message = error_of(path)
    assert f"{path.parent / 'mine-concepts.yaml'}: classes.liver.sentence: unknown key" in message


def test_missing_concepts_file_names_where_it_was_looked_for(own):
    path = own()
    (path.parent / "mine-concepts.yaml").unlink()
    message = error_of(path)
    assert str(path.parent / "mine-concepts.yaml") in message
    assert f"nor one of that name in {CONCEPTS_DIR}" in message


def test_class_without_concepts(own):
    texts = shipped_texts()
    del texts["spine"]
    path = own(concepts={"classes": texts})
    message = error_of(path)
    assert str(path) in message
    assert "no text for class 'spine'" in message


def test_concepts_for_an_unknown_class(own):
    texts = shipped_texts()
    texts["spleeen"] = texts["spleen"]
    message = error_of(own(concepts={"classes": texts}))
    assert "unknown class 'spleeen'" in message
    assert "liver, spleen" in message


def test_missing_and_unknown_attributes(own):
    texts = shipped_texts()
    texts["liver"]["sentences"]["size"] = texts["liver"]["sentences"].pop("shape")
    message = error_of(own(concepts={"classes": texts}))
    assert "concepts.classes.liver" in message
    assert "'size'" in message
    assert "class, shape, location, appearance, contour, texture" in message


def test_duplicate_value(own):
    labels = shipped_labels()
    labels["spleen"]["value"] = labels["liver"]["value"]
    message = error_of(own({"labels": labels}))
    assert "value 1 belongs to both 'liver' and 'spleen'" in message


def test_file_value_of_one_label_equal_to_the_value_of_another(own):
    labels = shipped_labels()
    labels["liver"]["file_values"] = [2]
    assert "value 2 belongs to both 'liver' and 'spleen'" in error_of(own({"labels": labels}))


def test_duplicate_yaml_key(own):
    path = own()
    path.write_text(path.read_text() + "spacing: [1, 1, 1]\n")
    message = error_of(path)
    assert str(path) in message
    assert "duplicate key 'spacing'" in message


def test_duplicate_nested_yaml_key(own):
    path = own()
    path.write_text(re.sub(r"(\n  epochs: \d+)", r"\1\1", path.read_text()))
    assert "duplicate key 'epochs'" in error_of(path)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "name: [unclosed\n", "{{ name }}: mine\n"])
def test_a_file_that_holds_no_keys(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert str(path) in error_of(path)


def test_unknown_label_of_a_region(own):
    region = {"labels": ["liver", "lung"], "snomed": {"code": "10200004", "meaning": "Liver"}, "color": [1, 2, 3]}
    message = error_of(own({"regions": {"upper organs": region}}))
    assert "regions.upper organs: unknown label 'lung'" in message
    assert "liver, spleen" in message


def test_left_right_flip_with_sided_classes():
    message = error_of("amos22-ct", {"augmentation.flip": ["left-right"]})
    assert "'left-right'" in message
    assert "'right kidney'" in message


@pytest.mark.parametrize("axis", ["posterior-anterior", "inferior-superior"])
def test_other_flips_are_the_users_choice(axis):
    assert load_task("amos22-ct", {"augmentation.flip": [axis]}).augmentation.flip == (axis,)


def test_unknown_axis_lists_the_valid_ones():
    message = error_of("msd-brain", {"augmentation.flip": ["sagittal"]})
    assert "augmentation.flip.0" in message
    assert "left-right" in message


@pytest.mark.parametrize("vision", ["swin_unetr", "swin_unetr_v2"])
def test_swin_feature_size_not_a_multiple_of_12(vision):
    message = error_of("quickstart", {"model.vision": vision, "model.feature_size": "16"})
    assert "feature_size 16" in message
    assert "multiple of 12" in message


def test_other_backbones_take_other_feature_sizes():
    assert load_task("quickstart", {"model.vision": "unet", "model.feature_size": "16"}).model.feature_size == 16


def test_patch_that_the_backbone_cannot_divide():
    assert "multiples of 32" in error_of("quickstart", {"patch": [64, 64, 48]})
    assert "multiples of 16" in error_of("quickstart", {"patch": [64, 64, 40], "model.vision": "unet"})


def test_intensity_limits():
    assert "low < high" in error_of("quickstart", {"intensity": {"mode": "range", "low": 5, "high": 5}})
    assert "neither low nor high" in error_of("quickstart", {"intensity": {"mode": "nonzero", "low": 5}})


def test_a_wrong_choice_lists_the_valid_ones():
    message = error_of("quickstart", {"model.vision": "resnet"})
    assert "model.vision" in message
    assert "unetpp" in message
    assert "'resnet'" in message


def test_a_review_needs_a_signature(own):
    assert "needs by and date" in error_of(own(concepts={"review": {"status": "reviewed"}}))


# Overrides


def test_dotted_overrides_reach_every_level_and_read_strings_as_yaml():
    task = load_task(
        "quickstart",
        {
            "spacing": "[2, 2, 2]",
            "model.feature_size": "24",
            "model.scratch.width": 32,
            "training.learning_rate": "2.0e-4",
        },
    )
    assert task.spacing == (2, 2, 2)
    assert (task.model.feature_size, task.model.scratch.width, task.training.learning_rate) == (24, 32, 2e-4)
    assert task.model.scratch.heads == load_task("quickstart").model.scratch.heads


def test_an_override_creates_a_section_that_the_file_leaves_out():
    assert load_task("amos22-ct", {"training.epochs": "2"}).training.epochs == 2


def test_an_unknown_override_gets_a_hint():
    message = error_of("quickstart", {"model.feature": "24"})
    assert "model.feature: unknown key" in message
    assert "feature_size" in message


def test_an_override_below_a_plain_value():
    assert "'description' holds a value" in error_of("quickstart", {"description.text": "x"})


def test_an_override_that_is_not_yaml():
    message = error_of("quickstart", {"spacing": "[1, 2"})
    assert "'spacing'" in message
    assert "not valid YAML" in message


def test_sentences_for_one_request():
    task = load_task("quickstart")
    changed = task.with_concepts({"liver": {"shape": "A big wedge."}})
    assert changed.text_rows()[0][1] == "A big wedge."
    assert changed.text_rows()[0][2:] == task.text_rows()[0][2:]
    assert changed.text_rows()[1:] == task.text_rows()[1:]
    assert changed.concepts.hash != task.concepts.hash


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ({"lung": {}}, ("'lung'", "liver")),
        ({"liver": {"size": "Big."}}, ("'size'", "texture")),
        ({"liver": {"shape": " "}}, ("liver.shape", "expected a sentence")),
        ({"liver": "big"}, ("liver", "expected attribute")),
        ("liver", ("expected class",)),
    ],
)
def test_wrong_sentences_for_one_request(override, words):
    with pytest.raises(TaskError) as caught:
        load_task("quickstart").with_concepts(override)
    assert all(word in str(caught.value) for word in words)


def test_a_checkpoint_of_plain_data_is_checked_like_a_file():
    data = load_task("quickstart").to_dict()
    data["modle"] = data.pop("model")
    with pytest.raises(TaskError, match=r"checkpoint: modle: unknown key.*did you mean 'model'"):
        task_from_dict(data, "checkpoint")


def test_a_task_cannot_be_changed_by_accident():
    task = load_task("quickstart")
    with pytest.raises(ValueError, match="frozen"):
        task.name = "other"
    assert isinstance(task, Task)
