"""Revisions on disk, the comparison of two masks, and the map: by hand."""

import base64
import gzip
import json
import threading

import numpy as np
import pytest
import torch

from lib.infers.explain import concept_map
from lib.infers.explain import trial as concept_trial
from lib.model.nets import build_model
from lib.model.tokens import check_text
from lib.tasks import TaskError
from lib.tasks.revisions import Conflict, Revisions, newest_text, with_wordings
from support.helpers import concepts, label, tiny_task


@pytest.fixture
def task():
    return tiny_task()


@pytest.fixture
def revisions(task, tmp_path):
    return Revisions(task, tmp_path)


def other(task, shape="Another shape altogether."):
    return task.with_concepts({"liver": {"shape": shape}})


# Revisions ------------------------------------------------------------------------------------------------------------


def test_the_newest_revision_is_what_a_round_reads(task, revisions, tmp_path):
    assert newest_text(task, tmp_path) == task
    assert [revisions.save(other(task, f"Shape {n}."), n, "ada", "why") for n in (0, 1)] == [1, 2]
    assert newest_text(task, tmp_path).concepts.classes["liver"].sentences["shape"] == "Shape 1."
    assert revisions.text(1).concepts.classes["liver"].sentences["shape"] == "Shape 0."
    assert revisions.text(0) == task
    newest, first, file = revisions.history()
    assert [entry["number"] for entry in (newest, first, file)] == [2, 1, 0]
    assert (newest["who"], newest["note"], newest["base"]) == ("ada", "why", 1) and newest["time"]
    assert file["hash"] == task.concepts.hash == newest["file"]


def test_what_is_based_on_an_older_text_or_changes_nothing_is_refused(task, revisions):
    revisions.save(other(task), 0, "ada", "")
    with pytest.raises(Conflict, match="revision 1 was saved in the meantime, and yours is made from revision 0"):
        revisions.save(other(task, "A third."), 0, "rob", "")
    with pytest.raises(TaskError, match="nothing to save: the text is that of revision 1"):
        revisions.save(other(task), 1, "rob", "")
    with pytest.raises(TaskError, match="note: one line"):
        revisions.save(other(task, "A third."), 1, "rob", "two\nlines")
    assert revisions.numbers() == [1]
    assert revisions.save(task, 1, "rob", "back") == 2, "the file's text can be restored"


