"""The second stage of a shipped model: a head that reads D alone, and learns more words on features that stay."""

import pytest
import torch

from benchmarks.text.second_stage import plain, teach
from lib.model.nets import build_model
from lib.tasks import ATTRIBUTES
from support.helpers import concepts, tiny_task

PATCH = (64, 32, 32)


def task_for(head_text):
    said = concepts(["liver", "spleen", "aorta"], "CT")
    for name, text in said["classes"].items():
        text["variants"] = {a: [f"{a} of {name} again", f"{a} of {name} aside"] for a in ATTRIBUTES}
    model = {"text": "minilm", "text_frozen": "all", "vision": "unet", "feature_size": 4, "head_text": head_text}
    return tiny_task(patch=PATCH, model=model, training={"absent": 0.5, "drop_concepts": 0.5}, concepts=said)


@pytest.fixture(scope="module")
def stage():
    """A fused network, the plain one made of it, and an image."""
    torch.manual_seed(0)
    fused, image = build_model(task_for("fused")).eval(), torch.rand(1, 1, *PATCH)
    with torch.no_grad():
        fused.get_parameter("head.reader.apart.weight").normal_(std=0.1)
    return fused, plain(fused, task_for("plain"), [image]), image


def test_a_plain_head_starts_with_the_mean_of_t(stage):
    """Where all classes have the same T, both heads draw the same."""
    fused, made, image = stage
    with torch.no_grad():
        output = fused(image)
        apart = torch.randn(3, 384)
        same = output.text.mean((0, 1)).expand_as(output.text)
        expected = fused.head(output.features, same, apart)
        found = made.head(output.features, torch.randn_like(same), apart)
        torch.testing.assert_close(made(image).features, output.features)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_only_the_head_learns_and_its_loss_falls(stage, capsys):
    _, made, image = stage
    label = torch.zeros(1, 1, *PATCH)
    label[..., :32, :, :] = 1
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    teach(made, task_for("plain"), [(image, label)] * 100, 0)  # its loss is printed twice
    changed = {name for name, tensor in made.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.startswith("head.") for name in changed)
    first, last = (float(line.split(":")[-1].strip(" }")) for line in capsys.readouterr().out.splitlines())
    assert last < first
