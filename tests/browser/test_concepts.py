"""The concept page in Chromium, as somebody on another machine uses it."""

import json
import re

import numpy as np
import pytest

from lib.tasks import load_task
from lib.tasks.revisions import Revisions
from support.clients.browser import ACCOUNT, ACCOUNT_OF_SERVER, SMALL, chromium, needs_browser, sync_api, visiting
from support.server import Server

pytestmark = [needs_browser, pytest.mark.slow]

expect = sync_api.expect
expect.set_options(timeout=60_000)  # on a busy machine
SENTENCES = "#sentences td > textarea"
WAYS = ("Outline: sharp on every side.", "Smooth rim, easy to follow.", "Crisp, even border.")
BEHAVED = "A bright tube beside the spine."
HOSTILE = """<img src=x onerror="document.title='owned'"><script>document.title='owned'</script>"""


@pytest.fixture(scope="module")
def server(tmp_path_factory, phantoms):
    folder = tmp_path_factory.mktemp("concepts")
    phantoms(folder / "studies", cases=2, labelled=1)
    conf = {**SMALL, "models": "quickstart"}
    with Server(folder / "studies", folder / "models", conf, **ACCOUNT_OF_SERVER) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture
def visit(browser, server):
    with visiting(browser, server.url) as visit:
        visit.page.goto(f"{server.url}/concepts/")
        visit.page.get_by_label("liver, shape").wait_for()
        yield visit


def said(visit, text):
    expect(visit.page.locator("#said")).to_contain_text(text)


def reword(visit):
    """Write three wordings of a sentence, the middle one last, and see that the last one is kept aside and checked."""
    page = visit.page
    ways = page.locator("tr").filter(has=page.get_by_label("aorta, contour")).locator("details")
    ways.locator("summary").click()
    while ways.get_by_role("button", name="Remove").count():
        ways.get_by_role("button", name="Remove").first.click()
    add = ways.get_by_role("button", name="Add a wording")
    add.click()
    page.keyboard.type(WAYS[0])  # it has the focus
    expect(ways.locator(".hint")).to_have_text("At least two are needed, because the last is kept aside.")
    add.click()
    page.keyboard.type("Normal border.")
    add.click()
    page.keyboard.type(WAYS[1])
    assert [mark.is_visible() for mark in ways.locator(".aside").all()] == [False, False, True]
    page.get_by_role("button", name="Check").click()
    expect(ways.locator("li").last.locator(".finding")).to_contain_text("diagnostic word 'normal'")
    visit.picture("concepts-wordings")
    ways.get_by_label("aorta: contour wording 3", exact=True).fill(WAYS[2])
    return ways


def test_edit_check_save_compare_sign_and_restore(visit):
    page = visit.page
    assert page.locator(SENTENCES).count() == 36
    expect(page.locator("#submit")).to_be_disabled()
    old = page.get_by_label("aorta, shape").input_value()
    page.get_by_label("aorta, shape").fill("A normal tube.")
    row = page.locator("tr.changed")
    assert row.locator(".was").text_content() == old
    page.get_by_role("button", name="Check").click()
    expect(row.locator(".finding")).to_have_text("diagnostic word 'normal'; describe what is visible")
    visit.picture("concepts-checked")
    page.get_by_label("aorta, shape").fill(BEHAVED)
    ways = reword(visit)
    page.get_by_role("button", name="Check").click()
    said(visit, "The check finds nothing.")
    expect(page.locator("#count")).to_have_text("1 sentence and wordings of 1 sentence changed")
    page.get_by_label("Why").fill("shorter <i>words</i>")
    page.get_by_role("button", name="Save as a new revision").click()
    said(visit, "Revision 1 is saved.")
    expect(page.locator("tr.changed")).to_have_count(0)
    page.reload()
    expect(page.get_by_label("aorta, shape")).to_have_value(BEHAVED)
    expect(ways.locator("summary")).to_have_text("3 wordings")
    assert [area.input_value() for area in ways.locator("textarea").all()] == list(WAYS)
    page.get_by_label("aorta, contour").fill("A ragged edge.")
    expect(page.locator("tr.changed .hint").first).to_have_text("Its wordings still say the old.")
    page.get_by_role("button", name="Undo my changes").click()
    first = page.locator("#history tr").nth(1)
    expect(first).to_contain_text(ACCOUNT["username"])
    expect(first).to_contain_text("shorter <i>words</i>")

    page.locator("#history tr").filter(has_text="the file").get_by_role("button", name="Compare").last.click()
    expect(page.locator("tr.changed td > textarea")).to_have_value(old)
    expect(ways.locator("summary")).to_contain_text("changed")
    assert ways.locator(".was").all_text_contents() == list(WAYS), "they are not in the file"
    page.get_by_label("Reviewed by").fill("Dr. N. N.")
    page.get_by_role("button", name="Mark the newest").click()
    said(visit, "save or undo your changes first")
    page.get_by_role("button", name="Undo my changes").click()
    page.get_by_role("button", name="Mark the newest").click()
    said(visit, "Revision 2 is saved.")
    expect(page.locator("#review")).to_have_text("reviewed")
    expect(page.locator("#about")).to_contain_text("reviewed by Dr. N. N.")

    page.locator("#history tr").filter(has_text="the file").get_by_role("button", name="Restore").last.click()
    said(visit, "Revision 3 is saved.")
    expect(page.get_by_label("aorta, shape")).to_have_value(old)
    expect(page.locator("#review")).to_have_text("unreviewed")
    assert page.locator("#history tr").count() == 1 + 4
    visit.assert_clean()


