"""Whose work on which image a request is about."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Work:
    """What a person works on.

    label: the image's last submitted label of the person's own or anybody's, if there is one.
    stored: whether the image is the datastore's; one that was sent for a while is not.
    """

    person: str
    image: str
    path: Path
    label: Path | None = None
    stored: bool = True
