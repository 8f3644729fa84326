"""The documents are true: examples work, and every command, option, file and key that they name exists."""

import ast
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer
from monailabel.main import Main

from lib.app.cli.commands import app
from lib.infers import BiPVLInfer
from lib.model.nets import build_model
from lib.tasks import TEXT_FORMATS, VISION_BACKBONES, ModelSpec, Training, list_tasks, load_task
from lib.tasks.check import check
from lib.trainers import BiPVLTrain
from support import ROOT

DOCUMENTS = [ROOT / n for n in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted((ROOT / "docs").rglob("*.md"))
README = (ROOT / "README.md").read_text()
OWN_TASK = (ROOT / "docs" / "using" / "own-task.md").read_text()
REQUESTS = (ROOT / "docs" / "using" / "requests.md").read_text()
SERVER = (ROOT / "docs" / "running" / "server.md").read_text()
COMMAND_LINE = (ROOT / "docs" / "running" / "command-line.md").read_text()
TRAINING = (ROOT / "docs" / "running" / "training.md").read_text()
COMMANDS = typer.main.get_group(app)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Every command line in shell blocks, and in inline code that starts like one."""
    found = []
    for path in DOCUMENTS:
        text = path.read_text()
        for block in blocks(text, "bash"):
            found += block.replace("\\\n", " ").splitlines()
        text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        inline = (" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text))
        indented = (line.strip().split("   ")[0] for line in text.splitlines() if line.startswith("    "))
        found += [line for line in (*inline, *indented) if line.startswith(("./bipvl ", "monailabel ")) or _main(line)]
    return sorted({line.split("#")[0].strip() for line in found} - {""})


def _main(line: str) -> bool:
    return re.match(r"(\S*python )apps/bipvl/main\.py ", line) is not None


def server_arguments(arguments: list[str]) -> dict[str, str]:
    """Parse as MONAI Label does; gives what `--conf` sets."""
    parsed = Main().args_parser().parse_args(["start_server", "--app", "apps/bipvl", *arguments])
    return dict(parsed.conf or [])


@pytest.fixture
def own_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files of own-task.md, under the names that it gives them."""
    named = re.findall(r"^`([\w-]+\.yaml)`\n\n```yaml\n(.*?)^```", OWN_TASK, re.DOTALL | re.MULTILINE)
    assert [name for name, _ in named] == ["my-task.yaml", "my-concepts.yaml"]
    for name, text in named:
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "my-task.yaml"


# The example of a user's own task


def test_the_own_task_loads_passes_the_check_and_builds(own_task):
    task = load_task("my-task.yaml")
    assert task.classes == ("left lung", "right lung")
    assert check(task) == []
    assert len(build_model(task).text.ids) == 2 * 6


def test_every_yaml_block_is_part_of_that_example(own_task):
    assert len(blocks(OWN_TASK, "yaml")) == 2


def test_review_and_choices_named_in_the_example(own_task):
    """What its comments offer instead is valid too."""
    concepts = own_task.with_name("my-concepts.yaml")
    signed = re.search(r"# or (\{status: reviewed.*\})", OWN_TASK)[1]
    concepts.write_text(concepts.read_text().replace("{status: unreviewed}", signed))
    own_task.write_text(own_task.read_text().replace("{mode: range, low: -1000, high: 300}", "{mode: nonzero}"))
    task = load_task(own_task)
    assert (task.concepts.review.status, task.intensity.mode) == ("reviewed", "nonzero")
    assert check(task) == []


# Commands


def test_commands_are_found():
    found = commands()
    assert {"./bipvl quickstart", "./bipvl test", "./bipvl check"} <= set(found)
    assert {shlex.split(c)[2] for c in found if _main(c)} == set(COMMANDS.commands), "all, and no other"
    assert any(c.startswith("monailabel start_server") for c in found)


@pytest.mark.parametrize("command", commands())
def test_command_exists_with_its_options(command):
    words = shlex.split(command)
    if _main(command):
        _, _, name, *arguments = words
        # Parses and validates without running: an unknown or a missing option is an error.
        COMMANDS.commands[name].make_context(name, arguments)
        if "--task" in arguments:
            assert arguments[arguments.index("--task") + 1] in list_tasks()
        return
    if words[0] == "monailabel":
        assert words[1:4] == ["start_server", "--app", "apps/bipvl"]
        conf = server_arguments(words[4:])
    elif words[0] == "./bipvl":
        usage = subprocess.run([ROOT / "bipvl", "help"], capture_output=True, text=True, check=True).stdout
        assert re.search(rf"^  {words[1]}\b", usage, re.MULTILINE)
        if words[1] != "serve":
            for option in (w for w in words[2:] if w.startswith("--")):
                assert option in usage
        conf = server_arguments(words[2:]) if words[1] == "serve" and words[2:] else {}
    else:
        assert Path(words[0]).name in ("pip", "ssh", "tensorboard", "mlflow"), f"unknown program: {command}"
        return
    for name in conf.get("models", "").split(","):
        assert name in ("", *list_tasks())


def test_dotted_settings_named_anywhere_are_keys_of_a_task():
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    named = re.findall(r"(?:--conf|--set)\s+((?:model|training)\.[\w.]+)[ =]([\w./-]+)", text)
    assert {"model.feature_size", "model.text", "model.checkpointing", "training.weight_decay"} <= {k for k, _ in named}
    for key, value in named:
        load_task("amos22-ct", {key: value})
    for section, keys in (("model", ModelSpec), ("training", Training)):
        for key in re.findall(rf"`{section}\.(\w+)", text):
            assert key in keys.model_fields


# Options of requests


def test_keys_of_the_task_named_beside_the_options_exist(tmp_path):
    section = TRAINING.split("## Options")[1].split("\n## ")[0]
    rest = re.search(r"under `training` \((.*?)\)", section, re.DOTALL)[1]
    options = BiPVLTrain(load_task("quickstart"), tmp_path).config()
    assert set(re.findall(r"`(\w+)`", rest)) <= set(Training.model_fields) - set(options)


def test_python_and_json_examples(tmp_path):
    (code,) = blocks(REQUESTS, "python")
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    (infer,) = (call for call in calls if ast.unparse(call.func) == "client.infer")
    task = load_task(ast.literal_eval(infer.args[0]))
    given = infer.args[2]
    assert isinstance(given, ast.Dict)
    options = {ast.literal_eval(key) for key in given.keys}
    assert options <= set(BiPVLInfer(task, tmp_path).config())
    assigned = [node for node in ast.parse(code).body if isinstance(node, ast.Assign)]
    (words,) = (node.value for node in assigned if ast.unparse(node).startswith("words ="))
    assert task.with_concepts(ast.literal_eval(words))


# Names


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    for target, heading in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", path.read_text()):
        if target.startswith("http"):
            assert target == "https://arxiv.org/abs/2503.23534"
            continue
        page = path.parent / target if target else path
        assert page.is_file(), target
        assert not heading or heading in anchors(page.read_text()), f"{target}#{heading}"


def anchors(text: str) -> set[str]:
    """What a link to a heading of the page may name: the heading in lower case, hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_stands_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    for path in sorted((ROOT / "docs").glob("*/*.md")):
        assert f"]({path.relative_to(ROOT / 'docs')})" in index, path


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_files_named_exist(path):
    text = path.read_text()
    tops = "apps|concepts|sample-apps-config|docs|tests|\\.ci|lib"
    named = re.findall(rf"(?<![\w/.])((?:{tops})/[\w./-]*)", text)
    named += re.findall(r"`((?:requirements[\w-]*\.(?:txt|in))|bipvl)`", text)
    for name in {n.rstrip(".") for n in named}:
        if not name.startswith("apps/bipvl/model"):  # written at run time
            folder = ROOT / "apps" / "bipvl" if name.startswith("lib/") else ROOT
            assert (folder / name).exists(), name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_no_path_of_one_machine_and_no_other_host(path):
    text = path.read_text()
    text = text.replace("/opt/bipvl-label", "")  # where docs/running/deployment.md installs it
    assert not re.findall(r"(?<![\w.<>-])/(?:home|root|work|tmp|mnt|srv|usr|opt|data)\b", text)
    hosts = re.findall(r"https?://([\w.-]+)", text)
    assert set(hosts) <= {"arxiv.org", "127.0.0.1", "label.hospital.example"}


def test_tasks_text_formats_and_backbones_are_all_named():
    for page, names in ((SERVER, list_tasks()), (OWN_TASK, (*TEXT_FORMATS, *VISION_BACKBONES))):
        for name in names:
            assert f"`{name}`" in page, name


def test_the_text_encoder_named_is_the_default():
    assert f"`{ModelSpec().text}`" in SERVER
    small = {"hippocampus-mr", "quickstart"}
    assert {load_task(n).model.text for n in list_tasks() if n not in small} == {ModelSpec().text}


def test_unreviewed_sentences_are_called_so():
    assert {load_task(name).concepts.review.status for name in list_tasks()} == {"unreviewed"}
    assert "no clinician has reviewed" in README
    assert "not a medical device" in README


def test_changelog_has_the_version_of_the_project():
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_data_list_example_is_json_but_for_the_dots():
    example = re.search(r"`(\{\"image\".*?\})`", COMMAND_LINE)[1]
    assert set(json.loads(example.replace("…", '"x"'))) == {"image", "label"}