def test_a_refusal_is_said_and_the_text_stays_in_the_table(visit, server):
    page = visit.page
    visit.expected = ("400 POST {address}/concepts/quickstart/revisions",)
    page.get_by_label("spleen, shape").fill("A <b>bold</b> wedge.")
    page.get_by_role("button", name="Save as a new revision").click()
    said(visit, "concepts.spleen.shape: sentences are plain text; found '<'")
    expect(page.get_by_label("spleen, shape")).to_have_value("A <b>bold</b> wedge.")
    before = server.call("GET", "/concepts/quickstart").json()["revision"]
    page.get_by_label("spleen, shape").fill("One bold wedge.")
    page.get_by_role("button", name="Save as a new revision").click()
    said(visit, f"Revision {before + 1} is saved.")
    visit.assert_clean()


def test_what_somebody_else_saved_meanwhile_is_not_overwritten(visit, server):
    page = visit.page
    visit.expected = ("409 POST {address}/concepts/quickstart/revisions",)
    page.get_by_label("liver, texture").fill("Mine.")
    base = server.call("GET", "/concepts/quickstart").json()["revision"]
    theirs = {"base": base, "sentences": {"spleen": {"texture": "Theirs."}, "liver": {"texture": "Theirs too."}}}
    assert server.call("POST", "/concepts/quickstart/revisions", json=theirs).ok
    page.get_by_role("button", name="Save as a new revision").click()
    said(visit, f"revision {base + 1} was saved in the meantime")
    expect(page.get_by_label("spleen, texture")).to_have_value("Theirs.")
    expect(page.get_by_label("liver, texture")).to_have_value("Mine.")
    assert page.locator("tr.changed .was").all_text_contents() == ["Theirs too."]
    page.get_by_role("button", name="Save as a new revision").click()
    said(visit, f"Revision {base + 2} is saved.")
    now = server.call("GET", "/concepts/quickstart").json()
    assert (now["classes"]["liver"]["texture"], now["classes"]["spleen"]["texture"]) == ("Mine.", "Theirs.")
    visit.assert_clean()


def canvas(visit, name):
    """What a canvas shows, (rows, columns, 4)."""
    script = """c => [c.height, c.width, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]"""
    height, width, pixels = visit.page.locator(f"#{name}").evaluate(script)
    return np.array(pixels, np.uint8).reshape(height, width, 4)


def coloured(pixels):
    """How many pixels have a colour."""
    rgb = pixels[..., :3].astype(int)
    return int((rgb.max(-1) - rgb.min(-1) > 12).sum())


