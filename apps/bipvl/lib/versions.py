"""Published model versions: one self-contained checkpoint a version, and a pointer to the one that is served.

    model/<task>/v0001.pt, v0002.pt, …    checkpoints
    model/<task>/served.json              {"version": 2}

Every file is written beside its place, synced and renamed, so that a kill at any instant leaves whole files and a
served model. A checkpoint carries the task, its sentences, the tokenizer and BERT's configuration: a server restarts
from it without the task's files and without a hub.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lib.nets import BiPVLSeg, TextAssets, build_model
from lib.tasks import Task, task_from_dict

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the reason."""


def checkpoint_of(model: BiPVLSeg, task: Task, manifest: dict[str, Any], **extra: Any) -> dict[str, Any]:
    """Everything needed to run the model anywhere, as plain data and tensors."""
    assets = model.text.assets
    return {
        "format": FORMAT,
        "task": task.to_dict(),
        "text": {"config": assets.config, "tokenizer": assets.tokenizer},
        "model": model.state_dict(),
        "manifest": manifest,
        **extra,
    }


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint atomically."""
    _atomic(path, lambda file: torch.save(checkpoint, file))


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically."""
    _atomic(path, lambda file: file.write(json.dumps(data, indent=2).encode()))


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; only tensors and plain data are unpickled.

    Raises:
        CheckpointError: missing, damaged, or not a checkpoint of this app.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: damaged, or no checkpoint: {_brief(error)}") from error
    missing = {"format", "task", "text", "model", "manifest"} - (
        checkpoint.keys() if isinstance(checkpoint, dict) else set()
    )
    if missing:
        raise CheckpointError(f"{path}: not a checkpoint of this app, it lacks {', '.join(sorted(missing))}")
    if checkpoint["format"] != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {checkpoint['format']}; this app reads format {FORMAT}")
    return checkpoint


def restore_model(checkpoint: dict[str, Any], path: Path | str = "checkpoint") -> tuple[BiPVLSeg, Task]:
    """Rebuild the network and the task that a checkpoint holds.

    Raises:
        CheckpointError: weights that do not fit the network of its own task.
    """
    task = task_from_dict(checkpoint["task"], str(path))
    model = build_model(task, text_assets(checkpoint))
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise CheckpointError(f"{path}: the weights do not fit: {_brief(error)}") from error
    return model, task


def text_assets(checkpoint: dict[str, Any]) -> TextAssets:
    return TextAssets(checkpoint["text"]["config"], checkpoint["text"]["tokenizer"])


def check_same_task(checkpoint: dict[str, Any], task: Task, path: Path | str = "checkpoint") -> None:
    """Refuse a checkpoint whose weights or values mean something else than the task's.

    Sentences and training settings may differ: weights stay meaningful, and the next round trains with the new ones.

    Raises:
        CheckpointError: naming each difference.
    """
    theirs = task_from_dict(checkpoint["task"], str(path))
    differences = [
        f"{what} {a!r}, the server's task has {b!r}"
        for what, a, b in (
            ("task", theirs.name, task.name),
            ("classes", theirs.classes, task.classes),
            ("label values", theirs.label_values, task.label_values),
            ("channels", theirs.channels, task.channels),
            ("vision backbone", theirs.model.vision, task.model.vision),
            ("Swin heads", theirs.model.swin_heads, task.model.swin_heads),
            ("feature size", theirs.model.feature_size, task.model.feature_size),
            ("fusion", theirs.model.fusion, task.model.fusion),
            ("projection", theirs.model.projection, task.model.projection),
            ("text encoder", theirs.model.text, task.model.text),
        )
        if a != b
    ]
    if differences:
        raise CheckpointError(f"{path}: a checkpoint of another task: {'; '.join(differences)}")


class Versions:
    """The versions of one task in one folder.

    Args:
        folder: created when the first version is published.
        keep: how many versions stay; the oldest go first, the served one never.
    """

    def __init__(self, folder: Path, keep: int = 5) -> None:
        self.folder = folder
        self.keep = keep

    def numbers(self) -> list[int]:
        """Published versions, oldest first."""
        if not self.folder.is_dir():
            return []
        found = (re.fullmatch(r"v(\d{4,})\.pt", p.name) for p in self.folder.iterdir())
        return sorted(int(m[1]) for m in found if m)

    def path(self, version: int) -> Path:
        return self.folder / f"v{version:04d}.pt"

    @property
    def served(self) -> int | None:
        """The version that is served, None before the first is published."""
        try:
            version = int(json.loads((self.folder / "served.json").read_text())["version"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.folder / 'served.json'}: not readable: {error}") from error
        return version

    def resolve(self, wanted: Any = None) -> int | None:
        """The version that a request means: a number, 'v3', or 'served', '' or None for the served one.

        Raises:
            CheckpointError: no such version; the message lists the valid ones.
        """
        if wanted in (None, "", "served"):
            return self.served
        match = re.fullmatch(r"v?0*(\d+)", str(wanted))
        if match and int(match[1]) in self.numbers():
            return int(match[1])
        valid = ", ".join(str(n) for n in self.numbers()) or "none yet"
        raise CheckpointError(f"model version {wanted!r}: valid are 'served' and {valid}")

    def serve(self, version: int) -> None:
        """Make a published version the served one."""
        if version not in self.numbers():
            raise CheckpointError(
                f"model version {version}: valid are {', '.join(map(str, self.numbers())) or 'none yet'}"
            )
        write_json(self.folder / "served.json", {"version": version})

    def publish(self, checkpoint: dict[str, Any]) -> int:
        """Write the next version, serve it, and remove the oldest beyond `keep`. Returns its number."""
        self.folder.mkdir(parents=True, exist_ok=True)
        version = max(self.numbers(), default=0) + 1
        checkpoint = {**checkpoint, "manifest": {**checkpoint["manifest"], "version": version, "parent": self.served}}
        save(checkpoint, self.path(version))
        self.serve(version)
        for old in self.numbers()[: -self.keep]:
            if old != version:
                self.path(old).unlink(missing_ok=True)
        return version


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _atomic(path: Path, write: Callable[[Any], Any]) -> None:
    """Write beside the place, sync, rename, sync the folder: readers see the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
