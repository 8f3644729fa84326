"""The protocol of vision backbones, and what their adapters share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch.utils.checkpoint
from torch import Tensor, nn

STAGES = 4


class VisionBackbone(nn.Module, ABC):
    """The protocol.

    Attributes:
        widths: channels of the map after each of the four stages.
        strides: voxels of the patch per voxel of that map, on the axis that is divided most.
        checkpointing: recompute in the backward pass what `run` computes, to save memory.
        decoder_widths: channels of the decoder's features at 1/8, 1/4, 1/2 and full resolution.
    """

    checkpointing = False
    widths: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]
    decoder_widths: tuple[int, int, int, int]

    @property
    def feature_width(self) -> int:
        """Channels of the decoder's features at full resolution."""
        return self.decoder_widths[-1]

    @abstractmethod
    def stem(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B, channels, H, W, D) to the input of stage 0 and the features that the decoder keeps from before it."""

    @abstractmethod
    def stage(self, n: int, x: Tensor) -> Tensor:
        """Run encoder stage n. Returns the map (B, widths[n], H/s, W/s, D/s) with s = strides[n]."""

    @abstractmethod
    def decode(self, image: Tensor, early: Sequence[Tensor], maps: Sequence[Tensor]) -> list[Tensor]:
        """Image, stem features and the four stage maps to the decoder's features at 1/8, 1/4, 1/2 and full resolution,
        (B, decoder_widths[i], H/s, W/s, D/s)."""

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        """A block's output; in training by recomputation, if `checkpointing` says so."""
        if self.checkpointing and self.training:
            return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return block(x)

    def forward(self, image: Tensor) -> Tensor:
        """The plain network without text: decoder features (B, feature_width, H, W, D)."""
        return self.decoded(image)[-1]

    def decoded(self, image: Tensor) -> list[Tensor]:
        """The plain network without text, with the decoder's features at all resolutions, as of `decode`."""
        x, early = self.stem(image)
        maps = []
        for n in range(STAGES):
            x = self.stage(n, x)
            maps.append(x)
        return self.decode(image, early, maps)
