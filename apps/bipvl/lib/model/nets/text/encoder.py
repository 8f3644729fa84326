"""Stage-divided BERT: the text encoder that BiFusion reaches into, one row per sentence.

T_n is one row per sentence, its [CLS] state. All C·K sentences pass through the layers once for a set of weights; from
stage 2 on only the rows are computed again for each image: a row attends to itself and to its own sentence's token
states of that layer, with BERT's own weights. With fusion switched off this is exactly BERT's [CLS] output.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import BertModel

from lib.tasks import Frozen, TaskError

CACHED_TEXTS = 8


@dataclass(frozen=True)
class TextAssets:
    """What rebuilds the text encoder without a hub: BERT's configuration and the tokenizer, each as JSON."""

    config: str
    tokenizer: str


@dataclass(frozen=True)
class Sentences:
    """Tokenised text of C classes: ids and mask (R, L), R = C·K rows, class by class; `key` tells texts apart.

    rows: if it is part of another text, the numbers of its rows there.
    whole: the text that it is part of; None for the task's own.
    concepts: which of the task's K concepts it has; None for all.
    """

    ids: Tensor
    mask: Tensor
    key: str
    classes: int
    rows: Tensor | None = None
    whole: Sentences | None = None
    concepts: Tensor | None = None

    def to(self, device: torch.device) -> Sentences:
        return replace(self, ids=self.ids.to(device), mask=self.mask.to(device))


@dataclass(frozen=True)
class TextStates:
    """The image-independent part of the text encoder.

    rows: (R, E), the [CLS] states after stage 1. keys, values: for each layer of stages 2-4 the tokens' projections
    (R, heads, L-1, E/heads), [CLS] left out. bias: (R, 1, L-1), 0 for a token and -inf for padding. meaning: (R, E),
    the mean of a sentence's token states before the last layer.
    """

    rows: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    bias: Tensor
    meaning: Tensor

    def select(self, rows: Tensor) -> TextStates:
        """The states of some rows."""
        keys, values = ([t[rows] for t in part] for part in (self.keys, self.values))
        return TextStates(self.rows[rows], keys, values, self.bias[rows], self.meaning[rows])

    def detached(self) -> TextStates:
        """The states as constants."""
        keys, values = ([t.detach() for t in part] for part in (self.keys, self.values))
        return TextStates(self.rows.detach(), keys, values, self.bias, self.meaning.detach())


