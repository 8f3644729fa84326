"""Exchange words of sentences for their opposites, in training (mirrored patients) and to see what the text moves.

Also: typing errors, and what makes a sentence more than plain text."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Sequence

MIRROR = ("left", "right")
_MARKUP = re.compile(r"[<>{}\\`]|&#?\w+;")
_UNPRINTED = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}  # control, format (text direction), surrogate, private, separators


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


def misspelt(sentence: str, draw: random.Random) -> str:
    """The sentence with a small typing error in one of its longer words: two letters exchanged, one left out, or one
    twice. A sentence without a word of four letters stays as it is.

    >>> misspelt("Above the spleen.", random.Random(1))
    'Aboev the spleen.'
    """
    words = list(re.finditer(r"[A-Za-z]{4,}", sentence))
    if not words:
        return sentence
    word = draw.choice(words)
    at = draw.randrange(word.start() + 1, word.end() - 1)  # the first letter and the last are rarely missed
    pair = sentence[at : at + 2]
    return sentence[:at] + draw.choice([pair[::-1], pair[1:], pair[0] + pair]) + sentence[at + 2 :]


def markup(sentence: str) -> str | None:
    """The first thing in a sentence that is not plain text; None if there is none.

    Sentences are shown on pages and terminals, which escape them. Refusing markup keeps them harmless wherever else
    they are shown, and the network would read it as words.

    >>> markup("Darker than fat & brighter than air, below 5 mm.")
    >>> markup("Bright <b>rim</b>")
    "'<'"
    """
    if found := _MARKUP.search(sentence):
        return repr(found[0])
    return next((f"the character U+{ord(c):04X}" for c in sentence if unicodedata.category(c) in _UNPRINTED), None)
