"""Concepts: the sentences of each class, and who has reviewed them."""

from __future__ import annotations

import hashlib
import json
from datetime import date
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

ATTRIBUTES = ("class", "shape", "location", "appearance", "contour", "texture")
TextFormat = Literal["concepts", "ambiguous", "definition", "name"]
TEXT_FORMATS: tuple[TextFormat, ...] = get_args(TextFormat)


class TaskError(ValueError):
    """A task or concepts file that cannot be used. The message names the file, the key and the valid choices."""


class StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Review(StrictModel):
    """Who has checked the sentences: `draft` is what a language model wrote and nobody has read, `unreviewed` what
    people wrote, `reviewed` what a clinician has signed. `part` is `wordings` if people wrote the sentences and only
    their further wordings are a draft."""

    status: Literal["draft", "unreviewed", "reviewed"]
    part: Literal["wordings"] | None = None
    by: str | None = None
    date: str | None = None

    @field_validator("date", mode="before")
    @classmethod
    def _iso(cls, value: Any) -> Any:
        return value.isoformat() if isinstance(value, date) else value  # YAML reads 2026-01-31 as a date

    @model_validator(mode="after")
    def _signed(self) -> Review:
        if self.status == "reviewed" and not (self.by and self.date):
            raise ValueError("status 'reviewed' needs by and date")
        if self.part and self.status != "draft":
            raise ValueError(f"part says what of a draft a language model wrote; the status is {self.status!r}")
        return self


class ClassText(StrictModel):
    """The text of one class: one sentence per attribute, further wordings of some of them, and K loosely worded
    sentences for the format `ambiguous`.

    The last wording of an attribute is kept aside: no training step reads it, and each round scores the masks that it
    brings. So an attribute has either none or at least two.
    """

    sentences: dict[str, str]
    variants: dict[str, tuple[str, ...]] = {}
    ambiguous: tuple[str, ...] = ()

    @field_validator("variants")
    @classmethod
    def _wordings(cls, variants: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for attribute, wordings in variants.items():
            if attribute not in ATTRIBUTES:
                raise ValueError(f"unknown attribute {attribute!r}; valid are {', '.join(ATTRIBUTES)}")
            if len(wordings) == 1:
                raise ValueError(f"{attribute}: one wording; at least 2 are needed, because the last is kept aside")
            if empty := [n for n, wording in enumerate(wordings, 1) if not wording.strip()]:
                raise ValueError(f"{attribute}: wording {empty[0]} is empty")
        return variants

    def trained(self, attribute: str) -> tuple[str, ...]:
        """The wordings of an attribute that training reads, the sentence itself first."""
        return self.sentences[attribute], *self.variants.get(attribute, ())[:-1]

    def aside(self, attribute: str) -> str:
        """The wording of an attribute that training never reads; the sentence itself if there is no other."""
        return (self.variants.get(attribute) or (self.sentences[attribute],))[-1]

    def written(self) -> list[str]:
        """Sentences and wordings."""
        return [*self.sentences.values(), *(wording for wordings in self.variants.values() for wording in wordings)]


class Concepts(StrictModel):
    """The sentences of every class of a task (`concepts/<task>.yaml`)."""

    modality: str
    review: Review
    classes: dict[str, ClassText]

    def rows(self, classes: tuple[str, ...], text_format: str = "concepts") -> list[list[str]]:
        """The sentences of each class in a text format of the paper's Table 2.

        Args:
            classes: class names, in the order of the rows wanted.
            text_format: `concepts` (one sentence per attribute), `ambiguous` (non-fixed sentences), `definition`
                (all attributes in one text, K = 1) or `name` (the class name only, K = 1).

        Returns:
            C lists of K sentences.
        """
        if text_format not in TEXT_FORMATS:
            raise TaskError(f"text format {text_format!r}: valid are {', '.join(TEXT_FORMATS)}")
        rows = []
        for name in classes:
            text = self.classes[name]
            if text_format == "concepts":
                rows.append([text.sentences[a] for a in ATTRIBUTES])
            elif text_format == "ambiguous":
                rows.append(list(text.ambiguous))
            elif text_format == "definition":
                rows.append([" ".join(text.sentences[a] for a in ATTRIBUTES)])
            else:
                rows.append([name])
        return rows

    def aside(self, classes: tuple[str, ...]) -> list[list[str]] | None:
        """`rows` of the wordings that are kept aside; None if no class has further wordings."""
        texts = [self.classes[name] for name in classes]
        return [[text.aside(a) for a in ATTRIBUTES] for text in texts] if any(text.variants for text in texts) else None

    @property
    def hash(self) -> str:
        """Short content hash: equal for equal sentences, whatever the file's layout and their further wordings, which
        change what a network learns to read and not what it is asked."""
        exclude: Any = {"review": True, "classes": {"__all__": {"variants"}}}
        return _hash(self.model_dump(exclude=exclude))

    @property
    def wordings_hash(self) -> str:
        """Likewise of the further wordings; empty if there are none."""
        worded = {name: text.variants for name, text in self.classes.items() if text.variants}
        return _hash(worded) if worded else ""


def _hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]
