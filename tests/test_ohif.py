"""OHIF in a real browser, from another machine, with a login, on a real archive."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from archive import Archive, needs_orthanc
from lib.web import ohif
from server import Server

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: ./bipvl test installs it")

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
SLICES = 16
WAIT = 60_000  # milliseconds for a step of the viewer
SCREENSHOTS = "BIPVL_SCREENSHOTS"  # a folder to keep pictures in, for a person to look at

# --- the files of the viewer ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files() -> TestClient:
    app = FastAPI()
    app.include_router(ohif.router())
    return TestClient(app)


def test_page_has_no_address_elsewhere_and_its_manifest_knows_the_login(files: TestClient) -> None:
    answer = files.get("/ohif/")
    assert 'href="http' not in answer.text and 'src="http' not in answer.text
    assert '<link rel="manifest" crossorigin="use-credentials" href="/ohif/manifest.json"/>' in answer.text
    assert '<script rel="preload" as="script" src="/ohif/app-config.js"></script>' in answer.text  # the rest stays
    assert answer.headers["content-security-policy"].startswith("default-src 'self'")


@pytest.mark.parametrize("path", ["viewer?StudyInstanceUIDs=1.2.3", "monai-label", "segmentation/dicomweb", "assets"])
def test_addresses_that_the_viewer_makes_up_are_its_page(files: TestClient, path: str) -> None:
    assert files.get(f"/ohif/{path}").text == files.get("/ohif/").text


def test_address_without_slash_leads_to_the_page(files: TestClient) -> None:
    answer = files.get("/ohif?StudyInstanceUIDs=1.2.3", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (307, "/ohif/?StudyInstanceUIDs=1.2.3")


def test_files_below_folders_are_found(files: TestClient) -> None:
    names = [file.relative_to(ohif.FOLDER).as_posix() for file in ohif.FOLDER.rglob("*.png")]
    answer = files.get(f"/ohif/{names[0]}")
    assert "/" in names[0]
    assert answer.content == (ohif.FOLDER / names[0]).read_bytes()
    assert answer.headers["content-type"] == "image/png"


def test_only_names_that_change_with_the_content_are_kept_without_asking(files: TestClient) -> None:
    script = next(ohif.FOLDER.glob("app.bundle.*.js")).name
    assert "immutable" in files.get(f"/ohif/{script}").headers["cache-control"]
    style = files.get("/ohif/app.bundle.css")
    assert style.headers["cache-control"] == "private, no-cache"
    again = files.get("/ohif/app.bundle.css", headers={"If-None-Match": style.headers["etag"]})
    assert again.status_code == 304
    assert "immutable" not in files.get("/ohif/").headers["cache-control"]


@pytest.mark.parametrize(
    "path",
    [
        "missing.js",
        "..%2f..%2f..%2fconfig.py",
        "%2e%2e/%2e%2e/%2e%2e/config.py",
        "assets/..%2f..%2f..%2f..%2fconfig.py",
        "..%5c..%5c..%5cconfig.py",
        "%2fetc%2fhosts.conf",
        "app.bundle.css%00.js",
    ],
)
def test_no_file_outside_and_no_page_for_a_missing_file(files: TestClient, path: str) -> None:
    answer = files.get(f"/ohif/{path}")
    assert answer.status_code == 404
    assert "OHIF has no file" in answer.json()["detail"]


# --- in the browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with accounts on an archive with one CT series, part of a real one."""
    folder = tmp_path_factory.mktemp("ohif")
    (folder / "series").mkdir()
    for file in sorted((real_data / "dicom_ct" / "crlm-ct-1004").iterdir())[:SLICES]:
        shutil.copy(file, folder / "series")
    environment = {
        "BIPVL_USER": ACCOUNT["username"],
        "BIPVL_PASSWORD": ACCOUNT["password"],
        "MONAI_LABEL_DICOMWEB_CACHE_PATH": str(folder / "cache"),
    }
    small = {"models": "quickstart", "model.vision": "unet", "model.feature_size": "4", "spacing": "[8, 8, 8]"}
    small |= {"model.scratch": "{layers: 4, width: 16, heads: 2}", "patch": "[48, 48, 48]"}
    with Archive(folder / "orthanc") as archive:
        archive.store(folder / "series")
        with Server(archive.url, folder / "models", small, **environment) as server:
            yield f"http://127.0.0.1:{server.port}"


@dataclass
class Visit:
    """A page, and what it asked for: answers that were refused or failed, and requests to other machines."""

    page: sync_api.Page
    address: str
    bad: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("response", self._answered)
        self.page.on("requestfailed", self._failed)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _answered(self, response: sync_api.Response) -> None:
        idle = response.status == 404 and response.url.endswith("/train/?check_if_running=true")  # the panel's question
        if response.status >= 400 and not idle:
            self.bad.append(f"{response.status} {response.request.method} {response.url}")
        if not response.url.startswith((self.address, "blob:", "data:")):
            self.elsewhere.append(response.url)

    def _failed(self, request: sync_api.Request) -> None:
        # "csp": the page's own policy stopped it before it left. Requests that the viewer itself gives up are no fault.
        if request.failure not in ("csp", "net::ERR_ABORTED"):
            self.bad.append(f"{request.failure} {request.method} {request.url}")

    def assert_clean(self) -> None:
        assert (self.bad, self.elsewhere, self.errors) == ([], [], [])

    def picture(self, name: str) -> None:
        """Keep a screenshot where the environment asks for it."""
        if folder := os.environ.get(SCREENSHOTS):
            self.page.screenshot(path=Path(folder) / f"{name}.png")


