"""`model.vision_weights`: a file of weights that others trained, with which a fresh vision network starts.

Tensors are matched by name. The names in public files differ from MONAI's present ones by what was wrapped around the
network when it was saved, and by its age:

| file | under the key | names |
|---|---|---|
| MONAI's self-supervised encoder (`model_swinvit.pt`) | `state_dict` | `module.layers1.0.blocks.0.mlp.fc1.weight` |
| Swin UNETR of BTCV, BraTS and the model zoo | `state_dict`, or none | `swinViT.layers1.0.…`, `encoder1.…`, `out.…` |
| SuPreM | `net` | `module.backbone.swinViT.layers1.0.…`, and its own heads |
| Disruptive Autoencoders (DAE) | `model` | `encoder.layers1.0.0.…` (an index more), `encoder1.…` |
| nnU-Net | `network_weights` | as in the network |

A wrong network must not pass unnoticed, so what does not fit the encoder is an error that says why.
"""

from __future__ import annotations

import logging
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lib.tasks import Task, TaskError

logger = logging.getLogger(__name__)

ENOUGH = 0.9  # of the encoder's parameters, and of what the file has for it
SHOWN = 4  # names in a message
CONTAINERS = ("state_dict", "model_state_dict", "network_weights", "net", "network", "model")
WRAPPERS = ("module.", "_orig_mod.", "vision.", "net.", "network.", "backbone.", "model.")
RENAMED = (
    (re.compile(r"^(?:encoder|swin_vit)\."), "swinViT."),
    (re.compile(r"^(?=(?:patch_embed|layers\dc?)\.)"), "swinViT."),
    (re.compile(r"^(?=(?:patch_embedding|blocks|norm)\.)"), "vit."),
    (re.compile(r"(\.layers\d\.0\.)0\."), r"\1"),
    (re.compile(r"\.mlp\.fc([12])\."), r".mlp.linear\1."),
)
# The encoders of the backbones: Swin UNETR; UNETR; nnU-Net's; UNet++; UNet but for its way up; MedNeXt.
ENCODER = re.compile(
    r"(?:swinViT|vit|encoder|conv_\d_0|stem|enc_stages|down_blocks|bottleneck)\.|model\.(?!(?:1\.submodule\.)*2\.)"
)
NEVER_RUN = re.compile(r"\.(?:norm_)?cross_attn\.")  # MONAI builds and saves it in UNETR's blocks, and calls it nowhere
# Scores in checkpoints are often numbers of NumPy's: plain data, which torch does not take for granted.
_NUMBERS = [np.dtype(kind) for kind in ("float64", "float32", "int64", "int32")]
_RECONSTRUCT = np.float64(0).__reduce__()[0]
PLAIN: list[Any] = [
    *((_RECONSTRUCT, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    *(type(number) for number in _NUMBERS),
]


@dataclass(frozen=True)
class Report:
    """What became of a file.

    Attributes:
        file: its path.
        loaded: tensors of the network that have the file's values.
        spread: those of them that the file has for one image channel and the network for several.
        kept: tensors of the network that stay as they were initialised.
        left: tensors of the file that nothing took.
        encoder: share of the encoder's parameters that have the file's values.
    """

    file: str
    loaded: tuple[str, ...]
    spread: tuple[str, ...]
    kept: tuple[str, ...]
    left: tuple[str, ...]
    encoder: float

    def __str__(self) -> str:
        parts = [
            f"{self.file}: {len(self.loaded)} of {len(self.loaded) + len(self.kept)} tensors loaded, "
            f"{self.encoder:.1%} of the encoder's parameters"
        ]
        for what, names in (
            ("copied from one image channel to all", self.spread),
            ("as initialised", self.kept),
            ("not used of the file", self.left),
        ):
            parts += [f"{what}: {_some(names)}"] if names else []
        return "; ".join(parts)


def load_vision_weights(vision: nn.Module, task: Task) -> Report | None:
    """Give a fresh vision network the weights of the task's `model.vision_weights`, and log what was loaded.

    A convolution that the file has for one image channel is copied to all of the task's, divided by their number: if
    all channels show the same image, it answers as before. Tensors of the decoder that do not fit stay as they are.

    Args:
        vision: a backbone; changed in place.
        task: names the file. None is named: nothing happens.

    Raises:
        TaskError: the file cannot be read, or does not fit at least 90% of the encoder; the network is as it was.
    """
    path = task.model.vision_weights
    if path is None:
        return None
    try:
        report = _load(vision, Path(path), len(task.channels))
    except _Misfit as error:
        raise TaskError(f"model.vision_weights {path!r}: {error}") from error
    logger.info("model.vision_weights: %s", report)
    return report


class _Misfit(ValueError):
    """Why a file does not serve."""


def _load(vision: nn.Module, path: Path, channels: int) -> Report:
    ours = {name.removeprefix("net."): tensor for name, tensor in vision.state_dict().items()}
    sizes = {name.removeprefix("net."): p.numel() for name, p in vision.named_parameters()}
    encoder = [name for name in sizes if ENCODER.match(name)] or list(sizes)
    found, left = _matched(_read(path), ours)

    values: dict[str, Tensor] = {}
    conflicts: dict[str, Tensor] = {}
    for name, (theirs, tensor) in found.items():
        fitted = _fitted(tensor, ours[name], channels)
        if fitted is not None:
            values[name] = fitted
        elif name in encoder:
            conflicts[name] = tensor
        else:
            left[theirs] = tensor
    if conflicts:
        raise _Misfit(_sizes(conflicts, ours))
    share = sum(sizes[name] for name in encoder if name in values) / sum(sizes[name] for name in encoder)
    used = sum(tensor.numel() for name, (_, tensor) in found.items() if name in encoder)
    first = {name.split(".")[0] for name in encoder}
    spare = {name: tensor for name, tensor in left.items() if _for_encoder(name, first)}
    unused = sum(tensor.numel() for tensor in spare.values())
    kept = [name for name in ours if name not in values]
    if share < ENOUGH:
        lacking = [name for name in encoder if name not in values]
        raise _Misfit(
            f"fills {share:.0%} of the encoder's parameters, and {ENOUGH:.0%} are needed: it is of another network. It "
            f"lacks {_some(lacking)}; not used of it: {_some(list(left)) or 'nothing'}"
        )
    if used < ENOUGH * (used + unused):
        raise _Misfit(
            f"of what it has for the encoder, {used / (used + unused):.0%} has a place here, and {ENOUGH:.0%} must: it "
            f"is of another network (model.vision), or of a deeper one. No place for {_some(list(spare))}"
        )
    broken = [name for name, value in values.items() if not torch.isfinite(value).all()]
    if broken:
        raise _Misfit(f"holds NaN or infinity in {_some(broken)}")
    with torch.no_grad():
        for name, value in values.items():
            ours[name].copy_(value)
    spread = tuple(name for name in values if found[name][1].shape != ours[name].shape)
    return Report(str(path), tuple(values), spread, tuple(kept), tuple(left), share)


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by their names. Only tensors and plain data are unpickled."""
    try:
        with torch.serialization.safe_globals(PLAIN):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, NotADirectoryError):
        raise _Misfit("no such file") from None
    except pickle.UnpicklingError as error:
        if more := re.search(r"Unsupported (?:global: GLOBAL|class) \S+", str(error)):
            raise _Misfit(
                f"holds more than tensors and plain data ({more[0]}). To read that can run any code, so it is refused; "
                "where you trust the file, save its state dictionary alone and name that"
            ) from error
        raise _Misfit("damaged, or not a file of torch.save") from error
    except (OSError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise _Misfit(f"damaged, or not a file of torch.save: {' '.join(str(error).split())[:200]}") from error
    inner = [_tensors(content.get(key)) for key in CONTAINERS] if isinstance(content, Mapping) else []
    tensors = next(filter(None, inner), None) or _tensors(content)
    if not tensors:
        keys = _some([str(key) for key in content]) if isinstance(content, Mapping) else type(content).__name__
        raise _Misfit(f"holds no weights by name, but {keys}; valid are names, or under {', '.join(CONTAINERS)}")
    return tensors


def _tensors(content: Any) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        return {}
    return {str(name): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


def _candidates(name: str) -> Iterator[str]:
    """What a tensor of a file may be called here: without what was wrapped around its network, by present names."""
    while True:
        yield name
        renamed = name
        for pattern, replacement in RENAMED:
            renamed = pattern.sub(replacement, renamed)
        if renamed != name:
            yield renamed
        wrapper = next((w for w in WRAPPERS if name.startswith(w)), None)
        if wrapper is None:
            return
        name = name.removeprefix(wrapper)


def _matched(
    file: Mapping[str, Tensor], ours: Mapping[str, Tensor]
) -> tuple[dict[str, tuple[str, Tensor]], dict[str, Tensor]]:
    """Our names to the file's names and tensors; and what of the file has no name of ours."""
    found: dict[str, tuple[str, Tensor]] = {}
    left: dict[str, Tensor] = {}
    for name, tensor in file.items():
        target = next((candidate for candidate in _candidates(name) if candidate in ours), None)
        if target is None:
            left[name] = tensor
        elif target in found:
            raise _Misfit(f"has two tensors for {target}: {found[target][0]} and {name}; save one network alone")
        else:
            found[target] = name, tensor
    return found, left


def _fitted(tensor: Tensor, like: Tensor, channels: int) -> Tensor | None:
    """A tensor of the file at our size, from one image channel to all if need be; None if it does not fit."""
    if tensor.shape == like.shape:
        return tensor
    kernel = tensor.ndim == like.ndim > 2 and tensor.shape[1] == 1 and like.shape[1] == channels
    if kernel and tensor.shape[0] == like.shape[0] and tensor.shape[2:] == like.shape[2:]:
        return tensor.expand_as(like) / channels
    return None


def _for_encoder(name: str, first: set[str]) -> bool:
    """Whether a tensor of the file that nothing took belongs to an encoder of our kind."""
    if NEVER_RUN.search(name):
        return False
    return any(ENCODER.match(c) and c.split(".")[0] in first for c in _candidates(name))


def _sizes(conflicts: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> str:
    """Which sizes differ, and what would make them fit."""
    shown = [
        f"{name} is {tuple(tensor.shape)} in the file and {tuple(ours[name].shape)} here"
        for name, tensor in list(conflicts.items())[:SHOWN]
    ]
    advice = []
    patches, heads = (
        (conflicts[name].shape, ours[name].shape) if name in conflicts else None
        for name in ("swinViT.patch_embed.proj.weight", "swinViT.layers1.0.blocks.0.attn.relative_position_bias_table")
    )
    if patches and patches[0][0] != patches[1][0]:
        advice.append(f"model.feature_size {patches[0][0]}")
    if heads and heads[0][-1] != heads[1][-1]:
        advice.append(f"model.swin_heads {heads[0][-1]}")
    text = f"does not fit the encoder: {'; '.join(shown)}"
    if len(conflicts) > SHOWN:
        text += f"; and {len(conflicts) - SHOWN} more"
    if advice:
        text += f". It fits with {' and '.join(advice)}"
    if patches and patches[0][1] not in (1, patches[1][1]):
        text += f". It is for {patches[0][1]} image channels; valid are files for {_either(patches[1][1])}"
    return text


def _either(channels: int) -> str:
    return "1" if channels == 1 else f"1 or {channels}"


def _some(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