class StageDividedBert(nn.Module):
    """BERT in four stages (of 12 layers: 1-6, 7-8, 9-10, 11-12; any other depth in the same proportions).

    Args:
        bert: the encoder, without its pooler.
        tokenizer: the tokenizer it was trained with.
        rows: C lists of K sentences.
        checkpointing: recompute activations in the backward pass.
        frozen: what of BERT never learns: `none`, `lower` (the embeddings and stage 1) or `all`. With `all` it has no
            dropout, and a text is read once for all steps.

    Attributes:
        interval: how many training steps a reading of the text lasts (`training.text_interval`).
        reference: the text that the text head sets classes apart from; None for the task's own.
        token_passes: how often all tokens went through the encoder; a counter for tests and benchmarks.
    """

    ids: Tensor
    mask: Tensor

    def __init__(
        self,
        bert: BertModel,
        tokenizer: Tokenizer,
        rows: list[list[str]],
        checkpointing: bool = False,
        frozen: Frozen = "none",
    ) -> None:
        super().__init__()
        depth = bert.config.num_hidden_layers
        self.bert = bert
        self.tokenizer = tokenizer
        self.width = bert.config.hidden_size
        self.ends = [round(depth * f) for f in (1 / 2, 2 / 3, 5 / 6, 1)]
        own = self.tokenize(rows)
        self.register_buffer("ids", own.ids, persistent=False)
        self.register_buffer("mask", own.mask, persistent=False)
        self.key, self.classes = own.key, own.classes
        self.reference: Sentences | None = None
        self.interval = 1
        self.token_passes = 0
        self._step = 0  # of training
        self._readings: dict[str, tuple[int, TextStates]] = {}  # of each text: the step it was read in, its states
        self._cache: OrderedDict[tuple, TextStates] = OrderedDict()
        self._lock = threading.Lock()  # of the cache: requests are computed in several threads
        self.checkpointing = checkpointing
        self.frozen = frozen == "all"
        layers: Any = bert.encoder.layer
        for part in {"none": [], "lower": [bert.embeddings, *layers[: self.ends[0]]], "all": [bert]}[frozen]:
            part.requires_grad_(False)

    def train(self, mode: bool = True) -> StageDividedBert:
        super().train(mode)
        if self.frozen:
            self.bert.eval()
        return self

    @property
    def sentences(self) -> Sentences:
        """The task's own text."""
        return Sentences(self.ids, self.mask, self.key, self.classes)

    def some(self, classes: Tensor, concepts: Tensor, sentences: Sentences | None = None) -> Sentences:
        """Some concepts of some classes by their numbers, of the task's own text or of another."""
        text = sentences or self.sentences
        numbers = torch.arange(len(text.ids), device=text.ids.device).unflatten(0, (text.classes, -1))
        rows = numbers[classes[:, None].to(numbers.device), concepts.to(numbers.device)].flatten()
        key = f"{text.key}:{classes.tolist()}:{concepts.tolist()}"
        some = concepts if len(concepts) < numbers.shape[1] else None
        return Sentences(text.ids[rows], text.mask[rows], key, len(classes), rows, sentences, some)

    @property
    def assets(self) -> TextAssets:
        return TextAssets(self.bert.config.to_json_string(), self.tokenizer.to_str())

    def tokenize(self, rows: list[list[str]]) -> Sentences:
        """C lists of K sentences to ids and mask (C·K, L), padded to the longest.

        Raises:
            TaskError: a sentence longer than the encoder's positions.
        """
        texts = [sentence for concepts in rows for sentence in concepts]
        encoded = self.tokenizer.encode_batch(texts)
        limit = self.bert.config.max_position_embeddings
        for text, e in zip(texts, encoded, strict=True):
            if len(e.ids) > limit:
                raise TaskError(
                    f"a text of {len(e.ids)} tokens; the text encoder takes at most {limit}: {text[:80]!r}…"
                )
        longest = max(len(e.ids) for e in encoded)
        ids = torch.full((len(texts), longest), self.bert.config.pad_token_id or 0)
        mask = torch.zeros(len(texts), longest, dtype=torch.bool)
        for i, e in enumerate(encoded):
            ids[i, : len(e.ids)] = torch.tensor(e.ids)
            mask[i, : len(e.ids)] = True
        return Sentences(ids, mask, hashlib.sha256(json.dumps(texts).encode()).hexdigest(), len(rows))

    def describe(self, rows: list[list[str]]) -> None:
        """Have other classes as the task's own from here on. What classes are set apart from stays the text of before,
        with which the weights were trained."""
        self.reference = self.reference or self.sentences
        own = self.tokenize(rows).to(self.ids.device)
        self.ids, self.mask, self.key, self.classes = own.ids, own.mask, own.key, own.classes

    def read(self, sentences: Sentences | None = None) -> TextStates:
        """Read all sentences: every token through the encoder, once. None: the task's own.

        Without gradients and outside training, or if the encoder is frozen, the result is kept until weights, text,
        device or precision change, and threads that ask for one text at once read it once. In training, with an
        `interval` above 1, a text is read with gradients once; in the next `interval` - 1 steps what was read stands in
        as a constant.
        """
        sentences = sentences or self.sentences
        if self.frozen:
            with torch.no_grad():
                return self._read_once(sentences)
        if self.training and torch.is_grad_enabled() and self.interval > 1:
            return self._read_at_intervals(sentences)
        if self.training or torch.is_grad_enabled():
            return self._read(sentences)
        return self._read_once(sentences)

    def _read_once(self, sentences: Sentences) -> TextStates:
        kind = self.ids.device.type
        key = (
            sentences.key,
            tuple(sentences.ids.shape),
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
            tuple((p.data_ptr(), p._version) for p in self.bert.parameters()),
        )
        with self._lock:
            states = self._cache.get(key)
            if states is None:
                states = self._cache[key] = self._read(sentences)
                while len(self._cache) > CACHED_TEXTS:
                    self._cache.popitem(last=False)
            return states

    def begin_epoch(self) -> None:
        """Read at the next step, so that a resumed round reads when one that ran through does."""
        self._readings.clear()

    def begin_step(self) -> None:
        """Count a training step and forget what was read `interval` steps ago. Outside training: nothing."""
        if self.training and torch.is_grad_enabled():
            self._step += 1
            recent = self._step - self.interval
            self._readings = {key: kept for key, kept in self._readings.items() if kept[0] > recent}

    def lasts(self, sentences: Sentences) -> bool:
        """Whether what was read of a text still stands in at the next training step."""
        return sentences.key in self._readings and self._readings[sentences.key][0] > self._step + 1 - self.interval

    def _read_at_intervals(self, sentences: Sentences) -> TextStates:
        if sentences.key in self._readings:
            return self._readings[sentences.key][1]
        states = self._read(sentences)
        self._readings[sentences.key] = self._step, states.detached()
        return states

    def _read(self, sentences: Sentences) -> TextStates:
        self.token_passes += 1
        sentences = sentences.to(self.ids.device)
        layers: Any = self.bert.encoder.layer
        bias = torch.zeros(sentences.mask.shape, device=self.ids.device).masked_fill(~sentences.mask, -torch.inf)
        bias = bias[:, None, None, :]  # (R, 1, 1, L)
        places = sentences.mask.flatten().nonzero()[:, 0]
        x = self.bert.embeddings(input_ids=sentences.ids).flatten(0, 1)[places]
        rows, keys, values = x.new_zeros(0), [], []
        for i, layer in enumerate(layers):
            if i == self.ends[0]:
                rows = self._padded(x, sentences.mask, places)[:, 0]
            if i == len(layers) - 1:  # nothing reads the tokens after the last layer
                k, v = self._keys_values(layer, x, sentences.mask, places)
            elif self.checkpointing and self.training:
                x, k, v = checkpoint(self._layer, layer, x, sentences.mask, places, bias, use_reentrant=False)
            else:
                x, k, v = self._layer(layer, x, sentences.mask, places, bias)
            if i >= self.ends[0]:
                keys.append(k[:, :, 1:])
                values.append(v[:, :, 1:])
        meaning = self._padded(x, sentences.mask, places).sum(1) / sentences.mask.sum(1, keepdim=True)
        return TextStates(rows, keys, values, bias[:, 0, :, 1:], meaning)

    def _layer(
        self, layer: Any, x: Tensor, mask: Tensor, places: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One layer of BERT on tokens without padding, x (tokens, E), a quarter fewer than with it: only attention sees
        sentences side by side. Returns x after the layer, and its keys and values (R, heads, L, E/heads)."""
        attention = layer.attention.self
        q = self._split(self._padded(attention.query(x), mask, places), attention)
        k, v = self._keys_values(layer, x, mask, places)
        dropout = attention.dropout.p if attention.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), dropout)
        x = layer.attention.output(mixed.transpose(1, 2).flatten(2).flatten(0, 1)[places], x)
        return layer.output(layer.intermediate(x), x), k, v

    def _keys_values(self, layer: Any, x: Tensor, mask: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        attention = layer.attention.self
        k, v = (self._padded(f(x), mask, places) for f in (attention.key, attention.value))
        return self._split(k, attention), self._split(v, attention)

    @staticmethod
    def _padded(x: Tensor, mask: Tensor, places: Tensor) -> Tensor:
        """(tokens, E) to (R, L, E), zeros where the mask (R, L) has padding."""
        return x.new_zeros(mask.numel(), x.shape[-1]).index_copy(0, places, x).unflatten(0, mask.shape)

    def advance(self, n: int, rows: Tensor, states: TextStates) -> Tensor:
        """Take the rows (B, R, E) through stage n (1, 2, 3; stage 0 is part of `read`)."""
        for i in range(self.ends[n - 1], self.ends[n]):
            layer: Any = self.bert.encoder.layer[i]
            rows = self._attend(layer, rows, states, i - self.ends[0])
            rows = layer.output(layer.intermediate(rows), rows)
        return rows

    def _attend(self, layer: Any, rows: Tensor, states: TextStates, i: int) -> Tensor:
        """Attention of each row to itself and to its own sentence's tokens; b batch, r row, h head, l token."""
        attention = layer.attention.self
        heads, width = attention.num_attention_heads, attention.attention_head_size
        q, k, v = (f(rows).unflatten(2, (heads, width)) for f in (attention.query, attention.key, attention.value))
        own = (q * k).sum(-1, keepdim=True)  # (B, R, heads, 1)
        others = torch.einsum("brhd,rhld->brhl", q, states.keys[i].to(q.dtype))
        scores = torch.cat([own, others], -1).float() * width**-0.5
        scores = torch.cat([scores[..., :1], scores[..., 1:] + states.bias], -1)
        p = F.dropout(scores.softmax(-1), attention.dropout.p, attention.training).to(v.dtype)
        mixed = p[..., :1] * v + torch.einsum("brhl,rhld->brhd", p[..., 1:], states.values[i].to(v.dtype))
        return layer.attention.output(mixed.flatten(2), rows)

    @staticmethod
    def _split(x: Tensor, attention: Any) -> Tensor:
        """(R, L, E) to (R, heads, L, E/heads)."""
        return x.unflatten(2, (attention.num_attention_heads, attention.attention_head_size)).transpose(1, 2)
