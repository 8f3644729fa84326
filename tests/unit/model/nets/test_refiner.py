"""The refiner: nothing before training, any box, and classes by their text."""

from __future__ import annotations

import pytest
import torch

from lib.interaction.guidance import CHANNELS
from lib.model.nets.refiner import Refiner

WIDTHS = (4, 8, 8)


def inputs(*shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((1, CHANNELS, *shape), (1, 6, *shape), (1, 10))
    guidance, features, text = (torch.randn(size, generator=generator) for size in sizes)
    return guidance, features, text


def trained() -> Refiner:
    """With weights that are not zero anywhere."""
    torch.manual_seed(0)
    refiner = Refiner(6, 10, WIDTHS)
    for parameter in refiner.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return refiner.eval()


def test_before_training_it_adds_nothing() -> None:
    assert not Refiner(6, 10, WIDTHS)(*inputs(9, 8, 7), (1.0, 1.0, 1.0)).any()


@pytest.mark.parametrize(
    ("shape", "spacing"), [((9, 8, 7), (1, 1, 1)), ((17, 5, 1), (1, 1, 8)), ((5, 2, 3), (1, 1, 1))]
)
def test_any_box_gets_an_answer_of_its_size(shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    found = trained()(*inputs(*shape), spacing)
    assert found.shape == (1, *shape) and torch.isfinite(found).all()


def test_thick_slices_are_not_halved_while_they_are_thick() -> None:
    """A change in one slice reaches the next but one through the convolutions alone: five of them, and the halved
    levels only if the slices are halved."""
    refiner, (guidance, features, text) = trained(), inputs(8, 8, 33)
    changed = guidance.clone()
    changed[..., 0] += 1
    for norm in (module for module in refiner.modules() if isinstance(module, torch.nn.GroupNorm)):
        norm.forward = lambda input: input  # type: ignore[method-assign]  # statistics of the whole box reach everywhere
    reached = {}
    for thickness in (1.0, 8.0):
        difference = refiner(changed, features, text, (1, 1, thickness)) - refiner(
            guidance, features, text, (1, 1, thickness)
        )
        reached[thickness] = int(difference.abs().amax((0, 1, 2)).nonzero().max())
    assert reached[8.0] <= 12 < reached[1.0]


def test_the_class_is_known_by_its_text() -> None:
    refiner, (guidance, features, text) = trained(), inputs(8, 8, 8)
    one, other = refiner(guidance, features, text, (1, 1, 1)), refiner(guidance, features, text + 1, (1, 1, 1))
    assert torch.allclose(one, other, atol=1e-5)  # a shift of all numbers is normed away
    assert not torch.allclose(one, refiner(guidance, features, -text, (1, 1, 1)), atol=1e-3)
