"""Clicks as our panel in OHIF sends them: in millimetres, in a box, with a map of its own, for a part of the mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from lib.infers import BiPVLInfer
from lib.infers.images import Images
from lib.infers.interactive import ClickInfer, ScribbleInfer
from lib.infers.sessions import Interaction
from lib.infers.work import Work
from lib.interaction.memory import Memory, OutdatedError
from lib.tasks import Task
from lib.volumes.masks import write_mask
from support.helpers import read_nifti, tiny_task, write_nifti

SHAPE = (40, 36, 20)
# Oblique, and with the first axis backwards: voxels, RAS and LPS are all different.
AFFINE = np.array([[-1.5, 0.1, 0, 7], [0.1, 1.5, 0, -30], [0, 0, 2, 100], [0, 0, 0, 1.0]])
INFO = [{"name": "liver", "value": 1}, {"name": "spleen", "value": 2}]


@pytest.fixture(scope="module")
def task() -> Task:
    return tiny_task(patch=(48, 48, 48), model={"vision": "unet", "feature_size": 4})


@pytest.fixture
def work(tmp_path: Path) -> Work:
    values = np.random.default_rng(0).integers(-50, 200, SHAPE).astype(np.int16)
    return Work("ann", "a", write_nifti(tmp_path / "a.nii.gz", values, AFFINE))


@pytest.fixture
def interaction(task: Task, tmp_path: Path) -> Interaction:
    return Interaction(BiPVLInfer(task, tmp_path / "m"), Memory(), Images())


@pytest.fixture
def labels() -> np.ndarray:
    labels = np.zeros(SHAPE, np.uint8)
    labels[5:12, 5:12, 5:12], labels[25:32, 20:27, 5:12] = 1, 2
    return labels


def ask(interaction: Interaction, work: Work, **options: Any) -> tuple[nib.Nifti1Image, dict[str, Any]]:
    options = {"label": "liver", "device": "cpu", "box": True, "space": "lps", **options}
    file, result = ClickInfer(interaction).respond(options, work)
    found = read_nifti(file)
    image = nib.Nifti1Image(np.asarray(found.dataobj), found.affine)
    file.unlink()
    return image, result


def sent(path: Path, labels: np.ndarray, work: Work) -> Path:
    write_mask(path, labels, AFFINE, str(work.path), {})
    return path


def lps(*voxels: tuple[int, int, int]) -> list[list[float]]:
    ras = nib.affines.apply_affine(AFFINE, voxels)
    return (ras * [-1, -1, 1]).tolist()


def box(low: tuple[int, int, int], high: tuple[int, int, int]) -> list[float]:
    return np.array(lps(low, high)).T.ravel().tolist()


def state(interaction: Interaction, work: Work) -> np.ndarray:
    session = interaction.memory.get(interaction.key(work))
    assert session is not None
    return session.labels.full()


def put(labels: np.ndarray, part: nib.Nifti1Image, result: dict[str, Any]) -> np.ndarray:
    """What a client does with the part of a map, by its place in space alone."""
    corner = np.rint(nib.affines.apply_affine(np.linalg.inv(AFFINE), part.affine[:3, 3])).astype(int)
    values = np.asarray(part.dataobj)
    assert [[a, a + n - 1] for a, n in zip(corner, values.shape, strict=True)] == result["box"]
    after = labels.copy()
    after[tuple(slice(a, a + n) for a, n in zip(corner, values.shape, strict=True))] = values
    return after


def test_a_client_that_puts_the_parts_together_has_the_servers_mask(
    interaction: Interaction, work: Work, labels: np.ndarray, tmp_path: Path
) -> None:
    known = sent(tmp_path / "m.nii.gz", labels, work)
    part, result = ask(interaction, work, foreground=lps((15, 8, 8)), map=known, label_info=INFO)
    assert result["mask_from"] == "the map that came with it" and part.shape < SHAPE
    mine = put(labels, part, result)
    assert mine[15, 8, 8] == 1 and np.array_equal(mine, state(interaction, work))
    both = {"foreground": lps((15, 8, 8)), "background": lps((6, 6, 6))}
    part, result = ask(interaction, work, **both, mask_state=result["mask_state"])
    mine = put(mine, part, result)
    assert mine[15, 8, 8] == 1 and mine[6, 6, 6] == 0 and np.array_equal(mine, state(interaction, work))
    assert np.array_equal(mine == 2, labels == 2)


def test_a_box_without_change_is_a_voxel_as_it_is(
    interaction: Interaction, work: Work, labels: np.ndarray, tmp_path: Path
) -> None:
    labels[0, 0, 0] = 2
    part, result = ask(interaction, work, map=sent(tmp_path / "m.nii.gz", labels, work), label_info=INFO)
    assert result["changed"] == 0 and np.array_equal(put(labels, part, result), labels)


def test_a_map_of_ones_own_is_where_clicks_begin_again(
    interaction: Interaction, work: Work, labels: np.ndarray, tmp_path: Path
) -> None:
    """Undo, and the same click once more: it counts again."""
    known = sent(tmp_path / "m.nii.gz", labels, work)
    for _ in range(2):
        part, result = ask(interaction, work, foreground=lps((15, 8, 8)), map=known, label_info=INFO)
        assert put(labels, part, result)[15, 8, 8] == 1


def test_settled_clicks_stay_though_they_are_not_sent_again(
    interaction: Interaction, work: Work, labels: np.ndarray, tmp_path: Path
) -> None:
    known = sent(tmp_path / "m.nii.gz", labels, work)
    part, result = ask(interaction, work, foreground=lps((15, 8, 8)), map=known, label_info=INFO)
    first = put(labels, part, result)
    part, result = ask(interaction, work, foreground=lps((35, 30, 17)), settled=True, mask_state=result["mask_state"])
    second = put(first, part, result)
    assert second[15, 8, 8] == second[35, 30, 17] == 1 and np.array_equal(second, state(interaction, work))


def test_a_mask_that_the_server_has_not_is_asked_for(
    interaction: Interaction, work: Work, labels: np.ndarray, tmp_path: Path
) -> None:
    """A server that was started again, or somebody's other window."""
    with pytest.raises(OutdatedError, match="send yours along"):
        ask(interaction, work, foreground=lps((15, 8, 8)), mask_state="gone")
    assert len(interaction.memory) == 0
    _, first = ask(interaction, work, map=sent(tmp_path / "m.nii.gz", labels, work), label_info=INFO)
    ask(interaction, work, foreground=lps((15, 8, 8)), mask_state=first["mask_state"])
    before = state(interaction, work)
    with pytest.raises(OutdatedError):
        ask(interaction, work, foreground=lps((30, 8, 8)), mask_state=first["mask_state"])
    assert np.array_equal(state(interaction, work), before)


