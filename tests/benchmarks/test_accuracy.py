"""The accuracy benchmark: a split without leaks, one loop for every network, text that is really shuffled, tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import records
from benchmarks.accuracy import report, training
from benchmarks.accuracy.__main__ import claim, execute, missing  # noqa: E402
from benchmarks.accuracy.data import SPLITS, Patches, Preprocessed, find_cases, split_cases  # noqa: E402
from benchmarks.accuracy.settings import SUPERVISED, VISION_ONLY, Run, matrix, with_shuffled_text  # noqa: E402
from benchmarks.documents import insert  # noqa: E402
from lib.model.nets import build_model  # noqa: E402
from lib.model.nets.fusion import BiFusion, IdentityFusion  # noqa: E402
from support.helpers import tiny_task, write_nifti


def acdc_like(folder: Path, patients: int) -> Path:
    for patient in range(1, patients + 1):
        for frame in (1, 12):
            stem = f"patient{patient:03}_frame{frame:02}"
            (folder / f"{stem}.nii.gz").touch()
            (folder / f"{stem}_gt.nii.gz").touch()
    return folder


def test_both_frames_of_a_patient_are_on_one_side(tmp_path: Path) -> None:
    cases = find_cases(acdc_like(tmp_path, 60))
    assert len(cases) == 120
    split = split_cases(cases)
    sides = [{c["patient"] for c in part} for part in (split.training, split.validation, split.test)]
    assert [len(s) for s in sides] == [40, 8, 12]
    assert len(set().union(*sides)) == 60
    assert [len(part) for part in (split.training, split.validation, split.test)] == [80, 16, 24]


def test_smaller_training_sets_are_parts_of_larger_ones_and_the_test_set_stays(tmp_path: Path) -> None:
    cases = find_cases(acdc_like(tmp_path, 60))
    sets = [{c["patient"] for c in split_cases(cases, n).training} for n in (4, 8, 16, None)]
    assert [len(s) for s in sets] == [4, 8, 16, 40]
    assert sets[0] < sets[1] < sets[2] < sets[3]
    assert split_cases(cases, 4).test == split_cases(cases).test
    with pytest.raises(ValueError, match="valid are 1 to 40"):
        split_cases(cases, 41)


def test_each_patient_is_tested_in_one_of_three_folds(tmp_path: Path) -> None:
    cases = find_cases(acdc_like(tmp_path, 10))
    folds = [split_cases(cases, fold=f) for f in range(3)]
    tested = [c["id"] for fold in folds for c in fold.test]
    assert sorted(tested) == sorted(c["id"] for c in cases)
    for fold in folds:
        assert not {c["patient"] for c in fold.training} & {c["patient"] for c in fold.test}


def test_a_task_may_have_a_split_of_its_own(tmp_path: Path) -> None:
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
        for n in range(202):
            (tmp_path / part / f"hippocampus_{n:03}.nii.gz").touch()
    split = split_cases(find_cases(tmp_path), shares=SPLITS["hippocampus-mr"])
    assert [len(part) for part in (split.training, split.validation, split.test)] == [120, 22, 60]


def test_layouts_of_the_public_data_sets_are_found(tmp_path: Path) -> None:
    for part in ("imagesTr", "labelsTr"):
        (tmp_path / "amos" / part).mkdir(parents=True)
        (tmp_path / "amos" / part / "amos_0001.nii.gz").touch()
    (tmp_path / "amos" / "imagesTr" / "amos_0002.nii.gz").touch()  # without a label
    (tmp_path / "mmwhs").mkdir()
    for kind in ("image", "label"):
        (tmp_path / "mmwhs" / f"ct_train_1001_{kind}.nii.gz").touch()
    assert [c["id"] for c in find_cases(tmp_path / "amos")] == ["amos_0001"]
    (case,) = find_cases(tmp_path / "mmwhs")
    assert (case["id"], Path(case["label"]).name) == ("ct_train_1001", "ct_train_1001_label.nii.gz")
    with pytest.raises(ValueError, match="no labelled volume"):
        find_cases(tmp_path / "mmwhs" / "nothing")


@pytest.mark.slow
@pytest.mark.parametrize("model", VISION_ONLY)
def test_networks_without_text_learn_in_the_same_loop(model: str) -> None:
    torch.manual_seed(0)
    task = tiny_task(model={"feature_size": 12, "swin_heads": 1})
    network = training.VisionTraining(training.VisionOnly(model, task), task)
    image, label = torch.rand(1, 1, *task.patch), torch.zeros(1, 1, *task.patch)
    label[..., :16] = 2
    image[..., :16] += 2
    before = [p.detach().clone() for p in network.parameters()]
    # Three steps: nnU-Net starts its residual branches at zero, so that what is inside them waits for the first.
    training.train(network, task, _Fixed([(image, label)] * 3), [], torch.device("cpu"), "float32")  # type: ignore[arg-type]
    moved = [not torch.equal(b, p) for b, p in zip(before, network.parameters(), strict=True)]
    assert sum(moved) / len(moved) > 0.9
    assert network.model(image).logits.shape == (1, task.out_channels, *task.patch)


class _Fixed(list):
    """Ready batches in place of `Patches`."""


def test_shuffled_text_leaves_no_class_its_own() -> None:
    task = tiny_task()
    own = task.text_rows()
    shuffled = [t for t in training.texts(task) if t["kind"] == "shuffled"]
    assert [t["order"] for t in shuffled] == [[1, 2, 0], [2, 0, 1]]
    for text in shuffled:
        assert sorted(text["rows"]) == sorted(own)
        assert all(mine != theirs for mine, theirs in zip(own, text["rows"], strict=True))
    assert with_shuffled_text(task).text_rows() == [own[1], own[2], own[0]]
    kinds = {t["kind"]: t["rows"] for t in training.texts(task)}
    assert kinds["names only"][1] == ["spleen"] * 6
    assert kinds["empty"] == [[""] * 6] * 3


def test_orders_of_many_classes_are_derangements() -> None:
    for n in (2, 3, 4, 5, 15):
        orders = list(training.derangements(n))
        assert orders
        assert len(set(orders)) == len(orders) <= 4
        assert all(sorted(o) == list(range(n)) and all(i != j for i, j in enumerate(o)) for o in orders)


def test_a_mask_is_compared_with_the_class_whose_sentences_it_got() -> None:
    table = training.following(tiny_task(), [1, 2, 0])  # liver reads the spleen's text, and so on
    assert table[np.array([0, 1, 2, 3])].tolist() == [0, 2, 3, 1]


def test_patches_depend_on_seed_and_step_alone(tmp_path: Path) -> None:
    task = tiny_task()
    volumes = list(Preprocessed(task, _tiny_cases(tmp_path, 2), tmp_path / "cache"))
    first, again, other = (Patches(task, volumes, 3, seed) for seed in (5, 5, 6))
    images = [first[i][0] for i in range(3)]
    assert torch.equal(again[2][0], images[2])  # whatever was drawn before
    assert not torch.equal(images[0], images[2])
    assert not torch.equal(other[0][0], images[0])


def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SAVE_SECONDS", 0)
    spec = Run("quickstart", "bipvl", "text")
    task = tiny_task()
    volumes = list(Preprocessed(task, _tiny_cases(tmp_path, 2), tmp_path / "cache"))

    class Stopping(Patches):
        def __getitem__(self, i: int) -> tuple[torch.Tensor, ...]:
            if i == 2 and not stopped:
                stopped.append(i)
                raise KeyboardInterrupt
            return super().__getitem__(i)

    def run(patches: Patches, state: Path | None) -> tuple[dict[str, torch.Tensor], dict[str, list]]:
        network = training.build_network(spec, task)
        cpu, half = torch.device("cpu"), {"validation": 0.5}
        curves = training.train(network, task, patches, [], cpu, "float32", state=state, validate=lambda model: half)
        return network.state_dict(), curves

    monkeypatch.setattr(training, "text_state", lambda *_: {})
    stopped: list[int] = [0]
    whole, expected = run(Stopping(task, volumes, 4, 0), None)
    stopped.clear()
    with pytest.raises(KeyboardInterrupt):
        run(Stopping(task, volumes, 4, 0), tmp_path / "state.pt")
    resumed, curves = run(Stopping(task, volumes, 4, 0), tmp_path / "state.pt")
    assert stopped == [2] and curves == expected and curves["validated"] == [1, 2, 3, 4]
    assert all(torch.equal(whole[name], value) for name, value in resumed.items())


def _tiny_cases(folder: Path, patients: int) -> list[dict[str, str]]:
    """AMOS-like volumes: noise with two boxes of their own intensity."""
    generator = np.random.default_rng(0)
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    for i in range(patients):
        label = np.zeros((40, 36, 34), np.uint8)
        label[8:20, 8:20, 8:20], label[24:34, 10:28, 6:26] = 1, 2
        image = generator.normal(0, 20, label.shape) + 100 * label
        write_nifti(folder / "imagesTr" / f"amos_{i:04}.nii.gz", image.astype(np.float32))
        write_nifti(folder / "labelsTr" / f"amos_{i:04}.nii.gz", label)
    return find_cases(folder)


def test_the_field_is_cut_from_the_middle_and_keeps_its_place(tmp_path: Path) -> None:
    task, cases = tiny_task(), _tiny_cases(tmp_path, 1)
    (whole,) = Preprocessed(task, cases, tmp_path / "cache")
    (middle,) = Preprocessed(task, cases, tmp_path / "cache", (20.0, 10.0))
    w, h, d = whole["image"].shape[1:]
    assert middle["image"].shape == middle["label"].shape == (1, 20, 10, d)
    x, y = (w - 20) // 2, (h - 10) // 2
    assert torch.equal(middle["label"].as_tensor(), whole["label"].as_tensor()[:, x : x + 20, y : y + 10])
    background = torch.nn.functional.one_hot(middle["label"][0].long(), task.out_channels).movedim(-1, 0).float()
    restored = training.restore(background.as_subclass(torch.Tensor), middle["image"], task)
    reference = training.read_volume(cases[0]["label"]).numpy()[0]
    inside = restored > 0
    assert inside.any()
    assert (restored[inside] == reference[inside]).all()


@pytest.mark.slow
@pytest.mark.parametrize(("model", "head"), [("bipvl", "text"), ("swin_unetr", "fixed")])
def test_the_papers_protocol_runs_on_a_data_set_of_another_task(tmp_path: Path, model: str, head: str) -> None:
    _tiny_cases(tmp_path / "data", 3)
    small = {"patch": [64, 32, 32], "model.feature_size": 12, "model.text": "scratch", "training.epochs": 1}
    small |= {"model.swin_heads": 1, "overlap": 0.0}
    small["model.scratch"] = {"layers": 4, "width": 16, "heads": 2}
    run = Run("amos22-ct", model, head, size="paper", fold=1, overrides=tuple(sorted(small.items())))
    work, device = tmp_path / "work", torch.device("cpu")
    execute(run, tmp_path / "data", "test", True, "float32", device, 0, tmp_path / "results.jsonl", work)
    (result,) = records.read(tmp_path / "results.jsonl", curves=True)
    assert len(result["curves"]["loss"]) == len(result["curves"]["step"]) > 0
    assert result["steps"] == 2  # one epoch over the other two thirds
    assert set(result["scores"]) == {*run.task_of().classes, "mean"}
    assert ("text" in result) == (model == "bipvl")


def test_every_run_of_the_matrix_has_a_name_of_its_own_and_a_task() -> None:
    runs = matrix("acdc-mr", "small") + matrix("amos22-ct", "paper", paper_protocol=True)
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        run.task_of()
    with pytest.raises(ValueError, match="reads none"):
        Run("acdc-mr", "unet", variant="name")
    with pytest.raises(ValueError, match="valid models are"):
        Run("acdc-mr", "dynunet", variant=SUPERVISED)


def test_class_maps_without_text_are_trained_and_cost_nothing_afterwards() -> None:
    """The control of the main comparison: maps at three resolutions in training, and then the same Swin UNETR."""
    task = tiny_task(patch=(64, 32, 32), model={"vision": "swin_unetr", "feature_size": 12})
    torch.manual_seed(0)
    model = training.VisionOnly("swin_unetr", task, supervised=True)
    network = training.VisionTraining(model, task).train()
    image, label = torch.randn(1, 1, 64, 32, 32), torch.randint(0, 4, (1, 1, 64, 32, 32))
    parts = network(image, label)
    assert parts["loss"].item() == pytest.approx((parts["segmentation"] + parts["class_embedding"]).item())
    assert [m.shape[2:] for m in model(image).class_maps] == [(8, 4, 4), (16, 8, 8), (32, 16, 16)]
    parts["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(image).logits, model.net(image))
    assert not model(image).class_maps


def test_late_fusion_is_the_last_stage_only() -> None:
    blocks = [type(block) for block in build_model(tiny_task(model={"fusion": "late"})).fusion]
    assert blocks == [IdentityFusion, IdentityFusion, IdentityFusion, BiFusion]


def test_a_text_ablation_that_was_cut_off_is_still_to_be_done(tmp_path: Path) -> None:
    run, plain = Run("acdc-mr", "bipvl"), Run("acdc-mr", "unet")
    results = tmp_path / "results.jsonl"
    assert missing(run, results, text=True) == "run"
    for each in (run, plain):
        records.put(results, {"name": each.name})
    assert missing(run, results, text=True) == "text"
    assert missing(run, results, text=False) == missing(plain, results, text=True) == ""
    records.put(results, {"name": run.name, "text": []})
    assert missing(run, results, text=True) == ""


def test_a_run_is_claimed_once_and_freed_by_the_death_of_its_process(tmp_path: Path) -> None:
    assert claim(tmp_path / "run")
    assert not claim(tmp_path / "run")
    (tmp_path / "run").write_text(str(2**22 + 1))  # above the largest process number
    assert claim(tmp_path / "run")


def _result(model: str, seed: int, dice: float, **more: Any) -> dict:
    name, _, head = model.partition("-") if model.startswith("bipvl") else (model, "", "")
    run = Run("acdc-mr", name, head or "fixed", seed=seed, **more)
    means = {"dice": dice, "hd95": 10.0, "nsd": 0.5, "n": 2}
    result: dict[str, Any] = {
        "run": run.to_dict(),
        "name": run.name,
        "on": "test",
        "patients": {"training": ["a"] * 40},
    }
    result["scores"] = {"left ventricle": means, "mean": means}
    other = {"left ventricle": {"dice": dice / 2}, "mean": {"dice": dice / 2}}
    result["text"] = [
        {"kind": "own", "mean": result["scores"]},
        {"kind": "shuffled", "mean": other, "follows": result["scores"]},
    ]
    return result


def test_tables_show_mean_and_spread_and_what_is_missing(tmp_path: Path) -> None:
    results = [_result("swin_unetr", s, d) for s, d in ((0, 0.7), (1, 0.8))] + [_result("bipvl-text", 0, 0.6)]
    for result in results:
        records.put(tmp_path / "results.jsonl", result)
    text = report.tables(report.read_results(tmp_path / "results.jsonl", "acdc-mr", "small"), "acdc-mr", "small")
    assert "| Swin UNETR | 2 | 75.0 ± 7.1 | 10.0 ± 0.0 | 50.0 ± 0.0 | 75.0 ± 7.1 |" in text
    assert "| BiPVL-Seg, text head | 1 | 60.0 | 30.0 | 60.0 | - | - |" in text
    assert "3 of 67 runs of the matrix are done" in text
    assert "`bipvl-fixed_s0`" in text
    document = tmp_path / "page.md"
    begin, end = "<!-- accuracy tables: begin -->", "<!-- accuracy tables: end -->"
    document.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    insert(document, report.SECTION, text)
    insert(document, report.SECTION, text)
    assert document.read_text() == f"before\n{begin}\n\n{text}\n\n{end}\nafter\n"
    with pytest.raises(ValueError, match="expected one line"):
        insert(tmp_path / "results.jsonl", report.SECTION, text)
