"""The segmentation loss: closed forms of Eqs. 1 and 11-13, and who annotated what."""

import math

import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.losses import DiceCELoss
from torch import Tensor

from lib.model.losses import cross_entropy_loss, dice_loss, segmentation_loss
from support.helpers import exclusive, regions


def test_perfect_segmentation_is_zero_even_with_an_absent_class():
    label = torch.tensor([0, 1, 1, 0]).view(1, 1, 4, 1, 1)  # class 2 is absent
    logits = 100 * F.one_hot(label[:, 0], 3).movedim(-1, 1).float() - 50
    assert dice_loss(logits, label).item() == pytest.approx(0, abs=1e-6)
    assert segmentation_loss(logits, label).item() == pytest.approx(0, abs=1e-6)
    hot = F.one_hot(label[:, 0], 3).movedim(-1, 1)
    assert segmentation_loss(100.0 * hot - 50, hot, overlapping=True).item() == pytest.approx(0, abs=1e-6)


def test_dice_has_squared_denominators():
    # Two voxels, p(class 1) = 3/4 and 1/4, label 1 and 0.
    # Class 1: 2 (3/4) / (1 + 9/16 + 1/16) = 12/13; background is its mirror image. Unsquared it would be 3/4.
    logits = torch.tensor([[[0.0, math.log(3)], [math.log(3), 0.0]]]).view(1, 2, 2, 1, 1)
    label = torch.tensor([1, 0]).view(1, 1, 2, 1, 1)
    assert dice_loss(logits, label).item() == pytest.approx(1 - 12 / 13, abs=1e-5)
    assert cross_entropy_loss(logits, label).item() == pytest.approx(math.log(4 / 3), abs=1e-6)
    assert segmentation_loss(logits, label).item() == pytest.approx(1 / 13 + math.log(4 / 3), abs=1e-5)


def test_background_counts_in_the_dice():
    # p = (2/3, 1/6, 1/6) everywhere, one voxel of each channel:
    # background 2 (2/3) / (1 + 3 * 4/9) = 4/7; classes 1 and 2: 2 (1/6) / (1 + 3/36) = 4/13.
    logits = torch.tensor([4.0, 1.0, 1.0]).log().view(1, 3, 1, 1, 1).expand(1, 3, 3, 1, 1)
    label = torch.arange(3).view(1, 1, 3, 1, 1)
    assert dice_loss(logits, label).item() == pytest.approx(1 - (4 / 7 + 2 * 4 / 13) / 3, abs=1e-5)


def test_overlapping_dice_and_binary_cross_entropy():
    # Two regions on the same two voxels. Region 1: p = 1/2, 1/2, label 1, 0: Dice 2/3, BCE log 2.
    # Region 2: p = 3/4, 3/4, label 1, 1: Dice 2 (3/2) / (2 + 9/8) = 24/25, BCE log(4/3).
    logits = torch.tensor([[0.0, 0.0], [math.log(3), math.log(3)]]).view(1, 2, 2, 1, 1)
    label = torch.tensor([[1, 0], [1, 1]]).view(1, 2, 2, 1, 1)
    assert dice_loss(logits, label, overlapping=True).item() == pytest.approx((1 / 3 + 1 / 25) / 2, abs=1e-5)
    expected = (math.log(2) + math.log(4 / 3)) / 2
    assert cross_entropy_loss(logits, label, overlapping=True).item() == pytest.approx(expected, abs=1e-6)


def test_uniform_logits_cost_log_of_the_number_of_channels():
    _, label = exclusive(classes=4)
    assert cross_entropy_loss(torch.zeros(2, 5, 4, 4, 4), label).item() == pytest.approx(math.log(5), abs=1e-6)