@pytest.mark.parametrize("backwards", [False, True])
def test_nothing_changes_outside_of_a_box(
    interaction: Interaction, work: Work, labels: np.ndarray, tmp_path: Path, backwards: bool
) -> None:
    low, high = (14, 7, 7), (17, 10, 50)  # which sticks out of the image
    roi = box(*((high, low) if backwards else (low, high)))
    inside = np.zeros(SHAPE, bool)
    inside[14:18, 7:11, 7:20] = True
    known = sent(tmp_path / "m.nii.gz", labels, work)
    free, at = ask(interaction, work, foreground=lps((15, 8, 8)), map=known, label_info=INFO)
    assert (put(labels, free, at) != labels)[~inside].any(), "else the box has nothing to do"
    part, result = ask(interaction, work, foreground=lps((15, 8, 8)), roi=roi, map=known, label_info=INFO)
    moved = put(labels, part, result) != labels
    assert moved[15, 8, 8] and not moved[~inside].any() and result["warnings"] == []


def test_clicks_outside_of_the_box_change_nothing_and_are_named(
    interaction: Interaction, work: Work, labels: np.ndarray, tmp_path: Path
) -> None:
    known = sent(tmp_path / "m.nii.gz", labels, work)
    points = lps((15, 8, 8), (30, 8, 8))
    part, result = ask(
        interaction, work, foreground=points, roi=box((28, 6, 6), (32, 10, 10)), map=known, label_info=INFO
    )
    after = put(labels, part, result)
    assert after[30, 8, 8] == 1 and after[15, 8, 8] == 0
    assert result["warnings"] == ["roi: 1 of 2 voxels lie outside of the box: they change nothing"]


def test_another_box_leaves_what_was_answered_in_the_first(
    interaction: Interaction, work: Work, labels: np.ndarray, tmp_path: Path
) -> None:
    """As 3D Slicer, which goes on sending all points, whatever box is drawn."""
    known = sent(tmp_path / "m.nii.gz", labels, work)
    part, result = ask(interaction, work, foreground=lps((15, 8, 8)), map=known, label_info=INFO)
    first = put(labels, part, result)
    part, result = ask(interaction, work, foreground=lps((15, 8, 8), (30, 8, 8)), roi=box((28, 6, 6), (32, 10, 10)))
    second = put(first, part, result)
    assert second[30, 8, 8] == 1 and np.array_equal(second[:28], first[:28])


