"""The text of values in a template: texts as they are, digits of numbers, True or False, dates and times in ISO 8601, and JSON
where a template asks for it.

Everything else is refused with a remedy, so that no prompt ever contains the Python representation of an object: lists, objects
and null, NaN and infinity, binary data, methods, functions.
"""

from __future__ import annotations

import json
import math
from collections.abc import ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any, cast
from uuid import UUID

from jinja2 import Undefined
from jinja2.exceptions import UndefinedError
from jinja2.runtime import LoopContext, Macro, TemplateReference


class NotText(TypeError):
    """A value that has no text."""


def is_null(value: Any) -> bool:
    """Return whether a value is null, or the NaN that data frames use for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def text_of(value: Any, name: str | None = None, place: str = "a value of the template") -> str:
    """Return the text of a value; `name` is its name in the template, `place` where it is used. Raises UndefinedError for null
    and missing values, NotText for values without a text."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | date | time | UUID):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(value)
    if isinstance(value, Decimal) and value.is_finite():
        return f"{value:f}"
    if isinstance(value, Undefined):
        return str(value)  # raises
    shown = f"`{name}`" if name else place
    if is_null(value):
        kind = "null" if value is None else "NaN"
        raise UndefinedError(f"{shown} is {kind} in this row; write {{{{ {name or '...'} | default('') }}}} if it is optional")
    what, remedy = _description(value, name or "...")
    raise NotText(f"{shown} is {what}, which is not text; {remedy}")


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson` of chat templates: plain JSON, no characters escaped for HTML, keys in their order."""
    pair = None if separators is None else (separators[0], separators[1])
    try:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=pair,
            sort_keys=sort_keys,
            allow_nan=False,
            default=_json_value,
        )
    except ValueError as error:
        raise NotText("tojson: the value holds NaN or an infinite number, for which JSON has no text") from error


def _json_value(value: Any) -> Any:
    """Replace a value that has no JSON type."""
    if isinstance(value, range | KeysView | ValuesView | ItemsView):
        return list(cast("Sequence[Any]", value))
    if isinstance(value, Mapping):
        return dict(cast("Mapping[Any, Any]", value))
    return text_of(value)


def _description(value: Any, name: str) -> tuple[str, str]:
    """Return what kind of value has no text, and what to write instead."""
    if isinstance(value, bytes | bytearray | memoryview):
        return "binary and no UTF-8", "store it as text, or leave it out of the prompt"
    if isinstance(value, Mapping):
        return "an object", f"write one of its fields, or {{{{ {name} | tojson }}}}"
    if isinstance(value, list | tuple | range | KeysView | ValuesView | ItemsView):
        return "a list", f"write {{{{ {name} | join(', ') }}}}, {{{{ {name} | tojson }}}} or a loop"
    if isinstance(value, TemplateReference | LoopContext):
        return "Jinja's own", "where a column has this name, give it another"
    if isinstance(value, Iterator):
        return "a sequence made by a filter", f"write {{{{ {name} | join(', ') }}}} or {{{{ {name} | list | tojson }}}}"
    if isinstance(value, float | Decimal):
        return f"the number {value}", "leave such rows out, or make it null"
    if isinstance(value, timedelta):
        return "a span of time", f"write {{{{ {name}.total_seconds() }}}}"
    if isinstance(value, Macro):
        return "a macro", f"call it: {{{{ {name}(...) }}}}"
    if callable(value):
        return (
            "a method" if hasattr(value, "__self__") else "a function",
            f"the row has no field of this name here; to call it, write {{{{ {name}() }}}}",
        )
    return f"of the type {type(value).__name__}", "write one of its fields"
