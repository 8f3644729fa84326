"""Corrections in OHIF, on a real archive: clicks, scribbles, box, undo, cancel, and a server that goes away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.clients.browser import Visit, another_patient, chromium, needs_browser, visiting
from support.clients.hand import Dialogs, Hand
from support.clients.panel import LABELS, Site, button, serving, wait_for
from support.dicom.archive import needs_orthanc

PATIENT = "CASE-A"
LIVER, AORTA = LABELS["liver"]["value"], LABELS["aorta"]["value"]
LOCK = """value => {
    const { state, segmentLocking } = cornerstoneTools.segmentation
    segmentLocking.setSegmentIndexLocked(state.getSegmentations()[0].segmentationId, value, true)
}"""


@pytest.fixture(scope="module")
def site(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("clicks")
    files = sorted((real_data / "dicom_ct" / "crlm-ct-1004").iterdir())
    series = {PATIENT: another_patient(files[12:28], folder / PATIENT, PATIENT)[1]}
    with serving(folder, [PATIENT], {"models": "quickstart"}) as (archive, server):
        yield Site(archive, server, series)


@pytest.fixture()
def visit(site: Site) -> Iterator[Visit]:
    with chromium() as browser, visiting(browser, site.server.url) as started:
        started.open_study(PATIENT, "MONAI Label")
        started.page.locator(".correct").wait_for()
        yield started


@pytest.fixture()
def dialogs(visit: Visit) -> Dialogs:
    return Dialogs(visit)


def segment(visit: Visit) -> None:
    button(visit, "Auto-Segmentation").click()
    wait_for(visit, ".version", "Drawn by version 1")
    visit.page.locator(".submit:enabled").wait_for()


@pytest.mark.slow
@needs_orthanc
@needs_browser
def test_every_way_to_correct_ends_in_the_archive(site: Site, visit: Visit, dialogs: Dialogs) -> None:
    hand, page = Hand(visit, site, PATIENT), visit.page
    states = [hand.mask]
    assert not states[0].any() and page.locator("button.undo").is_disabled()
    segment(visit)
    states.append(hand.mask)
    assert states[1].any()

    # A click takes its voxel, and nobody else's label moves.
    hand.choose("liver")
    page.keyboard.press("a")
    assert page.locator('[data-tool="click-in"]').get_attribute("aria-pressed") == "true"
    place = hand.find(states[-1], LIVER, equal=False)
    clicked = hand.voxel(place)
    taken = states[-1][clicked]
    hand.click(place)
    states.append(hand.mask)
    assert states[-1][clicked] == LIVER
    moved = states[-1] != states[-2]
    assert set(np.unique(states[-2][moved])) <= {0, taken} and set(np.unique(states[-1][moved])) == {LIVER}
    visit.picture("ohif-click")
    hand.submit()

    # The other kind, after the first and far from it: both are obeyed.
    page.keyboard.press("s")
    away = hand.find(states[-1], LIVER, equal=True, n=30)
    hand.click(away)
    states.append(hand.mask)
    assert states[-1][hand.voxel(away)] != LIVER and states[-1][clicked] == LIVER

    # Scribbles: every voxel below the line.
    page.keyboard.press("d")
    line = [hand.place(x, 0.55) for x in (0.42, 0.5)]
    hand.answer(lambda: hand.drag(*line))
    states.append(hand.mask)
    assert all(states[-1][hand.voxel(end)] == LIVER for end in line)
    k, row, _ = hand.voxel(line[0])
    columns = sorted(hand.voxel(end)[2] for end in line)
    assert (states[-1][k, row, columns[0] : columns[1] + 1] == LIVER).all()
    visit.picture("ohif-scribble")
    page.keyboard.press("f")
    line = [hand.place(0.46, y) for y in (0.53, 0.57)]
    hand.answer(lambda: hand.drag(*line))
    states.append(hand.mask)
    assert all(states[-1][hand.voxel(end)] != LIVER for end in line)
    hand.submit()

    # A box, in one view and, across its slices, in another: nothing changes outside.
    page.keyboard.press("b")
    corners = [hand.place(0.4, 0.48), hand.place(0.6, 0.56)]
    hand.drag(*corners)
    deep = [hand.place(0.45, 0.49, 1), hand.place(0.6, 0.51, 1)]
    hand.drag(*deep)
    page.keyboard.press("a")
    (_, j0, i0), (_, j1, i1) = (hand.voxel(corner) for corner in corners)
    k0, k1 = sorted(hand.voxel(corner, 1)[0] for corner in deep)
    _, jd0, _ = hand.voxel(deep[0], 1)
    _, jd1, _ = hand.voxel(deep[1], 1)
    visit.picture("ohif-box")
    page.mouse.click(*hand.place(0.2, 0.5))
    wait_for(visit, ".message", "outside of the box")
    middle = hand.place(0.5, 0.52)
    assert k0 <= hand.voxel(middle)[0] <= k1
    hand.choose("aorta")
    hand.click(middle)
    states.append(hand.mask)
    moved = np.argwhere(states[-1] != states[-2])
    assert states[-1][hand.voxel(middle)] == AORTA and len(moved)
    low, high = moved.min(0), moved.max(0)
    assert k0 <= low[0] and high[0] <= k1 and i0 <= low[2] and high[2] <= i1
    assert min(j0, j1, jd0, jd1) <= low[1] and high[1] <= max(j0, j1, jd0, jd1)
    button(visit, "Remove the box").click()
    hand.submit()

    # A stroke of the viewer's brush, and a click after it: the server answers on top of it.
    visit.stroke("spleen", below=20)
    wait_for(visit, ".drawn", "Your drawing is not submitted")
    assert page.locator('[data-tool="click-in"]').get_attribute("aria-pressed") == "false"
    page.wait_for_timeout(200)
    states.append(hand.mask)
    assert (states[-1] != states[-2]).any()
    hand.choose("liver")
    page.keyboard.press("a")
    place = hand.find(states[-1], 0, equal=True, n=9)
    hand.click(place)
    states.append(hand.mask)
    assert states[-1][hand.voxel(place)] == LIVER
    moved = states[-1] != states[-2]
    assert set(np.unique(states[-2][moved])) <= {0}

    # Collected: the server is asked once for two, also of two structures.
    page.get_by_label("Answer at once").uncheck()
    places = [hand.find(states[-1], 0, equal=True, n=n) for n in (30, 70)]
    page.mouse.click(*places[0])
    hand.choose("aorta")
    page.mouse.click(*places[1])
    wait_for(visit, "button.send", "Send 2")
    assert np.array_equal(hand.mask, states[-1])
    page.keyboard.press("Enter")
    page.locator("button.send:disabled").wait_for()
    wait_for(visit, ".said", "of aorta changed")
    final = hand.mask
    assert final[hand.voxel(places[0])] == LIVER and final[hand.voxel(places[1])] == AORTA
    page.get_by_label("Answer at once").check()
    hand.submit()
    page.keyboard.press("Control+z")
    page.keyboard.press("Control+z")
    np.testing.assert_array_equal(hand.mask, states[-1])

    # Back to the beginning and forth again, over all of it.
    for state in states[-2::-1]:
        page.keyboard.press("Control+z")
        np.testing.assert_array_equal(hand.mask, state)
    assert page.locator("button.undo").is_disabled()
    for state in states[1:]:
        page.keyboard.press("Control+y")
        np.testing.assert_array_equal(hand.mask, state)
    page.keyboard.press("Control+Shift+z")
    page.keyboard.press("Control+Shift+z")
    np.testing.assert_array_equal(hand.mask, final)
    assert page.locator("button.redo").is_disabled()
    assert wait_for(visit, ".drawn", "Submitted at"), "it is as it was submitted"

    # After undo, the same click again: the server answers on the mask that is shown.
    page.keyboard.press("Control+z")
    before = hand.mask
    hand.click(places[1])
    assert hand.mask[hand.voxel(places[1])] == AORTA and (hand.mask != before).any()
    hand.submit()
    visit.assert_clean()


@pytest.mark.slow
@needs_orthanc
@needs_browser
def test_undo_of_more_than_twenty_steps_over_loading_and_segmenting(site: Site, visit: Visit, dialogs: Dialogs) -> None:
    hand, page = Hand(visit, site, PATIENT), visit.page
    hand.choose("liver")
    page.keyboard.press("a")
    hand.click(hand.place(0.5, 0.5))  # the first answer looks at the image, as nobody has asked for a mask
    states = [np.zeros_like(hand.mask), hand.mask]
    for number in range(12):
        mask = hand.mask
        less = number % 3 == 2
        page.keyboard.press("s" if less else "a")
        hand.click(hand.find(mask, LIVER, equal=less, n=0 if less else 5 * number))
        states.append(hand.mask)
        assert (states[-1] != states[-2]).any()
    hand.submit()
    page.reload()
    visit.wait_for_pictures()
    button(visit, "Load the submitted label").click()
    page.locator("button.undo:enabled").wait_for()
    np.testing.assert_array_equal(hand.mask, states[-1])
    steps = [np.zeros_like(states[0]), states[-1]]
    page.keyboard.press("a")
    for number in range(19):
        hand.click(hand.find(steps[-1], LIVER, equal=False, n=7 * number))
        steps.append(hand.mask)
    segment(visit)
    steps.append(hand.mask)
    assert len(steps) > 21
    for state in steps[-2::-1]:
        page.keyboard.press("Control+z")
        np.testing.assert_array_equal(hand.mask, state)
    for state in steps[1:]:
        page.keyboard.press("Control+y")
        np.testing.assert_array_equal(hand.mask, state)
    hand.submit()
    visit.assert_clean()


@pytest.mark.slow
@needs_orthanc
@needs_browser
def test_requests_can_be_given_up(site: Site, visit: Visit, dialogs: Dialogs) -> None:
    hand, page = Hand(visit, site, PATIENT), visit.page
    segment(visit)
    before = hand.mask
    held: list[Any] = []
    page.route("**/infer/quickstart*?image=*", lambda route: held.append(route))  # the server takes its time
    button(visit, "Auto-Segmentation").click()
    page.locator("button.cancel").click()
    wait_for(visit, ".message", "Cancelled")
    hand.choose("liver")
    page.keyboard.press("a")
    place = hand.find(before, LIVER, equal=False)
    page.mouse.click(*place)
    page.locator("button.cancel").wait_for()
    visit.picture("ohif-cancel")
    page.keyboard.press("Escape")
    wait_for(visit, ".message", "Cancelled")
    assert len(held) == 2 and np.array_equal(hand.mask, before)
    page.unroute("**/infer/quickstart*?image=*")
    hand.click(place)
    assert hand.mask[hand.voxel(place)] == LIVER

    # Whoever has clicked is asked before the model's mask replaces it.
    clicked = hand.mask
    dialogs.answers = [False]
    button(visit, "Auto-Segmentation").click()
    assert dialogs.asked[-1].startswith("This replaces your drawing, with all clicks and scribbles.")
    assert len(dialogs.asked) == 1 and np.array_equal(hand.mask, clicked)
    segment(visit)
    np.testing.assert_array_equal(hand.mask, before)
    page.keyboard.press("Control+z")
    np.testing.assert_array_equal(hand.mask, clicked)

    # A structure that is locked stays as it is.
    page.evaluate(LOCK, AORTA)
    page.keyboard.press("a")
    page.mouse.click(*hand.find(clicked, AORTA, equal=True))
    wait_for(visit, ".message", "aorta is locked")
    np.testing.assert_array_equal(hand.mask, clicked)
    hand.submit()
    visit.assert_clean()


@pytest.mark.slow
@needs_orthanc
@needs_browser
def test_a_server_that_is_killed_between_clicks_loses_nothing(site: Site, visit: Visit, dialogs: Dialogs) -> None:
    hand, page = Hand(visit, site, PATIENT), visit.page
    visit.expected += ("409 POST", "net::ERR", "502", "503")
    segment(visit)
    hand.choose("liver")
    page.keyboard.press("a")
    first = hand.find(hand.mask, LIVER, equal=False)
    hand.click(first)

    def restart(between: Any = lambda: None) -> None:
        site.server.process.kill()
        site.server.process.wait()
        between()
        site.server.__enter__()

    # Nothing was done meanwhile: the next click brings the mask along.
    restart()
    before = hand.mask
    second = hand.find(before, 0, equal=True, n=40)
    hand.click(second)
    after = hand.mask
    assert after[hand.voxel(first)] == after[hand.voxel(second)] == LIVER
    moved = after != before
    assert set(np.unique(before[moved])) == {0} and set(np.unique(after[moved])) == {LIVER}

    # Clicks and strokes while it is away: the panel says what to do, and sends them when asked again.
    third = hand.find(after, 0, equal=True, n=80)

    def meanwhile() -> None:
        page.mouse.click(*third)
        wait_for(
            visit, ".message.error", "The server does not answer. Your drawing is still here: try again in a moment"
        )
        visit.picture("ohif-server-gone")
        assert np.array_equal(hand.mask, after)
        visit.stroke("spleen", below=30)

    restart(meanwhile)
    page.wait_for_timeout(200)
    stroked = hand.mask
    assert (stroked != after).any()
    hand.answer(lambda: button(visit, "Try again").click())
    last = hand.mask
    assert last[hand.voxel(third)] == LIVER
    moved = last != stroked
    assert set(np.unique(stroked[moved])) <= {0, stroked[hand.voxel(third)]} and set(np.unique(last[moved])) == {LIVER}
    hand.submit()
    assert visit.errors == []
