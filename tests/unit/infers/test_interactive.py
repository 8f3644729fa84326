"""Clicks and scribbles without a server: sessions, points that come and go, strokes, and what is refused."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nrrd
import numpy as np
import pytest

from lib.infers import BiPVLInfer
from lib.infers.images import Images
from lib.infers.interactive import ClickInfer, ScribbleInfer
from lib.infers.sessions import Interaction
from lib.infers.work import Work
from lib.interaction.memory import Memory
from lib.tasks import Task
from lib.volumes.masks import write_mask
from support.helpers import read_nifti, tiny_task, write_nifti

SHAPE = (40, 36, 20)
AFFINE = np.diag([-1.5, -1.5, 2.0, 1.0])


@pytest.fixture(scope="module")
def task() -> Task:
    return tiny_task(patch=(48, 48, 48), model={"vision": "unet", "feature_size": 4})


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    values = np.random.default_rng(0).integers(-50, 200, SHAPE).astype(np.int16)
    return Work("ann", "a", write_nifti(tmp_path_factory.mktemp("image") / "a.nii.gz", values, AFFINE))


@pytest.fixture(scope="module")
def engine(task: Task, tmp_path_factory: pytest.TempPathFactory) -> BiPVLInfer:
    """It segments the image once for all tests."""
    found = BiPVLInfer(task, tmp_path_factory.mktemp("models"))
    found.predict = functools.cache(found.predict)  # type: ignore[method-assign]
    return found


@pytest.fixture
def interaction(engine: BiPVLInfer) -> Interaction:
    return Interaction(engine, Memory(), Images())


def click(
    interaction: Interaction, work: Work, label: str = "liver", **points: Any
) -> tuple[np.ndarray, dict[str, Any]]:
    file, result = ClickInfer(interaction).respond({"label": label, "device": "cpu", **points}, work)
    mask = np.asarray(read_nifti(file).dataobj)
    file.unlink()
    return mask, result


def state(interaction: Interaction, work: Work) -> np.ndarray:
    session = interaction.memory.get(interaction.key(work))
    assert session is not None
    return session.labels.full()


def start(interaction: Interaction, work: Work) -> np.ndarray:
    """The model's mask; no label of the random model is where the tests click."""
    session, _ = interaction.session(work, "liver", "cpu", afresh=False)
    interaction.keep(work, session)
    labels = np.zeros(SHAPE, np.uint8)
    labels[5:12, 5:12, 5:12], labels[25:32, 20:27, 5:12] = 1, 2
    session.set(labels, "a test")
    return labels


def test_a_click_is_obeyed_and_answered_on_the_grid_of_the_image(interaction: Interaction, work: Work) -> None:
    labels = start(interaction, work)
    mask, result = click(interaction, work, foreground=[[15, 8, 8]], background=[[6, 6, 6]])
    assert mask.shape == SHAPE and mask[15, 8, 8] == 1 and mask[6, 6, 6] == 0 and set(np.unique(mask)) == {0, 1}
    assert result["mask_from"] == "a test" and result["label_names"] == {"liver": 1} and result["changed"] > 0
    after = state(interaction, work)
    assert np.array_equal(after == 1, mask == 1) and np.array_equal(after == 2, labels == 2)


def test_points_that_are_taken_away_again_leave_no_trace(interaction: Interaction, work: Work) -> None:
    labels = start(interaction, work)
    first, _ = click(interaction, work, foreground=[[15, 8, 8]])
    click(interaction, work, foreground=[[15, 8, 8], [18, 15, 8]])
    again, _ = click(interaction, work, foreground=[[15, 8, 8]])
    assert np.array_equal(first, again)
    click(interaction, work, foreground=[])
    assert np.array_equal(state(interaction, work), labels)


def test_clicks_on_two_labels_are_apart(interaction: Interaction, work: Work) -> None:
    start(interaction, work)
    click(interaction, work, "liver", foreground=[[15, 8, 8]])
    between = state(interaction, work)
    click(interaction, work, "spleen", foreground=[[28, 23, 14]])
    click(interaction, work, "spleen", foreground=[])
    assert np.array_equal(state(interaction, work), between)


def test_a_click_on_another_class_takes_its_voxel(interaction: Interaction, work: Work) -> None:
    start(interaction, work)
    mask, _ = click(interaction, work, foreground=[[28, 23, 8]])
    assert mask[28, 23, 8] == 1 and state(interaction, work)[28, 23, 8] == 1


def test_people_do_not_see_each_other_s_work(interaction: Interaction, work: Work) -> None:
    start(interaction, work)
    click(interaction, work, foreground=[[15, 8, 8]])
    other = Work("ben", work.image, work.path)
    _, result = click(interaction, other, foreground=[[15, 8, 8]])
    assert result["mask_from"] == "the model's mask"


