"""OHIF in a real browser, from another machine, with a login, on a real archive."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from lib.app.web import ohif
from lib.upstream import OHIF
from support.clients.browser import (
    ELSEWHERE,
    SMALL,
    Visit,
    chromium,
    needs_browser,
    sync_api,
    visiting,
)
from support.clients.panel import serving
from support.dicom.archive import needs_orthanc

SLICES = 16

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
    scripts = re.findall(r'<script [^>]*src="([^"]*)"', answer.text)
    viewer = next(i for i, name in enumerate(scripts) if "app.bundle" in name)
    assert scripts.index("/ohif/bipvl/extension.js") < viewer  # which reads the configuration that ours extends
    assert answer.headers["content-security-policy"].startswith("default-src 'self'")


@pytest.mark.parametrize("path", ["viewer?StudyInstanceUIDs=1.2.3", "monai-label", "segmentation/dicomweb", "assets"])
def test_addresses_that_the_viewer_makes_up_are_its_page(files: TestClient, path: str) -> None:
    assert files.get(f"/ohif/{path}").text == files.get("/ohif/").text


def test_address_without_slash_leads_to_the_page(files: TestClient) -> None:
    answer = files.get("/ohif?StudyInstanceUIDs=1.2.3", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (307, "/ohif/?StudyInstanceUIDs=1.2.3")


def test_files_below_folders_are_found(files: TestClient) -> None:
    names = [file.relative_to(OHIF).as_posix() for file in OHIF.rglob("*.png")]
    answer = files.get(f"/ohif/{names[0]}")
    assert "/" in names[0]
    assert answer.content == (OHIF / names[0]).read_bytes()
    assert answer.headers["content-type"] == "image/png"


def test_only_names_that_change_with_the_content_are_kept_without_asking(files: TestClient) -> None:
    script = next(OHIF.glob("app.bundle.*.js")).name
    assert "immutable" in files.get(f"/ohif/{script}").headers["cache-control"]
    style = files.get("/ohif/app.bundle.css")
    assert style.headers["cache-control"] == "private, no-cache"
    again = files.get("/ohif/app.bundle.css", headers={"If-None-Match": style.headers["etag"]})
    assert again.status_code == 304
    assert "immutable" not in files.get("/ohif/").headers["cache-control"]


def test_our_part_of_the_viewer_is_served(files: TestClient) -> None:
    for file in (path for path in ohif.OURS.rglob("*") if path.is_file()):
        answer = files.get(f"/ohif/bipvl/{file.relative_to(ohif.OURS).as_posix()}")
        assert answer.content == file.read_bytes()
        assert answer.headers["content-type"].startswith(("text/javascript", "text/css"))
        assert answer.headers["cache-control"] == "private, no-cache"


@pytest.mark.parametrize(
    "path",
    [
        "missing.js",
        "bipvl/missing.js",
        "bipvl/..%2f..%2fohif.py",
        "bipvl/%2e%2e/%2e%2e/ohif.py",
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
    with serving(folder, ["series"], SMALL) as (_, server):
        yield f"http://127.0.0.1:{server.port}"


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with chromium() as started:
        yield started


@pytest.fixture()
def visit(browser: sync_api.Browser, address: str) -> Iterator[Visit]:
    with visiting(browser, address) as started:
        yield started


@pytest.fixture(scope="module")
def panel(browser: sync_api.Browser, address: str) -> Iterator[sync_api.Page]:
    """The study list, for tests of the panel's arithmetic, which leave it as it is."""
    with visiting(browser, address) as started:
        started.page.goto(f"{address}/ohif/")
        yield started.page


@pytest.mark.slow
@needs_orthanc
@needs_browser
def test_nobody_without_login_sees_anything(browser: sync_api.Browser, address: str) -> None:
    context = browser.new_context(extra_http_headers=ELSEWHERE)
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
    visit.open_study("CRLM-CT-1004", "Basic Viewer")
    visit.picture("viewer")
    image = visit.shown()
    assert image.std() > 30  # a body, with air around it
    assert len(np.unique(image)) > 100
    visit.assert_clean()


@pytest.mark.slow
@needs_orthanc
@needs_browser
def test_masks_of_any_axis_order_are_shown_where_they_belong(panel: sync_api.Page) -> None:
    """The panel's own arithmetic, in the browser: a volume comes back from a file, on the grid of the viewer."""
    generator = np.random.default_rng(0)
    for _ in range(40):
        shape = generator.integers(1, 6, 3)
        rotation, _ = np.linalg.qr(generator.normal(size=(3, 3)))
        matrix = rotation * generator.uniform(0.5, 5, 3)
        affine = np.c_[matrix, generator.uniform(-300, 300, 3)]
        values = generator.integers(0, 7, shape)
        order, backwards = generator.permutation(3), generator.random(3) < 0.5
        other = np.transpose(values, order)[tuple(slice(None, None, -1 if b else 1) for b in backwards)]
        steps = np.where(backwards, -1, 1)
        start = affine[:, 3] + matrix[:, order] @ (backwards * (np.array(other.shape) - 1))
        moved = np.c_[matrix[:, order] * steps, start]
        found = panel.evaluate(
            """async ([stored, grid]) => {
                const { fromNifti, onGrid, toNifti } = await import('/ohif/bipvl/volumes.js')
                const file = await (await toNifti(stored)).arrayBuffer()
                return [...onGrid(await fromNifti(file), grid)]
            }""",
            [
                {"dimensions": list(other.shape), "affine": moved.tolist(), "data": other.ravel("F").tolist()},
                {"dimensions": shape.tolist(), "affine": affine.tolist()},
            ],
        )
        assert found == values.ravel("F").tolist()


