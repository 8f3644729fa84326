"""Scores of a case from one forward pass, kept per image and version; Dice that is right; annotators first."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monailabel.utils.others.generic import device_list

from lib.infers import BiPVLInfer
from lib.model import versions
from lib.model.nets import build_model
from lib.model.predict import Prediction, predict
from lib.scoring import CaseScoring, cache, scoring_methods
from lib.scoring import background as background_module
from lib.scoring.background import Background
from lib.scoring.forward import score_case
from lib.scoring.methods import SERVER, DiceScoring, Orphaned
from lib.scoring.turns import Turns
from lib.stores.dicom.archive import ArchiveError
from lib.stores.local import LocalStore
from lib.volumes.metrics import dice_of_classes, evaluate_volumes
from lib.volumes.transforms import apply, load, restore_map
from support.helpers import tiny_overlapping_task, tiny_task, write_nifti

PATCH = (48, 48, 48)


@pytest.fixture(scope="module")
def task():
    return tiny_task(patch=PATCH, model={"vision": "unet", "feature_size": 4})


@pytest.fixture(scope="module")
def model(task):
    torch.manual_seed(0)
    return build_model(task).eval()


@pytest.fixture
def store(tmp_path, task):
    """Four cases, one of them labelled."""
    folder = tmp_path / "studies"
    (folder / "labels" / "final").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in "abcd":
        write_nifti(folder / f"{name}.nii.gz", rng.integers(-50, 200, (30, 30, 20)).astype(np.int16))
    write_nifti(folder / "labels" / "final" / "b.nii.gz", np.ones((30, 30, 20), np.uint8))
    return LocalStore(folder, tasks=[task])


@pytest.fixture
def engine(tmp_path, task):
    return BiPVLInfer(task, tmp_path / "models" / task.name)


def publish(engine, task, seed):
    torch.manual_seed(seed)
    return engine.versions.publish(versions.checkpoint_of(build_model(task), task, {}))


def scoring(engine, tmp_path, limit=200):
    return CaseScoring("entropy", {engine.task.name: engine}, tmp_path / "models", limit)


def prediction(probabilities, classes):
    p = torch.tensor(probabilities, dtype=torch.float32)[:, :, None, None]
    return Prediction(p, torch.full((classes, 6), 1 / 6), torch.eye(classes), 1, 0)


# The three scores ---------------------------------------------------------------------------------------------------


def test_entropy_by_hand():
    """Two exclusive channels, three voxels: sure of background, undecided, sure of foreground."""
    found = prediction([[1.0, 0.5, 0.0], [0.0, 0.5, 1.0]], 1)
    assert found.entropy().flatten().tolist() == pytest.approx([0, 1, 0])
    assert found.uncertainty() == pytest.approx(0.5 / 1.5), "each voxel counts by its foreground probability"
    assert found.found().tolist() == [True]


def test_entropy_of_overlapping_classes_by_hand():
    found = prediction([[0.5, 1.0], [0.0, 1.0]], 2)
    assert found.overlapping
    assert found.entropy().flatten().tolist() == pytest.approx([0.5, 0])
    assert found.uncertainty() == pytest.approx(0.25 / 1.5)
    assert found.found().tolist() == [True, True]


def test_a_model_that_draws_nothing_because_it_is_unsure_is_uncertain():
    """No voxel is foreground, all are nearly: counting predicted foreground alone would call this certain."""
    unsure, sure = prediction([[0.51] * 4, [0.49] * 4], 1), prediction([[0.0] * 4, [1.0] * 4], 1)
    assert unsure.found().tolist() == [False]
    assert unsure.uncertainty() > 0.99
    assert sure.uncertainty() == 0


def test_entropy_in_parts_is_entropy(model, task):
    torch.manual_seed(1)
    found = predict(model, torch.rand(1, 70, 20, 20), task, overlap=0.0)
    p = found.probabilities.double()
    assert torch.allclose(found.entropy().double(), -(p * p.log()).sum(0) / math.log(4), atol=1e-5)


def test_scores_are_those_of_the_forward_pass(model, task):
    """The vector is the mean of V_4 over places and windows; one pass per window, and no hook is left behind."""
    torch.manual_seed(2)
    image = torch.rand(1, 60, 40, 40)
    seen, calls = [], []
    hooks = [
        model.fusion[-1].register_forward_hook(lambda _m, _i, out: seen.append(out[1].flatten(2).mean(2))),
        model.register_forward_pre_hook(lambda _m, i: calls.append(len(i[0]))),
    ]
    scores, found = score_case(model, image, task)
    for hook in hooks:
        hook.remove()
    assert sum(calls) == found.windows - found.skipped
    vector = torch.cat(seen).mean(0)
    assert np.allclose(scores.vector, vector / vector.norm(), atol=1e-6)
    assert scores.entropy == found.uncertainty()
    assert scores.alignment == pytest.approx(float(found.alignment[found.found()].mean()))
    assert not model.fusion[-1]._forward_hooks


def test_a_case_without_content_has_scores_too(model, task):
    scores, found = score_case(model, torch.zeros(1, 48, 48, 48), task)
    assert found.windows == found.skipped
    assert scores.entropy < 1e-3 and scores.alignment == 0 and not scores.vector.any()


# Kept in the datastore ----------------------------------------------------------------------------------------------


def test_every_case_is_scored_once_a_version(engine, task, store, tmp_path, monkeypatch):
    method = scoring(engine, tmp_path)
    assert method({}, store) == {"tiny": {"version": 0, "scored": 0, "failed": 0}}, "nothing is published yet"
    publish(engine, task, 1)
    passes = []
    forward = type(build_model(task)).forward
    monkeypatch.setattr(type(build_model(task)), "forward", lambda *a, **k: passes.append(1) or forward(*a, **k))
    assert method({}, store) == {"tiny": {"version": 1, "scored": 4, "failed": 0}}
    assert len(passes) == 4, "one window per case, one pass per window"
    for case in "abcd":
        info = store.get_image_info(case)
        assert cache.version_of(info, "tiny") == 1
        image = apply(load(task, label=False), {"image": store.get_image_uri(case)})["image"]
        expected, _ = score_case(engine.loaded("cpu")[1], image, task)
        found = cache.scores_of(info, "tiny")
        assert (found.entropy, found.alignment) == pytest.approx((expected.entropy, expected.alignment), abs=1e-5)
        assert np.allclose(found.vector, expected.vector, atol=1e-3)
    assert method.info()["progress"]["done"] == method.info()["progress"]["total"] == 4

    passes.clear()
    assert CaseScoring("alignment", method.infers, tmp_path / "models", 200)({}, store)["tiny"]["scored"] == 0
    assert passes == [], "another method finds everything there"
    publish(engine, task, 2)
    assert method.missing(store, "tiny") and method({"model": ["tiny"]}, store)["tiny"] == {
        **{"version": 2, "scored": 4, "failed": 0}
    }
    assert not method.missing(store, "tiny")
    with pytest.raises(ValueError, match="unknown model 'liver'; valid are all, tiny"):
        method({"model": "liver"}, store)


def test_a_killed_run_goes_on_where_it_was(engine, task, store, tmp_path, monkeypatch):
    """Killed after the second case: two are kept, and the next run scores the other two."""
    publish(engine, task, 1)
    method, kept = scoring(engine, tmp_path), []
    update = store.update_image_info

    def killed(case, news):
        if len(kept) == 2:
            raise KeyboardInterrupt
        kept.append(case)
        update(case, news)

    monkeypatch.setattr(store, "update_image_info", killed)
    with pytest.raises(KeyboardInterrupt):
        method({}, store)
    monkeypatch.undo()
    assert len(method.missing(store, "tiny")) == 2
    assert method({}, store)["tiny"]["scored"] == 2
    assert not engine.loaded(device_list()[0].split()[0])[1]._forward_pre_hooks


def test_a_version_published_meanwhile_is_scored_at_once(engine, task, store, tmp_path, monkeypatch):
    publish(engine, task, 1)
    update, calls = store.update_image_info, []

    def publishing(case, news):
        update(case, news)
        calls.append(case)
        if len(calls) == 2:
            publish(engine, task, 2)

    monkeypatch.setattr(store, "update_image_info", publishing)
    assert scoring(engine, tmp_path)({}, store)["tiny"] == {"version": 2, "scored": 6, "failed": 0}
    assert {cache.version_of(store.get_image_info(c), "tiny") for c in "abcd"} == {2}


def test_a_case_that_cannot_be_read_is_noted_and_not_tried_again(engine, task, store, tmp_path):
    publish(engine, task, 1)
    (store.folder / "a.nii.gz").write_bytes(b"no volume")
    method = scoring(engine, tmp_path)
    assert method({}, store)["tiny"] == {"version": 1, "scored": 3, "failed": 1}
    assert "cannot be read" in store.get_image_info("a")[cache.KEY]["tiny"]["failed"]
    assert method.missing(store, "tiny") == []


def test_an_archive_that_is_down_says_nothing_about_a_case(engine, task, store, tmp_path, monkeypatch):
    publish(engine, task, 1)

    def down(case):
        raise ArchiveError("did not answer")

    monkeypatch.setattr(store, "get_image_uri", down)
    with pytest.raises(ArchiveError):
        scoring(engine, tmp_path)({}, store)
    assert len(scoring(engine, tmp_path).missing(store, "tiny")) == 4


def test_at_most_so_many_unlabelled_cases_are_scored(engine, task, store, tmp_path):
    publish(engine, task, 1)
    some = scoring(engine, tmp_path, limit=2).missing(store, "tiny")
    assert len(some) == 3 and "b" in some, "two unlabelled ones, and the labelled one"
    (store.folder / "a0.nii.gz").write_bytes((store.folder / "a.nii.gz").read_bytes())
    assert set(some) - {"b"} <= set(scoring(engine, tmp_path, limit=3).missing(store, "tiny"))


def test_two_processes_do_not_score_at_once(engine, task, store, tmp_path):
    publish(engine, task, 1)
    method = scoring(engine, tmp_path)
    code = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True)"
    code += "; sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(method.lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        assert method({}, store) == {}
        other.kill()
    assert method({}, store)["tiny"]["scored"] == 4, "the kernel gives the lock of a killed process back"


def test_a_scoring_process_ends_with_its_server(engine, task, store, tmp_path, monkeypatch):
    publish(engine, task, 1)
    with subprocess.Popen([sys.executable, "-c", "pass"]) as gone:
        gone.wait()
    monkeypatch.setenv(SERVER, str(gone.pid))
    with pytest.raises(Orphaned):
        scoring(engine, tmp_path)({}, store)
    monkeypatch.setenv(SERVER, str(os.getppid()))
    assert scoring(engine, tmp_path)({}, store)["tiny"]["scored"] == 4


def test_scoring_waits_for_requests_and_requests_for_nobody(tmp_path):
    turns, passed = Turns(tmp_path / "m" / "requests.lock"), threading.Event()

    def wait() -> None:
        turns.wait()
        passed.set()

    with turns.request(), turns.request():
        threading.Thread(target=wait, daemon=True).start()
        assert not passed.wait(0.3)
        with turns.request():  # a later request overtakes who waits
            pass
        assert not passed.is_set()
    assert passed.wait(10)
    (tmp_path / "file").write_text("")
    with Turns(tmp_path / "file" / "requests.lock").request():
        Turns(tmp_path / "file" / "requests.lock").wait()


# In the background --------------------------------------------------------------------------------------------------


class Tasks:
    """MONAI Label's tasks, without processes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.all: dict[str, list[dict]] = {"scoring": [], "train": []}
        monkeypatch.setattr(background_module, "tasks_of", self.all.__getitem__)
        monkeypatch.setattr(background_module, "start_task", self.start)
        monkeypatch.setattr(background_module, "stop_task", self.stop)

    def start(self, method, request, queue):
        self.all[method].append({"status": "RUNNING", "request": request})
        return self.all[method][-1]

    def stop(self, method):
        self.all[method][-1]["status"] = "STOPPED"