def test_segmentation_loss_agrees_with_monai():
    logits, label = exclusive(dtype=torch.float32)
    reference = DiceCELoss(softmax=True, to_onehot_y=True, squared_pred=True)
    torch.testing.assert_close(segmentation_loss(logits, label), reference(logits, label))
    # Above one class DiceCELoss takes the softmax cross-entropy even beside sigmoid Dice: compare region by region.
    logits, label = regions(dtype=torch.float32)
    reference = DiceCELoss(sigmoid=True, squared_pred=True)
    each = [reference(logits[:, [c]], label[:, [c]].float()) for c in range(3)]
    torch.testing.assert_close(segmentation_loss(logits, label, overlapping=True), sum(each) / 3)


@pytest.mark.parametrize("overlapping", [False, True])
def test_a_predicted_absent_class_costs_more_than_a_silent_one(overlapping):
    shape = (1, 2, 4, 4, 4) if overlapping else (1, 3, 4, 4, 4)
    label = torch.zeros(1, shape[1] if overlapping else 1, 4, 4, 4, dtype=torch.long)
    logits = torch.full(shape, -5.0).requires_grad_()
    loss = segmentation_loss(logits, label, overlapping)
    loss.backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[:, -1] > 0).all()  # descent lowers the absent class
    with torch.no_grad():
        louder = logits.clone()
        louder[:, -1] += 3
        assert segmentation_loss(louder, label, overlapping) > loss


def test_overlapping_classes_mask_equals_subset():
    logits, label = regions()
    mask = torch.tensor([[True, False, True]] * 2)
    subset = segmentation_loss(logits[:, [0, 2]], label[:, [0, 2]], overlapping=True)
    torch.testing.assert_close(segmentation_loss(logits, label, overlapping=True, classes=mask), subset)


def test_exclusive_classes_mask_adds_unannotated_classes_to_the_background():
    logits, label = exclusive()
    partial = torch.where(label == 2, 0, label)  # nobody drew class 2
    mask = torch.tensor([[True, False, True]] * 2)
    background = torch.logaddexp(logits[:, 0], logits[:, 2])
    merged = torch.stack([background, logits[:, 1], logits[:, 3]], 1)
    expected = segmentation_loss(merged, torch.where(partial == 3, 2, partial))
    for given in (partial, label):  # a stray label of an unannotated class is background as well
        torch.testing.assert_close(segmentation_loss(logits, given, classes=mask), expected)


def test_classes_mask_of_all_changes_nothing_and_is_per_sample():
    for overlapping, (logits, label) in ((False, exclusive()), (True, regions())):
        everything = torch.ones(2, 3, dtype=torch.bool)
        torch.testing.assert_close(
            segmentation_loss(logits, label, overlapping, everything), segmentation_loss(logits, label, overlapping)
        )
        mixed = torch.tensor([[True, True, True], [False, True, False]])
        halves = [segmentation_loss(logits[i : i + 1], label[i : i + 1], overlapping, mixed[i : i + 1]) for i in (0, 1)]
        torch.testing.assert_close(segmentation_loss(logits, label, overlapping, mixed), sum(halves) / 2)


@pytest.mark.parametrize("overlapping", [False, True])
def test_a_sample_without_annotation_trains_nothing(overlapping):
    logits, label = regions() if overlapping else exclusive()
    logits.requires_grad_()
    loss = segmentation_loss(logits, label, overlapping, torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert logits.grad.abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(2, 4, 4, 4), (2, 2, 4, 4, 4), (2, 1, 4, 4, 5)])
def test_a_label_that_does_not_fit_is_refused(shape):
    logits, _ = exclusive()
    with pytest.raises(ValueError, match=r"label has shape .* need \(2, 1, 4, 4, 4\)"):
        segmentation_loss(logits, torch.zeros(shape))
    with pytest.raises(ValueError, match=r"need \(2, 4, 4, 4, 4\)"):
        segmentation_loss(logits, torch.zeros(2, 1, 4, 4, 4), overlapping=True)


def test_meta_tensors_give_the_plain_result():
    logits, label = exclusive()
    loss = segmentation_loss(MetaTensor(logits), MetaTensor(label))
    assert type(loss) is Tensor
    torch.testing.assert_close(loss, segmentation_loss(logits, label))
