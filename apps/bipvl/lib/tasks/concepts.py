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
    people wrote, `reviewed` what a clinician has signed."""

    status: Literal["draft", "unreviewed", "reviewed"]
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
        return self


class ClassText(StrictModel):
    """The text of one class: one sentence per attribute, and K loosely worded sentences for the format `ambiguous`."""

    sentences: dict[str, str]
    ambiguous: tuple[str, ...] = ()


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

    @property
    def hash(self) -> str:
        """Short content hash: equal for equal sentences, whatever the file's layout."""
        text = json.dumps(self.model_dump(exclude={"review"}), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]
