"""The conversation with a language model behind an OpenAI-compatible Chat Completions endpoint.

Each class has a conversation, and another one about the wordings of its sentences. The model is told what to write,
`lib.tasks.check` checks its answer, and the model is told what is wrong, a few times.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import openai
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam

from lib.tasks import ATTRIBUTES, ClassText, Review, Task
from lib.tasks.check import Problem, check
from lib.tasks.generate.prompts import (
    INSTRUCTIONS,
    REWORDING,
    Malformed,
    class_sentence,
    parse,
    parse_wordings,
    question,
    rewording_question,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")
AGAIN = "Answer again, with the whole JSON object and nothing else."
AGAIN_WORDINGS = (
    "Answer again, with a JSON object and nothing else. Keys of which nothing is said are kept: leave them out."
)


class EndpointError(ValueError):
    """The endpoint cannot be used as it was asked to; the message says why and what to do."""


class Drafter:
    """Asks a model for the text of one class at a time.

    Args:
        client: of the official library; it waits and asks again by itself if the endpoint is busy.
        model: its name at the endpoint.
        attempts: answers to ask for, at most, before a class is given up.
    """

    def __init__(self, client: openai.OpenAI, model: str, attempts: int = 4) -> None:
        self.client, self.model, self.attempts = client, model, attempts

    def draft(self, task: Task, name: str) -> ClassText:
        """The six sentences of a class, which pass the check beside the task's other texts. Wordings that it had are
        gone, because they reworded other sentences.

        Raises:
            Malformed: no answer could be used; the message says what was wrong with the last.
            EndpointError: the endpoint refuses or does not answer.
        """

        def read(answer: str) -> ClassText:
            sentences = {"class": class_sentence(task, name), **parse(answer)}
            text = task.concepts.classes[name].model_copy(update={"sentences": sentences, "variants": {}})
            before = check(task)
            problems = [p for p in check(with_texts(task, {name: text})) if p.class_name == name or p not in before]
            if problems := [p for p in problems if not p.attribute.startswith("ambiguous")]:
                raise Malformed("; ".join(_told(p, name) for p in problems))
            return text

        return self._converse(name, INSTRUCTIONS, question(task, name), read, AGAIN)

    def reword(self, task: Task, name: str, attributes: Sequence[str], count: int) -> ClassText:
        """The text of a class with `count` wordings of some of its sentences, which pass the check beside all that the
        task has. What was right in an answer is kept while the rest is asked for again.

        Raises:
            Malformed, EndpointError: as `draft`.
        """
        own = task.concepts.classes[name]
        others = {attribute: wordings for attribute, wordings in own.variants.items() if attribute not in attributes}
        before = check(with_texts(task, {name: own.model_copy(update={"variants": others})}))
        done: dict[str, tuple[str, ...]] = {}

        def read(answer: str) -> ClassText:
            found, wrong = parse_wordings(answer, [a for a in attributes if a not in done], count)
            given = {**others, **done, **found}
            text = own.model_copy(update={"variants": {a: given[a] for a in ATTRIBUTES if a in given}})
            problems = [p for p in check(with_texts(task, {name: text})) if p not in before]
            broken = {p.attribute.split()[0] for p in problems}
            done.update({attribute: wordings for attribute, wordings in found.items() if attribute not in broken})
            if wrong or problems:
                raise Malformed("; ".join([*wrong, *(_told(p, name) for p in problems)]))
            return text

        asked = rewording_question(task, name, attributes, count)
        return self._converse(name, REWORDING, asked, read, AGAIN_WORDINGS)

    def _converse(self, name: str, system: str, user: str, read: Callable[[str], T], again: str) -> T:
        """What `read` makes of an answer; if it finds an answer malformed, the model is told and asked again."""
        messages: list[ChatCompletionMessageParam] = [
            {"role": "system", "content": system},
            {"role": "user", "content": user},
        ]
        last = Malformed("nothing was asked")
        for attempt in range(1, self.attempts + 1):
            answer = ""
            try:
                answer = self._ask(messages)
                return read(answer)
            except Malformed as error:
                last = error
                logger.info("%s, answer %d of %d cannot be used: %s", name, attempt, self.attempts, error)
            if answer:
                messages.append({"role": "assistant", "content": answer})
            messages.append({"role": "user", "content": f"That cannot be used: {last}\n{again}"})
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


def with_texts(task: Task, classes: dict[str, ClassText], review: Review | None = None) -> Task:
    """The task with these texts; classes that are not there keep the task's own."""
    own = task.concepts
    texts = {name: classes.get(name, text) for name, text in own.classes.items()}
    concepts = own.model_copy(update={"classes": texts, "review": review or own.review})
    return task.model_copy(update={"concepts": concepts})


def _told(problem: Problem, name: str) -> str:
    return f"{problem.attribute}: {problem.message}" if problem.class_name == name else str(problem)


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
