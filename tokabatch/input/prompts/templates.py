"""A prompt template of the job: which columns it needs, and its text for one row.

A column that the template reads must have a value in every row. What the template itself guards is free: a name under
`| default(...)` may be missing or null, one under `is defined` may be missing, one that it tests (`{% if hint %}`, `is none`)
may be null.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import Template as CompiledTemplate
from jinja2 import nodes
from jinja2.exceptions import TemplateSyntaxError, UndefinedError
from jinja2.meta import find_undeclared_variables

from tokabatch.errors import JobError, RowError
from tokabatch.input.missing import missing_field, optional
from tokabatch.input.prompts.sandbox import Sandbox, TemplateTooLarge

GUARDING_FILTERS = frozenset(["default", "d"])
GUARDING_TESTS = frozenset(["defined", "undefined"])
NOT_IN_PROMPTS = (nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport, nodes.ScopedEvalContextModifier)


@dataclass(frozen=True, slots=True)
class Template:
    """Compiled once; `names` are all the columns it mentions, `required` those the input must have, `non_null` those that
    must have a value in each row."""

    sandbox: Sandbox
    compiled: CompiledTemplate
    names: frozenset[str]
    required: frozenset[str]
    non_null: frozenset[str]

    def render(self, row: Mapping[str, Any]) -> str | RowError:
        """The text for one row, or why there is none: `missing_field`, `bad_type`, `template_failed`, `template_too_large`."""
        for name in self.non_null:
            if row.get(name) is None:
                error = missing_field(name, row)
                return RowError(error.code, f"{error.message}; {optional(name)}")
        values = {name: row[name] for name in self.names if name in row}
        try:
            return self.sandbox.render(self.compiled.generate, values)
        except UndefinedError as error:
            return RowError("missing_field", f"the template: {error.message}")
        except (TemplateTooLarge, MemoryError) as error:
            return RowError("template_too_large", f"the template: {error}")
        except RecursionError:
            return RowError("template_too_large", "the template calls itself without end")
        except TypeError as error:
            return RowError("bad_type", f"the template: {error}")
        except Exception as error:  # whatever a template computes costs its row alone
            return RowError("template_failed", f"the template: {error or type(error).__name__}")


def compile_template(source: str, key: str) -> Template:
    """`key` is the job's key that holds it, for messages. Raises JobError with the template's line."""
    sandbox = Sandbox()
    try:
        tree = sandbox.parse(source)
        compiled = sandbox.from_string(source)
        names = frozenset(find_undeclared_variables(tree)) - frozenset(sandbox.globals)
    except TemplateSyntaxError as error:
        raise JobError(f"{key} is no valid Jinja template: line {error.lineno}: {error.message}") from error
    except Exception as error:  # Jinja's parser and Python's compiler raise many kinds
        raise JobError(f"{key} is no valid Jinja template: {error or type(error).__name__}") from error
    if any(tree.find_all(NOT_IN_PROMPTS)):
        raise JobError(f"{key}: a prompt's template cannot include other files, and `autoescape` makes HTML; remove that tag")
    guarded = frozenset(_guarded(tree))
    return Template(sandbox, compiled, names, names - guarded, names - guarded - frozenset(_tested(tree)))


def _guarded(tree: nodes.Template) -> Iterator[str]:
    for filtered in tree.find_all(nodes.Filter):
        if filtered.name in GUARDING_FILTERS and isinstance(filtered.node, nodes.Name):
            yield filtered.node.name
    for test in tree.find_all(nodes.Test):
        if test.name in GUARDING_TESTS and isinstance(test.node, nodes.Name):
            yield test.node.name


def _tested(tree: nodes.Template) -> Iterator[str]:
    for branch in tree.find_all((nodes.If, nodes.CondExpr)):
        yield from (name.name for name in _names(branch.test))


def _names(test: nodes.Node) -> Iterator[nodes.Name]:
    if isinstance(test, nodes.Name):
        yield test
    yield from test.find_all(nodes.Name)
