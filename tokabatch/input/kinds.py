"""What messages call a value of a row: its kind as in JSON, not its Python type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def kind_of(value: Any) -> str:
    """Return what to call a value behind "not": `text`, `a list`, `an object`, `the number 1.5`, `a number of more than 30
    digits`, `true`, `null`, `binary data`, or the name of its type."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        is_short = isinstance(value, float) or abs(value) < 10**30
        return f"the number {value}" if is_short else "a number of more than 30 digits"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, Mapping):
        return "an object"
    return {str: "text", bytes: "binary data"}.get(type(value), type(value).__name__)
