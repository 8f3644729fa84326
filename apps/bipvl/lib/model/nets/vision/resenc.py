"""nnU-Net's residual encoder U-Net (ResEnc), from the package that nnU-Net itself builds it with.

Isensee et al., "nnU-Net Revisited", MICCAI 2024 (arXiv 2404.09556). Six levels of 1, 3, 4, 6, 6, 6 residual blocks and
one convolution a level on the way up. The first two levels are the stem, the other four the stages: BiFusion sits
where it sits in Swin UNETR, at about a quarter of the resolution and below.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from torch import Tensor, nn

from lib.model.nets.vision.protocol import VisionBackbone

BLOCKS = (1, 3, 4, 6, 6, 6)
LEVELS = len(BLOCKS)
WIDEST = 10  # times the first level's width: nnU-Net's 320 of 32
SMALLEST = 4  # voxels that an axis keeps
ANISOTROPIC = 2.0  # an axis this many times as coarse as the finest is left alone


class Plan(NamedTuple):
    """Strides and kernel sizes of each level, three axes each."""

    strides: list[tuple[int, ...]]
    kernels: list[tuple[int, ...]]


def plan(patch: Sequence[int], spacing: Sequence[float]) -> Plan:
    """Where to halve and where to convolve, so that voxels become cubes first (nnU-Net, Nature Methods 2021).

    An axis is halved from one level to the next while it keeps four voxels and its voxels are less than twice as long
    as the shortest among those axes; it is convolved from the level on at which its voxels are less than twice as long
    as the shortest of all. A level at which no axis can be halved stays at the resolution of the one before.

    Args:
        patch: voxels per side.
        spacing: mm per voxel.

    Returns:
        Strides and kernels of six levels, the first at full resolution.
    """
    sizes, lengths = list(patch), list(spacing)
    strides: list[tuple[int, ...]] = [(1, 1, 1)]
    kernels = [_kernel(lengths, (1, 1, 1))]
    for _ in range(LEVELS - 1):
        large = [axis for axis in range(3) if sizes[axis] >= 2 * SMALLEST and sizes[axis] % 2 == 0]
        shortest = min((lengths[axis] for axis in large), default=0.0)
        halved = [axis for axis in large if lengths[axis] < ANISOTROPIC * shortest]
        for axis in halved:
            sizes[axis] //= 2
            lengths[axis] *= 2
        strides.append(tuple(2 if axis in halved else 1 for axis in range(3)))
        kernels.append(_kernel(lengths, kernels[-1]))
    return Plan(strides, kernels)


class ResEncBackbone(VisionBackbone):
    """ResEnc U-Net with nnU-Net's norm, activation and initialisation; its output convolutions are left out.

    Args:
        spacing: mm per voxel of the patch; decides with its size which axes each level halves.
    """

    def __init__(
        self, channels: int, patch: Sequence[int], feature_size: int, checkpointing: bool, spacing: Sequence[float]
    ) -> None:
        super().__init__()
        strides, kernels = plan(patch, spacing)
        widths = [min(feature_size * 2**n, WIDEST * feature_size) for n in range(LEVELS)]
        self.widths = (widths[2], widths[3], widths[4], widths[5])
        steps = torch.tensor(strides).cumprod(0).amax(1).tolist()
        self.strides = (steps[2], steps[3], steps[4], steps[5])
        self.decoder_widths = (widths[3], widths[2], widths[1], widths[0])
        self.net = ResidualEncoderUNet(
            channels,
            LEVELS,
            widths,
            nn.Conv3d,
            kernels,
            strides,
            BLOCKS,
            num_classes=1,
            n_conv_per_stage_decoder=1,
            conv_bias=True,
            norm_op=nn.InstanceNorm3d,
            norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True},
        )
        self.net.apply(ResidualEncoderUNet.initialize)
        self.net.decoder.seg_layers = nn.ModuleList()  # the model has its own head
        self.checkpointing = checkpointing

    def stem(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        encoder = self.net.encoder
        full = self.run(encoder.stages[0], encoder.stem(_in_order(image)))
        half = self.run(encoder.stages[1], full)
        return half, [full, half]

    def stage(self, n: int, x: Tensor) -> Tensor:
        return self.run(self.net.encoder.stages[n + 2], x)

    def decode(self, image: Tensor, early: Sequence[Tensor], maps: Sequence[Tensor]) -> list[Tensor]:
        decoder, decoded = self.net.decoder, [maps[-1]]
        skips = (*early, *maps[:-1])
        for up, level, skip in zip(decoder.transpconvs, decoder.stages, reversed(skips), strict=True):
            decoded.append(level(torch.cat((up(decoded[-1]), skip), 1)))
        return decoded[-4:]


def lay_out(network: nn.Module, device: torch.device) -> None:
    """Lay the weights of ResEnc's convolutions out in place as the device that is to train them does so fastest: on a
    CPU channels last, elsewhere as they are.

    With the features alone laid out so (`_in_order`), a step would take a tenth longer (docs/research/speed.md).
    """
    for module in network.modules():
        if isinstance(module, ResEncBackbone) and device.type == "cpu":
            module.to(memory_format=torch.channels_last_3d)


def _in_order(image: Tensor) -> Tensor:
    """On a CPU with channels last, whose convolutions train a tenth faster and give the same numbers to six digits."""
    return image.contiguous(memory_format=torch.channels_last_3d) if image.device.type == "cpu" else image


def _kernel(lengths: Sequence[float], above: Sequence[int]) -> tuple[int, ...]:
    """3 for an axis that is fine enough, or was at the level above; else 1."""
    fine = ANISOTROPIC * min(lengths)
    return tuple(3 if k == 3 or length < fine else 1 for k, length in zip(above, lengths, strict=True))