def test_work_goes_on_from_the_submitted_label(
    interaction: Interaction, work: Work, tmp_path: Path, task: Task
) -> None:
    start(interaction, work)
    click(interaction, work, foreground=[[15, 8, 8]])
    drawn = np.zeros(SHAPE, np.uint8)
    drawn[20:24, 5:9, 3:7] = 1
    write_mask(tmp_path / "label.nii.gz", drawn, AFFINE, str(work.path), {})
    saved = Work("ann", "a", work.path, tmp_path / "label.nii.gz")
    interaction.submitted(saved)
    assert np.array_equal(state(interaction, work), drawn)
    # 3D Slicer goes on sending the old point: what it asked for is in the label, or was erased by hand.
    mask, result = click(interaction, saved, foreground=[[15, 8, 8], [26, 7, 5]])
    assert result["mask_from"] == "the submitted label" and mask[26, 7, 5] and not mask[15, 8, 8]
    # And who begins there, begins with the label.
    _, result = click(interaction, Work("eve", "a", work.path, saved.label), foreground=[[26, 7, 5]])
    assert result["mask_from"] == "the submitted label"


def test_one_may_start_again_from_the_model(interaction: Interaction, work: Work) -> None:
    start(interaction, work)
    _, result = click(interaction, work, foreground=[[15, 8, 8]], reset_state="true")
    assert result["mask_from"] == "the model's mask"


def scene(
    labels: np.ndarray, inside: Sequence[tuple[int, ...]], outside: Sequence[tuple[int, ...]]
) -> tuple[np.ndarray, Any]:
    """A map as 3D Slicer exports it: segments in the order of its scene."""
    info = [
        {"name": n, "id": i}
        for i, n in enumerate(("spleen", "liver", "background_scribbles", "foreground_scribbles"), 1)
    ]
    sent = np.select([labels == 2, labels == 1], [1, 2], 0).astype(np.uint8)
    for points, value in ((outside, 3), (inside, 4)):
        for point in points:
            sent[point] = value
    return sent, info


def test_strokes_are_obeyed_and_the_map_they_came_in_is_the_mask(
    interaction: Interaction, work: Work, tmp_path: Path
) -> None:
    labels = start(interaction, work)
    labels[0:3, 30:33, 0:3] = 1  # painted by hand meanwhile
    labels[25:32, 20:27, 5:12] = 0  # erased by hand
    labels[30:33, 5:9, 3:6] = 2
    inside, outside = [(13, 8, 8), (14, 8, 8)], [(6, 6, 6)]
    sent, info = scene(labels, inside, outside)
    write_mask(tmp_path / "sent.nii.gz", sent, AFFINE, str(work.path), {})
    request = {"selected_label_name": "Liver", "label_info": info, "map": tmp_path / "sent.nii.gz", "device": "cpu"}
    file, result = ScribbleInfer(interaction).respond(request, work)
    mask = np.asarray(read_nifti(file).dataobj)
    assert mask[13, 8, 8] and mask[14, 8, 8] and not mask[6, 6, 6] and mask[0:3, 30:33, 0:3].all()
    assert result["label"] == "liver" and result["mask_from"] == "the map with the scribbles"
    after = state(interaction, work)
    assert np.array_equal(after == 2, labels == 2) and np.array_equal(after == 1, mask == 1)


def test_a_map_without_strokes_changes_nothing_and_says_so(
    interaction: Interaction, work: Work, tmp_path: Path
) -> None:
    labels = start(interaction, work)
    sent, info = scene(labels, [], [])
    write_mask(tmp_path / "sent.nii.gz", sent, AFFINE, str(work.path), {})
    request = {"selected_label_name": "liver", "label_info": info, "map": tmp_path / "sent.nii.gz", "device": "cpu"}
    _, result = ScribbleInfer(interaction).respond(request, work)
    assert result["changed"] == 0 and "no stroke is in the label map: nothing is changed" in result["warnings"]
    assert np.array_equal(state(interaction, work), labels)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"label": "heart"}, "label: unknown label 'heart'; valid are liver, spleen, aorta"),
        ({"foreground": [[1, 1, 1]]}, "label: expected the label that the points are about; valid are liver"),
        ({"label": "liver", "foreground": [[40, 0, 0]]}, r"foreground: \[40, 0, 0\] is outside the image"),
        ({"label": "liver", "foreground": "1,1,1"}, r"foreground: expected a list of \[i, j, k\], got str"),
    ],
)
def test_bad_clicks_are_refused_and_change_nothing(
    interaction: Interaction, work: Work, request_: dict[str, Any], message: str
) -> None:
    labels = start(interaction, work)
    with pytest.raises(ValueError, match=message):
        ClickInfer(interaction).respond({"device": "cpu", **request_}, work)
    assert np.array_equal(state(interaction, work), labels)


@pytest.mark.parametrize("bad", [{"foreground": [[99, 0, 0]]}, {"background": [[1, 1, 1]], "foreground": [[1, 1, 1]]}])
def test_a_refused_click_that_would_begin_afresh_leaves_the_mask(
    interaction: Interaction, work: Work, bad: dict[str, Any]
) -> None:
    labels = start(interaction, work)
    with pytest.raises(ValueError, match="voxel|outside the image"):
        ClickInfer(interaction).respond({"label": "liver", "device": "cpu", "reset_state": "true", **bad}, work)
    assert np.array_equal(state(interaction, work), labels)


