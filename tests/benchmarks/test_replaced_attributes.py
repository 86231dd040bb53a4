"""Tests and benchmarks import names that exist, and replace functions by ones that take the same arguments.

`module.name = function` goes unnoticed where `name` is called otherwise by now; where it takes other arguments, only a run
of the program says so, and some run with Ray, Slurm, NFS or a GPU alone.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ANY = inspect.Parameter.VAR_POSITIONAL
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def imported(tree: ast.Module) -> tuple[dict[str, Any], list[str]]:
    """What the names stand for that a file imports from the package, and those that are not there."""
    found: dict[str, Any] = {}
    missing: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("tokabatch", "support"):
            for name in node.names:
                module = f"{node.module}.{name.name}"
                try:
                    is_module = find_spec(module) is not None
                except ModuleNotFoundError:
                    is_module = False
                try:
                    of = import_module(module) if is_module else getattr(import_module(node.module), name.name)
                except ModuleNotFoundError as error:
                    # Else Ray, or a library for GPUs.
                    missing += [f"line {node.lineno}: {node.module}"] if error.name == node.module else []
                    continue
                except AttributeError:
                    missing.append(f"line {node.lineno}: {module}")
                    continue
                found[name.asname or name.name] = of
    return found, missing


def replaced(tree: ast.Module, names: dict[str, Any]) -> Iterator[tuple[int, Any, str, ast.expr]]:
    """The line, the module or class, the attribute, and what it becomes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                owner = owner_of(target.value, names) if isinstance(target, ast.Attribute) else None
                if owner is not None and isinstance(target, ast.Attribute):
                    yield node.lineno, owner, target.attr, node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("setattr", "object"):
            given = node.args
            if len(given) == 3 and isinstance(given[1], ast.Constant) and (owner := owner_of(given[0], names)) is not None:
                yield node.lineno, owner, str(given[1].value), given[2]


def owner_of(node: ast.expr, names: dict[str, Any]) -> Any:
    """A module or class; None for anything else."""
    if isinstance(node, ast.Attribute):
        return getattr(owner_of(node.value, names), node.attr, None)
    found = names.get(node.id) if isinstance(node, ast.Name) else None
    return found if inspect.ismodule(found) or inspect.isclass(found) else None


def positional(new: ast.expr, tree: ast.Module, names: dict[str, Any]) -> tuple[int, int] | None:
    """The least and the most positional arguments of a function that is written in the file, or imported; None for others."""
    if isinstance(new, ast.Call) and getattr(new.func, "id", "") == "partial":
        known = positional(new.args[0], tree, names)
        bound = len(new.args) - 1
        return None if known is None else (max(0, known[0] - bound), known[1] - bound)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    defined = [node.args for node in functions if isinstance(new, ast.Name) and node.name == new.id]
    arguments = new.args if isinstance(new, ast.Lambda) else defined[0] if len(defined) == 1 else None
    if arguments is not None:
        most = len(arguments.posonlyargs) + len(arguments.args)
        return most - len(arguments.defaults), 99 if arguments.vararg else most
    function = names.get(new.id) if isinstance(new, ast.Name) else None
    return parameters(function) if inspect.isfunction(function) else None


def parameters(function: Any) -> tuple[int, int]:
    found = inspect.signature(function).parameters.values()
    plain = [each for each in found if each.kind in POSITIONAL]
    return sum(each.default is each.empty for each in plain), 99 if any(e.kind is ANY for e in found) else len(plain)


def test_each_replaced_attribute_exists_and_its_replacement_takes_what_callers_give() -> None:
    wrong: list[str] = []
    count = 0
    for file in sorted((*ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/**/*.py"))):
        tree = ast.parse(file.read_text())
        names, missing = imported(tree)
        wrong += [f"{file.relative_to(ROOT)}, {each} does not exist" for each in missing]
        # A name may be a variable's, too.
        variables = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        variables |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id not in variables:
                module = names.get(node.value.id)
                if inspect.ismodule(module) and not hasattr(module, node.attr):
                    wrong.append(f"{file.relative_to(ROOT)}:{node.lineno}: {module.__name__}.{node.attr} does not exist")
        for line, owner, name, new in replaced(tree, names):
            count += 1
            place = f"{file.relative_to(ROOT)}:{line}: {owner.__name__}.{name}"
            if not hasattr(owner, name):
                wrong.append(f"{place} does not exist")
                continue
            old = getattr(owner, name)
            takes = positional(new, tree, names)
            if takes is not None and inspect.isfunction(old):
                least, most = parameters(old)
                if takes[0] > most or takes[1] < least:
                    wrong.append(f"{place} takes {least} to {most} arguments, and its replacement {takes[0]} to {takes[1]}")
    assert not wrong, "\n".join(wrong)
    assert count > 100
