"""Drafting sentences with a language model behind an OpenAI-compatible Chat Completions endpoint.

Each class has a conversation. The model is told what to write, `lib.tasks.check` checks its answer, and the model is
told what is wrong, a few times. The endpoint gets the names of the classes and what the task file says of them, never
anything of a patient. Finished classes are kept, so that a stopped run continues where it stopped.
"""

from __future__ import annotations

import datetime
import json
import logging
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import yaml
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam

from lib.files import write_atomic
from lib.tasks import ATTRIBUTES, ClassText, Concepts, Review, Task, TaskError, load_concepts
from lib.tasks.check import MAX_CHARACTERS, Problem, check

logger = logging.getLogger(__name__)

LONGEST_ANSWER = 20_000  # characters; six sentences have about 700
WRITTEN = ATTRIBUTES[1:]  # the sentence `class` has a fixed form and is not asked for
VOWEL_LETTERS = "AEFHILMNORSX"  # whose names begin with a vowel: an MR image, a CT image

INSTRUCTIONS = f"""\
You describe anatomical structures as they look in medical images. A segmentation network reads your sentences to learn
what each structure looks like and how it differs from the others.

Answer with one JSON object and nothing else. It has exactly these keys, each with one English sentence of 8 to 25
words:
  shape       the three-dimensional form and rough size
  location    where in the body, and beside which neighbours; the sides are the patient's
  appearance  brightness in this kind of image (for CT in Hounsfield units where known), compared with the neighbours
  contour     the outline: smooth, lobed, sharp, blurred, symmetric or not
  texture     the inside: even, mottled, striped, crossed by vessels

Rules:
- Write only what can be seen in the image. Nothing about what a structure does, no diagnosis, no disease, no "normal".
- Be true for every patient, and specific: no sentence may fit another class of the same task.
- Plain text without markup, at most {MAX_CHARACTERS} characters a sentence."""


class EndpointError(ValueError):
    """The endpoint cannot be used as it was asked to; the message says why and what to do."""


class Malformed(ValueError):
    """An answer that cannot be used; the message is what the model is told."""


@dataclass
class Outcome:
    """What a run has drafted, and why the other classes are missing."""

    drafted: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


class Drafter:
    """Asks a model for the sentences of one class at a time.

    Args:
        client: of the official library; it waits and asks again by itself if the endpoint is busy.
        model: its name at the endpoint.
        attempts: answers to ask for, at most, before a class is given up.
    """

    def __init__(self, client: openai.OpenAI, model: str, attempts: int = 4) -> None:
        self.client, self.model, self.attempts = client, model, attempts

    def draft(self, task: Task, name: str) -> ClassText:
        """The six sentences of a class, which pass the check beside the task's other sentences.

        Raises:
            Malformed: no answer could be used; the message says what was wrong with the last.
            EndpointError: the endpoint refuses or does not answer.
        """
        messages: list[ChatCompletionMessageParam] = [
            {"role": "system", "content": INSTRUCTIONS},
            {"role": "user", "content": question(task, name)},
        ]
        last = Malformed("nothing was asked")
        for attempt in range(1, self.attempts + 1):
            answer = ""
            try:
                answer = self._ask(messages)
                return self._checked(task, name, answer)
            except Malformed as error:
                last = error
                logger.info("%s, answer %d of %d cannot be used: %s", name, attempt, self.attempts, error)
            if answer:
                messages.append({"role": "assistant", "content": answer})
            again = f"That cannot be used: {last}\nAnswer again, with the whole JSON object and nothing else."
            messages.append({"role": "user", "content": again})
        raise last

    def _ask(self, messages: list[ChatCompletionMessageParam]) -> str:
        where = f"{self.client.base_url}, model {self.model!r}"
        try:
            completion = self.client.chat.completions.create(model=self.model, messages=messages)
        except openai.AuthenticationError as error:
            raise EndpointError(f"{where}: the key is refused ({_said(error)}); set OPENAI_API_KEY") from None
        except openai.RateLimitError as error:
            raise EndpointError(
                f"{where}: still over its rate limit or quota after {self.client.max_retries} retries "
                f"({_said(error)}); what is drafted is kept, run the command again later"
            ) from None
        except openai.APIStatusError as error:
            raise EndpointError(f"{where}: answers {error.status_code} ({_said(error)})") from None
        except openai.APIConnectionError as error:
            reason = error.__cause__ or error
            raise EndpointError(f"{where}: cannot be reached ({reason}); what is drafted is kept") from None
        except (openai.OpenAIError, json.JSONDecodeError) as error:
            raise Malformed(f"the endpoint's answer is not valid JSON: {error}") from None
        return _content(completion)

    def _checked(self, task: Task, name: str, answer: str) -> ClassText:
        sentences = {"class": class_sentence(task, name), **parse(answer)}
        text = task.concepts.classes[name].model_copy(update={"sentences": sentences})
        problems = [p for p in check(_with_class(task, name, text)) if p.class_name == name]
        problems = [p for p in problems if not p.attribute.startswith("ambiguous")]
        if problems:
            raise Malformed("; ".join(f"{p.attribute}: {p.message}" for p in problems))
        return text


