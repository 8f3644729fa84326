"""The class embedding and the class map: closed forms of Eq. 3."""

import math

import pytest
import torch

from lib.model.losses import class_embedding_loss, class_map_loss, segmentation_loss


def test_class_embedding_target_is_the_most_probable_class_between_the_central_voxels():
    # One cell of 8 voxels, whose centre is as far from each. Five are sure of class 1 (p near 1), three are absurdly
    # sure of class 0: by probability class 1 wins (5/8), by logit class 0 would.
    logits = torch.zeros(1, 2, 2, 2, 2)
    flat = logits.view(2, 8)
    flat[1, :5] = 20
    flat[0, 5:] = 1000
    class_map = torch.tensor([0.0, math.log(3)]).view(1, 2, 1, 1, 1)  # p(class 1) = 3/4
    assert class_embedding_loss(class_map, logits).item() == pytest.approx(math.log(4 / 3), abs=1e-6)


def test_class_embedding_pairs_cells_in_space():
    logits = torch.zeros(1, 2, 4, 2, 2)
    logits[:, 1, :2] = 9
    logits[:, 0, 2:] = 9
    class_map = torch.tensor([[-30.0, 30.0], [30.0, -30.0]]).view(1, 2, 2, 1, 1)  # class 1 first, then class 0
    assert class_embedding_loss(class_map, logits).item() == pytest.approx(0, abs=1e-6)
    assert class_embedding_loss(class_map.flip(2), logits).item() == pytest.approx(60)


def test_class_embedding_target_is_taken_at_the_centre_of_a_cell():
    # One cell of 6 x 6 x 6 voxels: the 8 in the middle are class 1, all others background. The mean would say 0.
    logits = torch.zeros(1, 2, 6, 6, 6)
    logits[:, 0] = 20
    logits[:, :, 2:4, 2:4, 2:4] = torch.tensor([0.0, 20.0]).view(1, 2, 1, 1, 1)
    class_map = torch.tensor([0.0, math.log(3)]).view(1, 2, 1, 1, 1)  # p(class 1) = 3/4
    assert class_embedding_loss(class_map, logits).item() == pytest.approx(math.log(4 / 3), abs=1e-6)


def test_class_embedding_overlapping_thresholds_the_probability():
    # Cell shares: region 0 holds 5 of 8 voxels (1), region 1 holds 4 of 8 (not above one half: 0), region 2 all (1).
    logits = torch.full((1, 3, 2, 2, 2), -50.0)
    flat = logits.view(3, 8)
    flat[0, :5] = flat[1, :4] = flat[2, :] = 50
    log3 = math.log(3)
    class_map = torch.tensor([log3, -log3, log3]).view(1, 3, 1, 1, 1)  # right with p = 3/4 in each region
    assert class_embedding_loss(class_map, logits, overlapping=True).item() == pytest.approx(math.log(4 / 3), abs=1e-6)


@pytest.mark.parametrize("overlapping", [False, True])
def test_class_embedding_sends_no_gradient_into_its_targets(overlapping):
    logits = torch.randn(2, 3, 6, 6, 6, requires_grad=True)
    class_map = torch.randn(2, 3, 2, 2, 2, requires_grad=True)
    class_embedding_loss(class_map, logits, overlapping).backward()
    assert logits.grad is None
    assert class_map.grad.abs().sum() > 0


def test_class_map_is_compared_with_the_share_of_each_cell():
    """One cell of four voxels, three of class 1: s = (1/4, 3/4), and p = (1/4, 3/4) too."""
    label = torch.tensor([1, 1, 1, 0]).view(1, 1, 4, 1, 1)
    class_map = torch.tensor([0.0, math.log(3)]).view(1, 2, 1, 1, 1)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert class_map_loss(class_map, label).item() == pytest.approx(entropy, abs=1e-5), "Dice is perfect"
    uniform = -math.log(0.5) + 1 - (0.25 / (0.0625 + 0.25) + 0.75 / (0.5625 + 0.25)) / 2
    assert class_map_loss(torch.zeros(1, 2, 1, 1, 1), label).item() == pytest.approx(uniform, abs=1e-4)


def test_class_map_at_full_resolution_is_the_segmentation_loss():
    logits, label = torch.randn(2, 4, 6, 5, 4), torch.randint(0, 4, (2, 1, 6, 5, 4))
    known = torch.tensor([[True, False, True], [True, True, True]])
    for classes in (None, known):
        assert class_map_loss(logits, label, classes=classes) == pytest.approx(
            segmentation_loss(logits, label, classes=classes).item(), rel=1e-5
        )
    regions = torch.randint(0, 2, (2, 4, 6, 5, 4))
    known = torch.tensor([[True, False, True, True], [False, True, True, False]])
    for classes in (None, known):
        assert class_map_loss(logits, regions, True, classes) == pytest.approx(
            segmentation_loss(logits, regions, True, classes).item(), rel=1e-5
        )


def test_class_map_of_a_partly_annotated_sample_says_nothing_about_the_rest():
    """Whatever the map gives the class nobody looked for, it counts as background, and its gradient stays finite."""
    label = torch.tensor([1, 1, 0, 0]).view(1, 1, 4, 1, 1)
    class_map = torch.tensor([0.0, 1.0, 2.0]).view(1, 3, 1, 1, 1).requires_grad_()
    merged = torch.tensor([math.log(1 + math.exp(2)), 1.0]).view(1, 2, 1, 1, 1)
    loss = class_map_loss(class_map, label, classes=torch.tensor([[True, False]]))
    assert loss.item() == pytest.approx(class_map_loss(merged, label).item(), abs=1e-6)
    loss.backward()
    assert torch.isfinite(class_map.grad).all()


def test_class_embedding_takes_sizes_that_do_not_divide():
    loss = class_embedding_loss(torch.zeros(1, 4, 2, 3, 2), torch.randn(1, 4, 7, 8, 5))
    assert loss.item() == pytest.approx(math.log(4), abs=1e-6)
