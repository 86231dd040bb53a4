"""Messages for columns, fields and items that a row does not have: what it has instead, and what to write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, cast

from jinja2 import StrictUndefined
from jinja2.lexer import name_re
from jinja2.utils import missing

from tokabatch.errors import RowError

ROW = "row"
"""The name of the whole row in a template, unless a column has this name."""
NO_NAMES = frozenset("true false none True False None and or not in is if else".split())
"""Words that are not names in Jinja."""
LISTED = 20
SHOWN = 40


class Missing(StrictUndefined):
    """A name, field or item that does not exist: an error wherever a template uses it."""

    @property
    def _undefined_message(self) -> str:
        name, owner = self._undefined_name, self._undefined_obj
        if self._undefined_hint:
            return self._undefined_hint
        if owner is missing:
            return f"the column {name!r} is missing in this row; {optional(str(name))}"
        if isinstance(owner, Mapping):
            fields = cast("Mapping[str, Any]", owner)
            return f"an object has no field {name!r}{suggestion(str(name), fields)}; {optional()}"
        if isinstance(owner, list | tuple):
            return f"a list of {len(cast('list[Any]', owner))} has no item {name!r}; {optional()}"
        what = "null" if owner is None else f"the text {owner[:SHOWN]!r}" if isinstance(owner, str) else type(owner).__name__
        return f"{what} has no field {name!r}; {optional()}"


def in_template(column: str) -> str:
    """Return how a template spells a column: its name, or `row['its name']` if Jinja would read something else."""
    plain = name_re.fullmatch(column) is not None and column not in NO_NAMES
    return column if plain else f"{ROW}[{column!r}]"


def missing_field(name: str, row: Mapping[str, Any], *, template: bool = False) -> RowError:
    """Return the error of a column that is null or missing in the row; `template` if a template names it."""
    if name in row:
        return RowError("missing_field", f"the column {name!r} is null in this row")
    return RowError("missing_field", f"the column {name!r} is missing in this row{suggestion(name, row, template=template)}")


def suggestion(name: str, names: Iterable[Any], *, template: bool = False) -> str:
    """Suggest what a misspelt `name` may mean, and list what exists."""
    listed = [str(each) for each in names]
    has = f"it has {list_columns(listed)}" if listed else "it is empty"
    return f"{did_you_mean(name, listed, template=template)}; {has}"


def did_you_mean(name: str, names: Iterable[str], *, template: bool = False) -> str:
    """Return the nearest name in brackets, with its spelling in a template if that differs; or nothing."""
    near = get_close_matches(name, list(names), n=1)
    if not near:
        return ""
    written = f", written {in_template(near[0])}" if template and in_template(near[0]) != near[0] else ""
    return f" (did you mean {near[0]!r}{written}?)"


def optional(name: str | None = None, *, filtered: bool = False) -> str:
    """Return how a template does without the column `name`; `filtered` if the template has filters behind it."""
    if filtered:
        return "for an optional column put default('') in front of its other filters, or another default that they accept"
    remedy = f"{{{{ {in_template(name)} | default('') }}}}" if name else "| default('') after it"
    return f"for an optional column write {remedy}"


def list_columns(names: Iterable[Any]) -> str:
    """List column names for a message, at most 20."""
    listed = sorted(str(name) for name in names)
    more = f" and {len(listed) - LISTED} more" if len(listed) > LISTED else ""
    return (", ".join(listed[:LISTED]) + more) or "none"
