"""A prompt template of the job: the columns it needs, and its text for one row.

A column that the template reads must have a value in every row, unless the template guards it: a name under `| default(...)`
may be missing or null, one under `is defined` may be missing. One that it tests (`{% if hint %}`, `is none`, `hint or
question`) may be null; where it is missing in a row, it reads as null.

`row['a name']` is the column of that name, whatever it is called, unless a column is called `row`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from jinja2 import Template as CompiledTemplate
from jinja2 import nodes
from jinja2.exceptions import TemplateSyntaxError, UndefinedError
from jinja2.meta import find_undeclared_variables

from tokabatch.errors import JobError, RowError
from tokabatch.input.missing import ROW, missing_field, optional
from tokabatch.input.prompts.sandbox import Sandbox, TemplateTooLarge

GUARDING_FILTERS = frozenset(["default", "d"])
GUARDING_TESTS = frozenset(["defined", "undefined"])
_FILES_OF_TEXT = (".j2", ".jinja", ".jinja2", ".tmpl", ".tpl", ".template", ".prompt", ".txt", ".text", ".md")
NOT_IN_PROMPTS = (nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport, nodes.ScopedEvalContextModifier)


@dataclass(frozen=True, slots=True)
class Template:
    """A compiled template. `names` are all columns that it mentions; `by_name` those that it mentions only as `row['name']`,
    and `row` itself if that is its only use; `filtered` those with a filter of the template's own."""

    sandbox: Sandbox
    compiled: CompiledTemplate
    names: frozenset[str]
    by_name: frozenset[str]
    filtered: frozenset[str | None]
    _required: frozenset[str]
    _non_null: frozenset[str]

    def required(self, present: Collection[str]) -> frozenset[str]:
        """Return the columns that the input must have, given those that are `present`."""
        return _of_columns(self._required, self.by_name, present)

    def render(self, row: Mapping[str, Any]) -> str | RowError:
        """Return the text for one row, or an error `missing_field`, `bad_type`, `template_failed` or `template_too_large`."""
        absent = sorted(name for name in _of_columns(self._non_null, self.by_name, row) if row.get(name) is None)
        if absent:
            error = missing_field(absent[0], row, template=True)
            null = [repr(name) for name in absent[1:] if {name, absent[0]} <= row.keys()]
            also = f" (so {'is' if len(null) == 1 else 'are'} {', '.join(null)})" if null else ""
            return RowError(error.code, f"{error.message}{also}; {optional(absent[0], filtered=absent[0] in self.filtered)}")
        values: dict[str, Any] = dict.fromkeys(self._required - self._non_null)
        values |= {name: row[name] for name in self.names if name in row}
        if ROW in self.names and ROW not in row:
            values[ROW] = values.copy()
        try:
            return self.sandbox.render(self.compiled.generate, values)
        except UndefinedError as error:
            return RowError("missing_field", f"the template: {error.message}")
        except (TemplateTooLarge, MemoryError) as error:
            return RowError("template_too_large", f"the template: {error}")
        except RecursionError:
            return RowError("template_too_large", "the template calls itself endlessly")
        except TypeError as error:
            null = f" (a value is null in this row; {optional()})" if "NoneType" in str(error) else ""
            return RowError("bad_type", f"the template: {error}{null}")
        except Exception as error:  # any failure inside a template is an error of its row
            return RowError("template_failed", f"the template: {error or type(error).__name__}")


