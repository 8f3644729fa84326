"""A real browser on a real archive for tests: Chromium, what its pages asked for, and what the viewer shows."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import generate_uid

if TYPE_CHECKING:
    from playwright import sync_api
else:
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: ./bipvl test installs it"
    )

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="Chromium is not installed (Debian: apt-get install chromium)"
)
# Software rendering, as test machines have no display, and no requests of the browser's own.
FLAGS = [
    *("--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader"),
    *("--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--disable-features=OptimizationHints,MediaRouter"),
]
ELSEWHERE = {"X-Forwarded-For": "192.0.2.10"}  # the server believes a proxy on its own machine
ACCOUNT = {"username": "annotator", "password": "correct horse battery staple"}
ACCOUNT_OF_SERVER = {"BIPVL_USER": ACCOUNT["username"], "BIPVL_PASSWORD": ACCOUNT["password"]}
# A model that segments noise within a second and trains within a few.
SMALL = {
    **{"models": "quickstart", "model.vision": "unet", "model.feature_size": "4", "spacing": "[8, 8, 8]"},
    **{"model.scratch": "{layers: 4, width: 16, heads: 2}", "patch": "[48, 48, 48]"},
}
WAIT = 120_000  # milliseconds for a step of the viewer, on a busy machine
SCREENSHOTS = "BIPVL_SCREENSHOTS"  # a folder to keep pictures in, for a person to look at


@contextmanager
def chromium() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


@dataclass
class Visit:
    """A page, and what it asked for: answers that were refused or failed, and requests to other machines.

    Args:
        expected: parts of lines in `bad` that are not faults.
    """

    page: sync_api.Page
    address: str
    expected: tuple[str, ...] = ("404 GET {address}/datastore/label?",)  # the panel's question whether there is one
    bad: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("response", self._answered)
        self.page.on("requestfailed", self._failed)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _answered(self, response: sync_api.Response) -> None:
        if response.status >= 400:
            self._note(f"{response.status} {response.request.method} {response.url}")
        if not response.url.startswith((self.address, "blob:", "data:")):
            self.elsewhere.append(response.url)

    def _failed(self, request: sync_api.Request) -> None:
        # "csp": the page's own policy stopped it before it left. Requests that the viewer gives up are not faults.
        if request.failure not in ("csp", "net::ERR_ABORTED"):
            self._note(f"{request.failure} {request.method} {request.url}")

    def _note(self, line: str) -> None:
        if not any(line.startswith(part.format(address=self.address)) for part in self.expected):
            self.bad.append(line)

    def assert_clean(self) -> None:
        assert (self.bad, self.elsewhere, self.errors) == ([], [], [])

    def picture(self, name: str) -> None:
        """Keep a screenshot if the environment asks for it."""
        if folder := os.environ.get(SCREENSHOTS):
            self.page.screenshot(path=Path(folder) / f"{name}.png")

    def shown(self) -> np.ndarray:
        """The middle of the first viewport as the user sees it, red, green and blue from 0 to 255, as floats."""
        box = self.page.locator("canvas.cornerstone-canvas").first.bounding_box()
        assert box
        left, top, width, height = box["x"], box["y"], box["width"], box["height"]
        picture = self.page.screenshot(
            clip={"x": left + width / 4, "y": top + height / 4, "width": width / 2, "height": height / 2}
        )
        return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"), float)

    def stroke(self, name: str, radius: int = 12, below: int = 0, fine: bool = False) -> None:
        """Choose a segment and draw with the brush, or its smallest one, across the first viewport, this far below its
        middle."""
        self.page.locator('[data-cy="data-row"]').filter(has_text=name).click()
        self.page.locator('[data-cy="Brush"]').click()
        self.page.get_by_role("slider").first.wait_for()
        if fine:
            self.page.locator("input.input-number").fill("1")
        box = self.page.locator("canvas.cornerstone-canvas").first.bounding_box()
        assert box
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2 + below
        self.page.mouse.move(x - 3 * radius, y)
        self.page.mouse.down()
        self.page.mouse.move(x + 3 * radius, y, steps=6)
        self.page.mouse.up()

    def open_study(self, patient: str, mode: str) -> None:
        """From the study list into a mode of the viewer, until its viewports show pictures."""
        self.page.goto(f"{self.address}/ohif/")
        self.page.get_by_text(patient).first.click()
        self.page.get_by_role("button", name=mode).click()
        self.wait_for_pictures()
        notice = self.page.get_by_role("button", name="Confirm and Hide")
        if notice.is_visible():
            notice.click()

    def wait_for_pictures(self) -> None:
        self.page.wait_for_function(
            """() => {
                const canvases = [...document.querySelectorAll('canvas.cornerstone-canvas')]
                const coloured = canvas => {
                    const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data
                    return new Set(pixels).size > 100
                }
                return canvases.length && canvases.every(coloured)
            }"""
        )


@contextmanager
def visiting(browser: sync_api.Browser, address: str) -> Iterator[Visit]:
    """A browser on another machine whose user has typed name and password."""
    context = browser.new_context(
        http_credentials={"username": ACCOUNT["username"], "password": ACCOUNT["password"]},
        extra_http_headers=ELSEWHERE,
        viewport={"width": 1280, "height": 800},
    )
    context.set_default_timeout(WAIT)
    yield Visit(context.new_page(), address)
    context.close()


def another_patient(files: list[Path], folder: Path, patient: str) -> tuple[str, str]:
    """Write slices of a series as one of another patient.

    Returns:
        Its study's and its own UID.
    """
    folder.mkdir()
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    for file in files:
        ds = pydicom.dcmread(file)
        ds.PatientID, ds.PatientName = patient, patient
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study, series, frame
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        ds.save_as(folder / file.name)
    return study, series
