"""The losses of BiPVL-Seg: one pure function per equation, and the learned weighting of their total.

Equation numbers are those of the paper (arXiv 2503.23534). Symbols: B batch, C foreground classes, K concepts per
class, P width of the common space, H W D voxels, h w d cells of the class map, tau temperature.

Every function takes plain tensors and returns a scalar (the mean over samples of the per-sample loss, so that a batch
of two scores the mean of its halves) or, where it says so, a tensor. Half-precision input is computed in float32, also
under autocast; float64 stays float64. Nothing here draws random numbers: the noise of Eqs. 5-8 is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from monai.networks import one_hot
from torch import Tensor, nn

from lib.model.alignment import full_precision, unit, upcast


def _all_or(mask: Tensor | None, like: Tensor) -> Tensor:
    """The boolean (B, N) mask; None stands for all of the first two dimensions of `like`."""
    return torch.ones(like.shape[:2], dtype=torch.bool, device=like.device) if mask is None else mask.bool()


def _mean_over(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of (B, N) over the masked N of each sample, then over samples; a sample with an empty mask counts as 0."""
    kept = torch.where(mask, values, torch.zeros_like(values))
    return (kept.sum(1) / mask.sum(1).clamp(min=1)).mean()


# segmentation, Eqs. 1 and 11-13


def _check_label(logits: Tensor, label: Tensor, overlapping: bool) -> None:
    batch, channels, *size = logits.shape
    expected = (batch, channels if overlapping else 1, *size)
    if tuple(label.shape) != expected:
        kind = "one 0/1 channel per class" if overlapping else "one channel of class indices, 0 for background"
        raise ValueError(f"label has shape {tuple(label.shape)}; logits {tuple(logits.shape)} need {expected} ({kind})")