def test_try_on_a_case_slice_by_slice_and_the_map(visit):
    page = visit.page
    compare = page.locator("#history tr").filter(has_text="the file").get_by_role("button", name="Compare").last
    if compare.is_enabled():  # a test before saved another text
        compare.click()
        expect(page.locator("tr.changed")).not_to_have_count(0)
    page.locator("#image").fill("phantom_001")
    page.get_by_role("button", name="Try", exact=True).click()
    expect(page.locator("#verdict")).to_contain_text("No voxel changed.")
    expect(page.locator("#next")).to_be_disabled()
    assert coloured(canvas(visit, "differences")) == 0
    for n, name in enumerate(load_task("quickstart").classes):
        page.get_by_label(f"{name}, location").fill(f"Somewhere else, number {n}.")
    page.get_by_role("button", name="Try", exact=True).click()
    expect(page.locator("#verdict")).to_contain_text("voxels changed")
    expect(page.locator("#verdict")).to_contain_text("untrained")
    number = int(re.search(r"(\d+) voxels changed", page.locator("#verdict").text_content())[1])
    cells = [row.locator("td").all_text_contents() for row in page.locator("#scores tr").all()[1:]]
    assert number > 0 and len(cells) == 6 and any(int(c[4]) for c in cells)
    assert all(0 <= float(c[1]) <= 1 for c in cells if c[1] != "–")

    # The picture shows as many differing pixels as the page says, on each plane, and the slider moves it.
    for plane in ("axial", "coronal", "sagittal"):
        page.get_by_label("Plane").select_option(plane)
        differ = int(re.search(r"(\d+) voxels differ", page.locator("#place").text_content())[1])
        assert differ > 0 and coloured(canvas(visit, "differences")) == differ
        here = page.locator("#place").text_content()
        page.get_by_role("button", name="Next slice that differs").click()
        assert page.locator("#place").text_content() != here
        assert coloured(canvas(visit, "differences")) > 0
    before = canvas(visit, "before")
    page.locator("#slice").evaluate("s => { s.value = 0; s.dispatchEvent(new Event('input')) }")
    assert page.locator("#place").text_content().startswith("1 of")
    assert not np.array_equal(canvas(visit, "before"), before)
    assert page.locator("#similarity-after td").count() == 36 == page.locator("#weights-before td").count()

    page.get_by_role("button", name="Draw the map").click()
    expect(page.locator("#map-before circle")).to_have_count(36)
    expect(page.locator("#map-after")).to_have_text("no version is published yet")
    assert page.locator("#map-before title").first.text_content() == "liver: The liver in a CT image."
    visit.picture("concepts-tried")
    visit.assert_clean()


def as_a_viewer(route):
    answer = route.fetch()
    route.fulfill(response=answer, json={**answer.json(), "may_save": False})


def test_markup_that_got_into_a_file_is_only_text(server, visit):
    """Somebody wrote it to the disk by hand: the page shows it and runs nothing."""
    folder = server.log.parent / "models" / "quickstart"
    revisions = Revisions(load_task("quickstart"), folder)
    saved = revisions.read(revisions.newest).model_dump(mode="json")
    saved["number"] = revisions.newest + 1
    saved["concepts"]["classes"]["spleen"]["variants"] = {"shape": [HOSTILE, "Harmless."]}
    saved["who"] = saved["note"] = saved["concepts"]["classes"]["liver"]["sentences"]["shape"] = HOSTILE
    (revisions.folder / f"r{saved['number']:04d}.json").write_text(json.dumps(saved))
    page = visit.page
    page.route("**/concepts/quickstart", as_a_viewer)
    page.reload()
    expect(page.get_by_label("liver, shape")).to_have_value(HOSTILE)
    ways = page.locator("tr").filter(has=page.get_by_label("spleen, shape")).locator("details")
    expect(ways.locator("textarea").first).to_have_value(HOSTILE)
    expect(ways.locator("textarea").last).to_have_attribute("readonly", "")
    assert page.locator("details button").count() == 0, "viewers read"
    expect(page.locator("#history tr").nth(1)).to_contain_text("onerror")
    expect(page.locator(".finding.fatal")).to_have_text(["sentences are plain text; found '<'"] * 2)
    assert page.locator("main img, main script").count() == 0
    assert page.title() == "Sentences of the classes"
    assert page.evaluate("document.documentElement.innerHTML.includes('<script>document.title')") is False
    visit.assert_clean()


def test_the_start_page_leads_here(visit):
    visit.page.goto(f"{visit.address}/")
    visit.page.get_by_role("link", name="Sentences").click()
    expect(visit.page.locator(SENTENCES)).to_have_count(36)
    visit.assert_clean()