def question(task: Task, name: str) -> str:
    """What is asked about a class: all that the task file says of it."""
    structures: Any = task.regions if task.regions is not None else task.labels
    structure = structures[name]
    lines = [
        f"Task: {task.description}. Modality: {task.modality}.",
        f"Channels: {', '.join(task.channels)}." if len(task.channels) > 1 else "",
        f"All classes: {', '.join(task.classes)}.",
        f"Describe the class {name!r}.",
        f"It is the union of: {', '.join(structure.labels)}." if task.regions is not None else "",
        f"Name the patient's side, {structure.snomed.laterality!r}, in the location."
        if structure.snomed.laterality
        else "",
    ]
    return "\n".join(line for line in lines if line)


def class_sentence(task: Task, name: str) -> str:
    """The fixed first sentence."""
    article = "an" if task.modality[:1].upper() in VOWEL_LETTERS else "a"
    return f"The {name} in {article} {task.modality} image."


def parse(answer: str) -> dict[str, str]:
    """The five sentences of an answer, which may stand in a code fence or between other words.

    Raises:
        Malformed: no JSON object, a key missing or unknown, or a value that is not a sentence.
    """
    if len(answer) > LONGEST_ANSWER:
        raise Malformed(f"the answer has {len(answer)} characters")
    start, end = answer.find("{"), answer.rfind("}")
    if start < 0 or end < start:
        raise Malformed("there is no JSON object in the answer")
    try:
        found = json.loads(answer[start : end + 1])
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not valid JSON: {error}") from None
    missing = [key for key in WRITTEN if key not in found]
    unknown = [key for key in found if key not in ATTRIBUTES]
    if missing or unknown:
        parts = [f"the key {key!r} is missing" for key in missing] + [f"unknown key {key!r}" for key in unknown[:5]]
        raise Malformed(f"{'; '.join(parts)}; the keys are {', '.join(WRITTEN)}")
    wrong = [key for key in WRITTEN if not isinstance(found[key], str) or not found[key].strip()]
    if wrong:
        raise Malformed(f"{', '.join(wrong)}: expected one sentence as a string")
    return {key: " ".join(found[key].split()) for key in WRITTEN}


def _content(completion: Any) -> str:
    """The text of the first choice. Endpoints answer in many shapes, and the library passes them on unchecked."""
    if not isinstance(completion, ChatCompletion) or not completion.choices:
        raise Malformed("the endpoint's answer is not a chat completion")
    choice = completion.choices[0]
    message = choice.message
    if message is None or getattr(message, "refusal", None):
        raise Malformed(f"the model refused: {str(getattr(message, 'refusal', ''))[:200]}")
    if choice.finish_reason == "content_filter":
        raise Malformed("the answer was withheld by a content filter")
    if choice.finish_reason == "length":
        raise Malformed("the answer was cut off; be shorter")
    if not isinstance(message.content, str) or not message.content.strip():
        raise Malformed("the answer is empty")
    return message.content


def _said(error: openai.APIStatusError) -> str:
    """What the endpoint said, in one short line."""
    body = error.body if isinstance(error.body, dict) else {}
    return " ".join(str(body.get("message") or error.message).split())[:300]


# The file -------------------------------------------------------------------------------------------------------------


def without_text(data: dict[str, Any]) -> dict[str, Any]:
    """A task file's content with empty sentences, for a task whose concepts file is still to be written."""
    names = data.get("regions") or data.get("labels") or {}
    empty = {"sentences": dict.fromkeys(ATTRIBUTES, "")}
    concepts = {
        "modality": data.get("modality", ""),
        "review": {"status": "draft"},
        "classes": dict.fromkeys(names, empty) if isinstance(names, dict) else {},
    }
    return {**data, "concepts": concepts}


