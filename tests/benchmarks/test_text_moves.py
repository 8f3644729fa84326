"""What the text moves, after a real training: masks follow their sentences with the text head, and only with it."""

import doctest
from typing import Any

import pytest
import torch

from benchmarks.text import laterality
from benchmarks.text import moves as text_moves
from lib.model.nets import build_model
from lib.tasks import wording
from lib.trainers.objective import TrainingNetwork


@pytest.mark.slow
@pytest.mark.parametrize("head", ["text", "fixed"])
def test_left_and_right_exchanged_in_the_sentences(head):
    """Two equal nodes, one per side; their sentences differ in "left" and "right" alone."""
    task = laterality.task(head)
    model = laterality.train(task, 100, seed=0)
    image, label = laterality.draw(8, torch.Generator().manual_seed(99))
    found = text_moves.moves(task, text_moves.patches(model, image), label[:, 0].long())
    assert min(found["dice"].values()) > 0.85, "trained"
    requests = {r["request"]: r["classes"] for r in found["requests"]}
    for moved in requests["left and right exchanged"].values():
        if head == "text":
            assert moved["follows"] > 0.95
            assert moved["stays"] < 0.05
        else:
            assert moved["stays"] > 0.95
    left = requests["left node described as right node"]["left node"]
    assert left["follows"] > 0.5 if head == "text" else left["stays"] > 0.95


def test_what_is_recorded_of_a_request():
    """A stand-in for the network whose mask of a class is where its first sentence says."""
    task = laterality.task("text")
    label = torch.tensor([1, 1, 2, 2, 0, 0])

    def run(asked, rows):
        found = torch.zeros(6, dtype=torch.long)
        for number, sentences in enumerate(rows, 1):
            found[slice(0, 2) if "left" in sentences[0] else slice(2, 4)] = number
        return found

    found = text_moves.moves(task, run, label)
    assert found["dice"] == {"left node": 1.0, "right node": 1.0}
    requests = {r["request"]: r for r in found["requests"]}
    words = requests["left and right exchanged"]
    assert words["words"] == 8, "one in the class, two in the location, one in the contour, for each of two"
    assert words["classes"]["left node"] == {"stays": 0.0, "follows": 1.0, "to": "right node"}
    alone = requests["left node described as right node"]["classes"]
    assert alone["left node"] == {"stays": 0.0, "follows": 1.0, "to": "right node"}
    assert alone["right node"]["stays"] == 0.0, "it was not asked for"
    lines = text_moves.table([{"head": "text", "wording": "sides", **found}]).splitlines()
    assert "| left and right exchanged | left node | 0.00 | 1.00 |" in lines
    assert len({line.count("|") for line in lines}) == 1


def test_words_are_exchanged_whole_and_in_their_case():
    assert doctest.testmod(wording).failed == 0
    assert wording.exchanged("thin, thinner; Thick", "thick", "thin") == "thick, thinner; Thin"
    assert wording.exchanged_rows([["left"], ["right"]], "left", "right") == [["right"], ["left"]]


def test_mirrored_steps_mirror_patient_and_words(monkeypatch):
    task = laterality.task("text", mirror=1.0, drop_classes=0.0)
    network = TrainingNetwork(build_model(task), task).train()
    image, label = laterality.draw(1, torch.Generator().manual_seed(0))
    seen: dict[str, Any] = {}

    def forward(self, image, sentences=None):
        seen.update(image=image, ids=sentences.ids)
        raise InterruptedError

    monkeypatch.setattr(type(network.model), "forward", forward)
    with pytest.raises(InterruptedError):
        network(image, label)
    assert torch.equal(seen["image"], image.flip(2))
    own = network.model.text.ids.unflatten(0, (2, 6))
    assert torch.equal(seen["ids"].unflatten(0, (2, 6)), own.flip(0)), "here the twins' sentences change places"