def test_of_many_who_save_at_once_one_wins(task, revisions):
    results = []

    def save(n):
        try:
            results.append(revisions.save(other(task, f"Shape {n}."), 0, f"person {n}", ""))
        except Conflict:
            results.append(None)

    threads = [threading.Thread(target=save, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results, key=str) == [1] + [None] * 7


def test_a_damaged_revision_stops_rounds_until_another_is_saved(task, revisions, tmp_path):
    revisions.save(other(task), 0, "ada", "")
    file = tmp_path / "concepts" / "r0001.json"
    file.write_text(file.read_text()[:200])
    with pytest.raises(TaskError, match="r0001.json: damaged: .* restore it from a backup"):
        newest_text(task, tmp_path)
    assert "damaged" in revisions.history()[0]
    assert revisions.save(task, 1, "rob", "") == 2
    assert newest_text(task, tmp_path).concepts == task.concepts


def test_a_class_that_came_or_went_since(task, revisions, tmp_path):
    signed = other(task).concepts.model_dump() | {
        "review": {"status": "reviewed", "by": "Dr. N. N.", "date": "2026-01-31"}
    }
    revisions.save(tiny_task(concepts=signed), 0, "ada", "")
    names = ("liver", "aorta", "stomach")
    labels = {name: label(value) for value, name in enumerate(names, 1)}
    grown = tiny_task(labels=labels, concepts=concepts(list(names), "CT"))
    text = newest_text(grown, tmp_path)
    assert text.classes == names
    assert text.concepts.classes["liver"].sentences["shape"] == "Another shape altogether."
    assert text.concepts.classes["stomach"] == grown.concepts.classes["stomach"]
    assert text.concepts.review.status == "unreviewed", "nobody has read the new class"
    assert newest_text(task, tmp_path).concepts.review.status == "reviewed"


def test_tokens_are_counted_by_the_encoder_that_will_read_them(task):
    """64 tokens fit into this one: a definition of six short sentences does, of six long ones not."""
    assert not [p for p in check_text(task) if p.fatal]
    long = {"liver": dict.fromkeys(("shape", "contour"), " ".join(["wide"] * 40))}
    found = [(p.class_name, p.attribute) for p in check_text(task.with_concepts(long)) if p.fatal]
    assert found == [("liver", "definition")]


# Wordings -------------------------------------------------------------------------------------------------------------

WAYS = {"liver": {"shape": ["One way.", "Another way."], "contour": ["Way 1.", "Way 2.", "Way 3."]}}


def test_wordings_are_replaced_and_removed_attribute_by_attribute(task):
    text = with_wordings(task, {"Liver": {"shape": [" One way. ", "Another way."]}, "spleen": {}})
    assert text.concepts.classes["liver"].variants == {"shape": ("One way.", "Another way.")}
    assert with_wordings(text, WAYS).concepts.classes["liver"].variants == {
        a: tuple(w) for a, w in WAYS["liver"].items()
    }
    assert with_wordings(text, {"liver": {"shape": [], "contour": []}}) == task
    assert with_wordings(task, {}) == task


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ({"heart": {}}, "variants: unknown class 'heart'; valid are liver"),
        ({"liver": {"size": ["Large.", "Big."]}}, "variants.liver: unknown attribute 'size'; valid are class, shape"),
        ({"liver": {"size": []}}, "variants.liver: unknown attribute 'size'"),
        ({"liver": {"shape": ["One."]}}, "variants.liver: shape: one wording; at least 2 are needed"),
        ({"liver": {"shape": ["One.", "  "]}}, "variants.liver: shape: wording 2 is empty"),
        ({"liver": {"shape": ["One.", "A <b>."]}}, "variants.liver.shape: .* plain text; found '<' in wording 2"),
        ({"liver": {"shape": [f"{n}." for n in range(21)]}}, "variants.liver.shape: 21 wordings; .* at most 20"),
    ],
)
def test_wordings_that_cannot_be_used(task, override, reason):
    with pytest.raises(TaskError, match=reason):
        with_wordings(task, override)
    assert with_wordings(task, {"liver": {"shape": [f"{n}." for n in range(20)]}}) != task


def test_revisions_keep_wordings_and_tell_when_those_of_the_file_change(task, revisions, tmp_path):
    assert revisions.save(with_wordings(task, WAYS), 0, "ada", "other words only") == 1
    with pytest.raises(TaskError, match="nothing to save"):
        revisions.save(with_wordings(task, WAYS), 1, "ada", "")
    assert newest_text(task, tmp_path).concepts.classes["liver"].variants["shape"] == ("One way.", "Another way.")
    assert revisions.history()[0]["hash"] == task.concepts.hash and not revisions.file_changed
    for changed in (with_wordings(task, WAYS), other(task)):
        assert Revisions(changed, tmp_path).file_changed
    assert Revisions(with_wordings(task, WAYS), tmp_path).save(task, 1, "ada", "") == 2
    assert revisions.file_changed and not Revisions(with_wordings(task, WAYS), tmp_path).file_changed


# Two masks ------------------------------------------------------------------------------------------------------------


def test_scores_of_two_masks(task):
    before, after = np.zeros((4, 4, 4), int), np.zeros((4, 4, 4), int)
    before[0, 0, :4], after[0, 0, 2:] = 1, 1  # the liver: 4 and 2 voxels, 2 in both
    before[1], after[2] = 2, 2  # the spleen: 16 and 16 elsewhere
    liver, spleen, aorta = concept_trial.scores(task, before, after)
    assert liver == {"name": "liver", "dice": pytest.approx(4 / 6), "before": 4, "after": 2, "changed": 2}
    assert spleen == {"name": "spleen", "dice": 0.0, "before": 16, "after": 16, "changed": 32}
    assert aorta == {"name": "aorta", "dice": None, "before": 0, "after": 0, "changed": 0}


