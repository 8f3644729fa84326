"""The benchmarks of explanation, of classes that join and of one network for two tasks: cases to derive by hand."""

import pytest
import torch
from monai.data import MetaTensor

from benchmarks.accuracy.data import Patches  # noqa: E402
from benchmarks.text import explanation, injected, new_class, two_tasks
from lib.model import checkpoints
from lib.model.nets import build_model
from support.helpers import tiny_task

MM3 = (3.0, 3.0, 4.0)


def organ():
    """A mask of 2 x 1 x 1 voxels and an image that is 7 and 8 there, and elsewhere the number of its row."""
    mask = torch.zeros(12, 9, 3, dtype=torch.bool)
    mask[4:6, 4, 1] = True
    image = torch.arange(12.0).view(12, 1, 1).repeat(1, 9, 3)
    image[4:6, 4, 1] = torch.tensor([70.0, 80.0])
    return mask, image[None]


def injection(mask, kind, number=0):
    return [e for e in injected.errors(mask, MM3) if e.kind == kind][number]


def test_auroc():
    assert explanation.auroc([3, 2], [1, 2]) == 3.5 / 4
    assert explanation.auroc([1, 1], [1, 1, 1]) == 0.5
    assert explanation.auroc([2], [1, 0]) == 1


def test_kinds_of_errors():
    mask, _ = organ()
    kinds = [e.kind for e in injected.errors(mask, MM3)]
    assert len(kinds) == 17
    assert set(explanation.IN_IMAGES) < set(kinds)
    assert torch.equal(injection(mask, "shift 6 mm").mask, mask.roll(2, 0))
    assert torch.equal(injection(mask, "shift 15 mm").mask.nonzero(), torch.tensor([[9, 4, 1], [10, 4, 1]]))
    grown = injection(mask, "growth 3 mm").mask
    assert grown.sum() == 2 + 6  # one voxel on each side in the slice, and none above or below
    assert torch.equal(injection(mask, "mirror in image").mask, mask.flip(0))
    assert torch.equal(injection(mask, "mirror in box").mask, mask)


def test_an_image_shows_the_error():
    mask, image = organ()
    moved = injected.painted(image, mask, injection(mask, "shift 9 mm"), MM3)[0]
    assert moved[7:9, 4, 1].tolist() == [70, 80]
    assert moved[4:6, 4, 1].max() < 12, "what surrounded it lies where it was"
    mirrored = injected.painted(image, mask, injection(mask, "mirror in box"), MM3)[0]
    assert mirrored[4:6, 4, 1].tolist() == [80, 70]
    grown = injected.painted(image, mask, injection(mask, "growth 3 mm"), MM3)[0]
    assert grown[3:7, 4, 1].tolist() == [70, 70, 80, 80]


def test_summary_by_kind_and_class():
    entries = {
        "": [{"class": 1, "overlap": 1, "s": 0.9}, {"class": 2, "overlap": 1, "s": 0.5}],
        "a": [{"class": 1, "overlap": 0.5, "s": 0.6}, {"class": 2, "overlap": 0.7, "s": 0.4}],
    }
    found = explanation.summed(entries)
    assert found["errors"] == {"a": {"n": 2, "dice": 0.6}}
    assert found["methods"]["s"] == {"all": 0.75, "within": 1.0, "a": 0.75}


@pytest.mark.parametrize("head", ["text", "fixed"])
def test_a_class_joins_and_the_others_stay(head):
    task = tiny_task(model={"head": head})
    new = task.classes[1]
    old = task.only([name for name in task.classes if name != new])
    torch.manual_seed(0)
    base = build_model(old).eval()
    model = new_class.joined(checkpoints.checkpoint_of(base, old, {}), task).eval()
    image = torch.randn(1, 1, *task.patch)
    with torch.no_grad():
        before, after = base(image).logits, model(image).logits
    assert after.shape[1] == 1 + len(task.classes)
    if head == "fixed":
        weights, theirs = (made.state_dict()["head.weight"] for made in (model, base))
        assert torch.equal(weights[[0, 1, 3]], theirs)
        assert not torch.equal(weights[2], theirs[1])
    else:
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True))
    assert before.shape[1] == 3


def test_half_of_a_round_are_cases_in_which_the_new_class_was_not_drawn():
    task = tiny_task()
    cases = [{"id": i, "label": torch.tensor([0, 1, 2, 3])} for i in range(8)]
    found = new_class.joint(cases[:2], cases[2:], task, "spleen")
    drawn, before = found[:6], found[6:]
    assert [c["id"] for c in drawn] == [0, 1] * 3
    assert [c["id"] for c in before] == [2, 3, 4, 5, 6, 7]
    assert all(c["label"].tolist() == [0, 1, 2, 3] and c["annotated"].tolist() == [True] * 3 for c in drawn)
    assert all(c["label"].tolist() == [0, 1, 0, 3] and c["annotated"].tolist() == [True, False, True] for c in before)
    assert [c["id"] for c in new_class.joint(cases[:2], [], task, "spleen")] == [0, 1]


def test_labels_without_a_class():
    task = tiny_task()
    old = task.only(task.classes[1:])
    assert new_class.without(torch.tensor([0, 1, 2, 3]), task, old).tolist() == [0, 0, 1, 2]


def volume(task, **more):
    label = (torch.arange(task.patch[0]) % (1 + len(task.classes)))[:, None, None].expand(task.patch)[None].clone()
    return {"image": MetaTensor(torch.rand(1, *task.patch)), "label": MetaTensor(label), **more}


def test_patches_say_what_their_labels_were_drawn_for():
    task = tiny_task()
    known = torch.tensor([True, False, True])
    image, label, annotated = Patches(task, [volume(task, annotated=known)], 1, 0)[0]
    assert len(image) == len(label) == task.training.patches_per_case
    assert annotated.tolist() == [known.tolist()] * len(image)
    assert len(Patches(task, [volume(task)], 1, 0)[0]) == 2


def test_two_tasks_share_every_weight(tmp_path):
    """Each task's checkpoint has the same weights and answers for its own classes."""
    first = tiny_task(model={"head": "text"})
    second = first.only(first.classes[1:]).model_copy(update={"name": "other"})
    files = [tmp_path / "first.pt", tmp_path / "second.pt"]
    two_tasks.learn([first, second], [[volume(first)], [volume(second)]], 1, 0, files)
    restored = [checkpoints.restore_model(checkpoints.load(file), file) for file in files]
    assert [task.name for _, task in restored] == ["tiny", "other"]
    (one, _), (other, _) = restored
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    image = torch.rand(1, 1, *first.patch)
    with torch.no_grad():
        assert [model.eval()(image).logits.shape[1] for model, _ in restored] == [4, 3]