@pytest.mark.slow
@needs_orthanc
@needs_browser
def test_parts_of_a_mask_of_any_axis_order_are_put_where_they_belong(panel: sync_api.Page) -> None:
    generator = np.random.default_rng(1)
    for _ in range(40):
        shape = generator.integers(2, 7, 3)
        rotation, _ = np.linalg.qr(generator.normal(size=(3, 3)))
        matrix = rotation * generator.uniform(0.5, 5, 3)
        affine = np.c_[matrix, generator.uniform(-300, 300, 3)]
        low = generator.integers(0, shape)
        high = generator.integers(low, shape)  # both ends belong to the part
        values = generator.integers(0, 7, high - low + 1)
        order, backwards = generator.permutation(3), generator.random(3) < 0.5
        other = np.transpose(values, order)[tuple(slice(None, None, -1 if b else 1) for b in backwards)]
        start = affine[:, 3] + matrix @ low + matrix[:, order] @ (backwards * (np.array(other.shape) - 1))
        moved = np.c_[matrix[:, order] * np.where(backwards, -1, 1), start]
        part = {"dimensions": list(other.shape), "affine": moved.tolist(), "data": other.ravel("F").tolist()}
        found = panel.evaluate(
            """async ([part, grid]) => {
                const { partOf } = await import('/ohif/bipvl/volumes.js')
                const { box, values } = partOf(part, grid)
                return [box.low, box.high, [...values]]
            }""",
            [part, {"dimensions": shape.tolist(), "affine": affine.tolist()}],
        )
        assert found == [low.tolist(), high.tolist(), values.ravel("F").tolist()]
    part["affine"][0][3] += 1000
    with pytest.raises(sync_api.Error, match="different"):
        panel.evaluate(
            "async ([part, grid]) => (await import('/ohif/bipvl/volumes.js')).partOf(part, grid)",
            [part, {"dimensions": shape.tolist(), "affine": affine.tolist()}],
        )


@pytest.mark.slow
@needs_orthanc
@needs_browser
def test_steps_are_undone_and_done_again_voxel_by_voxel(panel: sync_api.Page) -> None:
    """The panel's own history, on volumes whose slices do and do not have a length that four divides."""
    generator = np.random.default_rng(2)
    for shape in ((5, 3, 4), (4, 4, 6), (1, 1, 1)):
        volumes = [generator.integers(0, 3, shape) for _ in range(25)]
        volumes[3] = volumes[2].copy()
        volumes[3][0, 0, 0] = 7  # one voxel
        found = panel.evaluate(
            """async ([volumes, dimensions]) => {
                const { History, cut, difference, paste } = await import('/ohif/bipvl/history.js')
                const history = new History()
                const states = volumes.map(values => Uint8Array.from(values))
                for (let n = 1; n < states.length; n++) {
                    const box = difference(states[n - 1], states[n], dimensions)
                    const [before, after] = box ? [n - 1, n].map(at => cut(states[at], dimensions, box)) : []
                    if (box) history.push(`${n}`, box, before, after, n - 1, n)
                }
                const now = Uint8Array.from(states.at(-1))
                const seen = []
                const take = step => {
                    if (!step) return false
                    paste(now, dimensions, step.box, step.values)
                    return seen.push([step.state, [...now]])
                }
                while (take(history.undo()));
                while (take(history.redo()));
                return [seen, difference(now, states.at(-1), dimensions)]
            }""",
            [[volume.ravel("F").tolist() for volume in volumes], list(shape)],
        )
        seen, left = found
        assert left is None
        for state, values in seen:
            assert values == volumes[state].ravel("F").tolist()
        steps = sum(bool((a != b).any()) for a, b in zip(volumes, volumes[1:], strict=False))
        assert len(seen) == 2 * steps


@pytest.mark.slow
@needs_orthanc
@needs_browser
@pytest.mark.parametrize("change", ["spacing", "position", "size", "direction"])
def test_a_mask_on_another_grid_is_not_shown(panel: sync_api.Page, change: str) -> None:
    grid: dict[str, Any] = {"dimensions": [4, 5, 6], "affine": [[1, 0, 0, 10], [0, 1, 0, 20], [0, 0, 3, 30]]}
    mask = {**grid, "affine": [list(row) for row in grid["affine"]]}
    if change == "spacing":
        mask["affine"][2][2] = 3.1
    elif change == "position":
        mask["affine"][0][3] = 10.5
    elif change == "size":
        mask["dimensions"] = [4, 5, 7]
    else:
        mask["affine"][0][1] = 0.1
    mask["data"] = [0] * int(np.prod(mask["dimensions"]))
    with pytest.raises(sync_api.Error, match="different"):
        panel.evaluate(
            "async ([mask, grid]) => (await import('/ohif/bipvl/volumes.js')).onGrid(mask, grid)", [mask, grid]
        )
