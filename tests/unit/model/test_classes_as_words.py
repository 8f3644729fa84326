"""With the text head a version answers for the classes that its task has by now, and for those that a request names."""

import numpy as np
import pytest
import torch

from lib.infers import BiPVLInfer
from lib.model import versions
from lib.model.nets import build_model
from lib.model.predict import predict
from lib.model.versions import CheckpointError
from lib.tasks import task_from_dict
from lib.trainers.judging import _served
from support.helpers import ORGANS, concepts, label, read_nifti, tiny_overlapping_task, tiny_task, write_nifti

PATCH = (48, 48, 48)


def task_of(names=tuple(ORGANS), head="text", **changes):
    text = concepts(list(ORGANS), "CT")
    text["classes"] = {n: text["classes"][n] for n in names}
    labels = {n: label(ORGANS[n][1], ORGANS[n][0]) for n in names}
    model = {"vision": "unet", "feature_size": 4, "head": head}
    return tiny_task(labels=labels, concepts=text, patch=PATCH, model=model, **changes)


def checkpoint(task, seed=0):
    torch.manual_seed(seed)
    return versions.checkpoint_of(build_model(task), task, {"task": task.name})


@pytest.fixture
def image(tmp_path):
    return write_nifti(tmp_path / "image.nii.gz", np.random.default_rng(0).integers(-50, 200, (30, 30, 20), np.int16))


def segment(engine, image, **options):
    file, result = engine({"image": str(image), "device": "cpu", "logging": "WARNING", **options})
    return np.asarray(read_nifti(file).dataobj), result


# Requests


def test_a_subset_is_asked_for_and_nothing_else_computed(tmp_path, image):
    task = task_of(training={"drop_classes": 0.3})
    engine = BiPVLInfer(task, tmp_path / "m")
    engine.versions.publish(checkpoint(task))
    segment(engine, image)
    model = engine.models.get(None, "cpu").model
    channels, passes = [], model.text.token_passes
    model.register_forward_hook(lambda _m, _i, output: channels.append(output.logits.shape[1]))
    mask, result = segment(engine, image, label_subset=["aorta", "liver"])
    assert set(channels) == {3}
    assert set(np.unique(mask)) <= {0, 1, 3}
    assert list(result["voxels"]) == list(result["concept_weights"]) == ["liver", "aorta"]
    again, _ = segment(engine, image, label_subset="liver, aorta")
    assert np.array_equal(again, mask)
    assert model.text.token_passes == passes + 1, "the subset's text is read once"
    with torch.no_grad():
        assert model(torch.zeros(1, 1, *PATCH)).logits.shape[1] == 4, "the standard text is as it was"


@pytest.mark.parametrize("head", ["text", "fixed"])
def test_a_version_that_always_knew_all_classes_hides_the_others(tmp_path, image, head):
    engine = BiPVLInfer(task_of(head=head), tmp_path / "m")
    engine.versions.publish(checkpoint(task_of(head=head)))
    whole, _ = segment(engine, image)
    mask, _ = segment(engine, image, label_subset="aorta, liver")
    assert np.array_equal(mask, np.where(np.isin(whole, [1, 3]), whole, 0))
    assert {1, 3} & set(np.unique(mask)), "something to hide beside"


def test_overlapping_regions_stay_together(tmp_path):
    task = tiny_overlapping_task(patch=PATCH, model={"vision": "unet", "feature_size": 4, "head": "text"})
    assert task.only(["edema"]) is task


def test_a_requests_sentences_move_the_mask_of_their_class_alone_in_the_request(tmp_path, image):
    task = task_of(head="text")
    engine = BiPVLInfer(task, tmp_path / "m")
    engine.versions.publish(checkpoint(task, seed=3))
    before, _ = segment(engine, image)
    spleen = task.concepts.classes["spleen"].sentences
    liver = task.concepts.classes["liver"].sentences
    swapped, _ = segment(engine, image, concepts={"liver": spleen, "spleen": liver})
    exchanged = np.array([0, 2, 1, 3])[before]
    assert (swapped == exchanged).mean() > 0.999, "each mask appears where its sentences are"
    assert (swapped != before).any()
    assert np.array_equal(segment(engine, image)[0], before)