def draft_file(
    task: Task,
    target: Path,
    drafter: Drafter,
    names: Iterable[str] = (),
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] = lambda name, done, of: None,
) -> Outcome:
    """Draft what a concepts file lacks, or the classes named, and write it when all is there.

    Until then finished classes are kept in `<target>.part`, from which another run goes on. Text that people wrote or
    reviewed is replaced only if asked, and stays beside the file as `<target>.bak`.

    Args:
        task: its sentences are not read.
        target: the concepts file.
        names: classes to draft anew; none: all that have no text yet, or with `overwrite` all.
        progress: called before each class and at the end, with its name, how many are done and how many there are.

    Raises:
        TaskError: an unknown class, or a file of people's that is not to be overwritten.
        EndpointError: as `Drafter.draft`; what was finished is kept.
    """
    named = tuple(names)
    for name in named:
        if name not in task.classes:
            raise TaskError(f"unknown class {name!r}; valid are {', '.join(task.classes)}")
    existing = load_concepts(target) if target.is_file() else None
    if existing and existing.review.status != "draft" and not overwrite:
        by = f" by {existing.review.by}" if existing.review.by else ""
        raise TaskError(
            f"{target}: people wrote this text (status {existing.review.status}{by}). --overwrite replaces it and "
            "keeps it beside the file, --out writes another file"
        )
    part = target.with_name(f"{target.name}.part")
    finished = dict(load_concepts(part).classes) if part.is_file() else {}
    finished = {name: text for name, text in finished.items() if name in task.classes}
    kept = dict(existing.classes) if existing else {}
    wanted = named or tuple(n for n in task.classes if overwrite or n not in kept)
    if not named and existing and not overwrite:
        kept_task = _with_classes(task, {**kept, **finished})
        broken = {p.class_name for p in check(kept_task) if p.class_name and not p.attribute.startswith("ambiguous")}
        wanted = tuple(n for n in task.classes if n not in kept or n in broken)
    outcome = Outcome()
    for place, name in enumerate(wanted):
        progress(name, place, len(wanted))
        if name in finished:
            continue
        try:
            finished[name] = drafter.draft(_with_classes(task, {**kept, **finished}), name)
        except Malformed as error:
            outcome.failed[name] = str(error)
            continue
        outcome.drafted.append(name)
        write_concepts(part, task, finished, drafter.model)
    progress("", len(wanted), len(wanted))
    if outcome.failed or not finished:
        return outcome
    if existing and existing.review.status != "draft":
        shutil.copy2(target, _free(target.with_name(f"{target.name}.bak")))
    write_concepts(target, task, {**kept, **finished}, drafter.model)
    part.unlink(missing_ok=True)
    return outcome


def write_concepts(path: Path, task: Task, classes: dict[str, ClassText], model: str) -> None:
    """Write a concepts file with the status draft, atomically."""
    today = datetime.date.today().isoformat()
    ordered = {name: classes[name] for name in task.classes if name in classes}
    review = Review(status="draft", by=model, date=today)
    data = Concepts(modality=task.modality, review=review, classes=ordered).model_dump(mode="json")
    for text in data["classes"].values():
        if not text["ambiguous"]:
            del text["ambiguous"]
    header = "# Drafted by a language model. Nobody has reviewed it: read docs/using/sentences.md before it is used.\n"
    body = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)
    write_atomic(path, lambda file: file.write((header + body).encode()))


def remaining(task: Task, target: Path) -> list[Problem]:
    """What the check finds in a written file as a whole."""
    return check(_with_classes(task, load_concepts(target).classes, load_concepts(target).review))


def _free(path: Path) -> Path:
    """The path, with a number if it is taken."""
    number = 1
    while path.exists():
        number += 1
        path = path.with_name(f"{path.name.split('.bak')[0]}.bak{number}")
    return path


def _with_class(task: Task, name: str, text: ClassText) -> Task:
    return _with_classes(task, {**task.concepts.classes, name: text})


def _with_classes(task: Task, classes: dict[str, ClassText], review: Review | None = None) -> Task:
    """The task with these sentences; classes that are not there keep the task's own."""
    own = task.concepts
    texts = {name: classes.get(name, text) for name, text in own.classes.items()}
    concepts = own.model_copy(update={"classes": texts, "review": review or own.review})
    return task.model_copy(update={"concepts": concepts})
