"""Checkpoints: everything needed to run a model anywhere, as plain data and tensors."""

from __future__ import annotations

import contextlib
import json
import pickle
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, BertConfig

from lib.files import write_atomic
from lib.model.nets import BiPVLSeg, TextAssets, build_model
from lib.model.nets.text import Origin, origin_of, source_of, weights_of
from lib.tasks import Task, task_from_dict

FORMAT = 4  # 4 may leave a frozen text encoder to its package
CLASS_MAPS = 3  # before it a fixed head had the paper's class embedding; a text head was another network
ENCODER = "text.bert."  # the weights of the text encoder begin so
# What makes the weights of one BERT fit, and mean the same in, another.
BERT_FIELDS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
    *("max_position_embeddings", "type_vocab_size", "layer_norm_eps", "pad_token_id"),
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the reason.

    status: the HTTP status that says so. The file is the server's, and so is the fault.
    """

    status = 500


class RefusedCheckpoint(CheckpointError):
    """A checkpoint, or the number of one, that somebody sent and that cannot be used."""

    status = 400


class DamagedCheckpoint(CheckpointError):
    """A checkpoint whose file is missing, cut or changed."""


def checkpoint_of(model: BiPVLSeg, task: Task, manifest: dict[str, Any], **extra: Any) -> dict[str, Any]:
    """Everything needed to run the model anywhere, as plain data and tensors.

    The weights of a frozen text encoder that a package holds are left out; `text.origin` names the package.
    """
    assets, origin = model.text.assets, origin_of(task)
    left_out = ENCODER if origin else None
    return {
        "format": FORMAT,
        "task": task.to_dict(),
        "text": {"config": assets.config, "tokenizer": assets.tokenizer, "origin": origin and asdict(origin)},
        "model": {k: v for k, v in model.state_dict().items() if left_out is None or not k.startswith(left_out)},
        "manifest": manifest,
        **extra,
    }


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint atomically."""
    write_atomic(path, lambda file: torch.save(checkpoint, file))


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; only tensors and plain data are unpickled.

    Raises:
        DamagedCheckpoint: missing or damaged.
        CheckpointError: not a checkpoint of this app.
    """
    checkpoint = load_tensors(path)
    missing = {"format", "task", "text", "model", "manifest"} - (
        checkpoint.keys() if isinstance(checkpoint, dict) else set()
    )
    if missing:
        raise CheckpointError(f"{path}: not a checkpoint of this app, it lacks {', '.join(sorted(missing))}")
    if checkpoint["format"] not in range(1, FORMAT + 1):
        raise CheckpointError(f"{path}: checkpoint format {checkpoint['format']}; this app reads 1 to {FORMAT}")
    if checkpoint["format"] < CLASS_MAPS:
        head = "fixed"
        with contextlib.suppress(KeyError, TypeError, AttributeError):  # `restore_model` says what is wrong with it
            model = checkpoint["task"]["model"]
            head = model.setdefault("head", "fixed")  # the only one there was
            model.setdefault("class_embedding", "last")
        if head == "text":
            raise CheckpointError(
                f"{path}: of a text head without the decoder's class maps (format {checkpoint['format']}); "
                "train it again"
            )
    return checkpoint


def load_tensors(path: Path) -> Any:
    """Read a file of `torch.save` onto the CPU; only tensors and plain data are unpickled.

    Raises:
        DamagedCheckpoint: missing, damaged, or holding anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedCheckpoint(f"{path}: no such checkpoint") from None
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise DamagedCheckpoint(f"{path}: damaged, or not a checkpoint: {brief(error)}") from error


def restore_model(
    checkpoint: dict[str, Any], path: Path | str = "checkpoint", current: Task | None = None
) -> tuple[BiPVLSeg, Task]:
    """Rebuild the network, in evaluation mode, and the task that a checkpoint holds.

    Args:
        checkpoint: from `load`.
        path: for messages.
        current: the task as it is now, if `check_same_task` has passed it: a network with the text head gets its
            classes, the new ones by their description (`Task.extended`).

    Raises:
        CheckpointError: weights that do not fit the network of its own task, or are not finite.
    """
    task = task_from_dict(checkpoint["task"], str(path))
    try:
        model = build_model(task, text_assets(checkpoint))
        load_weights(model, checkpoint)
    # What an uploaded file may hold in place of a configuration, a tokenizer or weights fails in many ways.
    except Exception as error:
        raise CheckpointError(f"{path}: the weights do not fit: {brief(error)}") from error
    if not all(torch.isfinite(tensor).all() for tensor in model.state_dict().values()):
        raise CheckpointError(f"{path}: the weights hold NaN or infinity")
    if current is not None:
        task = task.respelled(current)
    reads = current is not None and task.model.head == "text" and task.overlapping == current.overlapping
    if current is not None and reads and current.classes != task.classes:
        task = task.extended(current)
        model.text.describe(task.text_rows())
    return model.eval(), task