@pytest.fixture
def filling(engine, task, store, tmp_path, monkeypatch):
    publish(engine, task, 1)
    tasks = Tasks(monkeypatch)
    return Background(scoring(engine, tmp_path), store), tasks.all


def test_scoring_starts_by_itself_and_after_each_publish(filling, engine, task, store):
    background, tasks = filling
    background.look()
    background.look()
    assert len(tasks["scoring"]) == 1, "one at a time"
    background._method({}, store)
    tasks["scoring"][-1]["status"] = "DONE"
    background.wake()
    background.look()
    assert len(tasks["scoring"]) == 1, "nothing is missing"
    publish(engine, task, 2)
    background.look()
    assert len(tasks["scoring"]) == 2


def test_scoring_makes_way_for_training_and_goes_on(filling):
    background, tasks = filling
    background.look()
    tasks["train"].append({"status": "RUNNING"})
    background.look()
    assert tasks["scoring"][-1]["status"] == "STOPPED"
    background.look()
    assert len(tasks["scoring"]) == 1
    tasks["train"][-1]["status"] = "DONE"
    background.look()
    assert [t["status"] for t in tasks["scoring"]] == ["STOPPED", "RUNNING"]


def test_what_a_person_stopped_begins_with_the_next_version_only(filling, engine, task):
    background, tasks = filling
    background.look()
    tasks["scoring"][-1]["status"] = "STOPPED"
    background.look()
    background.wake()
    background.look()
    assert len(tasks["scoring"]) == 1
    publish(engine, task, 2)
    background.look()
    assert len(tasks["scoring"]) == 2


