"""The training objective: the three losses of the paper under learned uncertainty weights, Eq. (15)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lib.model.losses import (
    UncertaintyWeights,
    alignment_loss,
    class_embedding_loss,
    class_maps_loss,
    segmentation_loss,
)
from lib.model.nets.bipvl import BiPVLSeg
from lib.model.nets.heads import ClassPyramid
from lib.model.nets.text import Sentences
from lib.tasks import Task
from lib.trainers.objective.wordings import ABSENT, Wordings

LEFT_RIGHT = (2,)  # the axis of a RAS patch (B, channels, H, W, D)
LOSSES = ("segmentation", "class_embedding", "alignment")


class TrainingNetwork(nn.Module):
    """Network and objective in one module, so that the sigmas are trained, saved and synchronised with the rest."""

    def __init__(self, model: BiPVLSeg, task: Task) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.uncertainty = UncertaintyWeights(len(LOSSES))
        model.text.interval = task.training.text_interval
        self.wordings = Wordings(task, model.text)

    def forward(self, image: Tensor, label: Tensor, annotated: Tensor | None = None) -> dict[str, Tensor]:
        """The weighted total under "loss", and its parts.

        Args:
            image: (B, channels, H, W, D).
            label: (B, 1, H, W, D) class indices, or (B, C, H, W, D) regions if classes overlap.
            annotated: (B, C) boolean, the classes that each label was drawn for; None for all. The others are left out
                of the losses. (The paper's class embedding follows the decoder, not the label.)

        With the text head a training step draws what it reads (`lib.trainers.objective.wordings`): of some classes
        only, so that what the label shows of the others is background; of classes that no voxel shows; or of mirrored
        patients.
        """
        task, recipe = self.task, self.task.training
        sentences: Sentences | None = None
        classes = torch.arange(len(task.classes))
        if self.training and task.model.head == "text":
            reading = self.wordings.draw()
            sentences, classes = reading.sentences, reading.classes
            if reading.mirrored:
                image, label = image.flip(LEFT_RIGHT), label.flip(LEFT_RIGHT)
            label = of_classes(label, classes, len(task.classes), task.overlapping)
            # Of an absent class it is known that no voxel is its.
            annotated = None if annotated is None else annotated[:, classes] | (classes == ABSENT).to(annotated.device)
        output = self.model(image, sentences)
        present = _present(label, len(classes), task.overlapping)
        if annotated is not None:
            present = present & annotated
            # Marginal probabilities cost memory: the plain loss does if nothing is left out.
            annotated = None if annotated.all() else annotated

        segmentation = segmentation_loss(output.logits, label, task.overlapping, annotated)
        if isinstance(self.model.embedding, ClassPyramid):
            embedding = class_maps_loss(output.class_maps, label, task.overlapping, annotated)
        else:
            embedding = class_embedding_loss(output.class_maps[0], output.logits, overlapping=task.overlapping)

        vision, text = output.vision.float(), output.text
        if self.training:  # Gaussian noise on T and V, on the unit vectors that the losses compare
            text = self._noisy(text)
            vision = self._noisy(vision)
        weights = recipe.global_weight, recipe.local_weight
        settings = recipe.hard_negatives, recipe.temperature
        alignment = alignment_loss(text, output.concepts, vision, *weights, *settings, present)

        total = self.uncertainty([segmentation, embedding, alignment.total])
        return {
            "loss": total,
            "segmentation": segmentation.detach(),
            "class_embedding": embedding.detach(),
            "alignment": alignment.total.detach(),
            "alignment_global": alignment.global_part.detach(),
            "alignment_local": alignment.local_part.detach(),
        }

    def parameter_groups(self, learning_rate: float | None = None) -> list[dict[str, Any]]:
        """Vision at the optimiser's rate, the text encoder at its own, what joins the two at their geometric mean, and
        the sigmas, which do not decay.

        The paper has one rate, and so do the defaults. Narrow networks from scratch need a rate for the vision side at
        which a BERT collapses (all sentences become one vector), and at BERT's rate BiFusion stays the noise that it
        begins as (docs/research/accuracy.md). The head and the class maps belong to vision, even if they read: their
        text comes normalised, and at the language's rate they lag behind.

        `learning_rate`: the vision side's, to be given to the optimiser too; default the task's.
        """
        model, recipe = self.model, self.task.training
        joined = math.sqrt((learning_rate or recipe.learning_rate) * recipe.language_learning_rate)
        vision: list[nn.Parameter] = [*model.vision.parameters(), *model.head.parameters()]
        joining: list[nn.Parameter] = [*model.fusion.parameters(), *model.project_text.parameters()]
        joining += model.project_vision.parameters()
        (vision if isinstance(model.embedding, ClassPyramid) else joining).extend(model.embedding.parameters())
        return [
            {"params": vision},
            {"params": [p for p in model.text.parameters() if p.requires_grad], "lr": recipe.language_learning_rate},
            {"params": joining, "lr": joined},
            {"params": list(self.uncertainty.parameters()), "weight_decay": 0.0},
        ]

    def sigmas(self) -> dict[str, float]:
        values = self.uncertainty.sigma.tolist()
        return {f"sigma_{name}": value for name, value in zip(LOSSES, values, strict=True)}

    def _noisy(self, x: Tensor) -> Tensor:
        x = nn.functional.normalize(x, dim=-1)
        return x + self.task.training.text_noise * torch.randn_like(x)


def unwrapped(network: Any) -> TrainingNetwork:
    """The network itself, even if several GPUs train it."""
    return network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network


def of_classes(label: Tensor, classes: Tensor, count: int, overlapping: bool) -> Tensor:
    """A label of `count` classes as one of the given classes alone; those that are absent have no voxel."""
    if len(classes) == count and ABSENT not in classes:
        return label
    found = (classes != ABSENT).nonzero()[:, 0]
    if overlapping:
        shown = label.new_zeros(len(label), len(classes), *label.shape[2:])
        shown[:, found.to(label.device)] = label[:, classes[found].to(label.device)]
        return shown
    table = torch.zeros(1 + count, dtype=torch.long)
    table[1 + classes[found]] = 1 + found
    return table.to(label.device)[label.long()]


def _present(label: Tensor, classes: int, overlapping: bool) -> Tensor:
    """(B, C) boolean: which classes occur in each patch. An absent class gives the alignment no visual evidence."""
    if overlapping:
        return label.flatten(2).any(-1)
    indices = torch.arange(1, classes + 1, device=label.device)
    return (label.flatten(1)[:, None, :] == indices[None, :, None]).any(-1)
