"""Convolutional networks of MONAI: the residual UNet, UNet++ and MedNeXt."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

import torch
from monai.networks.layers import SkipConnection
from monai.networks.nets import BasicUNetPlusPlus, MedNeXt, UNet
from torch import Tensor, nn

from lib.model.nets.vision.protocol import STAGES, VisionBackbone


class UNetBackbone(VisionBackbone):
    """MONAI's residual UNet with five levels: the first is the stem, the other four are the stages."""

    def __init__(self, channels: int, patch: Sequence[int], feature_size: int, checkpointing: bool) -> None:
        super().__init__()
        d = feature_size
        self.widths, self.strides = (2 * d, 4 * d, 8 * d, 16 * d), (4, 8, 16, 16)
        self.decoder_widths = (4 * d, 2 * d, d, d)
        self.net = UNet(3, channels, d, (d, 2 * d, 4 * d, 8 * d, 16 * d), (2, 2, 2, 2), num_res_units=2)
        self.checkpointing = checkpointing

    def _levels(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """MONAI nests the levels as (down, skip around the next level, up). Returns all downs and ups, from the top."""
        downs, ups, level = [], [], self.net.model
        while isinstance(level, nn.Sequential) and len(level) == 3 and isinstance(level[1], SkipConnection):
            downs.append(level[0])
            ups.append(level[2])
            level = level[1].submodule
        return [*downs, level], ups

    def stem(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self._levels()[0][0](image)
        return x, [x]

    def stage(self, n: int, x: Tensor) -> Tensor:
        down = self._levels()[0][n + 1]
        return self.run(down, x)

    def decode(self, image: Tensor, early: Sequence[Tensor], maps: Sequence[Tensor]) -> list[Tensor]:
        skips, decoded = (*early, *maps[:-1]), [maps[-1]]
        for skip, up in zip(reversed(skips), reversed(self._levels()[1]), strict=True):
            decoded.append(up(torch.cat([skip, decoded[-1]], dim=1)))
        return decoded[1:]


class UNetPlusPlusBackbone(VisionBackbone):
    """MONAI's UNet++: the backbone column of the nest is the encoder, every other node belongs to the decoder."""

    def __init__(self, channels: int, patch: Sequence[int], feature_size: int, checkpointing: bool) -> None:
        super().__init__()
        d = feature_size
        self.widths, self.strides = (2 * d, 4 * d, 8 * d, 16 * d), (2, 4, 8, 16)
        self.decoder_widths = (8 * d, 4 * d, 2 * d, d)
        with contextlib.redirect_stdout(io.StringIO()):  # the constructor prints a banner
            self.net = BasicUNetPlusPlus(3, channels, 1, (d, 2 * d, 4 * d, 8 * d, 16 * d, d))
        for n in range(1, 5):
            setattr(self.net, f"final_conv_0_{n}", nn.Identity())  # the model has its own head
        self.checkpointing = checkpointing

    def stem(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.net.conv_0_0(image)
        return x, [x]

    def stage(self, n: int, x: Tensor) -> Tensor:
        down = getattr(self.net, f"conv_{n + 1}_0")
        return self.run(down, x)

    def decode(self, image: Tensor, early: Sequence[Tensor], maps: Sequence[Tensor]) -> list[Tensor]:
        nodes = {(level, 0): x for level, x in enumerate((*early, *maps))}
        for column in range(1, 5):
            for level in range(5 - column):
                skips = torch.cat([nodes[level, c] for c in range(column)], dim=1)
                upcat = getattr(self.net, f"upcat_{level}_{column}")
                nodes[level, column] = upcat(nodes[level + 1, column - 1], skips)
        return [nodes[3, 1], nodes[2, 2], nodes[1, 3], nodes[0, 4]]


class MedNeXtBackbone(VisionBackbone):
    """MONAI's MedNeXt of kernel 3 with five levels: the first is the stem, the other four are the stages."""

    def __init__(self, channels: int, patch: Sequence[int], feature_size: int, checkpointing: bool) -> None:
        super().__init__()
        d = feature_size
        self.widths, self.strides = (2 * d, 4 * d, 8 * d, 16 * d), (2, 4, 8, 16)
        self.decoder_widths = (8 * d, 4 * d, 2 * d, d)
        self.net = MedNeXt(3, d, channels, 1, kernel_size=3, use_residual_connection=True)
        self.net.out_0 = nn.Identity()  # type: ignore[assignment]  # the model has its own head
        self.checkpointing = checkpointing

    def stem(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.run(self.net.enc_stages[0], self.net.stem(image))
        return x, [x]

    def stage(self, n: int, x: Tensor) -> Tensor:
        net = self.net
        level = net.bottleneck if n == STAGES - 1 else net.enc_stages[n + 1]
        return self.run(level, self.run(net.down_blocks[n], x))

    def decode(self, image: Tensor, early: Sequence[Tensor], maps: Sequence[Tensor]) -> list[Tensor]:
        decoded, skips = [maps[-1]], (*early, *maps[:-1])
        for up, level, skip in zip(self.net.up_blocks, self.net.dec_stages, reversed(skips), strict=True):
            decoded.append(self.run(level, up(decoded[-1]) + skip))
        return decoded[1:]