def test_volumes_are_thinned_where_they_are_large(task):
    grey = np.zeros((600, 4, 5))
    grey[300] = 1
    mask = np.zeros(grey.shape, int)
    mask[300:303] = 3
    found = concept_trial.volumes(task, grey, np.array([0.5, 1, 2]), {"before": mask})
    assert (found["shape"], found["step"], found["spacing"]) == ([200, 4, 5], [3, 1, 1], [1.5, 1.0, 2.0])
    shown = np.frombuffer(gzip.decompress(base64.b64decode(found["before"])), np.uint8).reshape(200, 4, 5)
    assert np.array_equal(np.unique(np.nonzero(shown)[0]), [100]) and shown.max() == 3
    shown = np.frombuffer(gzip.decompress(base64.b64decode(found["grey"])), np.uint8).reshape(200, 4, 5)
    assert (shown[100] == 255).all() and shown.sum() == 255 * 20


def test_masks_of_a_failed_request_are_removed(task, tmp_path):
    made = []

    def infer(options):
        if options:
            raise TaskError("refused")
        made.append(tmp_path / "mask.nii.gz")
        made[0].write_bytes(b"x")
        return {"file": str(made[0]), "params": {}}

    with pytest.raises(TaskError):
        concept_trial.compare(task, tmp_path / "image.nii.gz", infer, {"liver": {"shape": "x"}})
    assert made and not made[0].exists()


# The map --------------------------------------------------------------------------------------------------------------


def test_cosines_within_and_between_classes():
    """Two classes at a right angle, whose two sentences are equal in one and opposed in the other."""
    vectors = torch.tensor([[[1.0, 0], [1, 0]], [[0, 1.0], [0, -1]]])
    found = concept_map.describe(vectors)
    assert (found["within"], found["between"]) == (0.0, 0.0)
    assert np.array(found["points"]).shape == (2, 2, 2)


def test_groups_lie_apart_and_one_vector_is_one_point():
    torch.manual_seed(0)
    centres = torch.eye(3)[:, None].expand(3, 6, 3)
    found = concept_map.describe(torch.nn.functional.normalize(centres + 0.01 * torch.randn(3, 6, 3), dim=-1))
    points = np.array(found["points"])
    inside = max(np.linalg.norm(own - own.mean(0), axis=-1).max() for own in points)
    middles = points.mean(1)
    apart = min(np.linalg.norm(middles[i] - middles[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert apart > 2 * inside
    assert found["within"] > 0.99 and found["between"] < 0.1
    same = concept_map.describe(torch.tensor([1.0, 0, 0]).expand(3, 6, 3))
    assert not np.any(same["points"]) and same["between"] == 1.0


def test_embeddings_are_those_that_the_losses_see(task):
    model = build_model(task).eval()
    image = torch.rand(1, 70, 20, 33)
    found = concept_map.embeddings(model, task, image)
    assert found.shape == (3, 6, 16)
    assert torch.allclose(found.norm(dim=-1), torch.ones(3, 6), atol=1e-5)
    with torch.no_grad():
        patch = concept_map.middle(image, task.patch)[None]
        own = model(patch).concepts[0]
    assert torch.allclose(found, torch.nn.functional.normalize(own, dim=-1), atol=1e-6)
    changed = concept_map.embeddings(model, other(task), image)
    assert not torch.allclose(changed[0, 1], found[0, 1], atol=1e-3)


def test_the_patch_in_the_middle():
    image = torch.arange(4.0)[None, :, None, None].expand(1, 4, 6, 1)
    found = concept_map.middle(image, (2, 4, 3))
    assert found.shape == (1, 2, 4, 3)
    assert found[0, :, :, 1].unique(dim=1).flatten().tolist() == [1.0, 2.0] and not found[..., [0, 2]].any()


def test_the_untrained_network_leaves_random_numbers_alone(task):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    assets = build_model(task).text.assets
    torch.manual_seed(7)
    first, second = (concept_map.untrained(task, assets) for _ in range(2))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first.project_text.weight, second.project_text.weight)
    assert json.loads(first.text.assets.config) == json.loads(assets.config)
