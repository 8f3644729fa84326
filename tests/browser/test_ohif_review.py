"""Where the model doubts, in OHIF on a real archive: the list, the way to each place, and answers that are kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.clients.browser import (
    ACCOUNT,
    Visit,
    another_patient,
    chromium,
    needs_browser,
    visiting,
)
from support.clients.hand import Dialogs, Hand
from support.clients.panel import LABELS, POINT, Site, button, serving, wait_for
from support.dicom.archive import needs_orthanc

PATIENTS = {"CASE-A": slice(12, 28), "CASE-B": slice(28, 38)}
# Of each viewport, how far a place lies before its slice (mm), and where on the view it is, from 0 to 1.
WHERE = """centre => [...document.querySelectorAll('canvas.cornerstone-canvas')].map(canvas => {
    const viewports = cornerstone.getRenderingEngines().flatMap(engine => engine.getViewports())
    const viewport = viewports.find(each => each.canvas === canvas)
    const { focalPoint, viewPlaneNormal } = viewport.getCamera()
    const [x, y] = viewport.worldToCanvas(centre)
    const depth = centre.reduce((sum, mm, axis) => sum + (mm - focalPoint[axis]) * viewPlaneNormal[axis], 0)
    return [depth, x / canvas.clientWidth, y / canvas.clientHeight]
})"""


@pytest.fixture(scope="module")
def site(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("review")
    files = sorted((real_data / "dicom_ct" / "crlm-ct-1004").iterdir())
    series = {p: another_patient(files[part], folder / p, p)[1] for p, part in PATIENTS.items()}
    with serving(folder, PATIENTS, {"models": "quickstart"}) as (archive, server):
        yield Site(archive, server, series)


@pytest.fixture()
def visit(site: Site) -> Iterator[Visit]:
    with chromium() as browser, visiting(browser, site.server.url) as started:
        yield started


def kept(site: Site, patient: str) -> dict[str, Any]:
    return site.ask("GET", "/doubts/quickstart", params={"image": site.series[patient], "look": "false"})


def said(place: dict[str, Any]) -> list[tuple[str, str, int]]:
    return [(answer["answer"], answer["who"], answer["version"]) for answer in place["answers"]]


def assert_shown(visit: Visit, place: dict[str, Any], number: int) -> None:
    """A place is the chosen one, and every view shows its slice, with the place in sight."""
    chosen = visit.page.locator(".places [aria-current]")
    assert chosen.get_by_text(place["why"]).is_visible()
    assert visit.page.locator(".places > li").nth(number).get_attribute("aria-current") == "true"
    views = visit.page.evaluate(WHERE, place["centre"])
    assert len(views) == 3
    for depth, x, y in views:
        assert abs(depth) < 0.01 and 0 <= x < 1 and 0 <= y < 1


@pytest.mark.slow
@needs_orthanc
@needs_browser
def test_places_are_listed_shown_answered_and_kept(site: Site, visit: Visit) -> None:
    visit.open_study("CASE-A", "MONAI Label")
    page, hand = visit.page, Hand(visit, site, "CASE-A")
    Dialogs(visit)
    wait_for(visit, ".review .state", "The list comes with the mask")
    page.keyboard.press("n")  # nothing to go to
    button(visit, "Auto-Segmentation").click()
    rows = page.locator(".places > li")
    rows.first.wait_for()
    places = kept(site, "CASE-A")["places"]
    assert 1 < len(places) <= 10 and rows.count() == len(places)
    for number, place in enumerate(places):
        text = rows.nth(number).inner_text()
        rival = "" if place["instead"] == "background" else f" or {place['instead']}"
        assert text.startswith(place["label"] + rival) and " ml, " in text
    wait_for(visit, ".review .seen", f"0 of {len(places)} answered")

    # A click goes to a place in all views, N to the next one.
    rows.first.get_by_role("button").first.click()
    assert_shown(visit, places[0], 0)
    visit.picture("ohif-doubts")
    page.keyboard.press("n")
    assert_shown(visit, places[1], 1)

    # It looks right: kept, and on to the next.
    rows.first.get_by_role("button").first.click()
    button(visit, "Looks right").click()
    wait_for(visit, ".places > li:first-child", "looks right (annotator")
    assert said(kept(site, "CASE-A")["places"][0]) == [("right", ACCOUNT["username"], 1)]
    assert_shown(visit, places[1], 1)
    wait_for(visit, ".review .seen", f"1 of {len(places)} answered")

    # It is to be fixed: the structure is chosen, the tool that it needs is taken, and a click does it.
    visit.page.locator('[data-cy="data-row"]').last.click()
    button(visit, "Fix it here").click()
    wait_for(visit, ".places > li:nth-child(2)", "to be fixed (annotator")
    assert said(kept(site, "CASE-A")["places"][1]) == [("fix", ACCOUNT["username"], 1)]
    wait_for(visit, ".correct .label", places[1]["label"])
    point = page.evaluate(POINT, places[1]["centre"])
    value, voxel = LABELS[places[1]["label"]]["value"], hand.voxel(point)
    inside = hand.mask[voxel] == value
    tool = page.locator(f'[data-tool="{"click-out" if inside else "click-in"}"]')
    assert tool.get_attribute("aria-pressed") == "true"
    hand.click(point)
    assert (hand.mask[voxel] == value) != inside
    visit.picture("ohif-fix-here")
    assert rows.count() == len(places)

    # The server is away for a moment: the answer is not kept, the panel says so, and drawing goes on.
    visit.expected += ("net::ERR_FAILED PUT",)
    page.route("**/doubts/**", lambda route: route.abort())
    rows.first.get_by_role("button").first.click()
    button(visit, "Fix it here").click()
    wait_for(visit, ".review .state", "The server does not answer")
    assert said(kept(site, "CASE-A")["places"][0]) == [("right", ACCOUNT["username"], 1)]
    page.unroute("**/doubts/**")

    # Another list has come meanwhile: it is shown, and the panel says why.
    visit.expected += ("404 PUT",)
    page.route(
        "**/doubts/**",
        lambda route: (
            route.fulfill(status=404, json={"detail": "place: another list"})
            if route.request.method == "PUT"
            else route.continue_()
        ),
    )
    with page.expect_response(lambda answer: "/doubts/" in answer.url and answer.request.method == "GET"):
        button(visit, "Looks right").click()
    wait_for(visit, ".review .state", "Place: another list")
    assert rows.count() == len(places)
    page.unroute("**/doubts/**")
    hand.submit()

    # Opened again: what was answered is there, without a mask.
    page.reload()
    visit.wait_for_pictures()
    wait_for(visit, ".review .seen", f"2 of {len(places)} answered")
    wait_for(visit, ".places > li:nth-child(1)", "looks right (annotator")
    wait_for(visit, ".places > li:nth-child(2)", "to be fixed (annotator")
    assert not hand.mask.any()
    page.keyboard.press("n")  # past those with an answer, if there are more
    assert_shown(visit, places[2 % len(places)], 2 % len(places))
    visit.assert_clean()


@pytest.mark.slow
@needs_orthanc
@needs_browser
def test_the_model_can_look_without_drawing_and_nobody_waits_for_it(site: Site, visit: Visit) -> None:
    visit.open_study("CASE-B", "MONAI Label")
    page, hand = visit.page, Hand(visit, site, "CASE-B")
    held: list[Any] = []
    page.route("**/doubts/quickstart?*look=true*", lambda route: held.append(route))
    button(visit, "Let the model look").click()
    wait_for(visit, ".review .state", "The model is looking")
    before = hand.mask
    visit.stroke("spleen")  # drawing goes on meanwhile, and so does submitting
    wait_for(visit, ".drawn", "Your drawing is not submitted")
    drawn = hand.mask
    assert len(held) == 1 and (drawn != before).any()
    hand.submit()
    page.locator("button.unlook").click()
    wait_for(visit, ".review .state", "The list comes with the mask")
    assert page.locator(".places > li").count() == 0 and kept(site, "CASE-B")["version"] is None
    page.unroute("**/doubts/quickstart?*look=true*")
    button(visit, "Let the model look").click()
    page.locator(".places > li").first.wait_for()
    assert np.array_equal(hand.mask, drawn)
    assert page.locator(".places > li").count() == len(kept(site, "CASE-B")["places"])
    assert page.locator("button.look").is_hidden()
    visit.assert_clean()
