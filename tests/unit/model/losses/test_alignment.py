"""The alignment losses, Eqs. 4-9: closed forms, agreement with naive loops, absent classes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.model.alignment import aggregate_text, concept_weights
from lib.model.losses import (
    alignment_loss,
    global_alignment_loss,
    local_alignment_loss,
)
from support.helpers import vectors

TAU = 0.2


def align(text: Tensor, rows: Tensor, vision: Tensor, present: Tensor | None = None) -> Tensor:
    return alignment_loss(text, rows, vision, hard_negatives=2, present=present).total


# Eq. 4: concept weights


def test_concept_weights_of_cosines_one_and_zero():
    concepts = torch.tensor([[[[5.0, 0.0], [0.0, 0.1]]]])  # lengths must not matter
    weights = concept_weights(concepts, torch.tensor([[[2.0, 0.0]]]))
    expected = torch.tensor([[[math.e / (math.e + 1), 1 / (math.e + 1)]]])
    torch.testing.assert_close(weights, expected)


def test_concept_weights_sum_to_one_over_concepts_not_classes():
    _, rows, vision = vectors(classes=5, concepts=3)
    weights = concept_weights(rows, vision)
    assert weights.shape == (2, 5, 3)
    torch.testing.assert_close(weights.sum(2), torch.ones(2, 5, dtype=torch.float64))
    assert (weights.sum(1) - 1).abs().min() > 0.1
    alone = concept_weights(rows[:, :1], vision[:, :1])  # other classes have no say
    torch.testing.assert_close(weights[:, :1], alone)


def test_aggregated_text_is_the_weighted_sum():
    concepts = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]]]])
    torch.testing.assert_close(aggregate_text(concepts, torch.tensor([[[0.25, 0.75]]])), torch.tensor([[[0.25, 1.5]]]))


# Eqs. 5-9: alignment


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_global_alignment_of_orthogonal_pairs(classes):
    eye = torch.eye(classes)[None]
    expected = math.log1p((classes - 1) * math.exp(-1 / TAU))
    assert global_alignment_loss(3 * eye, 0.5 * eye).item() == pytest.approx(expected, rel=1e-5)
    assert global_alignment_loss(eye, torch.ones_like(eye)).item() == pytest.approx(math.log(classes), rel=1e-5)
    warm = math.log1p((classes - 1) * math.exp(-1))
    assert global_alignment_loss(eye, eye, temperature=1.0).item() == pytest.approx(warm, rel=1e-5)


def test_global_alignment_is_symmetric():
    text, _, vision = vectors()
    torch.testing.assert_close(global_alignment_loss(text, vision), global_alignment_loss(vision, text))
    # Both texts say the same, e1; the images are e1 and e2. Text to vision: anchors score log(1 + e^-5) and
    # log(1 + e^5), vision to text: log 2 each. One direction alone would be one of the two means.
    text, vision = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]), torch.eye(2)[None]
    forward = (math.log1p(math.exp(-5)) + math.log1p(math.exp(5))) / 2
    assert global_alignment_loss(text, vision).item() == pytest.approx((forward + math.log(2)) / 2, rel=1e-5)


@pytest.mark.parametrize(("hard_negatives", "used"), [(1, 1), (3, 3), (4, 4), (99, 4)])
def test_local_alignment_clips_the_number_of_hard_negatives(hard_negatives, used):
    eye = torch.eye(5)[None]
    loss = local_alignment_loss(eye[:, :, None].expand(1, 5, 2, 5), eye, hard_negatives)
    assert loss.item() == pytest.approx(math.log1p(used * math.exp(-1 / TAU)), rel=1e-5)


def cosines(rows: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Concepts (1, C, 1, P) and vision (1, C, P) = unit axes, whose cosine table is `rows` (concept by vision)."""
    table = torch.tensor(rows)
    rest = (1 - table.square().sum(1)).clamp(min=0).sqrt()
    concepts = torch.cat([table, torch.diag(rest)], 1)
    return concepts[None, :, None], torch.eye(len(rows), 2 * len(rows))[None]


def test_hard_negatives_are_the_most_similar_and_never_the_positive():
    # Concept 0 is nearest to its own image (0.8), then image 1 (0.5), then image 2 (-0.3); the others see nothing.
    table = [[0.8, 0.5, -0.3], [0.0, 0.9, 0.0], [0.0, 0.0, 0.9]]
    loss = local_alignment_loss(*cosines(table), hard_negatives=1)

    def term(positive: float, negative: float) -> float:
        return math.log1p(math.exp((negative - positive) / TAU))

    text_to_vision = [term(0.8, 0.5), term(0.9, 0.0), term(0.9, 0.0)]  # not -0.3 and not 0.8 for concept 0
    vision_to_text = [term(0.8, 0.0), term(0.9, 0.5), term(0.9, 0.0)]  # image 2 has 0.0 and -0.3 to choose from
    assert loss.item() == pytest.approx(sum(text_to_vision + vision_to_text) / 6, rel=1e-5)


def test_local_alignment_keeps_the_positive_when_it_is_the_least_similar():
    # The own image is the worst match, so a plain top-1 would drop it; with it in, the loss is a proper InfoNCE.
    concepts, vision = cosines([[-0.6, 0.7], [0.7, -0.6]])
    assert local_alignment_loss(concepts, vision, 1).item() == pytest.approx(math.log1p(math.exp(1.3 / TAU)), rel=1e-5)


