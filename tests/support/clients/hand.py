"""An annotator's hand in the viewer for tests: it finds places, clicks, draws and submits."""

from __future__ import annotations

from typing import Any

import numpy as np

from support.clients.browser import Visit
from support.clients.panel import Site, assert_holds, button, drawing, wait_for

FIRST = "canvas.cornerstone-canvas"
# The voxel (i, j, k) of the drawing that a point of a viewport, counted from 0, shows.
VOXEL = """([number, x, y]) => {
    const canvas = document.querySelectorAll('canvas.cornerstone-canvas')[number]
    const viewports = cornerstone.getRenderingEngines().flatMap(engine => engine.getViewports())
    const viewport = viewports.find(each => each.canvas === canvas)
    const { left, top } = canvas.getBoundingClientRect()
    const segmentation = cornerstoneTools.segmentation.state.getSegmentations()[0]
    const { imageData } = cornerstone.cache.getVolume(segmentation.representationData.Labelmap.volumeId)
    return [...imageData.worldToIndex(viewport.canvasToWorld([x - left, y - top]))].map(Math.round)
}"""


class Dialogs:
    """Answers the questions of the page with yes, or with `answers` as long as there are some."""

    def __init__(self, visit: Visit) -> None:
        self.asked: list[str] = []
        self.answers: list[bool] = []
        visit.page.on("dialog", self._answer)

    def _answer(self, dialog: Any) -> None:
        self.asked.append(dialog.message)
        if self.answers and not self.answers.pop(0):
            dialog.dismiss()
        else:
            dialog.accept()


class Hand:
    """The annotator's: finds places in a viewport, and points at them."""

    def __init__(self, visit: Visit, site: Site, patient: str) -> None:
        self.visit, self.page, self.site, self.patient = visit, visit.page, site, patient
        self.submits = len(site.segmentations(patient))

    @property
    def mask(self) -> np.ndarray:
        """(slice, row, column)."""
        return drawing(self.visit).voxels

    def place(self, x: float, y: float, viewport: int = 0) -> tuple[float, float]:
        """On the page, from shares of a viewport."""
        box = self.page.locator(FIRST).nth(viewport).bounding_box()
        assert box
        return round(box["x"] + x * box["width"]), round(box["y"] + y * box["height"])

    def voxel(self, place: tuple[float, float], viewport: int = 0) -> tuple[int, int, int]:
        """As indices of `mask`."""
        i, j, k = self.page.evaluate(VOXEL, [viewport, *place])
        return k, j, i

    def find(self, mask: np.ndarray, value: int, equal: bool, n: int = 0) -> tuple[float, float]:
        """A place in the first viewport, within the body, whose voxel has a label's value, or has not."""
        found = 0
        for y in np.linspace(0.42, 0.58, 33):
            for x in np.linspace(0.3, 0.7, 25):
                place = self.place(x, y)
                if (mask[self.voxel(place)] == value) == equal:
                    if found == n:
                        return place
                    found += 1
        raise AssertionError(f"no voxel with value {value}: {equal}")

    def answer(self, act: Any) -> None:
        """Do something, and wait until the server has answered it."""
        count = "() => performance.getEntriesByName('bipvl-answer').length"
        before = self.page.evaluate(count)
        act()
        self.page.wait_for_function(f"n => ({count})() > n", arg=before)
        self.page.wait_for_function("() => true")

    def click(self, place: tuple[float, float]) -> None:
        self.answer(lambda: self.page.mouse.click(*place))

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        self.page.mouse.move(*start)
        self.page.mouse.down()
        self.page.mouse.move(*end, steps=5)
        self.page.mouse.up()

    def choose(self, label: str) -> None:
        self.page.locator('[data-cy="data-row"]').filter(has_text=label).first.click()
        wait_for(self.visit, ".correct .label", label)

    def submit(self) -> None:
        """And compare what the archive has with what is shown, voxel by voxel."""
        shown = drawing(self.visit)
        saved = lambda answer: "/datastore/label" in answer.url and answer.request.method == "PUT"  # noqa: E731
        with self.page.expect_response(saved):
            button(self.visit, "Submit Label").click()
        wait_for(self.visit, ".drawn", "Submitted at")
        self.page.locator(".submit:enabled").wait_for()
        held = self.site.segmentations(self.patient)
        self.submits += 1
        assert len(held) == self.submits
        assert_holds(held[-1], shown, self.site.series[self.patient])
