"""How a trained network reads a text, without an image: which of its classes the text would be drawn as.

A network with the text head compares the decoder's features with a kernel that it makes of a class's text. Features of
one class lie together, so their mean, kept with a version as the class's place, stands for them: the text whose logit
there is the highest is the one that would be drawn there, and if none is above the background's, nothing is. What T of
Eq. (4) would see of an image is left out: its concepts weigh the same, and BiFusion adds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lib.model.nets.bipvl import BiPVLSeg
from lib.model.nets.heads import TextHead
from lib.tasks import Task

KEY = "places"  # in a checkpoint
LEAST = 0.5  # logit above the background's at which a text counts as read


@dataclass(frozen=True)
class Places:
    """Where classes lie in a network's feature space. features: (n, width), the mean decoder features of each class."""

    names: tuple[str, ...]
    features: Tensor

    def to_entry(self) -> dict[str, Any]:
        """Plain data and a tensor, for a checkpoint."""
        return {"names": list(self.names), "features": self.features}


def places_in(checkpoint: dict[str, Any], model: BiPVLSeg) -> Places | None:
    """The places that a checkpoint holds; None if it has none, or not of this network."""
    entry = checkpoint.get(KEY)
    if not isinstance(entry, dict) or not isinstance(model.head, TextHead):
        return None
    features, names = entry.get("features"), entry.get("names")
    if not isinstance(features, Tensor) or not isinstance(names, list):
        return None
    if features.shape != (len(names), model.vision.feature_width):
        return None
    return Places(tuple(map(str, names)), features.float())


@torch.no_grad()
def logits_at(model: BiPVLSeg, places: Places, rows: Sequence[Sequence[str]]) -> Tensor:
    """Logits of texts at the places of classes, less the background's.

    Args:
        model: with the text head.
        places: of n classes.
        rows: a list of K sentences for each of m texts.

    Returns:
        (m, n); above 0 the text is drawn there rather than the background.
    """
    head, text = model.head, model.text
    assert isinstance(head, TextHead)
    training = model.training
    model.eval()
    try:
        states, apart = model.read(text.tokenize([list(sentences) for sentences in rows]))
        state = states.rows[None]
        for stage in (1, 2, 3):
            state = text.advance(stage, state, states)
        vectors = model.project_text(state.unflatten(1, (len(rows), -1))).mean(2)
        features = places.features.to(vectors.device).T[None, :, :, None, None]
        logits = head(features, vectors, apart)[0, :, :, 0, 0]
    finally:
        model.train(training)
    return (logits if head.background is None else logits[1:] - logits[:1]).float().cpu()


def misread(
    model: BiPVLSeg, places: Places, task: Task, rows: Sequence[Sequence[str]] | None = None
) -> dict[str, str | None]:
    """The classes whose text would not be drawn as what they are.

    Args:
        task: with the text to judge. The texts of its classes compete, as in a request.
        rows: the text in its place: K sentences for each of the task's classes.

    Returns:
        Class name to the class that its text is read as; None if it is read as nothing that the network knows.
    """
    known = [name for name in task.classes if name in places.names]
    if not known:
        return {}
    at = [places.names.index(name) for name in known]
    texts = dict(zip(task.classes, rows or task.text_rows(), strict=True))
    logits = logits_at(model, places, [texts[name] for name in known])[:, at]
    found: dict[str, str | None] = {}
    for n, name in enumerate(known):
        best = int(logits[n].argmax())
        if logits[n, best] < LEAST:
            found[name] = None
        elif best != n:
            found[name] = known[best]
        elif not task.overlapping and int(logits[:, n].argmax()) != n:
            found[name] = None  # another text is drawn in its place
    return found


def describe(found: dict[str, str | None], version: int) -> dict[str, str]:
    """What to tell people of texts that are misread, a sentence a class."""
    return {
        name: f"to version {version} the text of {name} reads like {other}"
        if other
        else f"to version {version} the text of {name} describes nothing that it knows: expect no mask, or a wrong one"
        for name, other in found.items()
    }