@pytest.mark.parametrize("hard_negatives", [1, 3])
def test_alignment_losses_are_never_negative(hard_negatives):
    for _ in range(20):
        text, rows, vision = (v.float() for v in vectors())
        assert local_alignment_loss(rows, vision, hard_negatives).item() >= 0
        assert global_alignment_loss(text, vision).item() >= 0


def test_local_with_one_concept_and_all_negatives_is_the_global_loss():
    text, _, vision = vectors()
    present = torch.tensor([[True] * 5, [True, False, True, True, False]])
    local = local_alignment_loss(text[:, :, None], vision, hard_negatives=4, present=present)
    torch.testing.assert_close(local, global_alignment_loss(text, vision, present=present))


def naive_info_nce(positive: Tensor, negatives: list[Tensor]) -> Tensor:
    denominator = sum((n.exp() for n in negatives), positive.exp())
    return -(positive.exp() / denominator).log()


def naive_alignment(text: Tensor, rows: Tensor, vision: Tensor, hard: int, present: Tensor) -> tuple[float, float]:
    """Eqs. 5-8 written as loops over samples, concepts, anchors and candidates."""
    total_global, total_local = [], []
    for b in range(len(text)):
        there = [i for i in range(text.shape[1]) if present[b, i]]
        globals_, locals_ = [], []

        def s(a: Tensor, v: Tensor) -> Tensor:
            return F.cosine_similarity(a, v, dim=0) / TAU

        for i in there:
            others = [j for j in there if j != i]
            own = s(text[b, i], vision[b, i])
            globals_.append(naive_info_nce(own, [s(text[b, i], vision[b, j]) for j in others]))
            globals_.append(naive_info_nce(own, [s(text[b, j], vision[b, i]) for j in others]))
            for k in range(rows.shape[2]):
                own = s(rows[b, i, k], vision[b, i])
                seen = sorted((s(rows[b, i, k], vision[b, j]) for j in others), reverse=True)[:hard]
                said = sorted((s(rows[b, j, k], vision[b, i]) for j in others), reverse=True)[:hard]
                locals_ += [naive_info_nce(own, seen), naive_info_nce(own, said)]
        total_global.append(sum(globals_) / max(len(globals_), 1))
        total_local.append(sum(locals_) / max(len(locals_), 1))
    return float(sum(total_global) / len(text)), float(sum(total_local) / len(text))


@pytest.mark.parametrize("hard_negatives", [1, 2, 3, 9])
def test_alignment_agrees_with_the_naive_loops(hard_negatives):
    text, rows, vision = vectors(batch=4)
    present = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]]).bool()
    expected = naive_alignment(text, rows, vision, hard_negatives, present)
    assert global_alignment_loss(text, vision, present=present).item() == pytest.approx(expected[0], rel=1e-9)
    local = local_alignment_loss(rows, vision, hard_negatives, present=present)
    assert local.item() == pytest.approx(expected[1], rel=1e-9)
    total = alignment_loss(text, rows, vision, 0.5, 2.0, hard_negatives, TAU, present)
    assert total.total.item() == pytest.approx(0.5 * expected[0] + 2 * expected[1], rel=1e-9)
    assert (total.global_part.item(), total.local_part.item()) == pytest.approx(expected, rel=1e-9)
    both = alignment_loss(text, rows, vision, hard_negatives=hard_negatives, present=present)
    assert both.total.item() == pytest.approx(sum(expected), rel=1e-9)


def test_present_mask_equals_subset_whatever_absent_vectors_hold():
    text, rows, vision = vectors()
    kept = [0, 2, 3]
    present = torch.zeros(2, 5, dtype=torch.bool)
    present[:, kept] = True
    expected = align(text[:, kept], rows[:, kept], vision[:, kept])
    for junk in (0.0, 1e4, math.nan):  # the mean under an empty mask is 0 / 0
        given = text.clone(), rows.clone(), vision.clone()
        for v in given:
            v[:, [1, 4]] = junk
            v.requires_grad_()
        loss = align(*given, present=present)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        for v in given:
            assert torch.isfinite(v.grad).all()
            assert (v.grad[:, [1, 4]] == 0).all()
            assert (v.grad[:, kept] != 0).any()


@pytest.mark.parametrize("shown", [(), (1,)])
def test_fewer_than_two_present_classes_give_zero_and_finite_gradients(shown):
    given = vectors()
    for v in given:
        v.requires_grad_()
    present = torch.zeros(2, 5, dtype=torch.bool)
    present[:, list(shown)] = True
    loss = align(*given, present=present)
    loss.backward()
    assert loss.item() == 0
    assert all((v.grad == 0).all() for v in given)


def test_a_one_class_task_has_no_alignment():
    given = [v.requires_grad_() for v in vectors(classes=1)]
    loss = align(*given)
    loss.backward()
    assert loss.item() == 0
    assert all((v.grad == 0).all() for v in given)


def test_a_sample_without_present_classes_counts_as_zero_in_the_mean():
    text, rows, vision = vectors()
    present = torch.tensor([[True] * 5, [False] * 5])
    alone = align(text[:1], rows[:1], vision[:1])
    torch.testing.assert_close(align(text, rows, vision, present), alone / 2)
