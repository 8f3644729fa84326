"""Options as clients show and send them.

What `config()` of a model, trainer or strategy lists becomes a check box (true or false), a number, a text, or a
choice (a list of texts, the first of which is the default). Clients send back what was chosen: as the type, as a text,
or as the whole list with the chosen entry first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from lib.upstream import device_list, strtobool


def typed(given: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given, each in the type of its default. An empty number is left out.

    Args:
        given: option to value.
        config: option to default; of a list the first entry is the default and all entries are the choices.

    Raises:
        ValueError: naming the option and what is valid.
    """
    said = {k: v for k, v in given.items() if v not in (None, "") or isinstance(config.get(k), (str, bool, list))}
    return {key: _typed(key, value, config[key]) if key in config else value for key, value in said.items()}


def _typed(key: str, value: Any, default: Any) -> Any:
    if isinstance(value, list):
        if not value:
            raise ValueError(f"{key}: an empty list says nothing")
        value = value[0]
    if key == "device":
        return device(value)
    if isinstance(default, list):
        return _choice(key, value, default)
    if isinstance(default, bool):
        return boolean(key, value)
    if isinstance(default, (int, float)):
        return _number(key, value, type(default))
    if isinstance(default, str) and not isinstance(value, str):
        raise ValueError(f"{key}: expected a text, got {value!r}")
    return value


def boolean(key: str, value: Any) -> bool:
    """True or false from what clients send for a check box; nothing is false.

    Raises:
        ValueError: naming the option.
    """
    try:
        return value not in (None, "") and bool(strtobool(str(value)))
    except ValueError:
        raise ValueError(f"{key}: expected true or false, got {value!r}") from None


def device(name: Any) -> str:
    """A device as clients name it: as `/info/` lists it, cpu, mps, cuda or cuda with a number; nothing is the first.

    Raises:
        ValueError: there is no such device.
    """
    names = device_list()
    if name in (None, ""):
        return names[0]
    if name in names or name in ("cpu", "cuda", "mps"):  # MONAI Label takes the CPU where there is no GPU
        return str(name)
    match = re.fullmatch(r"cuda:(\d{1,3})", name) if isinstance(name, str) else None
    if not match or int(match[1]) >= torch.cuda.device_count():
        raise ValueError(f"device: {name!r}; valid are {', '.join(dict.fromkeys((*names, 'cpu', 'cuda')))}")
    return str(name)


def _choice(key: str, value: Any, choices: list[Any]) -> Any:
    found = next((c for c in choices if str(c) == str(value)), None)
    if found is None:
        raise ValueError(f"{key}: {value!r}; valid are {', '.join(str(c) for c in choices)}")
    return found


def _number(key: str, value: Any, kind: type[int] | type[float]) -> int | float:
    expected = "a whole number" if kind is int else "a number"
    try:
        number = float(value)
        if isinstance(value, bool) or (kind is int and number != int(number)):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{key}: expected {expected}, got {value!r}") from None
    return kind(number)
