"""The refiner: a small U-Net that corrects one class in a box, by what a person pointed at.

It reads the decoder's features that the segmentation left behind, the image at its own resolution, the class's margin,
the present mask and the prompts, and is told the class by its text vector. The main network is untouched: no window is
computed again for a click, and without prompts nothing changes.

    margin' = margin + evidence + d        d = 0 before training: the answer is then that of the evidence alone

The sum makes it a residual on the best answer without training (`lib.interaction.evidence`). Conditioning is FiLM
(Perez et al., AAAI 2018); simulated corrections follow RITM (Sofiiuk et al., ICIP 2022) and nnInteractive.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.interaction.guidance import CHANNELS

WIDTHS = (16, 32, 64)
THIN = 2.0  # times the finest spacing from which on an axis is not halved yet


class Block(nn.Module):
    """Two convolutions, normed over space, the second one scaled and shifted by the class."""

    def __init__(self, inputs: int, outputs: int, condition: int) -> None:
        super().__init__()
        self.first = nn.Conv3d(inputs, outputs, 3, padding=1)
        self.second = nn.Conv3d(outputs, outputs, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(4, outputs) for _ in range(2))
        self.film = nn.Linear(condition, 2 * outputs)
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = F.leaky_relu(self.norms[0](self.first(x)), 0.01)
        scale, shift = self.film(condition)[..., None, None, None].chunk(2, 1)
        return F.leaky_relu(self.norms[1](self.second(x)) * (1 + scale) + shift, 0.01)


class Refiner(nn.Module):
    """The network.

    Args:
        features: width of the decoder's features.
        condition: width of a class's text vector.
        widths: channels at full, half and quarter resolution.
    """

    def __init__(self, features: int, condition: int, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.norm = nn.GroupNorm(1, features)
        self.read = nn.Conv3d(features, widths[0], 1)
        self.condition = nn.Sequential(nn.LayerNorm(condition), nn.Linear(condition, widths[0]), nn.GELU())
        self.down = nn.ModuleList(
            Block(inputs, outputs, widths[0])
            for inputs, outputs in zip((widths[0] + CHANNELS, *widths), widths, strict=False)
        )
        self.up = nn.ModuleList(
            Block(deep + wide, wide, widths[0]) for deep, wide in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.out = nn.Conv3d(widths[0], 1, 1)
        nn.init.zeros_(self.out.weight)
        assert self.out.bias is not None
        nn.init.zeros_(self.out.bias)

    def forward(self, guidance: Tensor, features: Tensor, text: Tensor, spacing: Sequence[float]) -> Tensor:
        """What is added to the margin.

        Args:
            guidance: (B, CHANNELS, h, w, d), of `lib.interaction.guidance`.
            features: (B, width, h, w, d).
            text: (B, P), the class's text vector.
            spacing: mm per voxel: thick slices are not halved before thin ones.

        Returns:
            (B, h, w, d).
        """
        condition = self.condition(text)
        x = torch.cat([self.read(self.norm(features)), guidance], 1)
        held: list[tuple[Tensor, list[int]]] = []
        steps = list(spacing)
        for n, block in enumerate(self.down):
            x = block(x, condition)
            if n < len(self.down) - 1:
                finest = min(steps)
                strides = [
                    2 if step < THIN * finest and size > 1 else 1 for step, size in zip(steps, x.shape[2:], strict=True)
                ]
                steps = [step * stride for step, stride in zip(steps, strides, strict=True)]
                held.append((x, strides))
                x = F.max_pool3d(x, strides, strides, ceil_mode=True)
        for block in self.up:
            skip, _ = held.pop()
            x = F.interpolate(x, skip.shape[2:], mode="trilinear", align_corners=False)
            x = block(torch.cat([x, skip], 1), condition)
        return self.out(x)[:, 0]
