"""What OHIF itself writes: drawn in the viewer's own mode Segmentation, stored by its own menu, trained on here."""

from __future__ import annotations

import base64
import gzip
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from lib.stores.cases import audit
from lib.tasks import load_task
from support.clients.browser import (
    ACCOUNT,
    SMALL,
    Visit,
    another_patient,
    chromium,
    needs_browser,
    visiting,
)
from support.clients.panel import serving
from support.dicom.archive import Archive, needs_orthanc
from support.dicom.stores import store_on
from support.server import Server

PATIENT, SLICES = "CASE-A", 12
ZONE = "Asia/Tokyo"  # of the server: the viewer writes UTC
# In this order in the viewer: neither that of the alphabet nor the task's. The third is deleted before the export.
DRAWN = ("spleen", "aorta", "a slip", "liver")
# The slices of the drawing as the viewer holds them, with the image that each lies on.
SLICES_DRAWN = """() => {
    const [{ representationData }] = cornerstoneTools.segmentation.state.getSegmentations()
    return representationData.Labelmap.imageIds.map(id => {
        const image = cornerstone.cache.getImage(id)
        const data = image.getPixelData()
        let text = ''
        for (let i = 0; i < data.length; i += 32768) text += String.fromCharCode(...data.slice(i, i + 32768))
        const { SOPInstanceUID } = cornerstone.metaData.get('instance', image.referencedImageId)
        return [SOPInstanceUID, btoa(text)]
    })
}"""


@dataclass
class Site:
    """An archive with one series, and a server on it in another time zone."""

    archive: Archive
    server: Server
    series: str
    images: dict[str, pydicom.Dataset]  # by instance UID

    def completed(self) -> int:
        return int(self.server.call("GET", "/datastore/", auth=tuple(ACCOUNT.values())).json()["completed"])

    def label(self) -> nib.Nifti1Image:
        query = {"label": self.series, "tag": "final"}
        answer = self.server.call("GET", "/datastore/label", auth=tuple(ACCOUNT.values()), params=query)
        answer.raise_for_status()
        return nib.Nifti1Image.from_bytes(gzip.decompress(answer.content))