@pytest.fixture(scope="module")
def chromium() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture()
def visit(chromium: sync_api.Browser, address: str) -> Iterator[Visit]:
    """A browser on another machine whose user has typed name and password."""
    context = chromium.new_context(
        http_credentials=ACCOUNT, extra_http_headers=ELSEWHERE, viewport={"width": 1280, "height": 800}
    )
    context.set_default_timeout(WAIT)
    yield Visit(context.new_page(), address)
    context.close()


def shown(visit: Visit) -> np.ndarray:
    """The middle of the first viewport as the user sees it, red, green and blue from 0 to 255, as floats."""
    box = visit.page.locator("canvas.cornerstone-canvas").first.bounding_box()
    assert box
    clip = {"x": box["x"] + box["width"] / 4, "y": box["y"] + box["height"] / 4}
    clip |= {"width": box["width"] / 2, "height": box["height"] / 2}
    return np.asarray(Image.open(io.BytesIO(visit.page.screenshot(clip=clip))).convert("RGB"), float)


def open_study(visit: Visit, mode: str) -> None:
    """From the study list into a mode of the viewer, until its viewports show pictures."""
    page = visit.page
    page.goto(f"{visit.address}/ohif/")
    page.get_by_text("CRLM-CT-1004").first.click()
    page.get_by_role("button", name=mode).click()
    page.wait_for_function(
        """() => {
            const canvases = [...document.querySelectorAll('canvas.cornerstone-canvas')]
            const coloured = canvas => {
                const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data
                return new Set(pixels).size > 100
            }
            return canvases.length && canvases.every(coloured)
        }"""
    )
    page.get_by_role("button", name="Confirm and Hide").click()


@pytest.mark.slow
@needs_orthanc
@needs_browser
def test_nobody_without_login_sees_anything(chromium: sync_api.Browser, address: str) -> None:
    context = chromium.new_context(extra_http_headers=ELSEWHERE)
    for path in ("/", "/ohif/", "/ohif/app-config.js", "/proxy/dicom/qido/studies", "/info/"):
        answer = context.request.get(address + path)
        assert (answer.status, "CRLM" in answer.text()) == (401, False), path
        assert "Basic" in answer.headers["www-authenticate"]  # which makes a browser ask for name and password
    context.close()


@pytest.mark.slow
@needs_orthanc
@needs_browser
def test_study_list_shows_the_patients_of_the_archive_and_filters_them(visit: Visit) -> None:
    page = visit.page
    page.goto(f"{visit.address}/ohif/")
    page.get_by_text("CRLM-CT-1004").first.wait_for()
    visit.picture("study-list")
    with page.expect_response(lambda answer: "PatientName=" in answer.url) as answer:
        page.locator('[data-cy="input-patientName"]').fill("somebody else")
    assert answer.value.json() == []
    page.get_by_text("CRLM-CT-1004").first.wait_for(state="detached")
    visit.assert_clean()


@pytest.mark.slow
@needs_orthanc
@needs_browser
def test_viewer_shows_the_image(visit: Visit) -> None:
    open_study(visit, "Basic Viewer")
    visit.picture("viewer")
    image = shown(visit)
    assert image.std() > 30  # a body, with air around it
    assert len(np.unique(image)) > 100
    visit.assert_clean()


@pytest.mark.slow
@needs_orthanc
@needs_browser
def test_panel_segments_the_image(visit: Visit) -> None:
    """From the archive through the model into the viewer; the model has learned nothing, so its mask is noise."""
    open_study(visit, "MONAI Label")
    page = visit.page
    assert page.locator("#monailabelServerURL").input_value() == f"{visit.address}/"
    page.locator(".settingsTable button").click()
    page.get_by_text("BiPVL Label").wait_for()
    assert np.ptp(shown(visit), axis=-1).max() == 0  # all grey

    with page.expect_response(lambda answer: "/infer/quickstart" in answer.url) as answer:
        page.get_by_role("button", name="Run").first.click()
    assert answer.value.ok
    page.get_by_text("Running Segmentation - Successful").wait_for()
    page.wait_for_function(
        """() => {
            const canvas = document.querySelector('canvas.cornerstone-canvas')
            const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data
            for (let i = 0; i < pixels.length; i += 4) if (Math.abs(pixels[i] - pixels[i + 2]) > 50) return true
            return false
        }"""
    )
    visit.picture("panel")
    assert (np.ptp(shown(visit), axis=-1) > 20).mean() > 0.1  # coloured
    visit.assert_clean()
