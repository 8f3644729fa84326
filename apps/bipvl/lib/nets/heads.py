"""The two heads: the paper's, with one output channel a class, and one that reads what the class looks like.

With the fixed head a class is a channel: text that never changes can be treated as a constant, and nothing forces the
network to read it. With the text head a class is its sentences and nothing else:

    logits of class c  =  decoder features · MLP(T_c) + bias(T_c)          T_c of Eq. (4)
    class map of c     =  MLP(V_4) · projection of the mean of its concepts

and the background is a learned vector. No parameter knows a class by its number, so the classes may be permuted
(the masks follow exactly), left out, or described anew, and the number of classes is free.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GRID = (3, 3, 3)  # of the class vectors; V_4 of a 96³ patch


class FixedHead(nn.Conv3d):
    """The paper's output convolution: features (B, width, H, W, D) to logits, a channel a class, whatever the text."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__(width, channels, 1)

    def forward(self, input: Tensor, text: Tensor | None = None) -> Tensor:
        return super().forward(input)


class TextHead(nn.Module):
    """Logits of a class from its text vector.

    Args:
        width: channels of the decoder's features.
        projection: P, width of the text vectors.
        overlapping: no background channel.
    """

    def __init__(self, width: int, projection: int, overlapping: bool) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.LayerNorm(projection), nn.Linear(projection, projection), nn.GELU(), nn.Linear(projection, width + 1)
        )
        self.background = None if overlapping else nn.Parameter(torch.randn(width + 1))

    def forward(self, features: Tensor, text: Tensor) -> Tensor:
        """Features (B, width, H, W, D) and text vectors (B, C, P) to logits (B, channels, H, W, D)."""
        kernels = _with_background(self.mlp(text), self.background)  # (B, channels, width + 1)
        weights, bias = kernels[..., :-1] * features.shape[1] ** -0.5, kernels[..., -1:]
        return torch.baddbmm(bias, weights, features.flatten(2)).unflatten(2, features.shape[2:])


class ClassEmbedding(nn.Module):
    """The head of Eq. (3): an MLP scores each place of V_4 for each class; a class's scores over places are its vector.

    The paper flattens the class map, 27 values for a 96³ patch, which ties the model to one patch size. Here the map is
    first averaged onto a grid of 3 x 3 x 3, which changes nothing for 96³ and takes any other patch.
    """

    def __init__(self, width: int, outputs: int, overlapping: bool) -> None:
        """`outputs`: one a channel of the class map."""
        super().__init__()
        self.foreground = 0 if overlapping else 1  # the channel of the first class
        # V_4 has no bound of its own; without the norm its scores explode at large learning rates.
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, outputs))

    def forward(self, v4: Tensor, concepts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """V_4 (B, width, h, w, d) to the class map (B, channels, h, w, d) and class vectors (B, C, 27)."""
        return self._mapped(self.mlp(self._places(v4)), v4)

    def _places(self, v4: Tensor) -> Tensor:
        """(B, h*w*d, width), normalised."""
        return self.norm(v4.flatten(2).transpose(1, 2))

    def _mapped(self, scores: Tensor, v4: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (B, h*w*d, channels) as class map and class vectors."""
        class_map = scores.transpose(1, 2).unflatten(2, v4.shape[2:])
        return class_map, F.adaptive_avg_pool3d(class_map[:, self.foreground :], GRID).flatten(2)


class TextClassEmbedding(ClassEmbedding):
    """The class map of Eq. (3) for classes that are known by their text: each place of V_4 is compared with each class.

    A channel a class would tell the classes apart by their number, through w_k and the alignment.
    """

    def __init__(self, width: int, projection: int, overlapping: bool) -> None:
        super().__init__(width, width // 2, overlapping)  # here the MLP ends in a query, to be compared with the keys
        self.key = nn.Sequential(nn.LayerNorm(projection), nn.Linear(projection, width // 2))
        self.background = None if overlapping else nn.Parameter(torch.randn(width // 2))

    def forward(self, v4: Tensor, concepts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As in `ClassEmbedding`; `concepts` (B, C, K, P) are the rows in the common space."""
        assert concepts is not None
        queries = self.mlp(self._places(v4))  # (B, h*w*d, width // 2)
        keys = _with_background(self.key(concepts.mean(2)), self.background)
        return self._mapped(queries @ keys.mT * queries.shape[-1] ** -0.5, v4)


def _with_background(vectors: Tensor, background: Tensor | None) -> Tensor:
    """(B, C, n) to (B, channels, n), the background's vector first where there is one."""
    if background is None:
        return vectors
    first = background.to(vectors.dtype).expand(len(vectors), 1, -1)
    return torch.cat([first, vectors], 1)