@pytest.mark.parametrize("shape", [SHAPE, (30, 36, 20)])
def test_an_image_that_was_replaced_is_begun_again(task: Task, tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(-50, 200, SHAPE).astype(np.int16)
    own = Work("ann", "b", write_nifti(tmp_path / "b.nii.gz", values, AFFINE))
    interaction = Interaction(BiPVLInfer(task, tmp_path / "models"), Memory(), Images())
    start(interaction, own)
    write_nifti(own.path, values, AFFINE)  # the same voxels, written again
    assert click(interaction, own, foreground=[[15, 8, 8]])[1]["mask_from"] == "a test"
    write_nifti(own.path, np.random.default_rng(1).integers(-50, 200, shape).astype(np.int16), AFFINE)
    mask, result = click(interaction, own, foreground=[[15, 8, 8]])
    assert mask.shape == shape and mask[15, 8, 8] and result["mask_from"] == "the model's mask"
    assert result["warnings"][0].startswith("the image's file has changed")


def test_bad_scribbles_are_refused_and_change_nothing(interaction: Interaction, work: Work, tmp_path: Path) -> None:
    labels = start(interaction, work)
    sent, info = scene(labels, [(13, 8, 8)], [])
    good, small = tmp_path / "good.nii.gz", tmp_path / "small.nii.gz"
    write_mask(good, sent, AFFINE, str(work.path), {})
    write_mask(small, sent[:-1], AFFINE, str(work.path), {})
    base = {"selected_label_name": "liver", "label_info": info, "map": good, "device": "cpu"}
    for change, message in (
        ({"map": None}, "label: expected the label map with the strokes, as a file; got none"),
        ({"map": small}, "the label is not on the grid of its image"),
        ({"label_info": None}, "label_info: expected `name` and `id` of each segment"),
        ({"label_info": [{"name": "tumour", "id": 1}, *info[1:]]}, "the label shows 'tumour'"),
        ({"selected_label_name": ""}, "selected_label_name: expected the label that the strokes are about"),
    ):
        with pytest.raises(ValueError, match=message):
            ScribbleInfer(interaction).respond({**base, **change}, work)
        assert np.array_equal(state(interaction, work), labels)


def test_a_seg_nrrd_holds_all_labels_because_it_replaces_all_segments(interaction: Interaction, work: Work) -> None:
    start(interaction, work)
    request = {"label": "liver", "device": "cpu", "foreground": [[15, 8, 8]], "result_extension": ".seg.nrrd"}
    file, _ = ClickInfer(interaction).respond(request, work)
    values, header = nrrd.read(str(file))
    assert np.array_equal(values, state(interaction, work)) and header["Segment1_Name"] == "spleen"


def test_the_mask_s_own_pass_is_enough_for_the_first_click(
    interaction: Interaction, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = interaction.engine
    file, _ = engine(
        {"image": str(work.path), "device": "cpu", "logging": "WARNING"},
        made=lambda *made: interaction.remember(work, *made),
    )
    assert file is not None
    shown = np.asarray(read_nifti(file).dataobj)
    assert np.array_equal(state(interaction, work), shown)
    monkeypatch.setattr(engine, "predict", lambda *_: pytest.fail("a window was computed again"))
    _, result = click(interaction, work, foreground=[[15, 8, 8]])
    assert result["mask_from"] == "your last mask" and result["model_version"] == 0


def test_what_was_asked_is_told_until_the_label_is_submitted(
    interaction: Interaction, work: Work, tmp_path: Path
) -> None:
    start(interaction, work)
    click(interaction, work, foreground=[[15, 8, 8]])
    click(interaction, work, foreground=[[15, 8, 8]], background=[[6, 6, 6]])
    click(interaction, work, "spleen", foreground=[[28, 23, 14]])
    click(interaction, work, "spleen", foreground=[])  # taken back
    (found,) = interaction.asked("ann", "a")
    assert (found["task"], found["label"], found["kind"], found["answered_by"]) == (
        "tiny",
        "liver",
        "clicks",
        "evidence",
    )
    assert (found["foreground"], found["background"]) == ([[15, 8, 8]], [[6, 6, 6]])
    assert found["changed"] > 0 and found["box"][0][0] <= 6 and found["box"][0][1] >= 15
    sent, info = scene(state(interaction, work), [(13, 8, 8)], [])
    write_mask(tmp_path / "sent.nii.gz", sent, AFFINE, str(work.path), {})
    request = {"selected_label_name": "Liver", "label_info": info, "map": tmp_path / "sent.nii.gz", "device": "cpu"}
    ScribbleInfer(interaction).respond(request, work)[0].unlink()
    assert [one["kind"] for one in interaction.asked("ann", "a")] == ["clicks", "scribbles"]
    assert interaction.asked("ben", "a") == interaction.asked("ann", "b") == []
    write_mask(tmp_path / "label.nii.gz", state(interaction, work), AFFINE, str(work.path), {})
    interaction.submitted(Work("ann", "a", work.path, tmp_path / "label.nii.gz"))
    assert interaction.asked("ann", "a") == []