def compile_template(source: str, key: str) -> Template:
    """Compile a template; `key` is the job's key that holds it, for messages. Raises JobError with the template's line, and for
    the name of a file, whose text is not read."""
    sandbox = Sandbox()
    try:
        tree = sandbox.parse(source)
        compiled = sandbox.from_string(source)
        names = frozenset(find_undeclared_variables(tree)) - frozenset(sandbox.globals)
    except TemplateSyntaxError as error:
        message, hint = str(error.message).rstrip("."), "a column is written {{ name }}"
        if "nexpected end of template" in message:
            hint = "close what was opened: {{ name }}, {% if … %} … {% endif %}"
        elif "end of print statement" in message:  # Two words, where Jinja expects one.
            hint = "a column whose name is not one word is written row['its name']"
        elif unknown := re.fullmatch(r"No (filter|test) named '(\w+)'", message):
            known = sorted(name for name in (sandbox.filters if unknown[1] == "filter" else sandbox.tests) if name[0] != "_")
            near = get_close_matches(unknown[2], known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise JobError(f"{key} is not a valid Jinja template: line {error.lineno}: {message}; {hint}") from error
    except Exception as error:  # Jinja's parser and Python's compiler raise many kinds
        raise JobError(f"{key} is not a valid Jinja template: {error or type(error).__name__}") from error
    if not names:
        _refuse_file(source, key)
    if any(tree.find_all(NOT_IN_PROMPTS)):
        raise JobError(f"{key}: a prompt's template cannot include other files, and `autoescape` makes HTML; remove that tag")
    plain, by_name = names, frozenset[str]()
    if ROW in names:
        found = [_column(node) for node in tree.find_all((nodes.Getattr, nodes.Getitem)) if _is_row(node.node)]
        if None not in found and len(found) == sum(map(_is_row, tree.find_all(nodes.Name))):
            plain = names - {ROW}
        by_name = frozenset(name for name in (*found, ROW) if name is not None) - plain
    required = (plain | by_name - {ROW}) - frozenset(_guarded(tree))
    non_null = required - frozenset(_tested(tree))
    return Template(sandbox, compiled, names | by_name, by_name, frozenset(_filtered(tree)), required, non_null)


def _refuse_file(source: str, key: str) -> None:
    """Raise JobError for the path of a file in place of its text, perhaps behind an @, as other tools have it."""
    written = source.strip().removeprefix("@")
    path = Path(os.path.expanduser(written) if written.isprintable() else written)
    if not str(path).isprintable() or not path.suffix:
        return
    if os.path.isfile(path):
        fault = f"{source!r} is a file"
    elif path.suffix.lower() in _FILES_OF_TEXT and not re.search(r"\s|[{}]", str(path)):
        fault = f"{source!r} is the name of a file, and there is none in {path.absolute().parent}"
    else:
        return
    raise JobError(f"{key} is the text itself, but {fault}; write the file's text there, below `{key.rpartition('.')[2]}: |`")


def _of_columns(names: frozenset[str], by_name: frozenset[str], present: Collection[str]) -> frozenset[str]:
    """Return which names must be columns: if there is a column `row`, `row['name']` is a field of it."""
    return names - by_name | (by_name & {ROW}) if ROW in present and by_name else names


def _is_row(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Name) and node.name == ROW


def _column(node: nodes.Node) -> str | None:
    """Return the column that a node of a template refers to, None if it refers to none."""
    if isinstance(node, nodes.Name):
        return node.name
    if isinstance(node, nodes.Getattr) and _is_row(node.node):
        return node.attr
    if isinstance(node, nodes.Getitem) and _is_row(node.node) and isinstance(node.arg, nodes.Const):
        return node.arg.value if isinstance(node.arg.value, str) else None
    return None


def _guarded(tree: nodes.Template) -> Iterator[str | None]:
    yield from (_column(each.node) for each in tree.find_all(nodes.Filter) if each.name in GUARDING_FILTERS and each.node)
    yield from (_column(each.node) for each in tree.find_all(nodes.Test) if each.name in GUARDING_TESTS)


def _filtered(tree: nodes.Template) -> Iterator[str | None]:
    """Iterate over the columns with a filter of the template's own; the names of the sandbox's begin with _."""
    yield from (_column(each.node) for each in tree.find_all(nodes.Filter) if each.node and not each.name.startswith("_"))


def _tested(tree: nodes.Template) -> Iterator[str | None]:
    """Iterate over the columns in conditions and beside `and`, `or` and `not`."""
    conditions = [branch.test for branch in tree.find_all((nodes.If, nodes.CondExpr))]
    conditions += [side for pair in tree.find_all((nodes.And, nodes.Or)) for side in (pair.left, pair.right)]
    for condition in (*conditions, *(each.node for each in tree.find_all(nodes.Not))):
        yield _column(condition)
        yield from map(_column, condition.find_all((nodes.Name, nodes.Getattr, nodes.Getitem)))
