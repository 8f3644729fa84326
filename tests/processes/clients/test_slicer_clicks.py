"""Clicks and scribbles of 3D Slicer, with its own requests, on a server with the shipped model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from monailabel.client.client import MONAILabelClientException
from scipy import ndimage

from support.clients.slicer import Slicer, shown
from support.server import Server

CLICKS, SCRIBBLES = "quickstart_clicks", "quickstart_scribbles"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, phantoms: Callable[..., None]) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("clicks")
    phantoms(folder / "studies", cases=2, labelled=0)
    conf = {"models": "quickstart", "score_cases": "0"}
    with Server(folder / "studies", folder / "models", conf) as running:
        yield running


@pytest.fixture
def slicer(server: Server, tmp_path: Path) -> Slicer:
    return Slicer(server.url, tmp_path)


def beside(mask: np.ndarray, free: np.ndarray) -> list[int]:
    """A voxel two away from a mask, and free."""
    ring = ndimage.binary_dilation(mask, iterations=2) & ~ndimage.binary_dilation(mask) & free
    return [int(n) for n in np.argwhere(ring)[len(np.argwhere(ring)) // 2]]


def deep(mask: np.ndarray) -> list[int]:
    """The innermost voxel of a mask."""
    depth = ndimage.distance_transform_edt(mask)
    return [int(n) for n in np.unravel_index(depth.argmax(), depth.shape)]


def test_both_panels_appear(slicer: Slicer) -> None:
    found = {name: (model["type"], model["dimension"]) for name, model in slicer.info["models"].items()}
    assert found == {"quickstart": ("segmentation", 3), CLICKS: ("deepgrow", 3), SCRIBBLES: ("scribbles", 3)}
    assert slicer.info["models"][CLICKS]["labels"] == slicer.info["models"]["quickstart"]["labels"]


def test_clicks_from_the_first_mask_to_the_submitted_label(server: Server, slicer: Slicer) -> None:
    slicer.next_sample()
    slicer.run("quickstart")
    before = {name: mask.copy() for name, mask in slicer.segments.items()}
    free = ~np.any(list(before.values()), axis=0)
    more, less = beside(before["liver"], free), deep(before["liver"])
    answer = slicer.click(CLICKS, "liver", [more], [])
    assert answer["mask_from"] == "your last mask" and answer["model_version"] == 1 and answer["warnings"] == []
    assert slicer.segments["liver"][tuple(more)]
    slicer.click(CLICKS, "liver", [more], [less])
    assert slicer.segments["liver"][tuple(more)] and not slicer.segments["liver"][tuple(less)]
    for name, mask in slicer.segments.items():
        assert name == "liver" or np.array_equal(mask, before[name])
    slicer.click(CLICKS, "liver", [], [])  # both points were deleted
    assert np.array_equal(slicer.segments["liver"], before["liver"])

    # What is painted by hand and submitted is what the next click starts from.
    painted = np.zeros_like(free)
    painted[2:5, 2:5, 2:5] = True
    slicer.segments["liver"] |= painted
    slicer.segments["spleen"][tuple(deep(before["spleen"]))] = False
    spleen = slicer.segments["spleen"].copy()
    slicer.submit()
    answer = slicer.click(CLICKS, "liver", [more], [])
    assert answer["mask_from"] == "the submitted label"
    assert slicer.segments["liver"][painted].all() and slicer.segments["liver"][tuple(more)]
    second = beside(spleen, free)
    slicer.click(CLICKS, "spleen", [second], [])
    assert not slicer.segments["spleen"][tuple(deep(before["spleen"]))]

    # What was asked is kept with the label that came of it: not what was taken back, and nothing that a client says.
    place = {"label": slicer.sample["id"], "tag": "final"}
    assert "clicks" not in server.call("GET", "/datastore/label/info", params=place).json()
    slicer.submit()
    kept = server.call("GET", "/datastore/label/info", params=place).json()["clicks"]
    assert [(one["label"], one["foreground"], one["background"]) for one in kept] == [
        ("liver", [more], []),
        ("spleen", [second], []),
    ]
    assert {(one["task"], one["version"], one["answered_by"]) for one in kept} == {("quickstart", 1, "evidence")}


def test_scribbles_start_from_the_scene_as_it_is(slicer: Slicer) -> None:
    slicer.next_sample()
    slicer.run("quickstart")
    painted = np.zeros(slicer.volume.shape, bool)
    painted[1:4, 1:4, 1:4] = True
    slicer.segments["aorta"] |= painted  # by hand, not submitted
    before = {name: mask.copy() for name, mask in slicer.segments.items()}
    inside, outside = np.zeros((2, *slicer.volume.shape), bool)
    more, less = beside(before["liver"], ~np.any(list(before.values()), axis=0)), deep(before["liver"])
    inside[tuple(more)] = outside[tuple(less)] = True
    slicer.scribble(SCRIBBLES, "liver", inside, outside)
    assert slicer.segments["liver"][tuple(more)] and not slicer.segments["liver"][tuple(less)]
    assert slicer.segments["aorta"][painted].all()
    scribbled = slicer.segments["liver"].copy()
    answer = slicer.click(CLICKS, "aorta", [beside(painted, ~np.any(list(slicer.segments.values()), axis=0))], [])
    assert answer["mask_from"] == "your last scribbles" and slicer.segments["aorta"][painted].all()
    assert np.array_equal(slicer.segments["liver"], scribbled)


def test_people_are_apart(server: Server, slicer: Slicer, tmp_path: Path) -> None:
    slicer.next_sample()
    slicer.run("quickstart")
    slicer.click(CLICKS, "liver", [[1, 1, 1]], [])
    (tmp_path / "other").mkdir()
    other = Slicer(server.url, tmp_path / "other", client_id="somebody else")
    other.open(str(slicer.folder / "cache" / slicer.sample["name"]), slicer.sample)
    assert other.click(CLICKS, "spleen", [[1, 1, 2]], [])["mask_from"] != "your last mask"
    assert slicer.click(CLICKS, "liver", [[1, 1, 1]], [])["mask_from"] == "your last mask"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"foreground": [[1000, 0, 0]]}, "foreground: [1000, 0, 0] is outside the image; valid are 0 to"),
        ({"label": "heart"}, "label: unknown label 'heart'; valid are liver, spleen"),
        ({"foreground": [[1, 1, 1]] * 20001}, "foreground: 20001 points; valid are at most 20000"),
        ({"foreground": [[1, 1]]}, "foreground: expected [i, j, k] in voxels, got [1, 1]"),
    ],
)
def test_bad_clicks_get_a_sentence(slicer: Slicer, change: dict, sentence: str) -> None:
    slicer.next_sample()
    with pytest.raises(MONAILabelClientException) as error:
        slicer.client().infer(CLICKS, slicer.sample["id"], {"label": "liver", "foreground": [[1, 1, 1]], **change})
    assert shown(error.value).startswith(sentence)


def test_a_map_on_another_grid_gets_a_sentence(slicer: Slicer) -> None:
    slicer.next_sample()
    slicer.volume = slicer.volume[:-1]
    slicer.segments = {name: mask[:-1] for name, mask in slicer.segments.items()}
    none = np.zeros(slicer.volume.shape, bool)
    with pytest.raises(MONAILabelClientException) as error:
        slicer.scribble(SCRIBBLES, "liver", none, none)
    assert "the label is not on the grid of its image" in shown(error.value)