@pytest.fixture(scope="module")
def site(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("export")
    files = sorted((real_data / "dicom_ct" / "crlm-ct-1004").iterdir())[:SLICES]
    series = another_patient(files, folder / PATIENT, PATIENT)[1]
    headers = [pydicom.dcmread(file, stop_before_pixels=True) for file in (folder / PATIENT).iterdir()]
    with serving(folder, [PATIENT], SMALL, TZ=ZONE) as (archive, server):
        yield Site(archive, server, series, {ds.SOPInstanceUID: ds for ds in headers})


def draw(visit: Visit) -> None:
    """A segmentation of the viewer's own, its segments named by hand, on two slices."""
    page, rows = visit.page, visit.page.locator('[data-cy="data-row"]')

    def choose(row: int, what: str) -> None:
        rows.nth(row).hover()
        rows.nth(row).get_by_label("Actions").click()
        page.get_by_role("menuitem", name=what).click()

    page.get_by_text("Add Segmentation").click()
    for number, name in enumerate(DRAWN):
        if number:
            page.get_by_text("Add Segment", exact=True).click()
        choose(number, "Rename")
        page.locator('[data-cy="input-annotation"]').fill(name)
        page.get_by_role("button", name="Save").click()
        visit.stroke(name, radius=12 - 2 * number, below=40 * number - 60)
    choose(DRAWN.index("a slip"), "Delete")
    rows.filter(has_text="a slip").wait_for(state="detached")
    before = page.get_by_text(f"/{SLICES})").inner_text()
    page.locator("canvas.cornerstone-canvas").first.hover()
    page.mouse.wheel(0, 300)
    page.get_by_text(f"/{SLICES})").filter(has_not_text=before).wait_for()
    visit.stroke("liver")


def expected(site: Site, slices: list[tuple[str, str]], label: nib.Nifti1Image) -> np.ndarray:
    """What the page held, on the grid of the server's label and with the task's values."""
    values = load_task("quickstart").label_values
    numbers = np.zeros(256, np.uint8)
    for number, name in enumerate(DRAWN, start=1):
        numbers[number] = values.get(name, 255)
    made = np.zeros(label.shape, np.uint8)
    to_index = np.linalg.inv(np.diag([-1, -1, 1, 1]) @ label.affine)
    for uid, text in slices:
        ds = site.images[uid]
        pixels = numbers[np.frombuffer(base64.b64decode(text), np.uint8).reshape(ds.Rows, ds.Columns)]
        rows, columns = np.nonzero(pixels)
        along, down = np.reshape(np.array(ds.ImageOrientationPatient, float), (2, 3))
        points = np.array(ds.ImagePositionPatient, float) + np.outer(columns * float(ds.PixelSpacing[1]), along)
        points += np.outer(rows * float(ds.PixelSpacing[0]), down)
        index = points @ to_index[:3, :3].T + to_index[:3, 3]
        np.testing.assert_allclose(index, np.round(index), atol=0.01)
        made[tuple(np.round(index).astype(int).T)] = pixels[rows, columns]
    return made


def older(ds: pydicom.Dataset, target: Path) -> Path:
    """The SEG as another program in the server's time zone would have written it an hour before, of another class."""
    when = datetime.now(ZoneInfo(ZONE)) - timedelta(hours=1)
    ds.SeriesInstanceUID, ds.SOPInstanceUID = generate_uid(), generate_uid()
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.Manufacturer, ds.ContentDate, ds.ContentTime = "another program", f"{when:%Y%m%d}", f"{when:%H%M%S}"
    for segment in ds.SegmentSequence:
        segment.SegmentLabel = {"spleen": "spine"}.get(segment.SegmentLabel, segment.SegmentLabel)
    ds.save_as(target)
    return target


@pytest.mark.slow
@needs_orthanc
@needs_browser
def test_what_ohif_exports_is_a_label(site: Site, tmp_path: Path) -> None:
    assert site.completed() == 0
    with chromium() as browser, visiting(browser, site.server.url) as visit:
        page = visit.page
        visit.open_study(PATIENT, "Segmentation")
        draw(visit)
        slices = page.evaluate(SLICES_DRAWN)
        # The menu beside the name of the segmentation.
        page.get_by_role("combobox").locator("xpath=..").get_by_role("button").first.click()
        page.get_by_role("menuitem", name="Export & Download").hover()
        page.get_by_role("menuitem", name="Export DICOM SEG").click()
        page.get_by_text("Enter the report name").wait_for()
        page.locator('input[type="text"]').last.fill("drawn in OHIF")
        page.get_by_role("button", name="Save").click()
        page.get_by_text("Segmentation saved successfully").wait_for()
        visit.picture("ohif-export")
        visit.assert_clean()

    # The archive holds what OHIF wrote: numbers and codes say nothing, names do.
    (ds,) = site.archive.segs()
    assert (ds.SeriesDescription, ds.SegmentationType) == ("drawn in OHIF", "BINARY")
    assert ds.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    segments = [(int(s.SegmentNumber), s.SegmentLabel, s.SegmentAlgorithmType) for s in ds.SegmentSequence]
    assert segments == [(1, "spleen", "MANUAL"), (2, "aorta", "MANUAL"), (3, "liver", "MANUAL")]
    assert {s.SegmentedPropertyTypeCodeSequence[0].CodeMeaning for s in ds.SegmentSequence} == {"Tissue"}
    assert ds.ReferencedSeriesSequence[0].SeriesInstanceUID == site.series

    # The server counts it, and reads every voxel as the class it was drawn as.
    assert site.completed() == 1
    label = site.label()
    shown = expected(site, slices, label)
    np.testing.assert_array_equal(np.asarray(label.dataobj), shown)

    # An older one that arrives later does not count, though its time reads later than OHIF's, which is UTC.
    site.archive.store(older(ds, tmp_path / "older.dcm"))
    page_time, older_time = (s.ContentDate + s.ContentTime for s in (site.archive.segs()[0], ds))
    assert page_time < older_time
    assert site.completed() == 1
    np.testing.assert_array_equal(np.asarray(site.label().dataobj), shown)

    # Training, in the server's time zone, gets these classes.
    task = load_task("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", ZONE)
        time.tzset()
        (case,) = store_on(site.archive, tmp_path / "cache", task).datalist()
    time.tzset()
    drawn = {name: int((shown == value).sum()) for name, value in task.label_values.items()}
    assert audit(task, [case]).cases[0].counts == drawn
    shares = [drawn[name] for name in ("spleen", "aorta", "liver")]
    assert len(set(shares)) == 3 and min(shares) > 500 and sum(shares) == sum(drawn.values())
