"""BiPVL-Seg: Swin UNETR and a stage-divided BERT that fuse at every encoder stage.

    image ── stem ── stage 1 ──┐  ┌── stage 2 ──┐  ┌── stage 3 ──┐  ┌── stage 4 ──┐  ┌─ V_4 ── class embedding
                            BiFusion         BiFusion         BiFusion         BiFusion ─ decoder ── logits
    text ──────── stage 1 ─────┘  └── stage 2 ──┘  └── stage 3 ──┘  └── stage 4 ──┘  └─ rows t_k

Source: "BiPVL-Seg: Bidirectional Progressive Vision-Language Fusion with Global-Local Alignment for Medical Image
Segmentation", arXiv 2503.23534, section 3.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from lib.nets.fusion import WINDOW, BiFusion, IdentityFusion
from lib.nets.text import Sentences, StageDividedBert, TextAssets, build_text
from lib.nets.vision import STAGES, VisionBackbone, build_vision
from lib.tasks import Task

GRID = (3, 3, 3)  # of the class vectors; V_4 of a 96³ patch


class Output(NamedTuple):
    """What the network returns; `channels` counts the background where classes exclude each other.

    logits: (B, channels, H, W, D).
    class_map: (B, channels, h, w, d), the class embedding of Eq. (3) at the last stage's resolution.
    concept_rows: (B, C, K, E), the fused text rows t_k.
    concepts: (B, C, K, P), the rows in the common space of the alignment losses.
    vision: (B, C, P), one vision vector a class in that space.
    """

    logits: Tensor
    class_map: Tensor
    concept_rows: Tensor
    concepts: Tensor
    vision: Tensor


class ClassEmbedding(nn.Module):
    """The head of Eq. (3): an MLP scores each place of V_4 for each class; a class's scores over places are its vector.

    The paper flattens the class map, 27 values for a 96³ patch, which ties the model to one patch size. Here the map is
    first averaged onto a grid of 3 x 3 x 3, which changes nothing for 96³ and takes any other patch.
    """

    def __init__(self, width: int, classes: int, overlapping: bool) -> None:
        super().__init__()
        self.background = 0 if overlapping else 1
        # V_4 has no bound of its own; without the norm its scores explode at large learning rates.
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, classes + self.background)
        )

    def forward(self, v4: Tensor) -> tuple[Tensor, Tensor]:
        """V_4 (B, width, h, w, d) to the class map (B, channels, h, w, d) and class vectors (B, C, 27)."""
        scores = self.mlp(self.norm(v4.flatten(2).transpose(1, 2)))  # (B, h*w*d, channels)
        class_map = scores.transpose(1, 2).unflatten(2, v4.shape[2:])
        return class_map, F.adaptive_avg_pool3d(class_map[:, self.background :], GRID).flatten(2)


class BiPVLSeg(nn.Module):
    """The network, from finished parts.

    Args:
        vision: the vision backbone.
        text: the text encoder, holding the sentences of the C classes.
        fusion: one block a stage, (rows, map) → (rows, map).
        embedding: the class-embedding head on the last fused map.
        classes: C, foreground classes.
        channels: channels of the logits.
        projection: P, width of the common space.
    """

    def __init__(
        self,
        vision: VisionBackbone,
        text: StageDividedBert,
        fusion: nn.ModuleList,
        embedding: ClassEmbedding,
        classes: int,
        channels: int,
        projection: int,
    ) -> None:
        super().__init__()
        self.classes = classes
        self.vision = vision
        self.text = text
        self.fusion = fusion
        self.embedding = embedding
        self.head = nn.Conv3d(vision.feature_width, channels, 1)
        self.project_text = nn.Linear(text.width, projection)
        self.project_vision = nn.Linear(math.prod(GRID), projection)

    def forward(self, image: Tensor, sentences: Sentences | None = None) -> Output:
        """Segment a batch of patches.

        Args:
            image: (B, channels, H, W, D).
            sentences: text for this call in place of the task's own, from `text.tokenize`.
        """
        states = self.text.read(sentences)
        rows = states.rows.expand(image.shape[0], -1, -1)  # (B, C*K, E)
        x, early = self.vision.stem(image)
        maps = []
        for n in range(STAGES):
            x = self.vision.stage(n, x)
            if n > 0:
                rows = self.text.advance(n, rows, states)
            rows, x = self.fusion[n](rows, x)
            maps.append(x)
        logits = self.head(self.vision.decode(image, early, maps))

        class_map, vectors = self.embedding(x)
        concept_rows = rows.unflatten(1, (self.classes, -1))
        return Output(logits, class_map, concept_rows, self.project_text(concept_rows), self.project_vision(vectors))


def build_model(task: Task, assets: TextAssets | None = None) -> BiPVLSeg:
    """The network of a task, with fresh weights (and the pre-trained ones of a hub or folder text encoder).

    Args:
        task: sizes, classes and sentences.
        assets: text configuration and tokenizer of a checkpoint, so that neither hub nor folder is needed.

    Raises:
        TaskError: the text encoder cannot be loaded, or a sentence is too long for it.
    """
    spec = task.model
    own = {"heads": spec.swin_heads} if spec.vision.startswith("swin") else {}
    vision = build_vision(spec.vision, len(task.channels), task.patch, spec.feature_size, spec.checkpointing, **own)
    text = build_text(task, assets)
    fusion = nn.ModuleList()
    for width, stride in zip(vision.widths, vision.strides, strict=True):
        window = WINDOW if spec.fusion_attention == "windowed" and stride <= 4 else None
        fusion.append(BiFusion(text.width, width, window) if spec.fusion == "bifusion" else IdentityFusion())
    embedding = ClassEmbedding(vision.widths[-1], len(task.classes), task.overlapping)
    return BiPVLSeg(vision, text, fusion, embedding, len(task.classes), task.out_channels, spec.projection)
