"""What a language model is told and asked, and the reading of its answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lib.tasks import ATTRIBUTES, Task
from lib.tasks.check import MAX_CHARACTERS

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

REWORDING = f"""\
You reword descriptions of anatomical structures in medical images. A segmentation network reads your wordings to learn
that other words can mean the same.

You are given a JSON object of sentences. Answer with one JSON object and nothing else. It has the same keys, and for
each a list of exactly as many wordings of its sentence as you are asked for.

Rules:
- Each wording states the facts of its sentence: no new fact, none that contradicts it, none of importance left out.
- Use really different words and another order, not the sentence with one word exchanged. Change the style from wording
  to wording: terse like a note; the style of a radiology report; plain language without technical terms; the terms of
  an anatomy textbook.
- No wording may fit another class of the same task, and no two may be the same.
- Write only what can be seen in the image. Nothing about what a structure does, no diagnosis, no disease, no "normal".
- Plain text without markup, at most {MAX_CHARACTERS} characters a wording."""


class Malformed(ValueError):
    """An answer that cannot be used; the message is what the model is told."""


def question(task: Task, name: str) -> str:
    """What is asked about a class: all that the task file says of it."""
    structure = _structure(task, name)
    side = structure.snomed.laterality
    return _lines(
        *_about(task),
        f"Describe the class {name!r}.",
        f"It is the union of: {', '.join(structure.labels)}." if task.regions is not None else "",
        f"Name the patient's side, {side!r}, in the location." if side else "",
    )


def rewording_question(task: Task, name: str, attributes: Sequence[str], count: int) -> str:
    """What is asked to get `count` wordings of some sentences of a class."""
    sentences = task.concepts.classes[name].sentences
    side = _structure(task, name).snomed.laterality
    return _lines(
        *_about(task),
        f"Reword the sentences of the class {name!r}, each in {count} ways.",
        f"Name the patient's side, {side!r}, in every wording of class and location." if side else "",
        json.dumps({attribute: sentences[attribute] for attribute in attributes}, ensure_ascii=False, indent=1),
    )


def _structure(task: Task, name: str) -> Any:
    structures: Any = task.regions if task.regions is not None else task.labels
    return structures[name]


def _about(task: Task) -> tuple[str, ...]:
    return (
        f"Task: {task.description}. Modality: {task.modality}.",
        f"Channels: {', '.join(task.channels)}." if len(task.channels) > 1 else "",
        f"All classes: {', '.join(task.classes)}.",
    )


def _lines(*lines: str) -> str:
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
    found = _object(answer, LONGEST_ANSWER)
    missing = [key for key in WRITTEN if key not in found]
    unknown = [key for key in found if key not in ATTRIBUTES]
    if missing or unknown:
        parts = [f"the key {key!r} is missing" for key in missing] + [f"unknown key {key!r}" for key in unknown[:5]]
        raise Malformed(f"{'; '.join(parts)}; the keys are {', '.join(WRITTEN)}")
    wrong = [key for key in WRITTEN if not isinstance(found[key], str) or not found[key].strip()]
    if wrong:
        raise Malformed(f"{', '.join(wrong)}: expected one sentence as a string")
    return {key: " ".join(found[key].split()) for key in WRITTEN}


def parse_wordings(answer: str, attributes: Sequence[str], count: int) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """The wordings that an answer has for some attributes, and what is wrong with those that it has not.

    Raises:
        Malformed: no JSON object, or an unknown key.
    """
    found = _object(answer, max(LONGEST_ANSWER, 2 * MAX_CHARACTERS * count * len(ATTRIBUTES)))
    if unknown := [key for key in found if key not in ATTRIBUTES]:
        raise Malformed(f"unknown key {unknown[0]!r}; the keys are {', '.join(attributes)}")
    usable, wrong = {}, []
    for key in attributes:
        wordings = found.get(key)
        if key not in found:
            wrong.append(f"the key {key!r} is missing")
        elif not isinstance(wordings, list) or not all(isinstance(w, str) and w.strip() for w in wordings):
            wrong.append(f"{key}: expected a list of {count} sentences")
        elif len(wordings) != count:
            wrong.append(f"{key}: {len(wordings)} wordings; expected {count}")
        else:
            usable[key] = tuple(" ".join(wording.split()) for wording in wordings)
    return usable, wrong


def _object(answer: str, longest: int) -> dict[str, Any]:
    if len(answer) > longest:
        raise Malformed(f"the answer has {len(answer)} characters")
    start, end = answer.find("{"), answer.rfind("}")
    if start < 0 or end < start:
        raise Malformed("there is no JSON object in the answer")
    try:
        return json.loads(answer[start : end + 1])
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not valid JSON: {error}") from None
