"""A newcomer's first case in OHIF, from the first mask to a submitted label: docs/using/first-case.md, step by step.

The pictures of that page are made by this test:

    BIPVL_SCREENSHOTS=docs/images/first-case ./bipvl test -m slow tests/browser/test_first_case.py
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from support import ROOT
from support.clients.browser import ACCOUNT, Visit, chromium, needs_browser, visiting
from support.clients.hand import Dialogs, Hand
from support.clients.panel import POINT, Site, button, serving, wait_for
from support.dicom.archive import needs_orthanc
from support.dicom.dicoms import series_of
from support.helpers import read_nifti

CROPS = ROOT / "apps" / "bipvl" / "shipped" / "hippocampus-mr" / "images"
PATIENTS = ("hippocampus_074", "hippocampus_098", "hippocampus_277")  # none of which the shipped model has seen
TASK, PATIENT = "hippocampus-mr", PATIENTS[0]
PAGE = (ROOT / "docs" / "using" / "first-case.md").read_text()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("first")
    series = {
        patient: series_of(read_nifti(CROPS / f"{patient}.nii.gz"), folder / patient, patient, SeriesDescription="T1")
        for patient in PATIENTS
    }
    with serving(folder, PATIENTS, {"models": TASK}) as (archive, server):
        yield Site(archive, server, series)


@pytest.fixture()
def visit(site: Site) -> Iterator[Visit]:
    with chromium() as browser, visiting(browser, site.server.url) as started:
        yield started


def test_the_page_shows_what_this_test_draws() -> None:
    pictures = re.findall(r"\]\(\.\./images/first-case/([\w-]+)\.png\)", PAGE)
    drawn = re.findall(r'visit\.picture\("([\w-]+)"\)', Path(__file__).read_text())
    assert pictures == drawn and len(pictures) == 5
    for name in pictures:
        assert (ROOT / "docs" / "images" / "first-case" / f"{name}.png").is_file()


@pytest.mark.slow
@needs_orthanc
@needs_browser
def test_a_first_case(site: Site, visit: Visit) -> None:
    page = visit.page
    Dialogs(visit)
    page.goto(f"{visit.address}/ohif/")
    page.get_by_text(PATIENT).first.click()
    page.get_by_role("button", name="MONAI Label").wait_for()
    page.mouse.move(700, 650)  # away from the list, and its hints
    page.wait_for_timeout(1000)
    visit.picture("1-open")
    visit.open_study(PATIENT, "MONAI Label")
    hand = Hand(visit, site, PATIENT)

    button(visit, "Auto-Segmentation").click()
    wait_for(visit, ".version", "Drawn by version 1")
    rows = page.locator(".places > li")
    rows.first.wait_for()
    page.wait_for_timeout(1000)  # the viewer draws
    visit.picture("2-mask")
    first = hand.mask
    query = {"image": site.series[PATIENT], "look": "false"}
    places = site.ask("GET", f"/doubts/{TASK}", params=query)["places"]
    assert set(np.unique(first)) == {0, 1, 2}

    # The first place: the tail of the posterior part is too long.
    page.keyboard.press("n")
    page.locator(".places [aria-current]").wait_for()
    page.wait_for_timeout(1000)
    visit.picture("3-doubt")
    button(visit, "Fix it here").click()
    wait_for(visit, ".places > li:first-child", "to be fixed")
    assert page.locator('[data-tool="click-out"]').get_attribute("aria-pressed") == "true"
    hand.click(page.evaluate(POINT, places[0]["centre"]))
    page.mouse.move(700, 780)
    page.wait_for_timeout(1000)
    visit.picture("4-click")
    corrected = hand.mask
    gone = (corrected != first) & (corrected == 0)
    assert gone.sum() > 20 and np.array_equal(gone, corrected != first)

    # The second one looks right.
    page.keyboard.press("n")
    button(visit, "Looks right").click()
    wait_for(visit, ".places > li:nth-child(2)", "looks right")

    page.keyboard.press("Escape")
    button(visit, "Submit Label").click()
    wait_for(visit, ".drawn", "Submitted at")
    page.locator("button.train").scroll_into_view_if_needed()
    page.wait_for_timeout(1000)
    visit.picture("5-submitted")
    query = {"label": site.series[PATIENT], "tag": "final"}
    answer = site.server.call("GET", "/datastore/label", params=query, auth=tuple(ACCOUNT.values()))
    label = nib.Nifti1Image.from_bytes(gzip.decompress(answer.content))
    counts = [int((np.asarray(label.dataobj) == value).sum()) for value in (0, 1, 2)]
    assert counts == [int((corrected == value).sum()) for value in (0, 1, 2)]
    visit.assert_clean()
