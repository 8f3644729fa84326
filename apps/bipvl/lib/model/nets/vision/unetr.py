"""MONAI's UNETR."""

from __future__ import annotations

from collections.abc import Sequence

from monai.networks.nets import UNETR
from torch import Tensor, nn

from lib.model.nets.vision.protocol import STAGES, VisionBackbone


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

    def stem(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self._to_map(self.net.vit.patch_embedding(image))
        return x, [x]

    def stage(self, n: int, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)  # (B, tokens, width)
        for block in self.net.vit.blocks[self.ends[n - 1] if n else 0 : self.ends[n]]:
            x = self.run(block, x)
        return self._to_map(self.net.vit.norm(x) if n == STAGES - 1 else x)

    def decode(self, image: Tensor, early: Sequence[Tensor], maps: Sequence[Tensor]) -> list[Tensor]:
        net = self.net
        eighth = net.decoder5(maps[3], net.encoder4(maps[2]))
        quarter = net.decoder4(eighth, net.encoder3(maps[1]))
        half = net.decoder3(quarter, net.encoder2(maps[0]))
        return [eighth, quarter, half, net.decoder2(half, net.encoder1(image))]

    def _to_map(self, tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2).unflatten(2, self.grid)
