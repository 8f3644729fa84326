"""BiPVL-Seg: Swin UNETR and a stage-divided BERT that fuse at every encoder stage.

    image ── stem ── stage 1 ──┐  ┌── stage 2 ──┐  ┌── stage 3 ──┐  ┌── stage 4 ──┐  ┌─ V_4 ── class embedding
                            BiFusion         BiFusion         BiFusion         BiFusion ─ decoder ── logits
    text ──────── stage 1 ─────┘  └── stage 2 ──┘  └── stage 3 ──┘  └── stage 4 ──┘  └─ rows t_k

Source: "BiPVL-Seg: Bidirectional Progressive Vision-Language Fusion with Global-Local Alignment for Medical Image
Segmentation", arXiv 2503.23534, section 3. The heads: `lib.model.nets.heads`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from lib.model.alignment import aggregate_text, concept_weights
from lib.model.nets.fusion import WINDOW, BiFusion, IdentityFusion
from lib.model.nets.heads import LEVELS, ClassEmbedding, ClassPyramid, FixedHead, TextHead, distinction
from lib.model.nets.pretrained import load_vision_weights
from lib.model.nets.text import Sentences, StageDividedBert, TextAssets, TextStates, build_text
from lib.model.nets.vision import STAGES, VisionBackbone, build_vision
from lib.tasks import Task


class Output(NamedTuple):
    """What the network returns; `channels` counts the background if classes exclude each other.

    logits: (B, channels, H, W, D).
    class_maps: (B, channels, h, w, d) each, coarse to fine: scores of places for classes (`lib.model.nets.heads`).
    concept_rows: (B, C, K, E), the fused text rows t_k.
    concepts: (B, C, K, P), the rows in the common space of the alignment losses.
    vision: (B, C, P), one vision vector per class in that space.
    weights: (B, C, K), w_k of Eq. (4), how much each concept carries its class.
    text: (B, C, P), T of Eq. (4), one text vector per class.
    features: (B, width, H, W, D), of the decoder: what the head reads.
    """

    logits: Tensor
    class_maps: list[Tensor]
    concept_rows: Tensor
    concepts: Tensor
    vision: Tensor
    weights: Tensor
    text: Tensor
    features: Tensor | None = None


class BiPVLSeg(nn.Module):
    """The network, from finished parts.

    Args:
        vision: the vision backbone.
        text: the text encoder, holding the sentences of the C classes.
        fusion: one block per stage, (rows, map) → (rows, map).
        embedding: what each class looks like in the image; of the decoder, or of the last fused map (paper).
        head: from the decoder's features to logits; fixed or reading.
        projection: P, width of the common space.
    """

    def __init__(
        self,
        vision: VisionBackbone,
        text: StageDividedBert,
        fusion: nn.ModuleList,
        embedding: ClassPyramid | ClassEmbedding,
        head: FixedHead | TextHead,
        projection: int,
    ) -> None:
        super().__init__()
        self.vision = vision
        self.text = text
        self.fusion = fusion
        self.embedding = embedding
        self.head = head
        self.project_text = nn.Linear(text.width, projection)
        self.project_vision = nn.Linear(embedding.vector_width, projection)

    def forward(self, image: Tensor, sentences: Sentences | None = None) -> Output:
        """Segment a batch of patches.

        Args:
            image: (B, channels, H, W, D).
            sentences: text for this call in place of the task's own, from `text.tokenize`. With the text head it may
                describe other classes, and any number of them.
        """
        classes = sentences.classes if sentences else self.text.classes
        states, apart = self.read(sentences)
        rows = states.rows.expand(image.shape[0], -1, -1)  # (B, C*K, E)
        x, early = self.vision.stem(image)
        maps = []
        for n in range(STAGES):
            x = self.vision.stage(n, x)
            if n > 0:
                rows = self.text.advance(n, rows, states)
            rows, x = self.fusion[n](rows, x)
            maps.append(x)
        decoded = self.vision.decode(image, early, maps)

        concept_rows = rows.unflatten(1, (classes, -1))
        concepts = self.project_text(concept_rows)
        class_maps, vectors = self.embedding(x, decoded, concepts, apart)
        seen = self.project_vision(vectors)
        weights = concept_weights(concepts, seen)
        text = aggregate_text(concepts, weights)
        features = decoded[-1]
        logits = self.head(features, text, apart)
        return Output(logits, class_maps, concept_rows, concepts, seen, weights, text, features)

    def read(self, sentences: Sentences | None) -> tuple[TextStates, Tensor]:
        """The sentences, None for the task's own, and D (C, E), what sets their classes apart."""
        text = self.text
        classes = sentences.classes if sentences else text.classes
        if isinstance(self.head, FixedHead):
            assert classes == text.classes, f"{classes} classes for a head of {text.classes}"
        text.begin_step()
        reference = text.read(text.reference)
        if sentences is None and text.reference is None:
            states = reference
        elif (
            sentences is not None
            and sentences.rows is not None
            and (sentences.whole is None or text.interval > 1 or text.frozen)
        ):
            # Of the task's own text, which is read anyway; or of one that stands in for the parts of later steps too.
            own = sentences.whole is None and text.reference is None
            states = (reference if own else text.read(sentences.whole)).select(sentences.rows)
        else:
            states = text.read(sentences)
        own = reference.meaning.unflatten(0, (text.reference.classes if text.reference else text.classes, -1))
        concepts = sentences.concepts if sentences else None
        return states, distinction(states.meaning.unflatten(0, (classes, -1)), own, concepts)


def build_model(task: Task, assets: TextAssets | None = None, fresh: bool | None = None) -> BiPVLSeg:
    """The network of a task, with fresh weights, and the pre-trained ones that it names: of a text encoder from a hub,
    a folder or a package, and of `model.vision_weights`.

    Args:
        task: sizes, classes and sentences.
        assets: text configuration and tokenizer of a checkpoint, so that neither hub nor folder is needed.
        fresh: whether the vision network starts from `model.vision_weights`. By default it does without assets: with
            them the weights of a checkpoint follow.

    Raises:
        TaskError: the text encoder or the vision weights cannot be loaded, or a sentence is too long for the encoder.
    """
    spec = task.model
    vision = build_vision(task)
    text = build_text(task, assets)
    fusion = nn.ModuleList()
    for n, (width, stride) in enumerate(zip(vision.widths, vision.strides, strict=True)):
        fused = spec.fusion == "bifusion" or (spec.fusion == "late" and n == STAGES - 1)
        window = WINDOW if spec.fusion_attention == "windowed" and stride <= 4 else None
        fusion.append(BiFusion(text.width, width, window) if fused else IdentityFusion())
    embedding: ClassPyramid | ClassEmbedding
    if spec.class_embedding == "decoder":
        embedding = ClassPyramid(vision.decoder_widths[:LEVELS], spec.projection, text.width, task.overlapping)
    else:
        embedding = ClassEmbedding(vision.widths[-1], task.out_channels, task.overlapping)
    head: FixedHead | TextHead
    if spec.head == "text":
        plain = spec.head_text == "plain"
        head = TextHead(vision.feature_width, spec.projection, text.width, task.overlapping, plain)
    else:
        head = FixedHead(vision.feature_width, task.out_channels)
    if fresh or (fresh is None and assets is None):
        load_vision_weights(vision, task)
    return BiPVLSeg(vision, text, fusion, embedding, head, spec.projection)