def test_a_failure_is_tried_again_later(filling, monkeypatch):
    background, tasks = filling
    background.look()
    tasks["scoring"][-1]["status"] = "ERROR"
    background.look()
    background.wake()
    background.look()
    assert len(tasks["scoring"]) == 1
    monkeypatch.setattr(background_module, "time", _Later())
    background.look()
    assert len(tasks["scoring"]) == 2


class _Later:
    @staticmethod
    def monotonic() -> float:
        return time.monotonic() + background_module.RETRY_SECONDS


# Dice ---------------------------------------------------------------------------------------------------------------


def test_dice_by_hand(task):
    found, target = np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)
    found[0], target[0, :2] = 1, 1  # 16 and 8 voxels, 8 in common
    found[1] = 2  # spleen where there is none
    scores = dice_of_classes(task, found, target)
    assert scores["liver"] == pytest.approx(2 * 8 / 24)
    assert scores["spleen"] == 0
    assert math.isnan(scores["aorta"])


@pytest.mark.parametrize("make", [tiny_task, tiny_overlapping_task])
def test_dice_is_that_of_the_metrics(make):
    task, rng = make(), np.random.default_rng(0)
    found, target = (rng.integers(0, 4, (9, 8, 7)).astype(np.uint8) for _ in range(2))
    rows = evaluate_volumes(task, found, target, [1, 1, 1])
    assert dice_of_classes(task, found, target) == pytest.approx({r.name: r.dice for r in rows})
    with pytest.raises(ValueError, match="shapes differ"):
        dice_of_classes(task, found[:5], target)


