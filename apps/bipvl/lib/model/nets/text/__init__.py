"""The text encoder: BERT in stages, and where its weights come from."""

from lib.model.nets.text.encoder import Sentences, StageDividedBert, TextAssets, TextStates
from lib.model.nets.text.sources import (
    MINILM,
    MINILM_PACKAGE,
    Origin,
    build_text,
    origin_of,
    source_of,
    weights_of,
)

__all__ = [
    "MINILM",
    "MINILM_PACKAGE",
    "Origin",
    "Sentences",
    "StageDividedBert",
    "TextAssets",
    "TextStates",
    "build_text",
    "origin_of",
    "source_of",
    "weights_of",
]
