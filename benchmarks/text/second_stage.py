"""Teach the head of a trained network more words, on features that stay as they are.

The decoder's features hardly depend on the text, and on features that are fixed a text costs next to nothing. So each
patch is computed once, and many texts are drawn for it: wordings, names, and texts of what is not there. The head that
comes out reads D alone (`model.head_text: plain`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.accuracy.data import Patches
from lib.model.losses import segmentation_loss
from lib.model.nets import BiPVLSeg, build_model
from lib.model.nets.heads import TextHead
from lib.tasks import Task
from lib.trainers.objective import Wordings, of_classes
from lib.trainers.recipe import descend

DRAWS = 8  # texts a patch
NOISE = 0.5  # standard deviation on D, whose own is 1
RATE, DECAY = 3e-3, 1e-2
WARM_UP = 0.1
FOR_T = 8  # patches over which T is averaged


def plain(model: BiPVLSeg, task: Task, images: Sequence[Tensor]) -> BiPVLSeg:
    """The same network with a head that reads D alone, where T was its mean over some images.

    Args:
        model: of a fused head.
        task: with `head_text` plain.
        images: patches (B, channels, H, W, D).
    """
    result = build_model(task, model.text.assets)
    old, new = model.head, result.head
    assert isinstance(old, TextHead) and isinstance(new, TextHead)
    missing, unexpected = result.load_state_dict(model.state_dict(), strict=False)
    assert missing == ["head.reader.apart.bias"], missing
    assert all(name.startswith(("head.reader.norm", "head.reader.seen")) for name in unexpected), unexpected
    with torch.no_grad():
        mean = torch.cat([model.eval()(image).text for image in images]).mean((0, 1))
        new.reader.apart.bias.copy_(old.reader.seen(old.reader.norm(mean)))
    return result.eval()


def teach(model: BiPVLSeg, task: Task, patches: Patches | Sequence[tuple[Tensor, ...]], seed: int) -> None:
    """Train the head in place, one step a batch of patches; everything else stays as it is, bit for bit."""
    torch.manual_seed(seed)
    head, wordings = model.head, Wordings(task, model.text)
    assert isinstance(head, TextHead) and head.reader.plain and model.text.frozen
    optimizer = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=DECAY)
    steps, count = len(patches), len(task.classes)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=WARM_UP)
    total = 0.0
    for step in range(steps):
        image, label = patches[step][:2]
        with torch.no_grad():
            output = model(image)
            assert output.features is not None
        losses = []
        for _ in range(DRAWS):
            reading = wordings.draw()
            _, apart = model.read(reading.sentences)
            apart = apart + NOISE * torch.randn_like(apart)
            nothing = output.text.new_zeros(len(image), len(apart), output.text.shape[-1])
            logits = head(output.features, nothing, apart)
            losses.append(segmentation_loss(logits, of_classes(label, reading.classes, count, task.overlapping)))
        loss = torch.stack(losses).mean()
        optimizer.zero_grad(set_to_none=True)
        descend(loss, optimizer)
        schedule.step()
        total += float(loss.detach())
        if (step + 1) % 50 == 0:
            print(json.dumps({"step": step + 1, "loss": round(total / 50, 4)}), flush=True)
            total = 0.0
