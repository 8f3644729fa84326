"""A phantom of left and right: two equal nodes, told apart by their side alone, and the task that describes them.

The image shows a body with an unlabelled organ on one side and a bright column behind, which give away the sides. The
sentences of the two nodes differ in the words "left" and "right" and, in the wording `names`, in made-up names.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lib.model.nets import BiPVLSeg, build_model
from lib.tasks import Task, task_from_dict
from lib.trainers.objective import TrainingNetwork
from lib.trainers.recipe import build_schedule, descend

SIZE = (48, 32, 32)
SIDES = ("left", "right")
NAMES = {"sides": ("left node", "right node"), "names": ("fovum", "karda")}


def task(head: str, wording: str = "sides", **training: float) -> Task:
    """The task.

    Args:
        head: `fixed` or `text`.
        wording: `sides`: the sentences differ in left and right alone; `names`: in the name of the node as well.
        training: values of `Task.training`.
    """
    names = NAMES[wording]
    snomed = {"code": "91723000", "meaning": "Anatomical structure"}
    classes = {
        name: {
            "sentences": {
                "class": f"The {name} in a CT image.",
                "shape": "A rounded ellipsoid, about as long as it is wide.",
                "location": f"On the {side} side of the body, between the midline and the {side} wall.",
                "appearance": "Brighter than the tissue around it.",
                "contour": f"Smooth, facing the {side} wall.",
                "texture": "Even gray with fine noise.",
            }
        }
        for name, side in zip(names, SIDES, strict=True)
    }
    return task_from_dict(
        {
            "name": "laterality",
            "description": "Two equal nodes, one per side",
            "modality": "CT",
            "channels": ["CT"],
            "labels": {n: {"value": i, "snomed": snomed, "color": [9, 9, 9]} for i, n in enumerate(names, 1)},
            "spacing": [1.0, 1.0, 1.0],
            "intensity": {"mode": "range", "low": 0, "high": 1},
            "patch": SIZE,
            "model": {
                **{"vision": "unet", "feature_size": 8, "head": head, "projection": 32, "text": "scratch"},
                "scratch": {"layers": 4, "width": 32, "heads": 2, "max_tokens": 64},
            },
            # Nodes that differ in one word alone: without such steps one asked for alone is drawn on both sides.
            "training": {"learning_rate": 5e-3, "language_learning_rate": 1e-3, "drop_classes": 0.3, **training},
            "concepts": {"modality": "CT", "review": {"status": "unreviewed"}, "classes": classes},
        },
        "laterality",
    )


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (count, 1, *SIZE) and labels of the same shape: 1 on the patient's left, where the first axis of a RAS
    volume begins, and 2 on the right."""
    image, label = torch.zeros(count, 1, *SIZE), torch.zeros(count, 1, *SIZE)
    grid = torch.meshgrid(*(torch.arange(float(n)) for n in SIZE), indexing="ij")

    def around(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    def ellipsoid(centre: tuple[float, float, float], radii: tuple[float, float, float]) -> Tensor:
        distance = torch.zeros(SIZE)
        for g, c, r in zip(grid, centre, radii, strict=True):
            distance += ((g - c) / r) ** 2
        return distance < 1

    for picture, drawn in zip(image[:, 0], label[:, 0], strict=True):
        picture[ellipsoid((24 + around(-1, 1), 16, 16), (22, 14, 15))] = 0.4
        organ = (34 + around(-2, 2), 9 + around(-1, 1), 16 + around(-4, 4))
        picture[ellipsoid(organ, (8, 4, 7))] = 0.6
        picture[ellipsoid((24 + around(-1, 1), 24 + around(-1, 1), 16), (3, 3, 14))] = 0.9
        for value, x in ((1, 12), (2, 36)):
            centre = (x + around(-3, 3), 19 + around(-3, 3), 16 + around(-5, 5))
            node = ellipsoid(centre, (around(3, 5), around(3, 5), around(4, 6)))
            picture[node], drawn[node] = 0.75, value
        picture += 0.05 * torch.randn(SIZE, generator=generator)
    return image, label


def train(task: Task, steps: int, seed: int) -> BiPVLSeg:
    """A network trained on fresh phantoms, two per step, in evaluation mode."""
    torch.manual_seed(seed)
    network = TrainingNetwork(build_model(task), task).train()
    recipe, generator = task.training, torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameter_groups(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = build_schedule(optimizer, steps, recipe)
    for _ in range(steps):
        loss = network(*draw(2, generator))["loss"]
        optimizer.zero_grad(set_to_none=True)
        descend(loss, optimizer, network.uncertainty)
        schedule.step()
    return network.model.eval()
