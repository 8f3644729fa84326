"""Names of classes: when two are one, and which ones a task may have."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

MAX_NAME = 64  # characters that DICOM keeps of a segment's label (value representation LO)
SEPARATORS = "\\=^,"  # of values and parts of names in DICOM, and of names in the option `label_subset`
BACKGROUND = "background"


def folded(name: str) -> str:
    """What counts of a name: not case, not hyphens, underscores and spaces, not how Unicode composes a letter.

    >>> folded("Left-Kidney") == folded("left_kidney") == folded(" left  kidney ")
    True
    """
    plain = unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())
    return " ".join(plain.replace("_", " ").replace("-", " ").split())


def meant(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that `name` means: itself, or the only one that is the same by `folded`; None for an unknown one.

    >>> meant("Left-Kidney", ["left kidney", "right kidney"])
    'left kidney'
    """
    valid = list(valid)
    if name in valid:
        return name
    found = [other for other in valid if folded(other) == folded(name)]
    return found[0] if len(found) == 1 else None


def check_names(names: Iterable[str], what: str) -> None:
    """Whether clients, files and archives can carry these names and tell them apart.

    Args:
        what: of what, to name in messages.

    Raises:
        ValueError: saying which name, and what is valid.
    """
    known: dict[str, str] = {}
    for name in names:
        if problem := _problem(name):
            raise ValueError(
                f"{what}: {name!r} {problem}; valid are up to {MAX_NAME} visible characters without "
                f"{' '.join(SEPARATORS)}, not {BACKGROUND!r}"
            )
        other = known.setdefault(folded(name), name)
        if other != name:
            raise ValueError(
                f"{what}: {other!r} and {name!r} count as one name (case, hyphens, underscores and spaces do not "
                "matter); rename one"
            )


def _problem(name: str) -> str | None:
    if not folded(name):
        return "is empty"
    if name != name.strip():
        return "begins or ends with a space"
    if len(name) > MAX_NAME:
        return f"has {len(name)} characters"
    if not name.isprintable():
        return "holds a character that cannot be seen"
    if found := next((c for c in name if c in SEPARATORS), None):
        return f"holds {found!r}"
    return "means the background, which is not a class" if folded(name) == BACKGROUND else None
