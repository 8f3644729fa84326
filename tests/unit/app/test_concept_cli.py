"""`concepts check`, `show` and `diff` on the command line."""

import pytest
import yaml
from typer.testing import CliRunner

from lib.app.cli import commands as cli
from lib.tasks import load_task
from lib.tasks.revisions import Revisions
from support import ROOT

WORDINGS = ["A small bent disk.", "Flat, like a [bold]bean[/bold].", "Thin disk, concave."]


def run(*arguments, width=200):
    return CliRunner().invoke(cli.app, ["concepts", *map(str, arguments)], env={"COLUMNS": str(width)})


@pytest.fixture
def own(tmp_path):
    """A concepts file with one other sentence and three wordings of another, a task file that names it, and the shipped
    sentences without any wording."""
    words = yaml.safe_load((ROOT / "concepts" / "quickstart.yaml").read_text())
    for text in words["classes"].values():
        text.pop("variants", None)
    (tmp_path / "shipped.yaml").write_text(yaml.safe_dump(words))
    words["classes"]["spleen"]["variants"] = {"shape": WORDINGS}
    words["classes"]["liver"]["sentences"]["shape"] = "The largest organ of the abdomen, a [red]broad[/red] crescent."
    (tmp_path / "words.yaml").write_text(yaml.safe_dump(words))
    task = yaml.safe_load((ROOT / "sample-apps-config" / "quickstart.yaml").read_text())
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**task, "name": "own", "concepts": "words.yaml"}))
    return tmp_path


def test_check_is_what_happens_without_a_command(own):
    for arguments in (("check", own / "own.yaml"), (own / "own.yaml",)):
        result = run(*arguments)
        assert result.exit_code == 0 and "own.yaml: ok" in result.output.replace("\n", "")
    task = (own / "words.yaml").read_text().replace("broad", "normal")
    (own / "words.yaml").write_text(task)
    result = run("check", own / "own.yaml")
    assert result.exit_code == 1 and "liver.shape: diagnostic word 'normal'" in result.output


def test_show_prints_a_table_of_one_class_or_all(own):
    result = run("show", "quickstart", "spleen", "aorta")
    spleen, aorta = (load_task("quickstart").concepts.classes[n].sentences for n in ("spleen", "aorta"))
    for sentence in (*spleen.values(), *aorta.values()):
        assert sentence in result.output
    assert "│ liver" not in result.output and "unreviewed" in result.output
    assert "[red]broad[/red]" in run("show", own / "words.yaml", "liver").output, "a sentence is not terminal markup"
    assert "spine" in run("show", own / "own.yaml").output
    assert "unknown class 'heart'; valid are liver" in str(run("show", "quickstart", "heart").exception)


def test_show_prints_wordings_below_their_sentence_and_marks_the_one_kept_aside(own):
    lines = run("show", own / "words.yaml", "spleen").output.splitlines()
    (at,) = (n for n, line in enumerate(lines) if " shape " in line)
    for number, (wording, line) in enumerate(zip(WORDINGS, lines[at + 1 :], strict=False), 1):
        assert f"   wording {number}" in line and wording in line
        assert ("kept aside" in line) is (number == 3)
    assert " texture " in lines[at + 4], "the file's next"
    assert "  wording" not in run("show", own / "words.yaml", "liver").output


def test_diff_compares_wordings_too(own):
    result = run("diff", own / "shipped.yaml", own / "words.yaml")
    assert all(f"shape wording {n}" in result.output for n in (1, 2, 3)) and WORDINGS[2] in result.output
    other = (own / "words.yaml").read_text().replace("Thin disk", "Slender disk")
    (own / "other.yaml").write_text(other)
    result = run("diff", own / "words.yaml", own / "other.yaml")
    assert result.exit_code == 1 and result.output.count("shape wording") == 1
    assert "shape wording 3" in result.output and "Slender disk, concave." in result.output


def test_diff_shows_what_differs_and_says_so_by_its_exit_status(own):
    assert run("diff", "quickstart", ROOT / "concepts" / "quickstart.yaml").exit_code == 0
    result = run("diff", own / "shipped.yaml", own / "words.yaml")
    assert result.exit_code == 1
    assert "broad wedge" in result.output and "crescent." in result.output
    assert result.output.count(" shape  ") == 1 and "location" not in result.output
    result = run("diff", "quickstart", "msd-brain")
    assert result.exit_code == 1 and "whole tumor" in result.output and "liver" in result.output


def test_revisions_and_versions_are_named_with_an_at(tmp_path):
    task = load_task("quickstart")
    revisions = Revisions(task, tmp_path / "quickstart")
    for number, shape in enumerate(("One flat wedge.", "One thick wedge.")):
        revisions.save(task.with_concepts({"liver": {"shape": shape}}), number, "ada", "")
    result = run("diff", "quickstart@1", "quickstart@newest", "--model-dir", tmp_path)
    assert "One flat wedge." in result.output and "One thick wedge." in result.output
    assert "One thick wedge." in run("show", "quickstart@2", "liver", "--model-dir", tmp_path).output
    assert run("diff", "quickstart", "quickstart@file", "--model-dir", tmp_path).exit_code == 0
    assert "no revision 3; valid are 0, 1, 2" in str(run("show", "quickstart@3", "--model-dir", tmp_path).exception)
    assert "valid are 'served' and none yet" in str(run("show", "quickstart@v1", "--model-dir", tmp_path).exception)
    assert "unknown task 'quickstar'" in str(run("show", "quickstar").exception)
