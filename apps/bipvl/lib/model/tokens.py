"""Checking sentences with the tokenizer that will read them."""

from __future__ import annotations

import contextlib
import json
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer

from lib.model import checkpoints
from lib.model.nets.text import MINILM, build_text, source_of
from lib.model.versions import CheckpointError, Versions
from lib.tasks import Task, TaskError
from lib.tasks.check import Problem, check


def check_text(task: Task, versions: Versions | None = None) -> list[Problem]:
    """`concept_check.check` with the tokens counted as the next round will count them.

    That is by the tokenizer of the served version, from which a round starts; before the first one by that which a BERT
    from scratch gets or MiniLM has, or by an estimate if a hub would have to be asked or MiniLM is not installed.
    """
    path = _served(versions) if versions else None
    if path is not None:
        stat = path.stat()
        tokenizer, limit = _tokenizer(path, stat.st_mtime_ns)
        return check(task, lambda text: len(tokenizer.encode(text).ids), limit)
    if task.model.text == MINILM:
        with contextlib.suppress(TaskError):
            tokenizer, limit = _of_folder(Path(source_of(MINILM)))
            return check(task, lambda text: len(tokenizer.encode(text).ids), limit)
    if task.model.text != "scratch":
        return check(task)
    # The vocabulary comes from all sentences; building reads the class names only, so that none is too long for it.
    names = task.model_copy(update={"model": task.model.model_copy(update={"text_format": "name"})})
    own = build_text(names).tokenizer
    return check(task, lambda text: len(own.encode(text).ids), task.model.scratch.max_tokens)


def _served(versions: Versions) -> Path | None:
    try:
        served = versions.served
    except CheckpointError:
        return None
    path = versions.path(served) if served else None
    return path if path and path.is_file() else None


@lru_cache(maxsize=8)
def _tokenizer(path: Path, modified: int) -> tuple[Tokenizer, int]:
    """The tokenizer of a checkpoint, and how many tokens its encoder takes."""
    text = checkpoints.load(path)["text"]
    return _plain(text["tokenizer"], text["config"])


@lru_cache(maxsize=1)
def _of_folder(folder: Path) -> tuple[Tokenizer, int]:
    """Likewise of a model's folder; its weights are not read."""
    return _plain((folder / "tokenizer.json").read_text("utf-8"), (folder / "config.json").read_text("utf-8"))


def _plain(description: str, config: str) -> tuple[Tokenizer, int]:
    tokenizer = Tokenizer.from_str(description)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer, int(json.loads(config)["max_position_embeddings"])