# Versions


def test_a_version_of_fewer_classes_answers_for_a_new_one_by_its_description(tmp_path, image):
    known, now = task_of(("liver", "spleen")), task_of()
    engine = BiPVLInfer(now, tmp_path / "m")
    engine.versions.publish(checkpoint(known))
    _, result = segment(engine, image)
    assert list(result["voxels"]) == list(ORGANS)
    assert "version 1 never saw a label of aorta: found by description alone" in result["warnings"]
    loaded = engine.models.get(None, "cpu")
    assert loaded.task.classes == now.classes
    with torch.no_grad():
        original = versions.restore_model(checkpoint(known))[0].eval()
        x = torch.rand(1, 1, *PATCH)
        ours = loaded.model(x, loaded.model.text.tokenize(known.text_rows())).logits
    torch.testing.assert_close(
        ours, original(x).logits, rtol=1e-4, atol=1e-5, msg="asked for alone, the old ones are as they were"
    )


def test_the_gate_compares_with_it_on_the_new_class_too(tmp_path):
    known, now = task_of(("liver", "spleen")), task_of()
    store = versions.Versions(tmp_path)
    store.publish(checkpoint(known))
    served, number, note = _served(store, now, torch.device("cpu"))
    assert (number, note) == (1, None)
    model, task, _ = served
    assert task.classes == now.classes
    assert predict(model.eval(), torch.rand(1, *PATCH), task).probabilities.shape[0] == 4


def test_what_was_trained_keeps_its_sentences_and_what_is_gone_is_gone():
    known, now = task_of(("liver", "spleen")), task_of(("spleen", "aorta"))
    edited = now.with_concepts({"spleen": {"shape": "edited since"}})
    task = known.extended(edited)
    assert task.classes == ("spleen", "aorta")
    assert task.concepts.classes["spleen"] == known.concepts.classes["spleen"]
    assert task.concepts.classes["aorta"] == now.concepts.classes["aorta"]


def test_the_next_round_takes_the_weights_over():
    known, now = task_of(("liver", "spleen")), task_of()
    saved = checkpoint(known)
    versions.check_same_task(saved, now)
    model = build_model(now, versions.text_assets(saved))
    model.load_state_dict(saved["model"])
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 1, *PATCH)).logits.shape[1] == 4


@pytest.mark.parametrize("head", ["text", "fixed"])
def test_a_version_goes_on_with_a_class_that_is_written_in_another_way(head):
    known = task_of(head=head)
    data = known.to_dict()
    for table in (data["labels"], data["concepts"]["classes"]):
        table |= {"Liver": table.pop("liver")}
        table |= {name: table.pop(name) for name in ("spleen", "aorta")}  # back to the order of before
    now = task_from_dict(data)
    saved = checkpoint(known)
    versions.check_same_task(saved, now)
    _, task = versions.restore_model(saved, current=now)
    assert task.classes == ("Liver", "spleen", "aorta")
    assert task.text_rows() == known.text_rows()


def test_heads_do_not_mix_and_channels_are_counted_with_the_fixed_one():
    fixed, text = task_of(head="fixed"), task_of()
    with pytest.raises(CheckpointError, match="head 'fixed', the server's task has 'text'"):
        versions.check_same_task(checkpoint(fixed), text)
    with pytest.raises(CheckpointError, match="head 'text', the server's task has 'fixed'"):
        versions.check_same_task(checkpoint(text), fixed)
    with pytest.raises(CheckpointError, match=r"classes \('liver', 'spleen'\)"):
        versions.check_same_task(checkpoint(task_of(("liver", "spleen"), "fixed")), fixed)
    versions.check_same_task(checkpoint(task_of(("liver", "spleen"))), text)


def test_a_checkpoint_from_before_there_was_a_choice_has_the_fixed_head(tmp_path):
    saved = {**checkpoint(task_of(head="fixed")), "format": 1}
    del saved["task"]["model"]["head"]
    versions.save(saved, tmp_path / "old.pt")
    _, task = versions.restore_model(versions.load(tmp_path / "old.pt"))
    assert task.model.head == "fixed"
