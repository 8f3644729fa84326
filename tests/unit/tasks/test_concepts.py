"""The sentences that ship pass every rule, and each rule is broken once."""

import re
from typing import Any

import pytest
from pydicom.sr._concepts_dict import concepts as dicom_concepts

from lib.tasks import ATTRIBUTES, ClassText, Concepts, Review, Task, TaskError, list_tasks, load_task
from lib.tasks.check import DIAGNOSTIC_WORDS, FUNCTIONAL_WORDS, check, estimate_tokens

SHIPPED = list_tasks()
# Codes that pydicom's dictionary (the SNOMED CT subset that DICOM uses) does not have; each needs a comment here.
NOT_IN_DICOM: dict[str, str] = {}


def changed(task: Task, name: str, ambiguous: tuple[str, ...] | None = None, **sentences: Any) -> Task:
    """The task with other sentences for a class, unchecked; `class_` writes the attribute `class`, None removes one.
    `variants` are the further wordings of its attributes."""
    text, variants = task.concepts.classes[name], sentences.pop("variants", {})
    new = {**text.sentences, **{attribute.rstrip("_"): sentence for attribute, sentence in sentences.items()}}
    kept = {attribute: sentence for attribute, sentence in new.items() if sentence is not None}
    other = ClassText(sentences=kept, variants=variants, ambiguous=text.ambiguous if ambiguous is None else ambiguous)
    classes = {**task.concepts.classes, name: other}
    return with_concepts(task, classes=classes)


def with_concepts(task: Task, **update: object) -> Task:
    return task.model_copy(update={"concepts": task.concepts.model_copy(update=update)})


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task("quickstart")


def found(task: Task, **options: Any) -> list[tuple[str, str, str]]:
    return [(p.class_name, p.attribute, p.message) for p in check(task, **options)]


# What ships


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_task_has_no_problem(name):
    assert [str(problem) for problem in check(load_task(name))] == []


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_sentences_have_a_sensible_length(name):
    concepts = load_task(name).concepts
    for text in concepts.classes.values():
        lengths = {a: len(s.split()) for a, s in text.sentences.items() if a != "class"}
        assert all(8 <= length <= 25 for length in lengths.values()), lengths


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_sentences_admit_that_nobody_has_reviewed_them(name):
    assert load_task(name).concepts.review.status == "unreviewed"


@pytest.mark.parametrize("name", SHIPPED)
def test_the_class_sentence_has_the_fixed_form(name):
    task = load_task(name)
    article = "an" if task.modality == "MR" else "a"
    for row, class_name in zip(task.text_rows(), task.classes, strict=True):
        # A class with a plainer name may have it between commas: The anterior hippocampus, its head, in an MR image.
        form = rf"The {class_name}(, [a-z ]+,)? in {article} {task.modality} image\."
        assert re.fullmatch(form, row[0]), row[0]


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize(("text_format", "rows"), [("concepts", 6), ("ambiguous", 6), ("definition", 1), ("name", 1)])
def test_the_four_text_formats(name, text_format, rows):
    task = load_task(name, {"model.text_format": text_format})
    texts = task.text_rows()
    assert [len(row) for row in texts] == [rows] * len(task.classes)
    assert all(isinstance(sentence, str) and sentence.strip() for row in texts for sentence in row)


def test_the_text_formats_say_what_they_promise(task):
    liver = task.concepts.classes["liver"]
    formats = {f: task.concepts.rows(("liver",), f)[0] for f in ("concepts", "ambiguous", "definition", "name")}
    assert formats["concepts"] == [liver.sentences[a] for a in ATTRIBUTES]
    assert formats["ambiguous"] == list(liver.ambiguous)
    assert formats["definition"] == [" ".join(formats["concepts"])]
    assert formats["name"] == ["liver"]


def test_an_unknown_text_format_lists_the_valid_ones(task):
    with pytest.raises(ValueError, match="concepts, ambiguous, definition, name"):
        task.concepts.rows(task.classes, "poem")