def test_scribbles_have_a_box_in_voxels(
    interaction: Interaction, work: Work, labels: np.ndarray, tmp_path: Path
) -> None:
    info = [{"name": n, "id": i} for i, n in enumerate(("liver", "spleen", "foreground_scribbles"), 1)]
    drawn = labels.copy()
    drawn[13:17, 8, 8] = 3
    known = sent(tmp_path / "m.nii.gz", drawn, work)
    request = {"selected_label_name": "liver", "label_info": info, "map": known, "device": "cpu"}
    file, result = ScribbleInfer(interaction).respond({**request, "roi": [15, 12, 20, 0, 0, 9]}, work)
    moved = (np.asarray(read_nifti(file).dataobj) == 1) != (labels == 1)
    assert moved[13:16, 8, 8].all() and not moved[:12].any() and not moved[16:].any()
    assert result["warnings"] == ["roi: 1 of 4 voxels lie outside of the box: they change nothing"]
    file, result = ScribbleInfer(interaction).respond({**request, "roi": []}, work)
    assert np.asarray(read_nifti(file).dataobj)[13:17, 8, 8].all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"roi": [0, 1, 0, 1, 0]}, r"roi: expected \[i0, i1, j0, j1, k0, k1\], got"),
        ({"roi": [0, 1, 0, 1, 0, "x"]}, r"roi: expected \[i0, i1"),
        ({"roi": [0, 1, 0, 1, 0, float("nan")]}, r"roi: expected \[i0, i1"),
        ({"roi": "everything"}, r"roi: expected \[i0, i1, j0, j1, k0, k1\], got str"),
        ({"roi": [40, 50, 0, 1, 0, 1]}, r"roi: the box .* is beside the image; valid are 0 to 39, 0 to 35, 0 to 19"),
        ({"roi": [-9, -2, 0, 1, 0, 1]}, "roi: the box .* is beside the image"),
        ({"roi": [1e300, 1e301, 0, 1, 0, 1]}, "roi: the box .* is beside the image"),
        ({"roi": [10**400, 1, 0, 1, 0, 1]}, r"roi: expected \[i0, i1, j0, j1, k0, k1\], got \[10+…$"),
        ({"space": "lps", "foreground": [[10**400, 0, 0]]}, r"foreground: expected \[x, y, z\] in millimetres, got"),
        ({"device": "cuda:9"}, "device: 'cuda:9'; valid are .*cpu"),
        ({"space": "lps", "foreground": [[1e9, 0, 0]]}, "foreground: points that are infinite or kilometres away"),
        ({"space": "lps", "foreground": [[900, 0, 0]]}, "foreground: .* is outside the image"),
        ({"space": "lps", "foreground": [[1, 2]]}, r"foreground: expected \[x, y, z\] in millimetres"),
        ({"space": "lps", "foreground": [[1, 2, "x"]]}, r"foreground: expected \[x, y, z\] in millimetres"),
        ({"space": "ras"}, "space: 'ras'; valid are voxels, lps"),
        ({"label_info": [{"name": "heart", "value": 2}]}, "the label shows value 1, which task"),
    ],
)
def test_what_cannot_be_used_changes_nothing(
    interaction: Interaction, work: Work, labels: np.ndarray, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    known = sent(tmp_path / "m.nii.gz", labels, work)
    ask(interaction, work, map=known, label_info=INFO)
    bad = {"map": known, "label_info": INFO, "foreground": [[15, 8, 8]], "space": "voxels", **change}
    with pytest.raises(ValueError, match=message):
        ask(interaction, work, **bad)
    assert np.array_equal(state(interaction, work), labels)


def test_the_models_pass_says_how_far_it_is_and_can_be_stopped(interaction: Interaction, work: Work) -> None:
    told: list[tuple[int, int]] = []
    ClickInfer(interaction).respond(
        {"label": "liver", "device": "cpu", "foreground": [[15, 8, 8]]}, work, lambda *how: told.append(how)
    )
    assert told == [(n, 4) for n in range(4)]

    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise Stopped

    interaction.memory.forget(work.image)
    with pytest.raises(Stopped):
        ClickInfer(interaction).respond({"label": "liver", "device": "cpu"}, work, stop)
    assert len(interaction.memory) == 0


def test_voxels_that_are_to_stay_do_unless_they_are_clicked(
    interaction: Interaction, work: Work, labels: np.ndarray, tmp_path: Path
) -> None:
    known = sent(tmp_path / "m.nii.gz", labels, work)
    near = [(15, 8, 9), (16, 8, 8), (5, 5, 5)]
    click = {"foreground": lps((15, 8, 8)), "map": known, "label_info": INFO}
    free, at = ask(interaction, work, **click)
    assert all(put(labels, free, at)[voxel] == 1 for voxel in near)
    part, result = ask(interaction, work, **click, kept=lps(*near, (15, 8, 8), (39, 35, 19)))
    after = put(labels, part, result)
    assert [after[voxel] for voxel in near] == [labels[voxel] for voxel in near] and after[15, 8, 8] == 1


def test_a_label_that_is_submitted_as_it_is_leaves_the_clicks_as_they_are(
    interaction: Interaction, work: Work, labels: np.ndarray, tmp_path: Path
) -> None:
    known = sent(tmp_path / "m.nii.gz", labels, work)
    _, first = ask(interaction, work, foreground=lps((15, 8, 8)), map=known, label_info=INFO)
    submitted = sent(tmp_path / "final.nii.gz", state(interaction, work), work)
    interaction.submitted(Work(work.person, work.image, work.path, submitted))
    part, _ = ask(interaction, work, mask_state=first["mask_state"])
    assert np.array_equal(state(interaction, work), labels), "the click was taken back"