def _only_annotated(logits: Tensor, label: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the classes that a sample was not annotated for into its background (the marginal probability).

    What looks like background in a partially annotated label may be any of the classes nobody looked for, so their
    probabilities add up to the background's and no class is pushed down for want of an annotation.

    Returns:
        logits and label of the merged problem, and the (B, 1 + C) mask of channels that remain.
    """
    remain = F.pad(classes.bool(), (1, 0), value=True)
    foreground = classes.bool()[(...,) + (None,) * (logits.ndim - 2)]
    unknown = torch.cat([logits[:, :1], logits[:, 1:].masked_fill(foreground, -torch.inf)], 1)
    background = unknown.logsumexp(1, keepdim=True)
    logits = torch.cat([background, logits[:, 1:].masked_fill(~foreground, -torch.inf)], 1)
    known = remain.gather(1, label.long().flatten(1)).view_as(label)
    return logits, label * known, remain


def _soft_dice(logits: Tensor, shares: Tensor, overlapping: bool) -> Tensor:
    """(B, channels): 1 - Dice with squared denominators, against shares of each voxel or cell."""
    dice = DiceLoss(sigmoid=overlapping, softmax=not overlapping, squared_pred=True, reduction="none")
    return dice(logits, shares).flatten(1)


@full_precision
def dice_loss(logits: Tensor, label: Tensor, overlapping: bool = False, classes: Tensor | None = None) -> Tensor:
    r"""Soft Dice with squared denominators, Eq. 12.

    .. math:: L_{Dice} = 1 - \frac{1}{J} \sum_j \frac{2 \sum_i g_{ij} p_{ij}}{\sum_i g_{ij}^2 + \sum_i p_{ij}^2}

    p is the softmax of the logits (sigmoid when overlapping), g the one-hot label, i runs over the voxels of one sample
    and j over its J channels. Background is a channel like any other. 1e-5 is added to numerator and denominator, so
    that a class that is absent and not predicted scores 0; an absent class that is predicted scores close to 1 with
    almost no gradient, and it is the cross-entropy that takes it away.

    Args and errors: see `segmentation_loss`.

    >>> logits = torch.tensor([[[0.0, 0.0]]])  # one overlapping class, two voxels, p = 1/2 in both
    >>> label = torch.tensor([[[1.0, 0.0]]])
    >>> round(dice_loss(logits, label, overlapping=True).item(), 4)  # 1 - 2 (1/2) / (1 + 1/4 + 1/4)
    0.3333
    """
    _check_label(logits, label, overlapping)
    mask = _all_or(classes, logits)
    if not overlapping:
        if classes is not None:
            logits, label, mask = _only_annotated(logits, label, classes)
        label = one_hot(label, logits.shape[1], logits.dtype)
    return _mean_over(_soft_dice(logits, label.to(logits.dtype), overlapping), mask)


@full_precision
def cross_entropy_loss(
    logits: Tensor, label: Tensor, overlapping: bool = False, classes: Tensor | None = None
) -> Tensor:
    r"""Cross-entropy over the voxels, Eq. 13; binary cross-entropy per class when overlapping.

    .. math:: L_{CE} = -\frac{1}{I} \sum_i \sum_j g_{ij} \log p_{ij}

    Symbols as in `dice_loss`. Background is a class like any other; the binary form is averaged over classes too.

    Args and errors: see `segmentation_loss`.

    >>> label = torch.tensor([[[0, 3]]])
    >>> round(cross_entropy_loss(torch.zeros(1, 4, 2), label).item(), 4)  # log 4
    1.3863
    """
    _check_label(logits, label, overlapping)
    if overlapping:
        voxelwise = F.binary_cross_entropy_with_logits(logits, label.to(logits.dtype), reduction="none")
        return _mean_over(voxelwise.flatten(2).mean(2), _all_or(classes, logits))
    if classes is not None:
        logits, label, _ = _only_annotated(logits, label, classes)
    return F.cross_entropy(logits, label[:, 0].long())


def segmentation_loss(
    logits: Tensor, label: Tensor, overlapping: bool = False, classes: Tensor | None = None
) -> Tensor:
    r"""Segmentation loss, Eqs. 1 and 11: L_seg = L_Dice + L_CE.

    Args:
        logits: (B, 1 + C, H, W, D) with background first, or (B, C, H, W, D) when overlapping.
        label: (B, 1, H, W, D) class indices with 0 for background, or (B, C, H, W, D) of 0 and 1 when overlapping.
        overlapping: classes may share voxels: sigmoid Dice and binary cross-entropy, no background channel.
        classes: boolean (B, C), the foreground classes that each sample was annotated for; None for all. Overlapping
            classes that were not are left out; exclusive ones are merged into the background of that sample, because
            the voxels labelled background may be theirs.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: label and logits do not fit.

    >>> label = torch.tensor([[[0, 1]]])
    >>> perfect = torch.tensor([[[30.0, -30.0], [-30.0, 30.0]]])
    >>> round(segmentation_loss(perfect, label).item(), 6)
    0.0
    """
    return dice_loss(logits, label, overlapping, classes) + cross_entropy_loss(logits, label, overlapping, classes)


# class embedding: Eq. 3, and of the decoder


@full_precision
def class_embedding_loss(class_map: Tensor, logits: Tensor, overlapping: bool = False) -> Tensor:
    r"""Cross-entropy of the class map against the decoder's own, downsampled decision, Eq. 3.

    .. math:: L_{cls} = -\frac{1}{i} \sum_i \log \mathrm{softmax}(M_i)_{\hat y_i}, \quad
              \hat y_i = \arg\max_c \; \mathrm{softmax}(\mathrm{logits})_c \text{ at the centre of cell } i

    The decoder's probabilities (softmax; sigmoid when overlapping) are interpolated linearly at the centre of each cell
    i of the class map, and decided there: the most probable class, or, when overlapping, every class above one half,
    scored by binary cross-entropy. The centre, not the mean over the cell: a cell is 32 voxels wide, most organs fill
    less than half of one, and with the mean nearly every cell would be background. No gradient reaches `logits`.

    Args:
        class_map: (B, channels, h, w, d), logits of the class-embedding head.
        logits: (B, channels, H, W, D), the decoder's logits, background included if there is one.
        overlapping: classes may share voxels.

    Returns:
        Scalar, at least 0.

    >>> logits = torch.zeros(1, 3, 4, 4, 4)
    >>> round(class_embedding_loss(torch.zeros(1, 3, 2, 2, 2), logits).item(), 4)  # log 3
    1.0986
    """
    assert class_map.shape[:2] == logits.shape[:2], f"class map {class_map.shape} and logits {logits.shape} differ"
    with torch.no_grad():
        probabilities = logits.sigmoid() if overlapping else logits.softmax(1)
        share = F.interpolate(probabilities, class_map.shape[2:], mode="trilinear", align_corners=False)
    if overlapping:
        return F.binary_cross_entropy_with_logits(class_map, (share > 0.5).to(class_map.dtype))
    return F.cross_entropy(class_map, share.argmax(1))


@full_precision
def class_map_loss(
    class_map: Tensor, label: Tensor, overlapping: bool = False, classes: Tensor | None = None
) -> Tensor:
    r"""Dice and cross-entropy of a class map against what of each of its cells the label gives each class.

    .. math:: L = 1 - \frac{1}{J} \sum_j \frac{2 \sum_i s_{ij} p_{ij}}{\sum_i s_{ij}^2 + \sum_i p_{ij}^2}
              - \frac{1}{I} \sum_i \sum_j s_{ij} \log p_{ij}

    In place of Eq. 3 for the class embedding of the decoder. s_ij is the share of cell i that class j takes, p as in
    `dice_loss`; where s is 0 or 1 this is the segmentation loss of the cells. Overlapping: binary cross-entropy.

    Args:
        class_map: (B, channels, h, w, d), logits.
        label, overlapping, classes: see `segmentation_loss`; the label is at full resolution.

    Returns:
        Scalar, at least 0. If cells are shared it stays above 0: the least cross-entropy is the entropy of s.

    >>> label = torch.tensor([[[[[0, 1]]]]])  # two voxels, one cell: half of it is class 1
    >>> round(class_map_loss(torch.zeros(1, 2, 1, 1, 1), label).item(), 4)  # Dice 0, log 2
    0.6931
    """
    mask = _all_or(classes, class_map)
    size = class_map.shape[2:]
    if overlapping:
        share = F.adaptive_avg_pool3d(label.to(class_map.dtype), size)  # type: ignore[arg-type]
        entropy = F.binary_cross_entropy_with_logits(class_map, share, reduction="none").flatten(2).mean(2)
        return _mean_over(_soft_dice(class_map, share, overlapping) + entropy, mask)
    if classes is not None:
        class_map, label, mask = _only_annotated(class_map, label, classes)
    share = F.adaptive_avg_pool3d(one_hot(label, class_map.shape[1], class_map.dtype), size)  # type: ignore[arg-type]
    # A channel that was merged into the background has log 0 here, and a share of 0.
    log_p = class_map.log_softmax(1).masked_fill(share == 0, 0)
    return _mean_over(_soft_dice(class_map, share, overlapping), mask) - (share * log_p).sum(1).mean()


def class_maps_loss(
    class_maps: Sequence[Tensor], label: Tensor, overlapping: bool = False, classes: Tensor | None = None
) -> Tensor:
    """Mean of `class_map_loss` over the maps of all resolutions."""
    return torch.stack([class_map_loss(m, label, overlapping, classes) for m in class_maps]).mean()


# alignment, Eqs. 5-9


@full_precision
def global_alignment_loss(
    text: Tensor, vision: Tensor, temperature: float = 0.2, present: Tensor | None = None
) -> Tensor:
    r"""Symmetric InfoNCE between the text and the vision vectors of the classes of a sample, Eqs. 5 and 6.

    .. math:: L_{glob} = -\frac{1}{2C} \sum_{i=1}^{C} \left[
              \log \frac{e^{\cos(T_i, V_i)/\tau}}{\sum_j e^{\cos(T_i, V_j)/\tau}} +
              \log \frac{e^{\cos(T_i, V_i)/\tau}}{\sum_j e^{\cos(T_j, V_i)/\tau}} \right]

    A class that is absent from the sample is neither an anchor nor a negative, whatever its vectors hold.

    Args:
        text: (B, C, P), aggregated text vectors T; normalised here.
        vision: (B, C, P), vision vectors V; normalised here.
        temperature: tau.
        present: boolean (B, C), the classes that each sample shows; None for all.

    Returns:
        Scalar, at least 0: the mean over all B samples; one with fewer than two present classes counts as 0
        (it has nothing to tell apart).

    >>> round(global_alignment_loss(torch.eye(3)[None], torch.eye(3)[None]).item(), 4)  # log(1 + 2 exp(-1 / 0.2))
    0.0134
    """
    present = _all_or(present, vision)
    absent = ~present[..., None]
    similarity = unit(text.masked_fill(absent, 0)) @ unit(vision.masked_fill(absent, 0)).mT / temperature
    # The diagonal stays for absent anchors too: their rows stay finite, and `_mean_over` leaves them out.
    own = torch.eye(present.shape[1], dtype=torch.bool, device=vision.device)
    left_out = ~(present[:, None, :] | own)
    positive = similarity.diagonal(dim1=1, dim2=2)
    text_to_vision = similarity.masked_fill(left_out, -torch.inf).logsumexp(-1) - positive
    vision_to_text = similarity.mT.masked_fill(left_out, -torch.inf).logsumexp(-1) - positive
    return _mean_over((text_to_vision + vision_to_text) / 2, present)


@full_precision
def local_alignment_loss(
    concepts: Tensor, vision: Tensor, hard_negatives: int = 3, temperature: float = 0.2, present: Tensor | None = None
) -> Tensor:
    r"""Symmetric InfoNCE per concept against the most similar wrong classes, Eqs. 7 and 8.

    .. math:: L_{loc} = -\frac{1}{2CK} \sum_{i,k} \left[
              \log \frac{s(t_{ik}, V_i)}{s(t_{ik}, V_i) + \sum_{j \in N(t_{ik})} s(t_{ik}, V_j)} +
              \log \frac{s(t_{ik}, V_i)}{s(t_{ik}, V_i) + \sum_{j \in N_k(V_i)} s(t_{jk}, V_i)} \right],
              \quad s(a, b) = e^{\cos(a, b)/\tau}

    N(t_ik) are the `hard_negatives` other present classes j with the largest cos(t_ik, V_j), N_k(V_i) those with the
    largest cos(t_jk, V_i): concepts are only compared with the same concept k of other classes.

    Deviation: the denominator of Eq. 7 as printed is the top-K set alone, which can leave the positive out, and then
    the loss has no lower bound. Here it is {positive} and the hard negatives, a proper InfoNCE.

    Args:
        concepts: (B, C, K, P), projected concept rows t_ik; normalised here.
        vision: (B, C, P), vision vectors V; normalised here.
        hard_negatives: how many negatives, clipped to the number of other present classes.
        temperature: tau.
        present: boolean (B, C), the classes that each sample shows; None for all.

    Returns:
        Scalar, at least 0: the mean over all B samples; one with fewer than two present classes counts as 0.

    >>> concepts, vision = torch.eye(5)[None, :, None], torch.eye(5)[None]
    >>> round(local_alignment_loss(concepts, vision).item(), 4)  # log(1 + 3 exp(-1 / 0.2))
    0.02
    """
    assert hard_negatives >= 1, f"hard_negatives {hard_negatives}: at least 1"
    present = _all_or(present, vision)
    absent = ~present[..., None]
    concepts = unit(concepts.masked_fill(absent[..., None], 0))
    vision = unit(vision.masked_fill(absent, 0))
    similarity = torch.einsum("bikp,bjp->bkij", concepts, vision) / temperature
    positive = similarity.diagonal(dim1=2, dim2=3)
    number = present.shape[1]
    # If a sample shows fewer classes than the count asks for, top-k pads with -inf, which adds nothing to the sum.
    count = min(hard_negatives, number - 1)
    not_negative = torch.eye(number, dtype=torch.bool, device=vision.device) | ~present[:, None, None, :]

    def info_nce(rows: Tensor) -> Tensor:
        hardest = rows.masked_fill(not_negative, -torch.inf).topk(count, -1).values
        return torch.cat([positive[..., None], hardest], -1).logsumexp(-1) - positive

    per_concept = (info_nce(similarity) + info_nce(similarity.mT)) / 2  # (B, K, C)
    return _mean_over(per_concept.mean(1), present)


class Alignment(NamedTuple):
    """The alignment loss and its parts, each a scalar of at least 0."""

    total: Tensor
    global_part: Tensor
    local_part: Tensor


def alignment_loss(
    text: Tensor,
    concepts: Tensor,
    vision: Tensor,
    alpha1: float = 1.0,
    alpha2: float = 1.0,
    hard_negatives: int = 3,
    temperature: float = 0.2,
    present: Tensor | None = None,
) -> Alignment:
    """Global-local alignment, Eq. 9: L_align = alpha1 L_glob + alpha2 L_loc.

    Args:
        text: (B, C, P), aggregated text vectors T (`aggregate_text`), with the caller's noise in training.
        concepts: (B, C, K, P), projected concept rows.
        vision: (B, C, P), vision vectors, with the caller's noise in training.
        alpha1, alpha2: weights of the global and the local term.
        hard_negatives, temperature, present: see `local_alignment_loss`.
    """
    global_term = global_alignment_loss(text, vision, temperature, present)
    local_term = local_alignment_loss(concepts, vision, hard_negatives, temperature, present)
    return Alignment(alpha1 * global_term + alpha2 * local_term, global_term, local_term)


# total, Eqs. 10, 14 and 15


class UncertaintyWeights(nn.Module):
    r"""The total of n losses, weighted by learned uncertainties, Eq. 15.

    .. math:: L = \sum_{i=1}^{n} \left[ \frac{L_i}{2 \sigma_i^2} + \log \sigma_i \right]

    The parameter is `log_sigma` (n,), so that sigma stays positive; it starts at 0 (sigma = 1) and belongs in an
    optimiser group without weight decay. For fixed L_i the minimum lies at sigma_i^2 = L_i. A loss that is 0 throughout
    (the alignment of a one-class task) has none: its log_sigma falls by at most the learning rate per step and weighs
    nothing but that zero.

    >>> UncertaintyWeights(3)(torch.tensor([1.0, 2.0, 3.0])).item()  # (1 + 2 + 3) / 2 at sigma = 1
    3.0
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        self.log_sigma = nn.Parameter(torch.zeros(n))

    @property
    def sigma(self) -> Tensor:
        """The n uncertainties, detached, for logging."""
        return self.log_sigma.detach().exp()

    def forward(self, losses: Sequence[Tensor] | Tensor) -> Tensor:
        """The weighted total of n scalar losses, or of a tensor (n,). ValueError when they are not n."""
        # Upcast one by one: autocast leaves some of the losses in half precision and others not.
        values = torch.stack([upcast(loss) for loss in losses])
        if values.shape != self.log_sigma.shape:
            raise ValueError(f"losses have shape {tuple(values.shape)}, expected {tuple(self.log_sigma.shape)}")
        log_sigma = upcast(self.log_sigma)
        with torch.autocast(values.device.type, enabled=False):
            return (values * torch.exp(-2 * log_sigma) / 2 + log_sigma).sum()
