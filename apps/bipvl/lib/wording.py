"""Words of sentences exchanged for their opposites: in training (mirrored patients), and to see what the text moves."""

from __future__ import annotations

import re
from collections.abc import Sequence

MIRROR = ("left", "right")


def exchanged(sentence: str, first: str, second: str) -> str:
    """The sentence with two words in each other's place, whole words in lower case or with a capital.

    >>> exchanged("Left of the spine, under the left-sided ribs, facing right.", "left", "right")
    'Right of the spine, under the right-sided ribs, facing left.'
    """
    other = {first: second, second: first}

    def exchange(found: re.Match) -> str:
        word = other[found[0].lower()]
        return word.capitalize() if found[0][0].isupper() else word

    return re.sub(rf"\b({re.escape(first)}|{re.escape(second)})\b", exchange, sentence, flags=re.IGNORECASE)


def exchanged_rows(rows: Sequence[Sequence[str]], first: str, second: str) -> list[list[str]]:
    """`exchanged` for C lists of K sentences."""
    return [[exchanged(sentence, first, second) for sentence in sentences] for sentences in rows]
