"""Who imports whom, read from the source: imports point down, siblings do not know each other, torch stays where it belongs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import tokabatch

PACKAGE = Path(tokabatch.__file__).parent
LEAVES = {"errors", "messages", "job"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "streams": set(),
    "messages": set(),
    "job": LEAVES,
    "transfer": set(),
    "parallel": LEAVES,
    "attention": LEAVES | {"parallel", "transfer"},
    "model": LEAVES | {"parallel", "transfer"},
    "data": LEAVES,
    "planning": LEAVES,
    "costs": LEAVES | {"model"},
    "scheduling": LEAVES,
    "simulation": LEAVES | {"costs", "scheduling"},
    "experiments": LEAVES,
    "report": LEAVES,
    "engine": LEAVES | {"model", "attention", "parallel", "transfer", "streams"},
    "preparation": LEAVES | {"data", "planning", "engine", "model", "attention"},
    "interruption": {"errors"},
    "replica": LEAVES | {"interruption", "scheduling", "engine", "costs", "stopwatch"},
    "replica_process": LEAVES | {"interruption", "engine", "costs", "replica"},
    "recorder": LEAVES | {"data", "experiments", "preparation"},
    "stopwatch": LEAVES | {"costs", "scheduling"},
    "pricing": LEAVES | {"costs", "preparation", "engine"},
    "prediction": LEAVES
    | {"pricing", "costs", "scheduling", "simulation", "preparation", "data", "model", "replica", "report"},
    "planner": LEAVES
    | {"costs", "preparation", "prediction", "pricing", "replica", "resumption", "data", "engine", "model", "report"},
    "resumption": LEAVES | {"data", "preparation"},
    "runner": LEAVES
    | {
        "stopwatch",
        "costs",
        "pricing",
        "preparation",
        "recorder",
        "replica",
        "replica_process",
        "resumption",
        "interruption",
        "data",
        "planning",
        "scheduling",
        "engine",
        "attention",
        "model",
        "experiments",
        "report",
    },
    "review": LEAVES | {"data", "experiments", "report"},
    "cli": LEAVES | {"report", "interruption", "streams"},
    "__init__": LEAVES | {"report", "planner", "runner"},
    "__main__": {"cli"},
}
WITHOUT_TORCH = {
    "errors",
    "streams",
    "messages",
    "job",
    "data",
    "planning",
    "costs",
    "scheduling",
    "simulation",
    "experiments",
    "report",
    "cli",
}
HEAVY_HOMES = {
    "transformers": {"data/tokenizer.py", "data/tokenizer_files.py"},
    "flashinfer": {"attention/flashinfer_paged.py"},
    "triton": {
        "attention/triton_decode.py",
        "attention/triton_pages.py",
        "attention/triton_tiles.py",
        *(f"model/triton_{name}.py" for name in ("layers", "rows", "sampling", "filters", "alternatives")),
    },
    "datasets": {"data/readers/hub.py"},
    "typer": {"cli.py"},
    "matplotlib": {"report/plots.py"},
    "torch.distributed": {"parallel/mesh.py", "parallel/collectives.py"},
}


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(file: Path) -> str:
    """The package or top-level module that a file belongs to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


@pytest.mark.parametrize("file", files(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file):
    here = room(file)
    rooms = {name.split(".")[1] for name in imported(file) if name.startswith("tokabatch.")} - {here, "__version__"}
    allowed = MAY_IMPORT[here]
    assert {r for r in rooms if r in MAY_IMPORT} <= allowed, f"{file} may import {sorted(allowed)}"


@pytest.mark.parametrize("file", files(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_heavy_libraries_have_one_home(file):
    relative = str(file.relative_to(PACKAGE))
    names = imported(file)
    if room(file) in WITHOUT_TORCH:
        assert not {name for name in names if name.split(".")[0] == "torch"}, f"{relative} imports torch"
    for library, homes in HEAVY_HOMES.items():
        uses = {name for name in names if name == library or name.startswith(library + ".")}
        assert not uses or relative in homes, f"{relative} imports {library}; its home is {homes}"


def test_no_module_imports_inside_functions():
    for file in files():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                inner = [n for n in ast.walk(node) if isinstance(n, (ast.Import, ast.ImportFrom))]
                assert not inner, f"{file}:{inner[0].lineno}: an import inside {node.name}"


def test_only_the_command_line_prints_or_exits():
    for file in files():
        if room(file) == "cli":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            assert not (isinstance(called, ast.Name) and called.id == "print"), f"{file}:{node.lineno} prints"
            exits = isinstance(called, ast.Attribute) and called.attr == "exit" and ast.unparse(called.value) == "sys"
            assert not exits, f"{file}:{node.lineno} exits"


SWALLOWING = {"exists", "is_file", "is_dir", "is_symlink", "glob", "rglob", "lexists", "isfile", "isdir", "walk", "rmtree"}
"""They take what cannot be reached for what is not there, from one version of Python on or always."""
OF_OUTPUT_FOLDERS = (
    *("data/" + name + ".py" for name in "folder listing journal inspection manifest committed verification status".split()),
    *("data/" + name + ".py" for name in "export durable steps shards joining remedy scratch earlier row_digests".split()),
    *(name + ".py" for name in "resumption recorder runner review planner".split()),
)


@pytest.mark.parametrize("name", OF_OUTPUT_FOLDERS)
def test_what_cannot_be_reached_in_an_output_folder_is_not_taken_for_absent(name):
    for node in ast.walk(ast.parse((PACKAGE / name).read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr not in SWALLOWING, f"{name}:{node.lineno}: {ast.unparse(node)}"
            ignored = [word for word in node.keywords if word.arg == "ignore_errors"]
            assert not ignored, f"{name}:{node.lineno}: {ast.unparse(node)}"