def plain(meaning: str) -> str:
    return re.sub(r"\s*\([^)]*\)$", "", meaning).lower()


@pytest.mark.parametrize("name", SHIPPED)
def test_snomed_codes_and_meanings_are_those_of_dicom(name):
    meanings: dict[str, set[str]] = {}
    snomed_codes: Any = dicom_concepts["SCT"]
    for entries in snomed_codes.values():
        for code, (meaning, _) in entries.items():
            meanings.setdefault(code, set()).add(plain(meaning))
    task = load_task(name)
    structures: list[Any] = [*task.labels.values(), *(task.regions or {}).values()]
    for snomed in (structure.snomed for structure in structures):
        if snomed.code not in NOT_IN_DICOM:
            assert snomed.code in meanings, snomed
            assert plain(snomed.meaning) in meanings[snomed.code], (snomed, meanings[snomed.code])


@pytest.mark.parametrize("name", SHIPPED)
def test_labels_with_one_code_differ_by_side_or_part_or_belong_to_one_finding(name):
    coded: dict[tuple[str | None, ...], list[str]] = {}
    for label, spec in load_task(name).labels.items():
        coded.setdefault((spec.snomed.code, spec.snomed.laterality, spec.snomed.part), []).append(label)
    shared = [labels for labels in coded.values() if len(labels) > 1]
    assert shared == ([["non-enhancing tumor", "enhancing tumor"]] if name == "msd-brain" else [])


@pytest.mark.parametrize("name", SHIPPED)
def test_the_side_and_the_part_of_a_code_are_those_of_the_name(name):
    for label, spec in load_task(name).labels.items():
        assert {spec.snomed.laterality, spec.snomed.part} - {None} <= set(label.split())


# The rules


def test_each_class_has_every_attribute(task):
    problems = found(changed(task, "liver", shape=None))
    assert [p[:2] for p in problems] == [("liver", "shape")]
    assert "no sentence" in problems[0][2]
    assert [p[:2] for p in found(changed(task, "liver", shape="  "))] == [("liver", "shape")]


@pytest.mark.parametrize(
    ("sentence", "found_"),
    [
        ("A <script>alert(1)</script> wedge.", "'<'"),
        ("Brighter than fat &lt;", "'&lt;'"),
        ("A {{ wedge }}.", "'{'"),
        ("A `wedge`.", "'`'"),
        ("One line\nand another.", "the character U+000A"),
        ("Turned \u202e round.", "the character U+202E"),
    ],
)
def test_sentences_are_plain_text(task, sentence, found_):
    problems = [p for p in check(changed(task, "liver", shape=sentence)) if p.fatal]
    assert [(p.attribute, p.message) for p in problems] == [("shape", f"sentences are plain text; found {found_}")]
    with pytest.raises(TaskError, match="liver.shape: sentences are plain text"):
        task.with_concepts({"liver": {"shape": sentence}})


def test_signs_of_plain_text_are_none(task):
    plain = "About 5 % – 10 % brighter (fat & air: −100 HU), “smooth”; size 3×4 cm / 2 in."
    assert not [p for p in check(changed(task, "liver", shape=plain)) if p.fatal]


def test_an_overlong_sentence(task):
    assert found(changed(task, "liver", shape="a" * 400), count_tokens=lambda text: 9) == []
    (problem,) = check(changed(task, "liver", shape="a" * 401), count_tokens=lambda text: 9)
    assert problem.fatal and "401 characters; a sentence has at most 400" in problem.message


def test_no_other_attribute(task):
    problems = found(changed(task, "liver", size="A large organ that fills the upper abdomen."))
    assert [p[:2] for p in problems] == [("liver", "size")]
    assert "unknown attribute" in problems[0][2]


