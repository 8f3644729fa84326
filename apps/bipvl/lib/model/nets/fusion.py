"""BiFusion, Eq. (2): text and vision exchange information once per stage.

    T' = SA(LN(T))                         V' = SA(LN(V))
    T^ = T' + MLP_T(CA(q=T', kv=V'))       V^ = V' + MLP_V(CA(q=V', kv=T^))

Printed like this, Eq. (2) has no residual around self-attention, so inserting an untrained block would overwrite what
a pre-trained encoder passes on. We use the usual pre-norm residuals, scale each branch that re-enters an encoder by a
small learned vector (layer scale, 0.1 at the start), and add the mapped-back T^ to the text rows: an untrained block
changes either encoder little, and a trained one is free to change it much.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LAYER_SCALE = 0.1
WINDOW = 8
HEAD_WIDTH = 32


class SelfAttention(nn.Module):
    """Pre-norm multi-head self-attention on (B, N, width), without the residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, _heads(width), batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.attention(x, x, x, need_weights=False)[0]


class CrossAttentionMLP(nn.Module):
    """MLP(CA(q, kv)) of Eq. (2), pre-norm: q (B, N, width) and kv (B, M, width) to (B, N, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_q = nn.LayerNorm(width)
        self.norm_kv = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, _heads(width), batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, q: Tensor, kv: Tensor) -> Tensor:
        kv = self.norm_kv(kv)
        return self.mlp(self.attention(self.norm_q(q), kv, kv, need_weights=False)[0])


class BiFusion(nn.Module):
    """One BiFusion block.

    Args:
        text_width: E, width of the text encoder.
        vision_width: channels of the vision map at this stage; text is mapped to it by a learned linear layer.
        window: side of the cubes within which vision self-attention works, None for attention over the whole map. At
            stage 1 a 96³ patch has 13,824 tokens, where full attention is the heaviest part of the block.
    """

    def __init__(self, text_width: int, vision_width: int, window: int | None = None) -> None:
        super().__init__()
        self.window = window
        self.text_in = nn.Linear(text_width, vision_width)
        self.text_out = nn.Linear(vision_width, text_width)
        self.text_self = SelfAttention(vision_width)
        self.vision_self = SelfAttention(vision_width)
        self.text_cross = CrossAttentionMLP(vision_width)
        self.vision_cross = CrossAttentionMLP(vision_width)
        self.scale_text = nn.Parameter(torch.full((text_width,), LAYER_SCALE))
        self.scale_vision_self = nn.Parameter(torch.full((vision_width,), LAYER_SCALE))
        self.scale_vision_cross = nn.Parameter(torch.full((vision_width,), LAYER_SCALE))

    def forward(self, rows: Tensor, volume: Tensor) -> tuple[Tensor, Tensor]:
        """Text rows (B, R, E) and vision map (B, width, h, w, d) to both, fused, in the same shapes."""
        size = volume.shape[2:]
        t = self.text_in(rows)
        v = volume.flatten(2).transpose(1, 2)  # (B, h*w*d, width)

        t = t + self.text_self(t)
        v = v + self.scale_vision_self * self._attend_vision(v, size)
        t = t + self.text_cross(t, v)
        v = v + self.scale_vision_cross * self.vision_cross(v, t)

        return rows + self.scale_text * self.text_out(t), v.transpose(1, 2).unflatten(2, size)

    def _attend_vision(self, v: Tensor, size: torch.Size) -> Tensor:
        if self.window is None:
            return self.vision_self(v)
        cube = [_side(n, self.window) for n in size]
        h, w, d = (n // c for n, c in zip(size, cube, strict=True))
        x = v.unflatten(1, (h, cube[0], w, cube[1], d, cube[2]))
        x = x.permute(0, 1, 3, 5, 2, 4, 6, 7)  # (B, h, w, d, cube, cube, cube, width)
        x = self.vision_self(x.reshape(-1, cube[0] * cube[1] * cube[2], v.shape[-1]))
        x = x.view(-1, h, w, d, *cube, v.shape[-1]).permute(0, 1, 4, 2, 5, 3, 6, 7)
        return x.reshape(v.shape)


class IdentityFusion(nn.Module):
    """No exchange: both encoders run as they are (the paper's ablation, and the reference of the equality tests)."""

    def forward(self, rows: Tensor, volume: Tensor) -> tuple[Tensor, Tensor]:
        return rows, volume


def _heads(width: int) -> int:
    """Heads of about HEAD_WIDTH channels that divide the width."""
    return next(h for h in range(max(1, width // HEAD_WIDTH), 0, -1) if width % h == 0)


def _side(n: int, limit: int) -> int:
    """The largest window side up to `limit` that divides an axis of n voxels: no padding, every token in one window."""
    return next(s for s in range(min(n, limit), 0, -1) if n % s == 0)
