"""What holds for every loss: samples, order, gradients, precision; and the examples in their docstrings."""

import doctest

import pytest
import torch

from lib.model import alignment, losses
from lib.model.alignment import aggregate_text, concept_weights
from lib.model.losses import (
    alignment_loss,
    class_embedding_loss,
    global_alignment_loss,
    local_alignment_loss,
    segmentation_loss,
)
from support.helpers import exclusive, regions, vectors


def test_docstring_examples():
    results = [doctest.testmod(module) for module in (losses, alignment)]
    assert sum(r.attempted for r in results) >= 11
    assert not any(r.failed for r in results)


def arguments(name: str, batch: int = 2) -> tuple:
    """The loss of a name and its float64 tensors; the first is differentiable, and so are all of the alignment."""
    text, rows, vision = vectors(batch)
    table = {
        "segmentation": (segmentation_loss, exclusive(batch)),
        "segmentation overlapping": (lambda x, y: segmentation_loss(x, y, True), regions(batch)),
        "class embedding": (class_embedding_loss, (exclusive(batch, size=2)[0], exclusive(batch)[0])),
        "class embedding overlapping": (
            lambda x, y: class_embedding_loss(x, y, True),
            (regions(batch, size=2)[0], regions(batch)[0]),
        ),
        "global": (global_alignment_loss, (text, vision)),
        "local": (local_alignment_loss, (rows, vision)),
        "alignment": (lambda t, c, v: alignment_loss(t, c, v).total, (text, rows, vision)),
        "weights and text": (
            lambda t, v: global_alignment_loss(aggregate_text(t, concept_weights(t, v)), v),
            (rows, vision),
        ),
    }
    return table[name]


NAMES = [
    "segmentation",
    "segmentation overlapping",
    "class embedding",
    "class embedding overlapping",
    "global",
    "local",
    "alignment",
    "weights and text",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_scores_the_mean_of_its_samples(name):
    function, tensors = arguments(name)
    halves = [function(*(t[i : i + 1] for t in tensors)) for i in (0, 1)]
    assert halves[0] != halves[1]
    torch.testing.assert_close(function(*tensors), (halves[0] + halves[1]) / 2)


@pytest.mark.parametrize("name", NAMES)
def test_class_order_does_not_matter(name):
    function, tensors = arguments(name)
    if name == "segmentation":  # background stays first; new channel n holds the old class order[n]
        logits, label = tensors
        order = torch.tensor([0, 3, 1, 2])
        permuted = (logits[:, order], order.argsort()[label])
    else:
        order = torch.randperm(tensors[0].shape[1])
        permuted = tuple(t[:, order] for t in tensors)
    torch.testing.assert_close(function(*permuted), function(*tensors))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_numerically_right(name):
    function, tensors = arguments(name, batch=1)
    frozen = 1 if name.startswith(("segmentation", "class")) else len(tensors)
    inputs = tuple(t.requires_grad_() for t in tensors[:frozen])
    assert torch.autograd.gradcheck(lambda *x: function(*x, *tensors[frozen:]), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 3e4])
@pytest.mark.parametrize("name", NAMES)
def test_finite_in_every_precision(name, scale, dtype):
    function, tensors = arguments(name)
    given = tuple(
        t if t.dtype in (torch.long, torch.uint8) else (scale * t).clamp(-6e4, 6e4).to(dtype) for t in tensors
    )
    given[0].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = function(*given)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(given[0].grad).all()
    plain = function(*(t.float() if t.is_floating_point() else t for t in given))
    torch.testing.assert_close(loss, plain)  # only the input is rounded, nothing after it


@pytest.mark.parametrize("name", NAMES)
def test_zero_vectors_and_flat_logits_have_finite_gradients(name):
    function, tensors = arguments(name)
    given = tuple(torch.zeros_like(t) for t in tensors)
    given[0].requires_grad_()
    function(*given).backward()
    assert torch.isfinite(given[0].grad).all()
