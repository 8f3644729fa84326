"""A newcomer's first case in OHIF, from the first mask to a submitted label (docs/using/first-case.md, step by step),
and what the shipped model makes of other words on the concept page (docs/using/sentences.md).

The pictures of these pages are made by this test:

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

from lib.tasks import ATTRIBUTES, load_task
from support import ROOT
from support.clients.browser import ACCOUNT, Visit, chromium, needs_browser, sync_api, visiting
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
    drawn = re.findall(r'visit\.picture\("(\d-[\w-]+)"\)', Path(__file__).read_text())
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

    # The first place: the anterior part may be too large there.
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


@pytest.mark.slow
@needs_orthanc
@needs_browser
def test_the_shipped_model_reads(site: Site, visit: Visit) -> None:
    """Other words for the same structure leave the mask, exchanged words move it, and the page says so before a text is
    saved that it would draw as something else."""
    page, task = visit.page, load_task(TASK)
    page.goto(f"{visit.address}/concepts/#{TASK}")
    one, other = task.classes
    page.get_by_label(f"{one}, shape", exact=True).wait_for()

    def attempt(rows: list[list[str]]) -> list[float]:
        """The Dice of each class's two masks."""
        for name, sentences in zip(task.classes, rows, strict=True):
            for attribute, sentence in zip(ATTRIBUTES, sentences, strict=True):
                page.get_by_label(f"{name}, {attribute}", exact=True).fill(sentence)
        page.locator("#image").fill(site.series[PATIENT])
        page.get_by_role("button", name="Try", exact=True).click()
        page.get_by_text("Segmenting twice").wait_for()
        page.get_by_text("Segmenting twice").wait_for(state="hidden")
        found = [row.locator("td").all_text_contents() for row in page.locator("#scores tr").all()[1:]]
        return [float(cells[1]) for cells in found]

    reworded = task.concepts.aside(task.classes)
    assert reworded is not None
    stays = attempt(reworded)
    page.locator("#verdict").evaluate("e => e.scrollIntoView()")
    visit.picture("reading-stays")
    assert min(stays) > 0.85, "no training has read these words"
    assert "reads like" not in page.locator("#verdict").inner_text()

    moved = attempt(reworded[::-1])
    page.locator("#verdict").evaluate("e => e.scrollIntoView()")
    visit.picture("reading-moves")
    assert max(moved) < 0.2
    verdict = page.locator("#verdict").inner_text()
    assert f"to version 1 the text of {one} reads like {other}".lower() in verdict.lower()

    said: list[str] = []

    def dismiss(dialog: sync_api.Dialog) -> None:
        said.append(dialog.message)
        dialog.dismiss()

    page.on("dialog", dismiss)
    page.get_by_role("button", name="Save as a new revision").click()
    page.get_by_text("Nothing was saved.").wait_for()
    assert f"reads like {other}" in said[0] and "Save it all the same?" in said[0]
    assert site.ask("GET", f"/concepts/{TASK}")["revision"] == 0
    page.evaluate("window.onbeforeunload = null")
    visit.assert_clean()
