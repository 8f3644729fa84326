"""An annotator's day in OHIF, on a real archive: segment, correct, submit, next case, train, segment again."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest

from support.clients.browser import (
    SMALL,
    Visit,
    another_patient,
    chromium,
    needs_browser,
    visiting,
)
from support.clients.panel import DRAWING, LABELS, Drawing, Site, assert_holds, button, drawing, serving, wait_for
from support.dicom.archive import needs_orthanc

PATIENTS = {"CASE-A": slice(0, 10), "CASE-B": slice(10, 20), "CASE-C": slice(20, 30)}


@pytest.fixture(scope="module")
def site(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("loop")
    files = sorted((real_data / "dicom_ct" / "crlm-ct-1004").iterdir())
    series = {p: another_patient(files[part], folder / p, p)[1] for p, part in PATIENTS.items()}
    with serving(folder, PATIENTS, SMALL) as (archive, server):
        yield Site(archive, server, series)


@pytest.fixture()
def visit(site: Site) -> Iterator[Visit]:
    with chromium() as browser, visiting(browser, site.server.url) as started:
        yield started


# What the page shows --------------------------------------------------------------------------------------------------


def shares(counts: Any) -> dict[str, float]:
    return dict(zip(LABELS, (np.asarray(counts) / max(1, np.sum(counts))).tolist(), strict=True))


def places(visit: Visit, n: int = 200) -> np.ndarray:
    """Where in space the part of the first viewport is that `Visit.shown` returns: (n, n, 3) mm, rows first."""
    found = visit.page.evaluate(
        """n => {
            const canvas = document.querySelector('canvas.cornerstone-canvas')
            const viewports = cornerstone.getRenderingEngines().flatMap(engine => engine.getViewports())
            const viewport = viewports.find(each => each.canvas === canvas)
            const { clientWidth: width, clientHeight: height } = canvas
            const part = i => 0.25 + (i + 0.5) / (2 * n)
            const steps = [...Array(n).keys()]
            return steps.map(j => steps.map(i => [...viewport.canvasToWorld([width * part(i), height * part(j)])]))
        }""",
        n,
    )
    return np.array(found)


def in_view(visit: Visit, drawn: Drawing) -> np.ndarray:
    """What the part of the first viewport that `Visit.shown` returns has to show: values at its places, -1 outside of
    the volume."""
    at = drawn.indices(places(visit))[..., ::-1]  # as voxels
    inside = ((at >= 0) & (at < drawn.voxels.shape)).all(-1)
    values = drawn.voxels[tuple(np.moveaxis(np.where(inside[..., None], at, 0), -1, 0))].astype(int)
    return np.where(inside, values, -1)


def sampled(pixels: np.ndarray, n: int = 200) -> np.ndarray:
    """The pixels of `Visit.shown` at `places`."""
    rows, columns = (((np.arange(n) + 0.5) * size / n).astype(int) for size in pixels.shape[:2])
    return pixels[rows[:, None], columns]


def colours(visit: Visit) -> dict[str, float]:
    """The share of each label's colour among the coloured pixels, where masks hide the image and have no outlines.

    The viewer mixes a colour with an eighth of that of the label before.
    """
    visit.page.evaluate(
        """() => {
            const { style } = cornerstoneTools.segmentation.config
            const type = { type: 'Labelmap' }
            style.setStyle(type, { ...style.getStyle(type), renderOutline: false, fillAlpha: 1 })
            cornerstone.getRenderingEngines().forEach(engine => engine.render())
        }"""
    )
    visit.page.wait_for_timeout(1000)
    pixels = visit.shown().reshape(-1, 3)
    coloured = pixels[np.ptp(pixels, axis=1) > 8]
    own = np.array([label["color"] for label in LABELS.values()], float)
    expected = own * 7 / 8 + np.vstack([np.zeros(3), own[:-1]]) / 8
    distance = np.abs(coloured[:, None] - expected).max(-1)
    assert (distance.min(1) < 12).mean() > 0.95, coloured[distance.min(1) >= 12][:20]
    return shares(np.bincount(distance.argmin(1), minlength=len(LABELS)))


def graded(route: Any) -> None:
    """Answer with the server's own map, on its grid, with percents that rise from 0 at the sides to 100 in the middle:
    how much a model of a few steps doubts is chance."""
    answer = route.fetch()
    image = nib.Nifti1Image.from_bytes(gzip.decompress(answer.body()))
    columns, rows = (np.sin(np.pi * np.linspace(0, 1, n)) ** 4 for n in image.shape[:2])
    percent = (100 * np.outer(columns, rows)).round().astype(image.get_data_dtype())
    values = np.repeat(percent[..., None], image.shape[2], axis=2)
    body = gzip.compress(nib.Nifti1Image(values, image.affine, image.header).to_bytes())
    route.fulfill(response=answer, body=body)


# What the archive holds -----------------------------------------------------------------------------------------------


def algorithms(ds: pydicom.Dataset) -> dict[str, str]:
    return {segment.SegmentLabel: segment.SegmentAlgorithmType for segment in ds.SegmentSequence}


# The loop -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_orthanc
@needs_browser
def test_annotators_loop(site: Site, visit: Visit) -> None:
    page = visit.page
    asked: list[str] = []  # the questions of dialogs
    answers: list[bool] = []  # what the annotator answers to the next ones; else yes

    def answer(dialog: Any) -> None:
        asked.append(f"{dialog.type}: {dialog.message}")
        if answers and not answers.pop(0):
            dialog.dismiss()
        else:
            dialog.accept()

    page.on("dialog", answer)

    # Study list: the patients of the archive, and filters.
    page.goto(f"{visit.address}/ohif/")
    for patient in PATIENTS:
        page.get_by_text(patient).first.wait_for()
    visit.picture("ohif-studies")
    page.locator('[data-cy="input-mrn"]').fill("CASE-B")
    page.get_by_text("CASE-A").first.wait_for(state="detached")
    assert page.get_by_text("CASE-B").count() and not page.get_by_text("CASE-C").count()

    # A study in the mode MONAI Label: the panel has found the server of this page.
    visit.open_study("CASE-A", "MONAI Label")
    assert "CASE-A" in wait_for(visit, ".case", "CASE-")
    wait_for(visit, ".version", "Not trained yet")
    wait_for(visit, ".count", "0 of 3 cases")
    rows = [row.inner_text().split("\n") for row in page.locator('[data-cy="data-row"]').all()]
    assert [row[-1] for row in rows] == list(LABELS)

    # Auto-Segmentation: named and coloured organs, and what to think of them.
    button(visit, "Auto-Segmentation").click()
    wait_for(visit, ".version", "Drawn by an untrained model")
    assert "untrained weights" in page.locator(".warnings").inner_text()
    proposed = drawing(visit)
    seen = in_view(visit, proposed)
    expected = shares([(seen == label["value"]).sum() for label in LABELS.values()])
    assert colours(visit) == pytest.approx(expected, abs=0.05)

    # A correction is not submitted yet; who leaves is asked.
    visit.stroke("aorta", radius=1, fine=True)  # an untrained model mixes its labels; some shall stay as proposed
    wait_for(visit, ".drawn", "Your drawing is not submitted")
    corrected = drawing(visit)
    assert corrected.counts()["aorta"] > proposed.counts().get("aorta", 0)
    visit.picture("ohif-corrected")
    answers.append(False)
    page.locator('[data-cy="return-to-work-list"]').click()
    assert "not submitted" in asked[-1] and "monai-label" in page.url

    # A submit that fails loses nothing, and can be repeated.
    full = {"detail": "the server's disk is full; nothing was changed. Whoever runs it has to make room"}
    page.route("**/datastore/label?*", lambda route: route.fulfill(status=507, body=json.dumps(full)), times=1)
    visit.expected += ("507 PUT",)
    button(visit, "Submit Label").click()
    wait_for(visit, ".message.error", "The server's disk is full")
    visit.picture("ohif-submit-failed")
    assert site.segmentations("CASE-A") == []
    np.testing.assert_array_equal(drawing(visit).voxels, corrected.voxels)
    button(visit, "Try again").click()
    said = wait_for(visit, ".drawn", "Submitted at")
    for name, count in corrected.counts().items():
        assert f"{name} {count:,}" in said
    wait_for(visit, ".count", "1 of 3 cases")
    (first,) = site.segmentations("CASE-A")
    assert_holds(first, corrected, site.series["CASE-A"])
    for name, kind in algorithms(first).items():
        value = LABELS[name]["value"]
        drawn_over = ((corrected.voxels == value) != (proposed.voxels == value)).any()
        assert kind == ("MANUAL" if drawn_over else "SEMIAUTOMATIC"), name
    assert set(algorithms(first).values()) == {"MANUAL", "SEMIAUTOMATIC"}

    # Next Sample: neither the labelled case nor the one that somebody else works on.
    taken = site.ask("POST", "/activelearning/first", json={"client_id": "somebody else"})["id"]
    (free,) = (p for p, uid in site.series.items() if p != "CASE-A" and uid != taken)
    page.locator(".strategy").select_option("first")
    button(visit, "Next Sample").click()
    assert free in wait_for(visit, ".case", free)
    visit.wait_for_pictures()

    # Drawn from nothing, in a tab that is closed too early: the drawing is offered again.
    visit.stroke("liver")
    wait_for(visit, ".drawn", "Your drawing is not submitted")
    by_hand = drawing(visit)
    page.wait_for_timeout(2000)  # until it is kept
    page.reload()
    assert asked[-1].startswith("beforeunload")
    visit.wait_for_pictures()
    button(visit, "Bring it back").click()
    wait_for(visit, ".drawn", "Your drawing is not submitted")
    np.testing.assert_array_equal(drawing(visit).voxels, by_hand.voxels)
    button(visit, "Submit Label").click()
    wait_for(visit, ".drawn", f"liver {by_hand.counts()['liver']:,} voxels")
    (second,) = site.segmentations(free)
    assert_holds(second, by_hand, site.series[free])
    assert algorithms(second) == {"liver": "MANUAL"}

    # Update Model: stopped once, then to the end.
    page.locator("summary").filter(has_text="Options").click()
    page.locator('[name="train.max_epochs"]').fill("3")
    page.locator('[name="train.tracking"]').select_option("None")
    page.locator("summary").filter(has_text="Options").click()
    button(visit, "Update Model").click()
    button(visit, "Stop").click()
    wait_for(visit, ".training", "Training was stopped")
    wait_for(visit, ".version", "Not trained yet")
    button(visit, "Update Model").click()
    wait_for(visit, ".training", "of 3, loss", 300)
    visit.picture("ohif-training")
    wait_for(visit, ".training", "Version 1 is served", 300)
    wait_for(visit, ".version", "Version 1 is served")

    # The next mask is the new version's, on a case that has a label to go back to.
    button(visit, "Auto-Segmentation").click()
    wait_for(visit, ".version", "Drawn by version 1")
    assert not page.locator(".warnings li").count()
    visit.picture("ohif-version-1")

    # How sure it is, as colours over the image.
    page.locator("summary").filter(has_text="Options").click()
    page.locator('[name="infer.uncertainty_map"]').check()
    page.locator("summary").filter(has_text="Options").click()
    button(visit, "Auto-Segmentation").click()
    page.get_by_role("link", name="Download the uncertainty map").wait_for()
    certain = visit.shown()
    page.route("**/datastore/label?*", graded)
    button(visit, "Show the uncertainty").click()
    button(visit, "Hide the uncertainty").wait_for()
    page.wait_for_timeout(1000)
    visit.picture("ohif-uncertainty")
    percent = in_view(visit, drawing(visit, f"uncertainty quickstart {site.series[free]}"))
    changed = np.abs(sampled(visit.shown()) - sampled(certain)).max(-1)
    assert changed[percent < 0].max() == 0
    unsure = percent >= 30  # from there on the colours cover nearly half of the image
    assert unsure.any(), "there is something to colour"
    assert changed[percent == 0].mean() < 1 and changed[unsure].mean() > 10
    page.unroute("**/datastore/label?*")
    button(visit, "Hide the uncertainty").click()
    button(visit, "Show the uncertainty").wait_for()
    page.wait_for_timeout(1000)
    np.testing.assert_array_equal(visit.shown(), certain)
    page.reload()
    visit.wait_for_pictures()
    button(visit, "Load the submitted label").click()
    page.wait_for_function(f"() => {{ const f = {DRAWING}; return atob(f().data).includes('\\x01') }}")
    np.testing.assert_array_equal(drawing(visit).voxels, by_hand.voxels)

    # Nobody is offered what is labelled or taken.
    button(visit, "Next Sample").click()
    wait_for(visit, ".message", "No case is left")

    # A case that shows nothing of the task: who submits an empty drawing says so.
    (last,) = (p for p, uid in site.series.items() if uid == taken)
    visit.open_study(last, "MONAI Label")
    answers.append(False)
    button(visit, "Submit Label").click()
    wait_for(visit, ".count", "2 of 3 cases")
    assert f"none of {', '.join(LABELS)}?" in asked[-1] and site.segmentations(last) == []
    button(visit, "Submit Label").click()
    wait_for(visit, ".count", "3 of 3 cases")
    (third,) = site.segmentations(last)
    assert_holds(third, drawing(visit), taken)
    visit.assert_clean()
