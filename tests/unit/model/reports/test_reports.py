"""Reports of rounds and evaluations: what they show, that names stay text, who may read them, and when they go; and
the picture of the versions."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from PIL import Image
from typer.testing import CliRunner

from lib.app.cli import commands as cli
from lib.app.web.access.guard import role_needed
from lib.model.predict import Prediction
from lib.model.reports.charts import line_chart
from lib.model.reports.page import Examined, evaluation_report, round_report, write_report
from lib.model.reports.version_chart import version_chart
from lib.model.versions import Versions
from lib.trainers import judging
from lib.trainers.gate import decide
from lib.volumes.picture import CONFUSED, EXTRA, MISSED
from support.helpers import checkpoint, label, one_hot, tiny_overlapping_task, tiny_task
from support.training import OPTIONS, phantom_cases, small_trainer

MARKUP = """<script>alert("1")</script>'&"""
ROUND = {"tracking": "None", "device": "cpu", "max_epochs": 2}


class Page(HTMLParser):
    """Tags, their attributes and the text of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text = set(), [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]

    def handle_data(self, data):
        self.text += data

    def is_safe(self):
        """Nothing that runs or loads, but pictures in the page itself and links beside it."""
        assert not self.tags & {"script", "link", "iframe", "object", "embed", "form", "base"}
        for tag, name, value in self.attributes:
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset", "action"):
                assert value.startswith("data:image/png;base64,") or re.fullmatch(r"v\d{4}\.html", value), value
        return True


def case(task, name, found, truth, weight=None):
    """What a case of small volumes looks like to `Examined.prediction`: class indices (1, h, w, d)."""
    channels = one_hot(found, task.out_channels)
    count, concepts = len(task.classes), len(task.text_rows()[0])
    weights = torch.full((count, concepts), 1 / concepts) if weight is None else weight
    similarity = torch.eye(count) * 0.5
    data = {
        "id": name,
        "image": torch.full((1, *found.shape[1:]), 0.2),
        "annotated": torch.ones(count, dtype=torch.bool),
    }
    return data, Prediction(channels, weights, similarity, 1, 0), channels[1:], one_hot(truth, task.out_channels)[1:]


def boxes(shift=0):
    """Three boxes of 4 x 8 x 8 voxels, class 1 to 3, moved to the right by some voxels."""
    volume = torch.zeros(1, 24, 12, 12)
    for value in (1, 2, 3):
        start = 6 * value - 4 + shift
        volume[0, start : start + 4, 2:10, 2:10] = value
    return volume


@pytest.fixture
def task():
    return tiny_task()


# Charts ---------------------------------------------------------------------------------------------------------------


def points(svg):
    return [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]+)"', svg)[1].split()]


def test_a_line_goes_from_corner_to_corner():
    (x0, y0), (x1, y1) = points(line_chart({"a": [(1, 0.0), (9, 1.0)]}, limits=(0, 1), size=(460, 220)))
    assert (x0, y0) == (46, 220 - 26) and (x1, y1) == (460 - 10, 10)


def test_equal_factors_are_equal_steps_on_a_logarithmic_axis_and_zero_is_left_out():
    line = points(line_chart({"a": [(1, 0.01), (2, 0.0), (3, 0.1), (4, float("nan")), (5, 1.0)]}, log=True))
    assert len(line) == 3
    assert line[0][1] - line[1][1] == pytest.approx(line[1][1] - line[2][1], abs=0.11)


def test_one_point_is_a_dot_constant_values_are_a_line_and_nothing_is_nothing():
    assert "<circle" in line_chart({"a": [(3, 0.5)]})
    flat = points(line_chart({"a": [(1, 0.3), (2, 0.3)]}))
    assert flat[0][1] == flat[1][1]
    assert line_chart({"a": [], "b": [(1, float("inf"))]}) == ""
    assert "&lt;script" in line_chart({MARKUP: [(1, 1.0)]}) and "<script" not in line_chart({MARKUP: [(1, 1.0)]})


# What is collected ----------------------------------------------------------------------------------------------------


def test_the_worst_cases_are_kept_in_order(task):
    examined = Examined(task, worst=2)
    for name, shift in (("good", 0), ("bad", 2), ("worst", 3), ("fair", 1)):
        examined.prediction(*case(task, name, boxes(shift), boxes()))
    assert [shown.case for shown in examined.shown] == ["worst", "bad"]
    assert [shown.mean for shown in examined.shown] == pytest.approx([0.25, 0.5])
    assert len(examined.rows) == 4 * 3, "scores of all cases are kept"
    dice = {row.case: row.dice for row in examined.rows if row.name == "spleen"}
    assert dice == pytest.approx({"good": 1, "bad": 0.5, "worst": 0.25, "fair": 0.75})


def test_weights_and_similarity_are_means_over_cases(task):
    examined = Examined(task)
    assert (examined.weights, examined.similarity) == (None, None)
    sure = torch.zeros(3, 6)
    sure[:, 2] = 1
    examined.prediction(*case(task, "a", boxes(), boxes()))
    examined.prediction(*case(task, "b", boxes(), boxes(), sure))
    assert examined.weights[0] == pytest.approx([1 / 12, 1 / 12, 7 / 12, 1 / 12, 1 / 12, 1 / 12])
    assert examined.similarity == [[0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5]]


def test_differences_are_coloured_by_kind(task):
    """Class 1 is missed where it is not found, too much where it is found beside; class 2 found as 3 is another."""
    truth, found = torch.zeros(1, 12, 12, 12), torch.zeros(1, 12, 12, 12)
    truth[0, 1:6, 2:10, 2:10], found[0, 3:8, 2:10, 2:10] = 1, 1
    truth[0, 9:11, 2:10, 2:10], found[0, 9:11, 2:10, 2:10] = 2, 3
    examined = Examined(task)
    examined.prediction(*case(task, "a", found, truth))
    planes = examined.shown[0].planes
    assert list(planes) == ["Reference", "Model", "Differences"] and all(len(row) == 3 for row in planes.values())
    axial = picture(planes["Differences"][0])
    shares = [np.mean((np.abs(axial - np.array(c)) < 60).all(-1)) for c in (MISSED, EXTRA, CONFUSED)]
    assert shares == pytest.approx([2 * 8 / 144] * 3, abs=0.03)
    missed, extra = (np.argwhere((np.abs(axial - np.array(c)) < 60).all(-1))[:, 1].mean() for c in (MISSED, EXTRA))
    assert missed > extra, "the patient's right is on the left: what is missed has the smaller x"


def picture(uri):
    assert uri.startswith("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB")).astype(int)


def test_regions_and_partial_labels():
    task = tiny_overlapping_task()
    truth = torch.zeros(3, 12, 12, 12)
    truth[0, 2:10], truth[1, 4:8], truth[2, 5:7] = 1, 1, 1
    data = {"id": "a", "image": torch.rand(4, 12, 12, 12), "annotated": torch.tensor([True, True, False])}
    examined = Examined(task)
    weights = torch.full((3, 6), 1 / 6)
    examined.prediction(data, Prediction(truth.clone(), weights, torch.eye(3), 1, 0), truth, truth)
    assert [(row.name, row.dice) for row in examined.rows] == [("whole tumour", 1), ("tumour core", 1)]
    assert Page(evaluation_report(task, 0, [], examined, 2.0)).is_safe()


def test_what_goes_wrong_with_a_case_is_logged_and_stops_nothing(task, caplog):
    examined = Examined(task)
    examined.prediction({"id": "odd"}, None, None, None)
    assert "Case odd is not in the report" in caplog.text
    assert examined.rows == []


# The page -------------------------------------------------------------------------------------------------------------


def manifests(**changes):
    table = [{"class": n, "served": 0.5, "candidate": 0.75, "difference": 0.25} for n in ("liver", "mean")]
    gate = {"publish": True, "reason": "better", "against": 1, "table": table, "cases": ["a"], "margin": 0.02}
    gate |= {"method": "validation"}
    first = {"version": 1, "served": False, "report": "v0001.html", "time": "2026-01-01T10:00:00+00:00"}
    second = {"version": 2, "served": True, "report": None, "parent": 1, "trained_on": ["b"], "gate": gate, **changes}
    return [first, {**second, "seconds": 30.0, "epoch": 2}]


def test_a_round_shows_every_part(task):
    examined = Examined(task)
    examined.prediction(*case(task, "case_7", boxes(1), boxes()))
    history = {
        **{name: [(1, 1.0), (2, 0.5)] for name in ("loss", "segmentation", "class_embedding", "learning_rate")},
        **{f"sigma_{name}": [(1, 1.0), (2, 0.9)] for name in ("segmentation", "class_embedding", "alignment")},
        **{"alignment_global": [(1, 2.0)], "alignment_local": [(1, 2.0)], "val_mean_dice": [(2, 0.6)]},
        **{"dice_liver": [(2, 0.625)]},
    }
    doubts = "3 places looked right, 1 to be fixed"
    html = round_report(task, 2, manifests(), history, examined, "Held out.", doubts)
    page = Page(html)
    assert page.is_safe()
    for text in (
        "tiny, version 2",
        "served",
        "Held out.",
        "case_7",
        "Compared with version 1",
        "+0.250",
        "0.625",
        doubts,
    ):
        assert text in page.text, text
    for text in ("Loss parts", "Learned sigmas", "Learning rate", "Concept weights", "Similarity of text and vision"):
        assert text in page.text, text
    assert html.count('<svg viewBox="0 0 460 220"') == 4 and html.count('<svg viewBox="0 0 240 130"') == 2
    assert html.count("data:image/png") == 9
    assert 'href="v0001.html"' in html


def test_without_validation_it_says_so(task):
    page = Page(round_report(task, 2, manifests(), {"loss": [(1, 1.0)]}, Examined(task), "None."))
    assert "No case was set aside in this round" in page.text


def test_names_stay_text():
    """Class names, case ids, reasons and whatever else people or files bring."""
    task = tiny_task(labels={MARKUP: label(1), "liver": label(2), "spleen": label(3)})
    examined = Examined(task)
    examined.prediction(*case(task, MARKUP, boxes(1), boxes()))
    changed = manifests(trained_on=[MARKUP], time=MARKUP, options={MARKUP: MARKUP}, status=MARKUP)
    changed[1]["gate"] = {**changed[1]["gate"], "reason": MARKUP, "method": MARKUP}
    history = {"loss": [(1, 1.0)], f"dice_{MARKUP}": [(1, 0.5)]}
    for html in (
        round_report(task, 2, changed, history, examined, MARKUP),
        evaluation_report(task, 2, changed, examined, 2.0),
    ):
        page = Page(html)
        assert page.is_safe()
        assert page.text.count(MARKUP) >= 5
        assert "Content-Security-Policy" in html and "default-src 'none'" in page.attributes[3][2]


def test_an_evaluation_names_cases_that_were_trained_on(task):
    examined = Examined(task)
    for name in ("b", "c"):
        examined.prediction(*case(task, name, boxes(1), boxes()))
    page = Page(evaluation_report(task, 2, manifests(), examined, 2.0))
    assert "was trained on 1 of these cases" in page.text
    untrained = Page(evaluation_report(task, 0, [], examined, 2.0))
    assert "untrained" in untrained.text and "was trained on" not in untrained.text


# Rounds and evaluations -----------------------------------------------------------------------------------------------


def test_a_round_writes_its_report_with_and_without_validation(studies, tmp_path):
    trainer = small_trainer(tmp_path)
    for split in (0.34, 0):
        trainer({**ROUND, "val_split": split, "cross_validate": False, "val_interval": 1}, phantom_cases(studies, 3))
    first, second = (Page(trainer.versions.report(n).read_text()) for n in (1, 2))
    assert first.is_safe() and second.is_safe()
    assert "not trained on" in first.text and "Dice in validation" in first.text
    assert "WAS trained on" in second.text and "No case was set aside" in second.text
    assert [m["report"] for m in trainer.versions.manifests()] == ["v0001.html", "v0002.html"]


def test_a_fold_is_reported_by_the_model_that_left_it_out(studies, tmp_path):
    trainer = small_trainer(tmp_path)
    trainer({**ROUND, "val_split": 0, "cross_validate": True}, phantom_cases(studies, 2))
    page = Page(trainer.versions.report(1).read_text())
    assert "by the model of the fold that left it out" in page.text
    assert "phantom_000" in page.text and "phantom_001" in page.text


def test_a_round_does_not_fail_for_its_report(studies, tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(judging, "write_report", full)
    trainer = small_trainer(tmp_path)
    trainer({**ROUND, "max_epochs": 1, "val_split": 0}, phantom_cases(studies, 1))
    assert trainer.versions.served == 1
    assert "Version 1 has no report" in caplog.text


def test_reports_go_with_their_versions(tmp_path):
    store = Versions(tmp_path / "tiny", keep=2)
    for number in range(1, 5):
        assert store.publish(checkpoint(tiny_task())) == number
        write_report("<p>", store.report(number))
    assert sorted(p.name for p in store.folder.glob("*.html")) == ["v0003.html", "v0004.html"]
    assert not list(store.folder.glob(".v*.html*"))


def test_evaluate_writes_a_report(studies, tmp_path):
    arguments = ["evaluate", "--task", "quickstart", "--data", studies, "--out", tmp_path / "out", *OPTIONS]
    result = CliRunner().invoke(cli.app, [str(a) for a in (*arguments, "--model-dir", tmp_path)])
    assert result.exit_code == 0, result.output
    html = (tmp_path / "out" / "report.html").read_text()
    page = Page(html)
    assert page.is_safe()
    assert "untrained" in page.text and "phantom_002" in page.text
    assert html.count("data:image/png") == 27


# The server -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("realm", [False, True])
def test_who_may_read_images_may_read_reports(realm):
    assert role_needed("GET", "/reports/quickstart/v0001.html", realm) == role_needed("GET", "/datastore/image", realm)


# The picture of the versions

CHARTED = ("liver", "spleen")


def charted(version, decision, served=False):
    return {"version": version, "served": served, "gate": decision.to_dict()}


def one_case(liver, spleen):
    return {"case": {"liver": liver, "spleen": spleen}}


def test_served_and_kept_versions_differ_in_the_picture(tmp_path):
    first = decide(None, one_case(0.4, 0.5), CHARTED)
    better = decide(one_case(0.4, 0.5), one_case(0.6, 0.6), CHARTED)
    worse = decide(one_case(0.4, 0.5), one_case(0.6, 0.1), CHARTED)
    pictures = []
    for second in (better, worse):
        out = tmp_path / "chart.png"
        version_chart("organs", [charted(1, first), charted(2, second, served=True)], out)
        pictures.append(imread(out))
    assert pictures[0].shape == pictures[1].shape
    assert not np.array_equal(pictures[0], pictures[1])


def test_a_damaged_version_is_left_out(tmp_path):
    first = charted(1, decide(None, one_case(0.4, 0.5), CHARTED), served=True)
    damaged = {"version": 2, "served": False, "damaged": "cut"}
    version_chart("organs", [first, damaged], tmp_path / "a.png")
    version_chart("organs", [first], tmp_path / "b.png")
    assert np.array_equal(imread(tmp_path / "a.png"), imread(tmp_path / "b.png"))


def test_nothing_to_draw_is_said(tmp_path):
    with pytest.raises(ValueError, match="task 'organs' has no version"):
        version_chart("organs", [], tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
