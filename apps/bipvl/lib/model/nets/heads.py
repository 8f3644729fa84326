"""The two heads, and what a class looks like in this image: the class embedding.

With the fixed head (the paper's) a class is a channel. Text that never changes acts as a constant, and nothing forces
the network to read it. With the text head a class is its sentences and nothing else:

    logits of class c        =  GAIN · decoder features · MLP(T_c, D_c) / √width + bias        T_c of Eq. (4)
    score of place i for c   =  GAIN · query of place i · key(mean of c's concepts, D_c) / √P

and the background is a learned vector. D_c is what sets the class's sentences apart from the task's other sentences
(`distinction`). No parameter knows a class by its number, so the classes may be permuted (the masks follow exactly),
left out, or described anew, and the number of classes is free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GRID = (3, 3, 3)  # of the class vectors; V_4 of a 96³ patch
GAIN = 8.0  # of what is compared with text; at 1 the rarest class is found late (docs/research/accuracy.md)
LEVELS = 3  # of the decoder that carry class maps: 1/8, 1/4 and 1/2 of the resolution
POOLED = 1  # the level whose places make a class's vector
LEAST = 1e-3  # difference of sentences that counts as none; BERT's vectors have a root mean square of about 1


def distinction(meaning: Tensor, own: Tensor, concepts: Tensor | None = None) -> Tensor:
    """D of each class: its mean sentence less that of all of the task's classes, brought to a common size.

    Sentences about one body in one modality are nearly one vector to a text encoder, and two that differ in one word
    ("left") even more so. From there a network that knows classes by their text alone does not get away: equal texts
    make equal class maps, equal vision vectors, and no gradient that would part them.

    Centre and size come from the task's own text alone, so D is an affine function of what is described: a text about
    something else lies far from all classes, and does not become one of them.

    Args:
        meaning: (C, K, E), the sentences' vectors (`TextStates.meaning`).
        own: likewise of all classes of the task, in any order: what a class is set apart from does not depend on
            which classes are asked for.
        concepts: the numbers of the K concepts among the task's, if some are left out: sentences about shape are
            compared with sentences about shape. None for all.

    Returns:
        (C, E).
    """
    own = own.float()
    means = own.mean(1)
    centre = means.mean(0)
    size = (means - centre).square().mean().add(LEAST**2).sqrt()
    if concepts is not None:
        centre = own.mean(0)[concepts.to(own.device)].mean(0)
    return (meaning.float().mean(1) - centre) / size


class FixedHead(nn.Conv3d):
    """The paper's output convolution: features (B, width, H, W, D) to logits, one channel per class for any text."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__(width, channels, 1)

    def forward(self, input: Tensor, text: Tensor | None = None, apart: Tensor | None = None) -> Tensor:
        return super().forward(input)


class Reader(nn.Module):
    """A class's text as the heads take it: from T or another vector in the common space, which sees the image, and
    from D, which tells the classes apart; or, `plain`, from D alone."""

    def __init__(self, projection: int, text_width: int, width: int, plain: bool = False) -> None:
        super().__init__()
        self.plain = plain
        if not plain:
            self.norm = nn.LayerNorm(projection)
            self.seen = nn.Linear(projection, width)
        self.apart = nn.Linear(text_width, width, bias=plain)

    def forward(self, text: Tensor, apart: Tensor) -> Tensor:
        """(B, C, P) and (C, E) to (B, C, width)."""
        if self.plain:
            return self.apart(apart).expand(len(text), -1, -1)
        return self.seen(self.norm(text)) + self.apart(apart)


class TextHead(nn.Module):
    """Logits of a class from its text vector.

    Args:
        width: channels of the decoder's features.
        projection: P, width of the text vectors.
        text_width: E, width of the text encoder.
        overlapping: no background channel.
        plain: from D alone, so that a class is the same in every image.
    """

    def __init__(self, width: int, projection: int, text_width: int, overlapping: bool, plain: bool = False) -> None:
        super().__init__()
        self.reader = Reader(projection, text_width, projection, plain)
        self.mlp = nn.Sequential(nn.GELU(), nn.Linear(projection, width + 1))
        self.background = None if overlapping else nn.Parameter(torch.zeros(width + 1))

    def forward(self, features: Tensor, text: Tensor, apart: Tensor) -> Tensor:
        """Features (B, width, H, W, D), text vectors T (B, C, P) and D (C, E) to logits (B, channels, H, W, D)."""
        kernels = _with_background(self.mlp(self.reader(text, apart)), self.background)  # (B, channels, width + 1)
        weights, bias = kernels[..., :-1] * (GAIN * features.shape[1] ** -0.5), kernels[..., -1:]
        return torch.baddbmm(bias, weights, features.flatten(2)).unflatten(2, features.shape[2:])


