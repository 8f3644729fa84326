"""MONAI's Swin UNETR, its attention through torch's fused kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from monai.networks.blocks import UnetrUpBlock
from monai.networks.nets import SwinUNETR
from monai.networks.nets.swin_unetr import SwinTransformerBlock, WindowAttention
from torch import Tensor, nn
from torch.nn import functional as F

from lib.model.nets.vision.protocol import STAGES, VisionBackbone


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

    def stem(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        swin = self.net.swinViT
        x = swin.pos_drop(swin.patch_embed(image))
        return x, [x]

    def stage(self, n: int, x: Tensor) -> Tensor:
        swin = self.net.swinViT
        if swin.use_v2:
            x = getattr(swin, f"layers{n + 1}c")[0](x.contiguous())
        return getattr(swin, f"layers{n + 1}")[0](x.contiguous())

    def decode(self, image: Tensor, early: Sequence[Tensor], maps: Sequence[Tensor]) -> list[Tensor]:
        net = self.net
        x0, x1, x2, x3, x4 = (net.swinViT.proj_out(m, net.normalize) for m in (*early, *maps))
        x = net.decoder5(net.encoder10(x4), x3)
        eighth = net.decoder4(x, net.encoder4(x2))
        quarter = net.decoder3(eighth, net.encoder3(x1))
        half = net.decoder2(quarter, net.encoder2(x0))
        return [eighth, quarter, half, _up(net.decoder1, half, lambda: net.encoder1(image))]


def _up(block: UnetrUpBlock, x: Tensor, skip: Callable[[], Tensor]) -> Tensor:
    """MONAI's upsampling block, its skip connection gone before the convolutions: whoever calls the block itself holds
    it meanwhile, 0.16 GiB in a window of 96³ with 48 channels."""
    return block.conv_block(torch.cat((block.transp_conv(x), skip()), dim=1))
