"""Sections of the documents that benchmarks write: between the lines <!-- NAME: begin --> and <!-- NAME: end -->."""

from __future__ import annotations

from pathlib import Path


def insert(document: Path, section: str, text: str) -> None:
    """Put the text between a section's markers.

    Raises:
        ValueError: the document has no such markers.
    """
    begin, end = (f"<!-- {section}: {mark} -->" for mark in ("begin", "end"))
    content = document.read_text(encoding="utf-8")
    if content.count(begin) != 1 or content.count(end) != 1:
        raise ValueError(f"{document}: expected one line {begin!r} and one line {end!r}")
    before, rest = content.split(begin)
    document.write_text(f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}", encoding="utf-8")
