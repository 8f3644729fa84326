"""Vision backbones behind one protocol, so that the model never asks which one it holds.

A backbone is driven stage by stage: `stem` once, `stage` for n = 0..3 with a chance to change the map in between (that
is where BiFusion sits), then `decode` with the four maps as skip connections. Every adapter drives the modules of the
network that MONAI ships, so weights and behaviour stay MONAI's: run without fusion, it computes exactly what MONAI's
own forward computes. A further backbone is one adapter class and one entry in `BACKBONES`.
"""

from __future__ import annotations

import contextlib
import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from monai.networks.blocks import UnetrUpBlock
from monai.networks.layers import SkipConnection
from monai.networks.nets import UNETR, BasicUNetPlusPlus, SwinUNETR, UNet
from monai.networks.nets.swin_unetr import SwinTransformerBlock, WindowAttention
from torch import Tensor, nn
from torch.nn import functional as F

STAGES = 4


class VisionBackbone(nn.Module, ABC):
    """The protocol.

    Attributes:
        widths: channels of the map after each of the four stages.
        strides: voxels of the patch per voxel of that map, the same for the three axes.
        decoder_widths: channels of the decoder's features at 1/8, 1/4, 1/2 and full resolution.
    """

    widths: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]
    decoder_widths: tuple[int, int, int, int]

    @property
    def feature_width(self) -> int:
        """Channels of the decoder's features at full resolution."""
        return self.decoder_widths[-1]

    @abstractmethod
    def stem(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, channels, H, W, D) to the input of stage 0 and the feature that the decoder keeps from before it."""

    @abstractmethod
    def stage(self, n: int, x: Tensor) -> Tensor:
        """Run encoder stage n. Returns the map (B, widths[n], H/s, W/s, D/s) with s = strides[n]."""

    @abstractmethod
    def decode(self, image: Tensor, early: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        """Image, stem feature and the four stage maps to the decoder's features at 1/8, 1/4, 1/2 and full resolution,
        (B, decoder_widths[i], H/s, W/s, D/s)."""

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


class FusedWindowAttention(WindowAttention):
    """MONAI's window attention, same parameters and result, through torch's fused kernel.

    MONAI's own writes the scores of all windows to memory (343 x 343 per window, head and layer) and reads them again
    for bias, mask, softmax and product, which is a sixth of the network's time on a CPU (docs/research/speed.md).
    """

    @classmethod
    def like(cls, plain: WindowAttention) -> FusedWindowAttention:
        """One with the sizes and the same parameter objects as MONAI's own. Draws no random number."""
        with torch.device("meta"):
            fused = cls(
                plain.dim,
                plain.num_heads,
                plain.window_size,
                plain.qkv.bias is not None,
                plain.attn_drop.p,
                plain.proj_drop.p,
            )
        fused.load_state_dict(plain.state_dict(keep_vars=True), assign=True)
        return fused

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Windows (B*W, tokens, width) to the same shape; mask (W, tokens, tokens) is added to the scores."""
        windows, tokens, width = x.shape
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        index = self.relative_position_index[:tokens, :tokens]  # type: ignore[index]
        bias = self.relative_position_bias_table[index.reshape(-1)].view(tokens, tokens, -1)
        scores = bias.permute(2, 0, 1).contiguous()[None]  # (1, heads, tokens, tokens)
        if mask is not None:  # one per window: windows go where heads are, so that all samples share one mask
            scores = (scores + mask[:, None]).flatten(0, 1)[None]
            q, k, v = (t.reshape(windows // len(mask), -1, tokens, t.shape[-1]) for t in (q, k, v))
        dropout = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, scores.to(q.dtype), dropout, scale=self.scale)
        x = x.reshape(windows, self.num_heads, tokens, -1).transpose(1, 2).reshape(windows, tokens, width)
        return self.proj_drop(self.proj(x))


class SwinUNETRBackbone(VisionBackbone):
    """MONAI's Swin UNETR. A stage is its blocks and the patch merging after them (V2: the residual convolution too)."""

    def __init__(
        self, channels: int, patch: Sequence[int], feature_size: int, checkpointing: bool, v2: bool, heads: int = 3
    ) -> None:
        super().__init__()
        d = feature_size
        self.widths, self.strides = (2 * d, 4 * d, 8 * d, 16 * d), (4, 8, 16, 32)
        self.decoder_widths = (4 * d, 2 * d, d, d)
        heads_of_stages = tuple(heads * 2**n for n in range(STAGES))
        self.net = SwinUNETR(
            channels, 1, feature_size=d, num_heads=heads_of_stages, use_checkpoint=checkpointing, use_v2=v2
        )
        self.net.out = nn.Identity()  # type: ignore[assignment]  # the model has its own head
        for block in self.net.modules():
            if isinstance(block, SwinTransformerBlock):
                block.attn = FusedWindowAttention.like(block.attn)

    def stem(self, image: Tensor) -> tuple[Tensor, Tensor]:
        swin = self.net.swinViT
        x = swin.pos_drop(swin.patch_embed(image))
        return x, x

    def stage(self, n: int, x: Tensor) -> Tensor:
        swin = self.net.swinViT
        if swin.use_v2:
            x = getattr(swin, f"layers{n + 1}c")[0](x.contiguous())
        return getattr(swin, f"layers{n + 1}")[0](x.contiguous())

    def decode(self, image: Tensor, early: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        net = self.net
        x0, x1, x2, x3, x4 = (net.swinViT.proj_out(m, net.normalize) for m in (early, *maps))
        x = net.decoder5(net.encoder10(x4), x3)
        eighth = net.decoder4(x, net.encoder4(x2))
        quarter = net.decoder3(eighth, net.encoder3(x1))
        half = net.decoder2(quarter, net.encoder2(x0))
        return [eighth, quarter, half, _up(net.decoder1, half, lambda: net.encoder1(image))]


class UNETRBackbone(VisionBackbone):
    """MONAI's UNETR. Its decoder takes the states after blocks 4, 7, 10 and the last: those are the four stages."""

    ends = (4, 7, 10, 12)

    def __init__(self, channels: int, patch: Sequence[int], feature_size: int, checkpointing: bool) -> None:
        super().__init__()
        width = 16 * feature_size
        self.widths, self.strides = (width,) * 4, (16,) * 4
        self.decoder_widths = (8 * feature_size, 4 * feature_size, 2 * feature_size, feature_size)
        heads = next(h for h in range(max(1, width // 64), 0, -1) if width % h == 0)
        self.net = UNETR(
            channels, 1, patch, feature_size=feature_size, hidden_size=width, mlp_dim=4 * width, num_heads=heads
        )
        self.grid = tuple(p // 16 for p in patch)
        self.checkpointing = checkpointing
        self.net.out = nn.Identity()  # type: ignore[assignment]  # the model has its own head
        for block in self.net.vit.blocks:  # MONAI builds cross-attention that UNETR never runs
            block.cross_attn, block.norm_cross_attn = nn.Identity(), nn.Identity()

    def stem(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = self._to_map(self.net.vit.patch_embedding(image))
        return x, x

    def stage(self, n: int, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)  # (B, tokens, width)
        for block in self.net.vit.blocks[self.ends[n - 1] if n else 0 : self.ends[n]]:
            x = _checkpointed(block, x) if self.checkpointing and self.training else block(x)
        return self._to_map(self.net.vit.norm(x) if n == STAGES - 1 else x)

    def decode(self, image: Tensor, early: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        net = self.net
        eighth = net.decoder5(maps[3], net.encoder4(maps[2]))
        quarter = net.decoder4(eighth, net.encoder3(maps[1]))
        half = net.decoder3(quarter, net.encoder2(maps[0]))
        return [eighth, quarter, half, net.decoder2(half, net.encoder1(image))]

    def _to_map(self, tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2).unflatten(2, self.grid)


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

    def stem(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = self._levels()[0][0](image)
        return x, x

    def stage(self, n: int, x: Tensor) -> Tensor:
        down = self._levels()[0][n + 1]
        return _checkpointed(down, x) if self.checkpointing and self.training else down(x)

    def decode(self, image: Tensor, early: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        skips, decoded = (early, *maps[:-1]), [maps[-1]]
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

    def stem(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = self.net.conv_0_0(image)
        return x, x

    def stage(self, n: int, x: Tensor) -> Tensor:
        down = getattr(self.net, f"conv_{n + 1}_0")
        return _checkpointed(down, x) if self.checkpointing and self.training else down(x)

    def decode(self, image: Tensor, early: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        nodes = {(level, 0): x for level, x in enumerate((early, *maps))}
        for column in range(1, 5):
            for level in range(5 - column):
                skips = torch.cat([nodes[level, c] for c in range(column)], dim=1)
                upcat = getattr(self.net, f"upcat_{level}_{column}")
                nodes[level, column] = upcat(nodes[level + 1, column - 1], skips)
        return [nodes[3, 1], nodes[2, 2], nodes[1, 3], nodes[0, 4]]


def _up(block: UnetrUpBlock, x: Tensor, skip: Callable[[], Tensor]) -> Tensor:
    """MONAI's upsampling block, its skip connection gone before the convolutions: whoever calls the block itself holds
    it meanwhile, 0.16 GiB in a window of 96³ with 48 channels."""
    return block.conv_block(torch.cat((block.transp_conv(x), skip()), dim=1))


def _checkpointed(module: nn.Module, x: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)


BACKBONES: dict[str, Callable[..., VisionBackbone]] = {
    "swin_unetr": partial(SwinUNETRBackbone, v2=False),
    "swin_unetr_v2": partial(SwinUNETRBackbone, v2=True),
    "unetr": UNETRBackbone,
    "unet": UNetBackbone,
    "unetpp": UNetPlusPlusBackbone,
}


def build_vision(
    name: str, channels: int, patch: Sequence[int], feature_size: int, checkpointing: bool = False, **own: Any
) -> VisionBackbone:
    """Build a backbone by name.

    Args:
        name: a key of `BACKBONES`.
        channels: image channels.
        patch: voxels per side; only UNETR is tied to it (learned position embeddings).
        feature_size: the width d of the paper (48 at full size).
        checkpointing: recompute activations in the backward pass to save memory.
        own: what only this backbone takes (Swin UNETR: `heads`, attention heads of stage 1).

    Raises:
        ValueError: unknown name.
    """
    if name not in BACKBONES:
        raise ValueError(f"vision backbone {name!r}: valid are {', '.join(BACKBONES)}")
    return BACKBONES[name](channels, tuple(patch), feature_size, checkpointing, **own)