def test_dice_of_stored_masks(task, tmp_path):
    """Of several classes, in another orientation, and of the declared classes only; MONAI Label's own multiplies label
    indices and would say more than 1."""
    folder = tmp_path / "studies"
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, (6, 5, 4)).astype(np.uint8)
    mask = np.where(rng.random(truth.shape) < 0.5, truth, 0).astype(np.uint8)
    store = LocalStore(folder, tasks=[task])
    turned = nib.Nifti1Image(mask[::-1], np.diag([-1.0, 1, 1, 1]) + np.eye(4, k=3) * [[5], [0], [0], [0]])
    nib.save(turned, tmp_path / "mask.nii.gz")
    label = write_nifti(tmp_path / "label.nii.gz", truth)
    for case in ("whole", "part", "alone"):
        write_nifti(folder / f"{case}.nii.gz", np.zeros(truth.shape, np.int16))
        store.save_label(case, str(label), "final", {"annotated": ["liver"]} if case == "part" else {})
    for case in ("whole", "part"):
        store.save_label(case, str(tmp_path / "mask.nii.gz"), "original", {})
    scores = DiceScoring({"tiny": task})({}, store)
    expected = {n: round(v, 6) for n, v in dice_of_classes(task, mask, truth).items()}
    assert scores == {"whole": expected, "part": {"liver": expected["liver"]}}
    info = store.get_image_info("whole")
    assert info["dice"] == pytest.approx(np.mean(list(expected.values())), abs=1e-6)
    assert info["dice_of_classes"] == expected
    with pytest.raises(ValueError, match="unknown model 'x'; valid are tiny"):
        DiceScoring({"tiny": task})({"model": "x"}, store)


