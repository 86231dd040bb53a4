"""Which module imports which, read from the source: imports point down, siblings are independent, torch stays in its home."""

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path

import pytest

import tokabatch

PACKAGE = Path(tokabatch.__file__).parent
CONTRACTS = "scheduling.contracts"
LEAVES = {"errors", "arrays", "cores", "number_text", CONTRACTS, "job"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "arrays": set(),
    "cores": set(),
    "number_text": set(),
    CONTRACTS: {"arrays"},
    "job": LEAVES,
    "openai": LEAVES,
    "parallel": LEAVES,
    "attention": LEAVES | {"parallel"},
    "model": LEAVES | {"parallel", "attention"},
    "storage": LEAVES,
    "input": LEAVES | {"storage", "openai"},
    "output": LEAVES | {"storage", "input"},
    "batch": LEAVES | {"openai", "input", "output", "storage", "report"},
    "scheduling": LEAVES,
    "scoring": LEAVES,
    "report": LEAVES | {"scoring", "output", "storage", "input"},
    "engine": LEAVES | {"model", "attention", "parallel", "report"},
    "workload": LEAVES | {"input", "output", "engine", "model", "attention", "parallel", "storage", "scoring"},
    "precheck": LEAVES | {"input", "output", "model", "scoring"},
    "forecast": LEAVES | {"workload", "scheduling", "input", "output", "storage", "engine", "model", "report"},
    "runner": LEAVES
    | {"workload", "forecast", "scheduling", "engine", "input", "output", "storage", "model", "attention", "scoring", "report"}
    | {"parallel"},
    "cluster": LEAVES | {"runner", "parallel"},
    "cli": LEAVES | {"report", "runner"},
    "api": LEAVES | {"report", "runner"},
    "serve": LEAVES
    | {
        "openai",
        "batch",
        "workload",
        "runner",
        "forecast",
        "scheduling",
        "engine",
        "input",
        "output",
        "storage",
        "model",
        "report",
    },
    "__init__": LEAVES | {"report", "api"},
    "__main__": {"cli"},
}
WITHOUT_TORCH = {
    "cluster",
    "errors",
    "arrays",
    "cores",
    "number_text",
    CONTRACTS,
    "job",
    "openai",
    "batch",
    "storage",
    "input",
    "output",
    "scheduling",
    "scoring",
    "report",
    "precheck",
    "api",
    "cli",
}
HEAVY_HOMES = {
    "transformers": {"input/tokenizer/tokenizer.py", "input/tokenizer/loading.py"},
    "flashinfer": {"attention/flashinfer_paged.py"},
    "triton": {
        "attention/triton_decode.py",
        "attention/triton_hopper_tiles.py",
        "attention/triton_page_store.py",
        "attention/triton_tiles.py",
        "model/triton_layers.py",
        *(f"model/sampling/triton_{name}.py" for name in ("rows", "sampling", "filters", "alternatives")),
    },
    "datasets": {"input/readers/hub.py"},
    "typer": {f"cli/{name}.py" for name in ("arguments", "commands", "folder", "plan", "printing", "run", "serve")},
    "ray": {"cluster/ray.py"},
    "starlette": {"serve/app.py", "serve/file_routes.py"},
    "uvicorn": {"serve/server.py"},
    "matplotlib": {"report/plots.py"},
    "torch.distributed": {
        "parallel/mesh.py",
        "parallel/collectives.py",
        "parallel/peer_links.py",
        "parallel/peer_memory.py",
    },
}


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(file: Path) -> str:
    """The package or top-level module that a file belongs to."""
    return room_of("tokabatch." + str(file.relative_to(PACKAGE)).removesuffix(".py").replace("/", "."))


def room_of(module: str) -> str:
    """The same of a module's name. What crosses the scheduler's boundary is written beside it and anyone's to import."""
    return CONTRACTS if module.startswith("tokabatch.scheduling.contracts") else module.split(".")[1]


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
    names = {name for name in imported(file) if name.startswith("tokabatch.") and name != "tokabatch.scheduling"}
    rooms = {room_of(name) for name in names} - {here, "__version__"}
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


def test_no_simple_queue_is_read_with_a_timeout():
    """In Python 3.11 `SimpleQueue.get` may block for good if a short timeout passes before the wait begins. A module
    that reads any queue with a timeout therefore has none of these."""
    for file in files():
        tree = ast.parse(file.read_text())
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
        timed = [call for call in calls if call.func.attr == "get" and any(key.arg == "timeout" for key in call.keywords)]
        assert not timed or "queue.SimpleQueue" not in file.read_text(), f"{file}:{timed[0].lineno}"


