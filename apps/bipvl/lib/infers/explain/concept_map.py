"""A map of the concepts before and after training, the paper's Fig. 1b: which sentences are alike to the network."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.manifold import TSNE
from torch import Tensor

from lib.model.alignment import unit
from lib.model.nets import BiPVLSeg, TextAssets, build_model
from lib.tasks import Task

SEED = 0
LEAST_POINTS = 5  # of which a map can say anything
SAME = 1e-6  # distance of unit vectors below which all are one
PERPLEXITY = 30.0


def embeddings(model: BiPVLSeg, task: Task, image: Tensor) -> Tensor:
    """The concepts as the alignment losses see them: fused rows in the common space, at length 1.

    Args:
        model: in evaluation mode.
        task: whose sentences are read.
        image: (channels, h, w, d), preprocessed; the patch in its middle is what the rows are fused with.

    Returns:
        (C, K, P) on the CPU.
    """
    device = next(model.parameters()).device
    sentences = model.text.tokenize(task.text_rows()).to(device)
    with torch.no_grad():
        output = model(middle(image, task.patch)[None].to(device), sentences)
    return unit(output.concepts[0].float()).cpu()


def middle(image: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """The patch in the middle of (channels, h, w, d), zeros around it if the volume is smaller."""
    image = torch.as_tensor(image).as_subclass(Tensor)
    result = image.new_zeros(len(image), *patch)
    source, target = [slice(None)], [slice(None)]
    for have, want in zip(image.shape[1:], patch, strict=True):
        n = min(have, want)
        source.append(slice((have - n) // 2, (have - n) // 2 + n))
        target.append(slice((want - n) // 2, (want - n) // 2 + n))
    result[tuple(target)] = image[tuple(source)]
    return result


def untrained(task: Task, assets: TextAssets | None) -> BiPVLSeg:
    """The network as a first round begins with it: pre-trained text encoder, or random numbers for `scratch`, whose
    tokenizer is taken from the trained network, so that both read the same tokens; and the task's vision weights.

    Raises:
        lib.tasks.TaskError: what is pre-trained cannot be loaded.
    """
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return build_model(task, assets if task.model.text == "scratch" else None, fresh=True).eval()


def describe(vectors: Tensor) -> dict[str, Any]:
    """A map of unit vectors (C, K, P): two coordinates per sentence by t-SNE, class by class, and how alike they are.

    t-SNE draws groups even if there are none, so numbers stand beside it: the mean cosine of two sentences of one
    class, and of two classes.
    """
    classes, concepts, _ = vectors.shape
    flat = vectors.flatten(0, 1)
    cosine = flat @ flat.T
    same = torch.arange(classes).repeat_interleave(concepts)
    within = same[:, None] == same[None]
    within.fill_diagonal_(False)
    return {
        "points": _tsne(flat.double().numpy()).reshape(classes, concepts, 2).round(3).tolist(),
        "within": _mean(cosine[within]),
        "between": _mean(cosine[same[:, None] != same[None]]),
    }


def _tsne(points: NDArray) -> NDArray:
    if len(points) < LEAST_POINTS or np.ptp(points, axis=0).max() < SAME:
        return np.zeros((len(points), 2))
    perplexity = min(PERPLEXITY, (len(points) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=SEED).fit_transform(points)


def _mean(values: Tensor) -> float | None:
    return round(float(values.mean()), 4) if len(values) else None