def test_the_methods_that_clients_show(engine, task, tmp_path):
    methods = scoring_methods({"tiny": engine}, {"tiny": task}, tmp_path, 5)
    assert set(methods) == {"entropy", "alignment", "dice"}
    for method in methods.values():
        options = method.info()["config"].values()
        assert all(isinstance(o, str) or all(isinstance(x, str) for x in o) for o in options)


# The map ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAL"])
def test_the_map_lies_on_the_grid_of_the_image(engine, task, tmp_path, codes):
    """uint8 percent of the largest entropy, with the image's very geometry, and what the prediction says there."""
    shape = (31, 24, 17)
    affine = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(codes), shape)
    volume = np.random.default_rng(0).integers(-50, 200, shape).astype(np.int16)
    image = write_nifti(tmp_path / "image.nii.gz", volume, affine)
    publish(engine, task, 1)
    file, result = engine({"image": str(image), "device": "cpu", "logging": "WARNING", "uncertainty_map": "true"})
    found = nib.load(result["uncertainty_map"])
    assert found.shape == shape and found.get_data_dtype() == np.uint8
    assert np.array_equal(found.affine, nib.load(image).affine)
    data = apply(load(task, label=False), {"image": str(image)})["image"]
    entropy = predict(engine.loaded("cpu")[1], data, task).entropy()
    expected = np.zeros(shape)
    # Voxels are 1 mm, as the network's: what was turned to RAS is turned back, and nothing is interpolated.
    expected[...] = restore_map(entropy, data)
    percent = np.asarray(found.dataobj)
    assert np.abs(percent / 100 - expected).max() <= 0.0051
    assert len(np.unique(percent)) > 5
    Path(file).unlink()
    Path(result["uncertainty_map"]).unlink()
    _, plain = engine({"image": str(image), "device": "cpu", "logging": "WARNING"})
    assert "uncertainty_map" not in plain


def test_a_map_is_interpolated_linearly_and_zero_outside():
    values = torch.arange(4.0)[:, None, None].expand(4, 4, 4).contiguous()
    crop = torch.diag(torch.tensor([2.0, 1, 1, 1], dtype=torch.float64))
    crop[0, 3] = 4.0  # the network's grid: 2 mm along the first axis, from 4 mm on
    meta = {"affine": crop, "original_affine": torch.eye(4, dtype=torch.float64), "spatial_shape": [14, 4, 4]}
    found = restore_map(values, meta)[:, 1, 1]
    assert found.tolist() == pytest.approx([0, 0, 0, 0, 0, 0.5, 1, 1.5, 2, 2.5, 3, 3, 0, 0])
    assert found.dtype == np.float32


def test_a_kept_map_replaces_the_one_before_and_fills_no_history(store, tmp_path):
    for value in (10, 20):
        file = write_nifti(tmp_path / "map.nii.gz", np.full((30, 30, 20), value, np.uint8))
        store.keep_map("a", file, {"model": "tiny"})
    assert np.asarray(nib.load(store.get_label_uri("a", "uncertainty")).dataobj).max() == 20
    assert not (store.folder / "labels" / "history").exists()
    assert store.get_labeled_images() == ["b"], "a map is not a label"
    assert [case["id"] for case in store.datalist()] == ["b"]