@pytest.mark.parametrize(
    "word", ["function", "filters", "Pumps", "produces", "stores", "digests", "supplies", "drains"]
)
def test_no_functional_wording(task, word):
    problems = found(changed(task, "liver", texture=f"A gray organ that {word} something bright."))
    assert [p[:2] for p in problems] == [("liver", "texture")]
    assert f"functional word {word.lower()!r}" in problems[0][2]


@pytest.mark.parametrize(
    "word", ["normal", "abnormal", "cancer", "disease", "Suspicious", "benign", "malignant", "tumor"]
)
def test_no_diagnostic_wording(task, word):
    problems = found(changed(task, "liver", texture=f"A gray organ with {word} branches."))
    assert [p[:2] for p in problems] == [("liver", "texture")]
    assert f"diagnostic word {word.lower()!r}" in problems[0][2]


def test_ambiguous_sentences_are_held_to_the_same_wording(task):
    ambiguous = (*task.concepts.classes["liver"].ambiguous[:5], "It filters a lot.")
    assert [p[:2] for p in found(changed(task, "liver", ambiguous))] == [("liver", "ambiguous 6")]


def test_words_are_matched_whole_and_beside_hyphens(task):
    assert found(changed(task, "liver", texture="Gray with paranormally drainless, storehouse-like corners.")) == []
    assert len(found(changed(task, "liver", texture="A normal-looking gray interior with branches."))) == 1


def test_the_names_of_the_tasks_own_classes_are_allowed():
    task = load_task("msd-brain")
    assert found(changed(task, "tumor core", texture="Dark tumor beside bright edema on one side.")) == []
    assert len(found(changed(task, "tumor core", texture="Dark cancer beside bright edema on one side."))) == 1


def test_the_word_lists_hold_single_lower_case_words_once():
    words = (*FUNCTIONAL_WORDS, *DIAGNOSTIC_WORDS)
    assert len(set(words)) == len(words)
    assert all(re.fullmatch("[a-z]+", word) for word in words)


def test_a_sentence_within_the_limit_of_the_tokenizer(task):
    def count(text: str) -> int:
        return len(text.split()) + 2

    longest = max(count(row[0]) for row in task.concepts.rows(task.classes, "definition"))
    assert found(task, count_tokens=count, max_tokens=longest) == []
    problems = found(changed(task, "liver", shape="w " * (longest - 1)), count_tokens=count, max_tokens=longest)
    assert [p[:2] for p in problems] == [("liver", "shape"), ("liver", "definition")]
    assert f"{longest + 1} tokens; the limit is {longest}" in problems[0][2]


def test_the_joined_definition_within_the_limit(task):
    limit = max(len(s.split()) for row in task.text_rows() for s in row)
    problems = found(task, count_tokens=lambda text: len(text.split()), max_tokens=limit)
    assert {p[1] for p in problems} >= {"definition"}
    assert not {p[1] for p in problems} & set(ATTRIBUTES)


def test_without_a_tokenizer_the_estimate_is_two_letters_a_token():
    assert estimate_tokens("") == 2
    assert estimate_tokens("liver") == 2 + 3
    assert estimate_tokens("A gray organ.") == 2 + 1 + 2 + 3 + 1


def test_the_estimate_decides_without_a_tokenizer(task):
    problems = found(changed(task, "liver", shape="a " * 511))
    assert ("liver", "shape", "513 tokens; the limit is 512") in problems


def test_no_sentence_twice_whatever_case_space_and_class_name(task):
    spleen = changed(task, "spleen", shape="The spleen is a  Wide wedge.")
    problems = found(changed(spleen, "liver", shape="the LIVER is a wide wedge"))
    assert [p[:2] for p in problems] == [("spleen", "shape")]
    assert "class 'liver'" in problems[0][2]


def test_the_same_words_in_two_attributes_are_no_duplicate(task):
    spleen = changed(task, "spleen", shape="A wide gray wedge under the ribs.")
    assert found(changed(spleen, "liver", contour="A wide gray wedge under the ribs.")) == []