def test_parquet_is_read_by_the_calling_thread_alone():
    """See `storage.parquet_file`: a process that ends may abort otherwise, once in a hundred times."""
    elsewhere = [file for file in files() if file.name != "parquet_file.py"]
    for file in elsewhere:
        for node in ast.walk(ast.parse(file.read_text())):
            used = ast.unparse(node) if isinstance(node, ast.Attribute) else getattr(node, "arg", None)
            assert used not in {"pq.ParquetFile", "pq.read_table", "pq.ParquetDataset", "use_threads"}, f"{file}: {used}"


def test_only_the_command_line_prints_or_exits():
    for file in files():
        if room(file) == "cli":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            assert not (isinstance(called, ast.Name) and called.id == "print"), f"{file}:{node.lineno} prints"
            exits = isinstance(called, ast.Attribute) and called.attr == "exit" and ast.unparse(called.value) == "sys"
            assert not exits, f"{file}:{node.lineno} exits"


COUNTED = (
    "byte character column device error file GPU head id layer line model page prompt rank replica request result row sample "
    "space stage step text token verdict"
).split()
PLURAL = re.compile(rf" (?:(?!(?:and|for|has|of|takes|while|with) )[a-zA-Z]+ )?(?:{'|'.join(COUNTED)})s\b")


def test_messages_with_one_of_a_kind_have_no_plural():
    """A number and what it counts are written by `number_text.counted`, which writes `1 row`; a limit that is a constant,
    and `a x b devices`, are never 1."""
    found: list[str] = []
    for file in files():
        for node in ast.walk(ast.parse(file.read_text())):
            for value, text in itertools.pairwise(node.values if isinstance(node, ast.JoinedStr) else ()):
                if isinstance(value, ast.FormattedValue) and isinstance(text, ast.Constant) and PLURAL.match(str(text.value)):
                    number = ast.unparse(value.value)
                    words = str(text.value)
                    if not number.isupper() and number not in NOT_NUMBERS and " x " not in ast.unparse(node):
                        found.append(f"{file.relative_to(PACKAGE)}:{value.lineno}: {number}{words[:20]}")
    assert found == []


NOT_NUMBERS = {"found", "its", "kind", "len(hidden_TE)", "' and '.join(found)"}
"""Words, and the tokens of a padded step."""


SWALLOWING = {"exists", "is_file", "is_dir", "is_symlink", "glob", "rglob", "lexists", "isfile", "isdir", "walk", "rmtree"}
"""They take what cannot be reached for what is not there, from one version of Python on or always."""
OF_OUTPUT_FOLDERS = (
    *(f"output/{file.name}" for file in sorted(PACKAGE.glob("output/*.py"))),
    *("storage/" + name + ".py" for name in "atomic_files listing".split()),
    *("runner/" + name + ".py" for name in "resume recorder run plan shared supply".split()),
    *("input/store/row_digests.py", "report/review.py"),
)


@pytest.mark.parametrize("name", OF_OUTPUT_FOLDERS)
def test_what_cannot_be_reached_in_an_output_folder_is_not_taken_for_absent(name):
    for node in ast.walk(ast.parse((PACKAGE / name).read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr not in SWALLOWING, f"{name}:{node.lineno}: {ast.unparse(node)}"
            ignored = [word for word in node.keywords if word.arg == "ignore_errors"]
            assert not ignored, f"{name}:{node.lineno}: {ast.unparse(node)}"


def test_every_folder_is_in_the_map():
    page = (PACKAGE / "README.md").read_text()
    folders = {path.parent.relative_to(PACKAGE).parts[0] for path in files() if path.parent != PACKAGE}
    assert sorted(folder for folder in folders if f"| `{folder}/` |" not in page) == [], (
        "say in tokabatch/README.md what they are for"
    )


def test_tests_follow_the_rooms():
    tests, own = PACKAGE.parent / "tests", {"bad_input", "benchmarks", "cases", "crash", "jobs", "recipes", "support"}
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    folders = {path.parent.relative_to(tests).parts[0] for path in tests.rglob("*.py") if path.parent != tests}
    assert folders - rooms == own
    assert {path.name for path in tests.glob("*.py")} == {"conftest.py", "test_architecture.py", "test_interpreted_kernels.py"}
