"""Drafting sentences through an endpoint that speaks the protocol: good answers, bad ones, limits, words of people."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from lib.app.cli import commands as cli
from lib.tasks import ATTRIBUTES, load_concepts, load_task
from lib.tasks.check import check
from lib.tasks.generate import WRITTEN, class_sentence
from support import ROOT
from support.endpoint import (
    KEY,
    MODEL,
    TASK,
    about_wordings,
    completion,
    drafted,
    error,
    generate,
    given,
    good,
    sentences,
    wordings,
)

pytest_plugins = ("support.endpoint",)

# Good answers ---------------------------------------------------------------------------------------------------------


def test_every_class_is_drafted_checked_and_waits_for_a_person(endpoint, out):
    result = generate(endpoint, out)
    assert result.exit_code == 0, result.output
    task = drafted(out)
    assert (task.concepts.review.status, task.concepts.review.by) == ("draft", MODEL)
    assert check(task) == []
    for name in TASK.classes:
        assert task.concepts.classes[name].sentences == {"class": f"The {name} in a CT image.", **sentences(name)}
    assert endpoint.asked() == list(TASK.classes), "one request per class"
    assert "Nobody has reviewed it" in out.read_text() and "6/6" in result.output
    assert list(out.parent.iterdir()) == [out], "nothing else is left"


def test_a_model_is_told_the_structure_and_nothing_of_a_patient(endpoint, out):
    generate(endpoint, out)
    system, user = (m["content"] for m in endpoint.requests[3]["messages"])
    assert all(attribute in system for attribute in WRITTEN)
    assert "no diagnosis" in system and "Nothing about what a structure does" in system
    assert "'right kidney'" in user and "'right', in the location" in user and "Modality: CT" in user
    assert set(endpoint.requests[3]) == {"model", "messages"}, "nothing that not every server knows"


def test_a_task_without_a_concepts_file_is_drafted_beside_it(endpoint, tmp_path, monkeypatch):
    task = yaml.safe_load((ROOT / "sample-apps-config" / "quickstart.yaml").read_text())
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump({**task, "name": "own", "concepts": "own-words.yaml"}))
    assert generate(endpoint, None, task=file).exit_code == 0
    assert load_task(file).concepts.classes["liver"].sentences["shape"] == sentences("liver")["shape"]
    file.write_text(yaml.safe_dump({**task, "name": "own", "concepts": "own.yaml"}))
    assert generate(endpoint, file, task=file).exit_code == 1, "the task file itself is not overwritten"


def test_answers_in_a_code_fence_with_words_around_are_read(endpoint, out):
    fenced = f"Here you are:\n```json\n{json.dumps(sentences('liver'), indent=2)}\n```\nAnything else?"
    endpoint.always["liver"] = lambda name: (200, completion(fenced))
    assert generate(endpoint, out).exit_code == 0
    assert len(endpoint.requests) == 6


def test_articles_follow_the_sound_of_the_letters():
    assert class_sentence(load_task("acdc-mr"), "myocardium") == "The myocardium in an MR image."
    for task in map(load_task, ("amos22-ct", "msd-brain")):
        for name in task.classes:
            assert class_sentence(task, name) == task.concepts.classes[name].sentences["class"]


# Bad answers ----------------------------------------------------------------------------------------------------------

BAD = {
    "prose": (lambda n: completion("I would rather talk."), "there is no JSON object"),
    "cut JSON": (lambda n: completion('{"shape": "A wedge", }'), "not valid JSON"),
    "nested too deep": (lambda n: completion('{"shape": ' + "[" * 9000 + "]" * 9000 + "}"), "not valid JSON"),
    "a key missing": (
        lambda n: completion(json.dumps({k: v for k, v in sentences(n).items() if k != "contour"})),
        "the key 'contour' is missing",
    ),
    "an unknown key": (lambda n: completion(json.dumps(sentences(n, size="Large."))), "unknown key 'size'"),
    "all classes at once": (
        lambda n: completion(json.dumps({c: sentences(c) for c in TASK.classes})),
        "the key 'shape' is missing",
    ),
    "not a string": (
        lambda n: completion(json.dumps(sentences(n, shape=["A wedge."]))),
        "shape: expected one sentence",
    ),
    "empty sentence": (lambda n: completion(json.dumps(sentences(n, texture=" "))), "texture: expected one sentence"),
    "function": (lambda n: completion(json.dumps(sentences(n, shape="It pumps blood."))), "functional word 'pumps'"),
    "diagnosis": (lambda n: completion(json.dumps(sentences(n, shape="A normal one."))), "diagnostic word 'normal'"),
    "markup": (lambda n: completion(json.dumps(sentences(n, shape="A <b>wedge</b>."))), "plain text; found '<'"),
    "too long": (lambda n: completion(json.dumps(sentences(n, shape="a " * 300))), "599 characters"),
    "another's words": (
        lambda n: completion(json.dumps(sentences(n, shape=sentences("liver")["shape"]))),
        "the same sentence as class 'liver'",
    ),
    "side missing": (
        lambda n: completion(json.dumps(sentences(n, location="In the retroperitoneum."))),
        "the side 'left' is missing",
    ),
    "refusal": (lambda n: completion(None, message={"refusal": "I cannot help."}), "the model refused: I cannot help."),
    "filtered": (lambda n: completion("", finish_reason="content_filter"), "content filter"),
    "cut off": (lambda n: completion('{"shape"', finish_reason="length"), "cut off"),
    "no content": (lambda n: completion(None), "the answer is empty"),
    "no choice": (lambda n: {**completion(""), "choices": []}, "not a chat completion"),
    "other JSON": (lambda n: {"detail": "gateway"}, "not a chat completion"),
    "JSON list": (lambda n: [1], "not a chat completion"),
    "broken JSON": (lambda n: '{"id": "chatcm', "not valid JSON"),
    "very long": (lambda n: completion("{" + "x" * 30_000 + "}"), "30002 characters"),
}


@pytest.mark.parametrize("kind", BAD)
def test_the_model_is_told_what_is_wrong_and_asked_again(endpoint, out, kind):
    body, reason = BAD[kind]
    endpoint.script = [good, good, lambda name: (200, body(name))]  # the third is the left kidney's
    result = generate(endpoint, out)
    assert result.exit_code == 0, result.output
    assert endpoint.asked().count("left kidney") == 2 and len(endpoint.requests) == 7
    assert reason in endpoint.requests[3]["messages"][-1]["content"]
    assert check(drafted(out)) == []


def test_a_page_instead_of_an_answer_is_told(endpoint, out):
    endpoint.always["liver"] = lambda name: (200, "<html>log in</html>", {"Content-Type": "text/html"})
    result = generate(endpoint, out, "--attempts", 2)
    assert result.exit_code == 1 and "liver: no answer of 2 could be used" in result.output
    assert "not a chat completion" in result.output


def test_a_class_is_given_up_after_so_many_answers_and_the_others_are_kept(endpoint, out):
    endpoint.always["aorta"] = lambda name: (200, completion(None, message={"refusal": "No."}))
    result = generate(endpoint, out, "--attempts", 3)
    assert result.exit_code == 1
    assert endpoint.asked().count("aorta") == 3 and len(endpoint.requests) == 5 + 3
    assert "aorta: no answer of 3 could be used; the last: the model refused: No." in result.output
    assert not out.exists(), "nothing half-finished is written"
    endpoint.requests.clear()
    endpoint.always.clear()
    assert generate(endpoint, out).exit_code == 0
    assert endpoint.asked() == ["aorta"]
    assert check(drafted(out)) == []


# The endpoint ---------------------------------------------------------------------------------------------------------


def test_a_rate_limit_is_waited_for(endpoint, out):
    busy = (429, error("Rate limit reached", "rate_limit_exceeded"), {"Retry-After": "1"})
    endpoint.script = [good, lambda name: busy, lambda name: busy]
    result = generate(endpoint, out)
    assert result.exit_code == 0, result.output
    assert endpoint.asked()[1:4] == ["spleen"] * 3
    gaps = [b - a for a, b in zip(endpoint.times, endpoint.times[1:], strict=False)]
    assert min(gaps[1:3]) > 0.95, "the endpoint's own wait is kept"
    assert max(gaps[3:]) < 0.95


def test_a_rate_limit_that_stays_ends_the_run_and_the_next_goes_on(endpoint, out):
    busy = (429, error("You exceeded your current quota", "insufficient_quota"), {"Retry-After": "0.01"})
    endpoint.script = [good, good, *[lambda name: busy] * 3]
    result = generate(endpoint, out, "--retries", 2)
    assert result.exit_code == 1
    assert "still over its rate limit or quota after 2 retries (You exceeded" in str(result.exception)
    assert len(endpoint.requests) == 2 + 3 and not out.exists()
    assert list(load_concepts(out.with_name("drafted.yaml.part")).classes) == ["liver", "spleen"]
    endpoint.requests.clear()
    assert generate(endpoint, out).exit_code == 0
    assert endpoint.asked() == list(TASK.classes)[2:]


@pytest.mark.parametrize(
    ("arguments", "key", "reason"),
    [
        ([], "sk-wrong-and-secret", "the key is refused (Incorrect API key provided)"),
        (["--model", "other"], KEY, "answers 404 (The model other does not exist)"),
    ],
)
def test_what_cannot_become_better_is_asked_once(endpoint, out, arguments, key, reason):
    result = generate(endpoint, out, *arguments, key=key)
    assert result.exit_code == 1 and reason in str(result.exception)
    assert len(endpoint.requests) == 1
    assert "secret" not in result.output + str(result.exception)


def test_errors_of_the_endpoint_and_a_cut_line_are_tried_again(endpoint, out):
    endpoint.script = [lambda n: (503, error("overloaded", "server_error")), lambda n: None]
    result = generate(endpoint, out)
    assert result.exit_code == 0, result.output
    assert endpoint.asked()[:3] == ["liver"] * 3


def test_nobody_there(endpoint, out):
    endpoint.http.shutdown()
    endpoint.http.server_close()
    result = generate(endpoint, out, "--retries", 0)
    assert result.exit_code == 1 and "cannot be reached" in str(result.exception)


def test_a_key_from_a_file_and_none_for_an_endpoint_of_ones_own(endpoint, out, tmp_path):
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    assert generate(endpoint, out, "--key-file", file, key="").exit_code == 0
    result = generate(endpoint, out, "--class", "liver", key="")
    assert "the key is refused" in str(result.exception), "sent without a key"
    result = CliRunner().invoke(
        cli.app, ["concepts", "generate", "quickstart", "--model", "m", "--out", str(out)], env={"OPENAI_API_KEY": ""}
    )
    assert result.exit_code == 1 and "no key: set OPENAI_API_KEY" in str(result.exception)


# What people wrote ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["{status: unreviewed}", "{status: reviewed, by: Dr. N. N., date: 2026-01-31}"])
def test_what_people_wrote_or_reviewed_is_replaced_only_if_asked_and_stays(endpoint, out, status):
    text = (ROOT / "concepts" / "quickstart.yaml").read_text().replace("{status: unreviewed}", status)
    out.write_text(text)
    for more in ([], ["--class", "liver"]):
        result = generate(endpoint, out, *more)
        assert result.exit_code == 1 and "people wrote this text" in str(result.exception)
    assert out.read_text() == text and endpoint.requests == []
    assert generate(endpoint, out, "--class", "liver", "--overwrite").exit_code == 0
    assert endpoint.asked() == ["liver"]
    concepts = load_concepts(out)
    assert concepts.review.status == "draft", "signed text with other sentences is signed no more"
    assert concepts.classes["liver"].sentences["shape"] == sentences("liver")["shape"]
    assert concepts.classes["spleen"] == TASK.concepts.classes["spleen"]
    assert concepts.classes["liver"].ambiguous == TASK.concepts.classes["liver"].ambiguous
    assert out.with_name("drafted.yaml.bak").read_text() == text


def test_a_draft_is_completed_and_repaired_and_one_class_drafted_anew(endpoint, out):
    generate(endpoint, out)
    data = yaml.safe_load(out.read_text())
    del data["classes"]["spleen"]
    data["classes"]["aorta"]["sentences"]["shape"] = "A normal tube."
    out.write_text(yaml.safe_dump(data))
    endpoint.requests.clear()
    assert generate(endpoint, out).exit_code == 0
    assert endpoint.asked() == ["spleen", "aorta"]
    assert check(drafted(out)) == []
    endpoint.requests.clear()
    before = out.read_bytes()
    result = generate(endpoint, out)
    assert "every class has its sentences" in result.output and endpoint.requests == []
    assert out.read_bytes() == before
    assert generate(endpoint, out, "--class", "liver").exit_code == 0
    assert endpoint.asked() == ["liver"]
    result = generate(endpoint, out, "--class", "heart")
    assert result.exit_code == 1 and "unknown class 'heart'; valid are liver" in str(result.exception)


def test_a_class_drafted_anew_may_not_say_what_a_later_one_says(endpoint, out):
    generate(endpoint, out)
    endpoint.requests.clear()
    endpoint.script = [lambda n: (200, completion(json.dumps(sentences(n, shape=sentences("spleen")["shape"])))), good]
    assert generate(endpoint, out, "--class", "liver").exit_code == 0
    assert endpoint.asked() == ["liver"] * 2 and check(drafted(out)) == []
    assert "spleen.shape: the same sentence as class 'liver'" in endpoint.requests[1]["messages"][-1]["content"]


# Wordings -------------------------------------------------------------------------------------------------------------


def test_wordings_are_drafted_after_the_sentences_of_each_class(endpoint, out):
    assert generate(endpoint, out, "--variants", 3).exit_code == 0
    assert endpoint.asked() == [name for name in TASK.classes for _ in range(2)]
    system, user = (m["content"] for m in endpoint.requests[7]["messages"])  # of the right kidney
    assert "no new fact" in system and "No wording may fit another class" in system and "terse" in system
    assert "'right', in every wording of class and location" in user and "each in 3 ways" in user
    assert given(endpoint.requests[7]) == drafted(out).concepts.classes["right kidney"].sentences
    text = load_concepts(out)
    assert (text.review.status, text.review.part) == ("draft", None)
    for name in TASK.classes:
        assert text.classes[name].sentences["shape"] == sentences(name)["shape"]
        assert text.classes[name].variants == {a: tuple(ways) for a, ways in wordings(name, 3).items()}
    assert check(drafted(out)) == []
    endpoint.requests.clear()
    assert "its sentences and wordings" in generate(endpoint, out, "--variants", 3).output
    assert generate(endpoint, out, "--class", "liver").exit_code == 0
    assert endpoint.asked() == ["liver"] and not load_concepts(out).classes["liver"].variants, "they are of other words"
    assert generate(endpoint, out, "--variants", 1).exit_code == 1 and len(endpoint.requests) == 1


def of_people(out):
    """Write the shipped sentences without wordings to a file. Returns what it holds."""
    data = yaml.safe_load((ROOT / "concepts" / "quickstart.yaml").read_text())
    for text in data["classes"].values():
        text.pop("variants", None)
    out.write_text(yaml.safe_dump(data, width=1000))
    return data


def test_wordings_of_what_people_wrote_leave_every_word_of_theirs(endpoint, out):
    data = of_people(out)
    data["classes"]["liver"]["variants"] = {"shape": ["Our own way.", "Our other way."]}
    data["classes"]["aorta"]["sentences"]["shape"] = "Our normal tube."  # a finding is theirs to mend
    out.write_text(yaml.safe_dump(data))
    before = load_concepts(out)
    result = generate(endpoint, out, "--variants", 2)
    assert result.exit_code == 0, result.output
    assert all(map(about_wordings, endpoint.requests)) and endpoint.asked() == list(TASK.classes)
    assert set(given(endpoint.requests[0])) == set(ATTRIBUTES) - {"shape"}
    text = load_concepts(out)
    for name in TASK.classes:
        own, drafts = before.classes[name], text.classes[name]
        assert drafts.sentences == own.sentences and drafts.ambiguous == own.ambiguous
        assert drafts.variants == {**{a: tuple(w) for a, w in wordings(name, 2).items()}, **own.variants}
    assert (text.review.status, text.review.part, text.review.by) == ("draft", "wordings", MODEL)
    assert load_concepts(out.with_name("drafted.yaml.bak")) == before
    endpoint.requests.clear()
    for more in ([], ["--class", "liver"]):
        assert "people wrote this text" in str(generate(endpoint, out, *more).exception), "still their sentences"
    assert "every class has its sentences and wordings" in generate(endpoint, out, "--variants", 2).output
    assert endpoint.requests == []
    del data["classes"]["liver"]["sentences"]["texture"]
    out.write_text(yaml.safe_dump(data))
    assert "no sentence for liver.texture" in str(generate(endpoint, out, "--variants", 2).exception)


SHAPES = {name: text.sentences["shape"] for name, text in TASK.concepts.classes.items()}
BAD_WORDINGS = {
    "prose": (lambda n: "No.", "there is no JSON object"),
    "a key missing": (
        lambda n: {k: w for k, w in wordings(n, 2).items() if k != "shape"},
        "the key 'shape' is missing",
    ),
    "an unknown key": (lambda n: wordings(n, 2, size=["Large.", "Big."]), "unknown key 'size'; the keys are class"),
    "not a list": (lambda n: wordings(n, 2, shape="One way."), "shape: expected a list of 2 sentences"),
    "too few": (lambda n: wordings(n, 2, shape=["One way."]), "shape: 1 wordings; expected 2"),
    "empty": (lambda n: wordings(n, 2, shape=["One way.", " "]), "shape: expected a list of 2 sentences"),
    "no other words": (lambda n: wordings(n, 2, shape=[SHAPES[n], "A way."]), "shape wording 1: the same"),
    "twice": (lambda n: wordings(n, 2, shape=["A way.", "a  WAY"]), "shape wording 2: the same as wording 1"),
    "another's": (
        lambda n: wordings(n, 2, shape=["A way.", SHAPES["liver"]]),
        "shape wording 2: the same sentence as class 'liver'",
    ),
    "diagnosis": (lambda n: wordings(n, 2, shape=["A way.", "Normal."]), "shape wording 2: diagnostic word 'normal'"),
    "side missing": (
        lambda n: wordings(n, 2, location=["A way.", "On the left."]),
        "location wording 1: the side 'left'",
    ),
}


@pytest.mark.parametrize("kind", BAD_WORDINGS)
def test_the_model_is_told_what_is_wrong_with_its_wordings(endpoint, out, kind):
    body, reason = BAD_WORDINGS[kind]
    again = [key for key in ("shape", "location") if key in reason] or ATTRIBUTES  # what was right is kept
    endpoint.script_of_wordings = [
        lambda name: (200, completion(json.dumps(body(name)))),
        lambda name: (200, completion(json.dumps(wordings(name, 2, again)))),
    ]
    of_people(out)
    result = generate(endpoint, out, "--variants", 2, "--class", "left kidney")
    assert result.exit_code == 0, result.output
    assert endpoint.asked() == ["left kidney"] * 2
    told = endpoint.requests[1]["messages"][-1]["content"]
    assert reason in told and "leave them out" in told
    assert load_concepts(out).classes["left kidney"].variants.keys() == set(ATTRIBUTES)
    assert check(drafted(out)) == []


def test_a_stopped_run_goes_on_with_the_wordings_that_lack(endpoint, out):
    endpoint.script_of_wordings = [lambda n: (200, completion("No.")) for _ in range(2)]  # of the liver
    result = generate(endpoint, out, "--variants", 2, "--attempts", 2)
    assert result.exit_code == 1 and "liver: no answer of 2 could be used" in result.output and not out.exists()
    endpoint.requests.clear()
    assert generate(endpoint, out, "--variants", 2).exit_code == 0
    assert endpoint.asked() == ["liver"] and about_wordings(endpoint.requests[0])
    assert check(drafted(out)) == []


def test_what_people_change_after_a_stopped_run_is_reworded_as_it_is_now(endpoint, out):
    of_people(out)
    endpoint.always["aorta"] = lambda name: (200, completion("No."))
    assert generate(endpoint, out, "--variants", 2, "--attempts", 1).exit_code == 1
    words = out.read_text()
    liver = TASK.concepts.classes["liver"].sentences["shape"]
    out.write_text(words.replace(liver, "Our new wedge."))
    endpoint.requests.clear()
    endpoint.always.clear()
    assert generate(endpoint, out, "--variants", 2).exit_code == 0
    assert endpoint.asked() == ["liver", "aorta"] and given(endpoint.requests[0])["shape"] == "Our new wedge."
    assert load_concepts(out).classes["liver"].sentences["shape"] == "Our new wedge."
