"""Reports of rounds on a real server and in Chromium: who may read them, and what they show and load."""

import pytest

from support.clients.browser import chromium
from support.server import Server
from support.training import SMALL, phantom_cases, small_trainer

ROUND = {"tracking": "None", "device": "cpu", "max_epochs": 2}


@pytest.mark.slow
def test_reports_in_a_browser(studies, tmp_path):
    """Linked from the start page, closed to strangers, nothing loaded, nothing refused by the policy, no sideways
    scrolling on a narrow screen."""
    trainer = small_trainer(tmp_path / "models")
    for _ in range(2):
        trainer({**ROUND, "val_split": 0.34, "val_interval": 1}, phantom_cases(studies, 3))
    (tmp_path / "models" / "quickstart" / "v0009.html").write_text("of no version")
    account = {"BIPVL_USER": "ada", "BIPVL_PASSWORD": "word"}
    with Server(studies, tmp_path / "models", SMALL, **account) as server:
        place = "/reports/quickstart/v0002.html"
        assert server.call("GET", place, elsewhere=True).status_code == 401
        answer = server.call("GET", place, elsewhere=True, auth=("ada", "word"))
        assert answer.content == trainer.versions.report(2).read_bytes()
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert "no-store" in answer.headers["Cache-Control"]
        for wrong in (
            "quickstart/v0009.html",
            "quickstart/v0001.json",
            "quickstart/..%2fquickstart%2fv0001.html",
            "x/y",
        ):
            assert server.call("GET", f"/reports/{wrong}").status_code == 404, wrong
        listed = server.call("GET", "/model/quickstart/versions").json()
        assert [m["report"] for m in listed] == ["v0001.html", "v0002.html"]

        with chromium() as browser:
            page, asked, said = browser.new_page(viewport={"width": 390, "height": 800}), [], []
            page.on("request", lambda request: asked.append(request.url))
            page.on("console", lambda message: said.append(message.text))
            page.goto(server.url + "/")
            page.click("text=version 2")
            assert page.title() == "Training round: quickstart, version 2"
            assert page.evaluate("document.documentElement.scrollWidth") == 390
            assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 50)")
            assert page.evaluate("getComputedStyle(document.querySelector('.bar')).width") == "46px", "styles count"
            page.click("#versions a")
            assert page.title() == "Training round: quickstart, version 1"
            assert said == []
            assert {url for url in asked if not url.startswith("data:")} <= {
                *(server.url + path for path in ("/", place, place.replace("2.h", "1.h"), "/favicon.ico")),
            }
