"""The house rules that a reader relies on: imports run one way, private names stay at home, rooms stay small."""

from __future__ import annotations

import ast
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path, PurePosixPath

import pytest

from support import ROOT

APP = ROOT / "apps" / "bipvl"
# Each package may import those after it.
ORDER = (
    ("main",),
    ("lib.app",),
    ("lib.activelearning",),
    ("lib.infers", "lib.trainers"),
    ("lib.model",),
    ("lib.stores",),
    ("lib.interaction",),
    ("lib.volumes",),
    ("lib.tasks",),
    ("lib.options",),
    ("lib.files", "lib.upstream"),
)
ROOMS = ("apps", "benchmarks", "docs", "tests")
LINES, ENTRIES = 400, 12  # of a Python file; of a folder
WRITTEN = ("apps/bipvl/bin/", "apps/bipvl/logs/", "apps/bipvl/model/")  # by a running server, and in no checkout


def module_of(path: Path) -> str:
    """The name that a file of the app is imported by."""
    parts = path.relative_to(APP).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_of(path): path for path in sorted(APP.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}


def imported(tree: ast.AST) -> list[tuple[str, str | None]]:
    """(module, name) of every import of ours; a whole module has no name."""
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.append((whole, None) if whole in SOURCES else (node.module, alias.name))
    return [(module, name) for module, name in found if module == "main" or module.split(".")[0] == "lib"]


def package_of(module: str) -> str:
    """The room below lib/ that a module is in."""
    return ".".join(module.split(".")[:2])


def test_imports_run_one_way() -> None:
    rank = {name: number for number, names in enumerate(ORDER) for name in names}
    strangers = {package_of(module) for module in SOURCES} - rank.keys() - {"lib"}
    assert not strangers, f"a new package needs its place in ORDER: {strangers}"
    wrong = [
        f"{module} imports {other}"
        for module, tree in TREES.items()
        for other, _ in imported(tree)
        if package_of(other) != package_of(module) and rank[package_of(other)] <= rank[package_of(module)]
    ]
    assert not wrong


def test_modules_import_each_other_in_no_circle() -> None:
    graph = {
        module: {other for other, _ in imported(tree) if other in SOURCES and other != module}
        for module, tree in TREES.items()
        if SOURCES[module].name != "__init__.py"  # these only name what is in their room
    }
    graph = {module: others & graph.keys() for module, others in graph.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)  # raises CycleError


def private_uses(module: str, tree: ast.AST) -> list[str]:
    """Names with a leading underscore that a module takes from another package of ours."""
    found = [
        f"{module}: {other}.{name}"
        for other, name in imported(tree)
        if package_of(other) != package_of(module) and (name or other.split(".")[-1]).startswith("_")
    ]
    modules = {  # names that stand for a whole module of another package
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
        if f"{node.module}.{alias.name}" in SOURCES and package_of(f"{node.module}.{alias.name}") != package_of(module)
    }
    found += [
        f"{module}: {node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in modules
        and node.attr.startswith("_")
    ]
    return found


def test_private_names_stay_in_their_package() -> None:
    trees = dict(TREES)
    for path in sorted((ROOT / "benchmarks").rglob("*.py")):
        trees[".".join(path.relative_to(ROOT).with_suffix("").parts)] = ast.parse(path.read_text(encoding="utf-8"))
    assert not [use for module, tree in trees.items() for use in private_uses(module, tree)]


@pytest.mark.parametrize(
    ("source", "uses"),
    [
        ("from lib.model.predict import _Windows", 1),
        ("from lib.model import predict\npredict._Windows", 1),
        ("from lib.model import predict\npredict.predict", 0),
        ("from lib.tasks.loading import _read_yaml", 0),  # of its own package
    ],
)
def test_a_private_name_is_noticed(source: str, uses: int) -> None:
    assert len(private_uses("lib.tasks.schema", ast.parse(source))) == uses


def test_tasks_know_neither_torch_nor_monailabel() -> None:
    heavy = {"torch", "monai", "monailabel", "transformers"}
    for module in SOURCES:
        if package_of(module) in {"lib.tasks", "lib.files"}:
            roots = {
                name.split(".")[0]
                for node in ast.walk(TREES[module])
                for name in (
                    [alias.name for alias in node.names]
                    if isinstance(node, ast.Import)
                    else [node.module or ""]
                    if isinstance(node, ast.ImportFrom)
                    else []
                )
            }
            assert not roots & heavy, module


def test_a_server_imports_no_client_of_language_models() -> None:
    """Seconds, at each start and at each round. Drafting sentences is work of the command line alone."""
    reached, left = {"lib.app.bipvl"}, ["lib.app.bipvl"]
    while left:
        new = {other for other, _ in imported(TREES[left.pop()]) if other in SOURCES} - reached
        reached |= new
        left += new
    at_start = {other for node in TREES["main"].body if not isinstance(node, ast.If) for other, _ in imported(node)}
    assert at_start == {"lib.app.bipvl"} and "lib.model.nets.text" in reached
    assert not [module for module in reached if "import openai" in SOURCES[module].read_text(encoding="utf-8")]


def test_main_only_imports() -> None:
    """MONAI Label loads the file; what it does is in `lib.app`."""
    assert len(SOURCES["main"].read_text(encoding="utf-8").splitlines()) <= 15


def too_big(files: dict[str, int]) -> list[str]:
    """Python files that are too long and folders that hold too much, among files given with their numbers of lines."""
    found = [f"{file}: {lines} lines" for file, lines in files.items() if file.endswith(".py") and lines > LINES]
    entries: defaultdict[str, set[str]] = defaultdict(set)
    for path in map(PurePosixPath, files):
        if path.name != "__init__.py":  # it only says what its folder is
            for entry in (path, *path.parents):
                entries[str(entry.parent)].add(entry.name)
    return found + [f"{folder}: {len(names)} entries" for folder, names in entries.items() if len(names) > ENTRIES]


def test_files_and_folders_stay_small() -> None:
    files = {}
    for path in (path for room in ROOMS for path in sorted((ROOT / room).rglob("*")) if path.is_file()):
        name = path.relative_to(ROOT).as_posix()
        hidden = any(part.startswith((".", "__pycache__")) for part in path.relative_to(ROOT).parts)
        if not hidden and not name.startswith(WRITTEN) and path.suffix != ".lock":
            files[name] = len(path.read_text(encoding="utf-8").splitlines()) if path.suffix == ".py" else 0
    assert {"tests/conftest.py", "apps/bipvl/main.py", "docs/README.md", "benchmarks/common.py"} <= files.keys()
    assert too_big(files) == []


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"tests/a.py": 400, "docs/page.md": 1000}, []),
        ({"tests/a.py": 401}, ["tests/a.py: 401 lines"]),
        ({f"tests/unit/test_{n}.py": 1 for n in range(12)} | {"tests/unit/__init__.py": 1}, []),
        ({f"tests/unit/test_{n}.py": 1 for n in range(13)}, ["tests/unit: 13 entries"]),
        ({f"docs/using/{n}/page.md": 1 for n in range(13)}, ["docs/using: 13 entries"]),  # rooms count as well
        ({f"benchmarks/one/{n}.py": 1 for n in range(24)} | {"benchmarks/two.py": 1}, ["benchmarks/one: 24 entries"]),
    ],
)
def test_what_is_too_big_is_noticed(files: dict[str, int], found: list[str]) -> None:
    assert too_big(files) == found
