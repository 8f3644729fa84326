"""Options of requests. One table per kind of request says what may be asked for: what clients are shown, what is
checked (in the web's process, and again where the work is done) and the pages of docs/ come from it.

Clients show an option as a check box (true or false), a number, a text, or a choice (a list of texts, the first of
which is the default). They send back what was chosen: as its type, as a text, or as the whole list with the chosen
entry first. An option that is sent empty counts as not sent.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lib.upstream import device_list, strtobool

SHOWN = 100  # characters of a value in an error
DIGITS = 300  # of a whole number: more make no number with a decimal point


@dataclass(frozen=True)
class Option:
    """One option: subclasses say what it takes.

    Args:
        name: as clients send it.
        default: what counts if it is not sent.
        help: one line for the documents.
        said: the default in words, if it depends on something.
        shown: whether clients offer it.
    """

    name: str
    default: Any
    help: str
    said: str = ""
    shown: bool = True

    @property
    def offer(self) -> Any:
        """What clients get to build the option from."""
        return self.default

    @property
    def valid(self) -> str:
        """What it takes, for the documents."""
        return "text"

    def read(self, value: Any) -> Any:
        """What was sent, in the option's type; None if nothing was.

        Raises:
            ValueError: naming the option and what is valid.
        """
        if isinstance(value, list):
            if not value:
                raise ValueError(f"{self.name}: an empty list says nothing")
            value = value[0]
        return None if value is None or value == "" else self.convert(value)

    def convert(self, value: Any) -> Any:
        """One value that is not empty."""
        raise NotImplementedError


@dataclass(frozen=True)
class Switch(Option):
    """True or false."""

    @property
    def valid(self) -> str:
        return "true, false"

    def convert(self, value: Any) -> bool:
        return boolean(self.name, value)


@dataclass(frozen=True)
class Number(Option):
    """A number from `low` up to, but not including, `below`. It is a whole one if its default is."""

    low: float = -math.inf
    below: float = math.inf

    @property
    def valid(self) -> str:
        what = "whole number" if isinstance(self.default, int) else "number"
        what += f" from {self.low:g}" if math.isfinite(self.low) else ""
        return what + (f" to below {self.below:g}" if math.isfinite(self.below) else "")

    def convert(self, value: Any) -> int | float:
        bounded = math.isfinite(self.below)
        try:
            number = _whole(value) if isinstance(self.default, int) else _finite(value)
        except (TypeError, ValueError, OverflowError):
            what = "a whole number" if isinstance(self.default, int) else "a number"
            what += f" from {self.low:g} to below {self.below:g}" if bounded else ""
            raise ValueError(f"{self.name}: expected {what}, got {shown(value)}") from None
        if bounded and not self.low <= number < self.below:
            found = shown(number)
            raise ValueError(f"{self.name} {found}: valid is {self.low:g} up to, but not including, {self.below:g}")
        if number < self.low:
            raise ValueError(f"{self.name}: {shown(number)} is too small; the least is {self.low:g}")
        return number


@dataclass(frozen=True)
class Text(Option):
    """A text, all of which fits a pattern; `expected` says in words which."""

    pattern: str = ".*"
    expected: str = "a text"

    @property
    def valid(self) -> str:
        return self.expected.removeprefix("a ")

    def convert(self, value: Any) -> str:
        if not isinstance(value, str) or not re.fullmatch(self.pattern, value, re.DOTALL):
            raise ValueError(f"{self.name}: expected {self.expected}, got {shown(value)}")
        return value


GPUS = Text("gpus", "all", "which GPUs", pattern=r"all|\d*(,\d+)*", expected="all or numbers such as 0,1")


@dataclass(frozen=True)
class Choice(Option):
    """One of some texts; `what` names the thing that is chosen if one is unknown."""

    choices: tuple[str, ...] = ()
    what: str = ""

    @property
    def offer(self) -> list[str]:
        return [self.default, *(c for c in self.choices if c != self.default)]

    @property
    def valid(self) -> str:
        return f"name of a {self.what}" if self.what else ", ".join(self.choices)

    def convert(self, value: Any) -> str:
        found = next((c for c in self.choices if c == str(value)), None)
        if found is None:
            unknown = f"unknown {self.what} " if self.what else ""
            raise ValueError(f"{self.name}: {unknown}{shown(value)}; valid are {', '.join(self.choices)}")
        return found


@dataclass(frozen=True)
class Device(Option):
    """Where to compute: as `/info/` lists it, cpu, mps, cuda, or cuda with a number."""

    @property
    def offer(self) -> list[str]:
        return device_list()

    @property
    def valid(self) -> str:
        return "cpu, cuda, cuda:1, …"

    def convert(self, value: Any) -> str:
        names = device_list()
        if value in names or value in ("cpu", "cuda", "mps"):  # MONAI Label takes the CPU if there is no GPU
            return str(value)
        match = re.fullmatch(r"cuda:(\d{1,3})", value) if isinstance(value, str) else None
        if not match or int(match[1]) >= torch.cuda.device_count():
            raise ValueError(f"device: {shown(value)}; valid are {', '.join(dict.fromkeys((*names, 'cpu', 'cuda')))}")
        return str(value)


class OptionTable(Mapping[str, Option]):
    """The table of one kind of request: name to option."""

    def __init__(self, *options: Option) -> None:
        self._options = {option.name: option for option in options}

    def __getitem__(self, name: str) -> Option:
        return self._options[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._options)

    def __len__(self) -> int:
        return len(self._options)

    def offer(self) -> dict[str, Any]:
        """What clients get to build their table of options from."""
        return {name: option.offer for name, option in self.items() if option.shown}

    def read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options that were sent, in their types; other keys of a request stay as they are.

        Raises:
            ValueError: naming the option and what is valid.
        """
        found = {key: self[key].read(value) if key in self else value for key, value in given.items()}
        return {key: value for key, value in found.items() if value is not None or key not in self}

    def full(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """As `read`, with the defaults of all other options."""
        return {name: option.default for name, option in self.items()} | self.read(given)

    def markdown(self) -> str:
        """The table for the documents."""
        rows = ["| option | default | valid | meaning |", "|---|---|---|---|"]
        for name, option in self.items():
            default = option.said or _said(option.default)
            rows.append(f"| `{name}` | {default} | {option.valid} | {option.help} |")
        return "\n".join(rows) + "\n"


def boolean(name: str, value: Any) -> bool:
    """True or false, as clients and the environment write it; nothing is false.

    Raises:
        ValueError: naming the option.
    """
    try:
        return value not in (None, "") and bool(strtobool(str(value)))
    except ValueError:
        raise ValueError(f"{name}: expected true or false, got {shown(value)}") from None


def shown(value: Any) -> str:
    """What somebody sent, as an error shows it: its beginning, if it is long."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        return f"an {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def from_json(text: str) -> Any:
    """What a text of JSON holds.

    Raises:
        ValueError: in words for whoever sent it.
    """
    try:
        return json.loads(text, parse_int=_digits)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError("lists and objects in one another, too deep") from None


def _digits(text: str) -> int:
    count = len(text.lstrip("-"))
    if count > DIGITS:
        raise ValueError(f"a number of {count} digits; valid are at most {DIGITS}")
    return int(text)


def _finite(value: Any) -> float:
    number = float(value)
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError
    return number


def _whole(value: Any) -> int:
    number = _finite(value)
    if number != int(number):
        raise ValueError
    try:
        return int(value)  # all digits of a large one
    except ValueError:  # 1e3
        return int(number)


def _said(default: Any) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    return f"`{default}`" if isinstance(default, str) and default else str(default)