class ClassPyramid(nn.Module):
    """The class embedding of the decoder: at three resolutions, each place is compared with the text of each class.

    Eq. (3) scores the places of V_4 for each class, against what the decoder decides there. Of those there are 27 in a
    96³ patch, most organs fill less than one, and on real data their vectors became constants that no image changed
    (docs/research/accuracy.md). Here the places are the decoder's, thousands of them, the maps learn from the label
    (`lib.model.losses.class_map_loss`), and the vector of a class is the mean of the places that show it.

    Args:
        widths: channels of the decoder's features at 1/8, 1/4 and 1/2 resolution.
        projection: P, width of the common space.
        text_width: E, width of the text encoder.
        overlapping: no background.

    Attributes:
        vector_width: P, numbers of a class vector.
    """

    def __init__(self, widths: Sequence[int], projection: int, text_width: int, overlapping: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths[:LEVELS])
        self.queries = nn.ModuleList(nn.Linear(width, projection) for width in widths[:LEVELS])
        self.reader = Reader(projection, text_width, projection)
        self.background = None if overlapping else nn.Parameter(torch.randn(projection))
        self.vector_width = projection

    def forward(
        self, v4: Tensor, decoded: Sequence[Tensor], concepts: Tensor, apart: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """The decoder's features, coarse to fine, the rows in the common space (B, C, K, P) and what sets the classes
        apart (C, E) to class maps (B, channels, h, w, d), coarse to fine, and class vectors (B, C, P).

        Outside training the vectors' level alone is computed, and there is one map.
        """
        keys = _with_background(self.reader(concepts.mean(2), apart), self.background)
        maps, vectors = [], keys
        for n in range(LEVELS) if self.training else (POOLED,):
            places = self.queries[n](self.norms[n](decoded[n].flatten(2).transpose(1, 2)))  # (B, h*w*d, P)
            scores = (places @ keys.mT).transpose(1, 2) * (GAIN * places.shape[-1] ** -0.5)  # (B, channels, h*w*d)
            maps.append(scores.unflatten(2, decoded[n].shape[2:]))
            if n == POOLED:
                # Against the background alone: a class's vector must not depend on which others are asked for.
                known = scores.float() if self.background is None else (scores[:, 1:] - scores[:, :1]).float()
                shares = known.sigmoid()
                vectors = (shares / (shares.sum(-1, keepdim=True) + LEAST)).to(places.dtype) @ places
        return maps, vectors


class ClassEmbedding(nn.Module):
    """The class embedding of the paper, Eq. (3): an MLP scores each place of V_4 for each class; a class's scores over
    places are its vector.

    The paper flattens the class map, 27 values for a 96³ patch, which ties the model to one patch size. Here the map is
    first averaged onto a grid of 3 x 3 x 3, which changes nothing for 96³ and takes any other patch.
    """

    def __init__(self, width: int, channels: int, overlapping: bool) -> None:
        super().__init__()
        self.foreground = 0 if overlapping else 1  # the channel of the first class
        # V_4 has no bound of its own; without the norm its scores explode at large learning rates.
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, channels))
        self.vector_width = math.prod(GRID)

    def forward(
        self, v4: Tensor, decoded: Sequence[Tensor], concepts: Tensor, apart: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """V_4 (B, width, h, w, d) to one class map (B, channels, h, w, d) and class vectors (B, C, 27)."""
        scores = self.mlp(self.norm(v4.flatten(2).transpose(1, 2)))  # (B, h*w*d, channels)
        class_map = scores.transpose(1, 2).unflatten(2, v4.shape[2:])
        return [class_map], F.adaptive_avg_pool3d(class_map[:, self.foreground :], GRID).flatten(2)


def _with_background(vectors: Tensor, background: Tensor | None) -> Tensor:
    """(B, C, n) to (B, channels, n), the background's vector first if there is one."""
    if background is None:
        return vectors
    first = background.to(vectors.dtype).expand(len(vectors), 1, -1)
    return torch.cat([first, vectors], 1)