def load_weights(model: BiPVLSeg, checkpoint: dict[str, Any]) -> None:
    """Give a network of the same sizes the weights of a checkpoint, and of the package that it names.

    Raises:
        TaskError: the package of the text encoder is missing, or another one.
        RuntimeError: the weights do not fit.
    """
    weights = dict(checkpoint["model"])
    if origin := checkpoint["text"].get("origin"):
        weights |= {ENCODER + name: tensor for name, tensor in weights_of(Origin(**origin)).items()}
    model.load_state_dict(weights)


def text_assets(checkpoint: dict[str, Any]) -> TextAssets:
    return TextAssets(checkpoint["text"]["config"], checkpoint["text"]["tokenizer"])


def check_same_task(checkpoint: dict[str, Any], task: Task, path: Path | str = "checkpoint") -> None:
    """Refuse a checkpoint whose weights or values mean something other than the task's.

    Sentences and training settings may differ: weights stay meaningful, and the next round trains with the new ones.
    With the text head classes may differ too, because they are known by their sentences alone.

    Raises:
        CheckpointError: naming each difference.
    """
    theirs = task_from_dict(checkpoint["task"], str(path)).respelled(task)
    by_channel = (
        ("classes", theirs.classes, task.classes),
        ("label values", theirs.label_values, task.label_values),
    )
    reads = theirs.model.head == task.model.head == "text"
    differences = [
        f"{what} {a!r}, the server's task has {b!r}"
        for what, a, b in (
            ("task", theirs.name, task.name),
            *(() if reads else by_channel),
            ("overlapping classes", theirs.overlapping, task.overlapping),
            ("channels", theirs.channels, task.channels),
            ("vision backbone", theirs.model.vision, task.model.vision),
            ("Swin heads", theirs.model.swin_heads, task.model.swin_heads),
            ("feature size", theirs.model.feature_size, task.model.feature_size),
            ("fusion", theirs.model.fusion, task.model.fusion),
            ("head", theirs.model.head, task.model.head),
            ("text of the head", theirs.model.head_text, task.model.head_text),
            ("class embedding", theirs.model.class_embedding, task.model.class_embedding),
            ("projection", theirs.model.projection, task.model.projection),
        )
        if a != b
    ]
    if theirs.model.text != task.model.text:
        # One encoder may go by several names: a hub's, or the local folder of a site without network.
        reason = _text_difference(text_assets(checkpoint), task.model.text)
        if reason:
            differences.append(
                f"text encoder {theirs.model.text!r}, the server's task has {task.model.text!r} ({reason})"
            )
    if differences:
        raise CheckpointError(f"{path}: a checkpoint of another task: {'; '.join(differences)}")


def brief(error: Exception) -> str:
    """The first words of an error, in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _text_difference(assets: TextAssets, name: str) -> str | None:
    """Why the text encoder called `name` is not the one of a checkpoint; None if it is."""
    if name == "scratch":
        return "'scratch' makes a vocabulary of its own"
    try:
        source = source_of(name)
        theirs, ours = BertConfig(**json.loads(assets.config)), BertConfig.from_pretrained(source)
        tokenizers = [Tokenizer.from_str(assets.tokenizer), AutoTokenizer.from_pretrained(source).backend_tokenizer]
    except Exception as error:  # hub, file and format errors come as many types
        return f"they cannot be compared: {brief(error)}"
    for field in BERT_FIELDS:
        if getattr(theirs, field) != getattr(ours, field):
            return f"{field} {getattr(theirs, field)}, not {getattr(ours, field)}"
    for tokenizer in tokenizers:
        tokenizer.no_padding()
        tokenizer.no_truncation()
    return None if tokenizers[0].to_str() == tokenizers[1].to_str() else "another tokenizer"