def test_no_ambiguous_sentence_twice(task):
    first = task.concepts.classes["liver"].ambiguous
    spleen = (*task.concepts.classes["spleen"].ambiguous[:5], first[0])
    problems = found(changed(task, "spleen", spleen))
    assert [p[:2] for p in problems] == [("spleen", "ambiguous 6")]


def test_class_sentences_that_differ_by_the_name_only_are_fine(task):
    assert task.text_rows()[0][0] == "The liver in a CT image."
    assert task.text_rows()[1][0] == "The spleen in a CT image."
    assert found(task) == []


@pytest.mark.parametrize("attribute", ["class_", "location"])
def test_the_side_is_stated_where_a_twin_exists(task, attribute):
    problems = found(changed(task, "left kidney", None, **{attribute: "The kidney in a CT image near the spleen."}))
    assert ("left kidney", attribute.rstrip("_"), "the side 'left' is missing") in problems


def test_the_side_of_the_twin_does_not_count(task):
    problems = found(changed(task, "left kidney", location="On the right side of the body, next to the spine."))
    assert problems == [("left kidney", "location", "the side 'left' is missing")]


def test_twins_without_laterality_code_count_too():
    task = load_task("mmwhs-ct")
    problems = found(changed(task, "right atrium", location="At the border of the heart between two large veins."))
    assert problems == [("right atrium", "location", "the side 'right' is missing")]


def test_a_side_without_a_twin_need_not_be_stated():
    task = load_task("acdc-mr")
    alone = task.model_copy(update={"labels": {n: v for n, v in task.labels.items() if n != "right ventricle"}})
    moved = changed(alone, "left ventricle", location="At the center of the muscular ring, behind the other cavity.")
    assert found(moved) == []
    assert len(found(changed(task, "left ventricle", location="At the center of the muscular ring."))) == 1


@pytest.mark.parametrize(
    ("sentence", "message"),
    [
        ("The organ in a CT image.", "the class name 'liver' is missing"),
        ("The liver in an image.", "the modality 'CT' is missing"),
        ("The livers in a CT image.", "the class name 'liver' is missing"),
    ],
)
def test_the_class_sentence_names_class_and_modality(task, sentence, message):
    assert found(changed(task, "liver", class_=sentence)) == [("liver", "class", message)]


def test_sentences_for_another_modality(task):
    problems = found(with_concepts(task, modality="MR"))
    assert "'MR', but the task's modality is 'CT'" in problems[0][2]
    assert len(problems) == 1 + len(task.classes)


@pytest.mark.parametrize("review", [{"status": ""}, {"status": "reviewed"}, {"status": "reviewed", "by": "N. N."}])
def test_the_review_status_is_present_and_signed(task, review):
    unchecked = Review.model_construct(**{"by": None, "date": None, **review})
    assert [p[:2] for p in found(with_concepts(task, review=unchecked))] == [("", "review")]


def test_only_a_draft_is_one_in_part():
    assert Review(status="draft", part="wordings").part == "wordings"
    with pytest.raises(ValueError, match="what of a draft a language model wrote; the status is 'unreviewed'"):
        Review(status="unreviewed", part="wordings")


def test_a_signed_review_is_fine(task):
    assert found(with_concepts(task, review=Review(status="reviewed", by="N. N.", date="2026-01-31"))) == []


def test_as_many_ambiguous_sentences_for_every_class(task):
    problems = found(changed(task, "liver", task.concepts.classes["liver"].ambiguous[:4]))
    assert [p[:2] for p in problems] == [("", "ambiguous")]
    assert "liver 4, spleen 6" in problems[0][2]


def test_no_ambiguous_sentences_at_all_is_fine(task):
    none = {n: ClassText(sentences=t.sentences) for n, t in task.concepts.classes.items()}
    assert found(with_concepts(task, classes=none)) == []


