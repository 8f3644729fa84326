"""The losses: closed forms of Eqs. 1, 3 and 11-15, and properties of all (Eqs. 4-9: losses/test_alignment.py)."""

import doctest
import math

import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.losses import DiceCELoss
from torch import Tensor

from lib.model import alignment, losses
from lib.model.alignment import aggregate_text, concept_weights
from lib.model.losses import (
    UncertaintyWeights,
    alignment_loss,
    class_embedding_loss,
    class_map_loss,
    cross_entropy_loss,
    dice_loss,
    global_alignment_loss,
    local_alignment_loss,
    segmentation_loss,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def exclusive(
    batch: int = 2, classes: int = 3, size: int = 4, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Random logits with a background channel and a label that holds every class."""
    label = torch.arange(batch * size**3).view(batch, 1, size, size, size) % (classes + 1)
    return torch.randn(batch, classes + 1, size, size, size, dtype=dtype), label


def regions(
    batch: int = 2, classes: int = 3, size: int = 4, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Random logits and random overlapping regions."""
    shape = (batch, classes, size, size, size)
    return torch.randn(shape, dtype=dtype), torch.rand(shape).gt(0.5).to(torch.uint8)


def vectors(batch: int = 2, classes: int = 5, concepts: int = 3, width: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Random text (B, C, P), concepts (B, C, K, P) and vision (B, C, P) in float64."""
    text = torch.randn(batch, classes, width, dtype=torch.float64)
    rows = torch.randn(batch, classes, concepts, width, dtype=torch.float64)
    return text, rows, torch.randn(batch, classes, width, dtype=torch.float64)


def test_docstring_examples():
    results = [doctest.testmod(module) for module in (losses, alignment)]
    assert sum(r.attempted for r in results) >= 11
    assert not any(r.failed for r in results)


# Eqs. 1, 11-13: segmentation


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


# Eq. 3: class embedding


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


# Eq. 15: total


def test_uncertainty_weights_value_and_gradient():
    weights = UncertaintyWeights(2)
    assert [tuple(p.shape) for p in weights.parameters()] == [(2,)]
    with torch.no_grad():
        weights.log_sigma.copy_(torch.tensor([2.0, 0.5]).log())
    losses_ = torch.tensor([4.0, 3.0], requires_grad=True)
    total = weights(losses_)
    # 4 / (2 * 4) + log 2 + 3 / (2 / 4) + log 1/2 = 6.5; with sigma instead of sigma^2 it would be 4.
    assert total.item() == pytest.approx(6.5, rel=1e-6)
    total.backward()
    torch.testing.assert_close(losses_.grad, torch.tensor([1 / 8, 2.0]))  # 1 / (2 sigma^2)
    torch.testing.assert_close(weights.log_sigma.grad, torch.tensor([0.0, -11.0]))  # 1 - L / sigma^2
    torch.testing.assert_close(weights.sigma, torch.tensor([2.0, 0.5]))


def test_uncertainty_weights_settle_at_sigma_squared_equal_to_the_loss():
    weights = UncertaintyWeights(3)
    values = torch.tensor([0.25, 1.0, 4.0])
    optimiser = torch.optim.LBFGS(weights.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        total = weights(values)
        total.backward()
        return total

    optimiser.step(closure)
    torch.testing.assert_close(weights.sigma**2, values, rtol=1e-3, atol=0)


def test_uncertainty_weights_survive_a_checkpoint():
    trained = UncertaintyWeights(3)
    with torch.no_grad():
        trained.log_sigma.copy_(torch.tensor([-1.0, 0.5, 2.0]))
    restored = UncertaintyWeights(3)
    restored.load_state_dict(trained.state_dict())
    values = torch.tensor([1.0, 2.0, 3.0])
    assert restored(values) == trained(values) != UncertaintyWeights(3)(values)


def test_uncertainty_weights_take_mixed_precision_and_refuse_a_wrong_count():
    mixed = [torch.tensor(1.0, dtype=torch.bfloat16), torch.tensor(2.0), torch.tensor(3.0, dtype=torch.float16)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = UncertaintyWeights(3)(mixed)
    assert total.dtype == torch.float32
    assert total.item() == 3.0
    with pytest.raises(ValueError, match=r"\(2,\), expected \(3,\)"):
        UncertaintyWeights(3)(torch.ones(2))


# Properties of all


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


def test_meta_tensors_give_the_plain_result():
    logits, label = exclusive()
    loss = segmentation_loss(MetaTensor(logits), MetaTensor(label))
    assert type(loss) is Tensor
    torch.testing.assert_close(loss, segmentation_loss(logits, label))
