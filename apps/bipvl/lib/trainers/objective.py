"""The training objective: the three losses of the paper under learned uncertainty weights, Eq. (15)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lib.alignment import aggregate_text, concept_weights
from lib.losses import (
    UncertaintyWeights,
    class_embedding_loss,
    global_alignment_loss,
    local_alignment_loss,
    segmentation_loss,
)
from lib.nets.bipvl import BiPVLSeg
from lib.tasks import Task

LOSSES = ("segmentation", "class_embedding", "alignment")


class TrainingNetwork(nn.Module):
    """Network and objective in one module, so that the sigmas are trained, saved and synchronised with the rest."""

    def __init__(self, model: BiPVLSeg, task: Task) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.uncertainty = UncertaintyWeights(len(LOSSES))

    def forward(self, image: Tensor, label: Tensor, annotated: Tensor | None = None) -> dict[str, Tensor]:
        """The weighted total under "loss", and its parts.

        Args:
            image: (B, channels, H, W, D).
            label: (B, 1, H, W, D) class indices, or (B, C, H, W, D) regions where classes overlap.
            annotated: (B, C) boolean, the classes that each label was drawn for; None for all. The others are left out
                of the segmentation loss and of the alignment. The class embedding follows the decoder, not the label.
        """
        task, recipe = self.task, self.task.training
        output = self.model(image)
        present = _present(label, len(task.classes), task.overlapping)
        if annotated is not None:
            present = present & annotated
            # Marginal probabilities cost memory: the plain loss does where nothing is left out.
            annotated = None if annotated.all() else annotated

        segmentation = segmentation_loss(output.logits, label, task.overlapping, annotated)
        embedding = class_embedding_loss(output.class_map, output.logits, overlapping=task.overlapping)

        concepts, vision = output.concepts.float(), output.vision.float()
        text = aggregate_text(concepts, concept_weights(concepts, vision))
        if self.training:  # Gaussian noise on T and V, on the unit vectors that the losses compare
            text = self._noisy(text)
            vision = self._noisy(vision)
        global_part = global_alignment_loss(text, vision, recipe.temperature, present)
        local_part = local_alignment_loss(concepts, vision, recipe.hard_negatives, recipe.temperature, present)
        alignment = recipe.global_weight * global_part + recipe.local_weight * local_part  # Eq. (9)

        total = self.uncertainty([segmentation, embedding, alignment])
        return {
            "loss": total,
            "segmentation": segmentation.detach(),
            "class_embedding": embedding.detach(),
            "alignment": alignment.detach(),
            "alignment_global": global_part.detach(),
            "alignment_local": local_part.detach(),
        }

    def sigmas(self) -> dict[str, float]:
        values = self.uncertainty.sigma.tolist()
        return {f"sigma_{name}": value for name, value in zip(LOSSES, values, strict=True)}

    def _noisy(self, x: Tensor) -> Tensor:
        x = nn.functional.normalize(x, dim=-1)
        return x + self.task.training.text_noise * torch.randn_like(x)


def unwrapped(network: Any) -> TrainingNetwork:
    """The network itself, also where several GPUs train it."""
    return network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network


def _present(label: Tensor, classes: int, overlapping: bool) -> Tensor:
    """(B, C) boolean: which classes occur in each patch. An absent class gives the alignment no visual evidence."""
    if overlapping:
        return label.flatten(2).any(-1)
    indices = torch.arange(1, classes + 1, device=label.device)
    return (label.flatten(1)[:, None, :] == indices[None, :, None]).any(-1)