FINE = "Broad and wedge-like, narrowing to the left."
BAD_WORDINGS = {
    "markup": ("shape", "A <b>wedge</b>.", "sentences are plain text; found '<'"),
    "length": ("shape", "a" * 401, "401 characters; a sentence has at most 400"),
    "tokens": ("shape", "0." * 190, "382 tokens; the limit is 300"),
    "function": ("texture", "Gray, and it pumps.", "functional word 'pumps'; describe what is visible"),
    "diagnosis": ("class", "An abnormal spleen.", "diagnostic word 'abnormal'; describe what is visible"),
    "its own sentence": ("shape", "{own}", "the same as the sentence itself"),
    "another wording": ("shape", "broad and wedge-like  NARROWING to the left", "the same as wording 1"),
    "another's sentence": ("shape", "{other}", "the same sentence as class 'aorta'"),
    "another's wording": ("shape", "Long tube before the spine.", "the same sentence as class 'liver'"),
    "side in the class": ("class", "Kidney on CT.", "the side 'left' is missing"),
    "side in the location": ("location", "Right of the spine.", "the side 'left' is missing"),
}


@pytest.mark.parametrize("rule", BAD_WORDINGS)
def test_each_rule_holds_for_wordings_too(task, rule):
    attribute, wording, message = BAD_WORDINGS[rule]
    name = "left kidney" if rule.startswith("side") else "spleen"
    sentences = {n: text.sentences[attribute] for n, text in task.concepts.classes.items()}
    wording = wording.format(own=sentences[name], other=sentences["aorta"])
    liver = changed(task, "liver", variants={attribute: ("Long tube before the spine!", "Another one.")})
    assert found(changed(liver, name, variants={attribute: (FINE, "Wedge, broad, left.")}), max_tokens=300) == []
    problems = check(changed(liver, name, variants={attribute: (FINE, wording)}), max_tokens=300)
    assert [(p.class_name, p.attribute, p.message) for p in problems] == [(name, f"{attribute} wording 2", message)]
    assert problems[0].fatal is (rule in ("markup", "length", "tokens"))


def test_wordings_of_the_class_name_it_as_they_like_and_an_attribute_has_none_or_two(task):
    assert found(changed(task, "liver", variants={"class": ("Hepar.", "The big organ under the right ribs.")})) == []
    for variants, reason in (
        ({"shape": ("A wedge.",)}, "at least 2 are needed, because the last is kept aside"),
        ({"shape": ("A wedge.", " ")}, "shape: wording 2 is empty"),
        ({"size": ("Large.", "Big.")}, "unknown attribute 'size'; valid are class"),
    ):
        with pytest.raises(ValueError, match=reason):
            changed(task, "liver", variants=variants)


def test_a_problem_reads_as_class_attribute_message_and_sentence(task):
    (problem,) = check(changed(task, "liver", texture="A normal gray interior."))
    assert str(problem).startswith("liver.texture: diagnostic word 'normal'")
    assert str(problem).endswith("in 'A normal gray interior.'")


def test_the_hash_follows_the_sentences_and_not_the_review(task):
    signed = task.concepts.model_copy(update={"review": Review(status="reviewed", by="N. N.", date="2026-01-31")})
    assert signed.hash == task.concepts.hash
    assert changed(task, "liver", shape="A wide gray wedge.").concepts.hash != task.concepts.hash
    worded = [changed(task, "liver", variants={"shape": ("Wide wedge.", last)}) for last in ("Gray.", "Dark.")]
    assert {t.concepts.hash for t in worded} == {task.concepts.hash}, "what is asked is the same"
    assert len({t.concepts.wordings_hash for t in worded}) == 2
    bare = {name: ClassText(sentences=text.sentences) for name, text in task.concepts.classes.items()}
    assert with_concepts(task, classes=bare).concepts.wordings_hash == ""
    assert isinstance(signed, Concepts)
