"""Parse one JSON object from a line of bytes, strictly.

Stricter than Python's `json`: duplicate keys, NaN, Infinity, numbers that overflow to infinity, nesting beyond MAX_DEPTH and
text with lone surrogates are errors. The caller adds the line's place to messages.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NoReturn, cast

from tokabatch.errors import RowError
from tokabatch.number_text import counted

MAX_DEPTH = 100
MAX_SHOWN = 80
BAD_JSON = "bad_json"


class _Refused(ValueError):
    """A fault that Python's `json` would accept."""


def parse_object(data: bytes) -> dict[str, Any] | RowError:
    """Return the object in `data`, or a RowError `bad_json`, `bad_utf8` or `bad_unicode` without the line's place."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return RowError(
            "bad_utf8",
            f"invalid UTF-8: {error.reason} (byte 0x{data[error.start]:02x}, {counted(error.start, 'byte')} in); save "
            f"it as UTF-8",
        )
    fault = _depth_fault(text)
    if fault:
        return RowError(BAD_JSON, fault)
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        return RowError(BAD_JSON, f"{error.msg.removesuffix(' at')} at character {error.pos}: {_shown(text)}")
    except RecursionError:
        return RowError(BAD_JSON, "nested too deeply")
    except _Refused as error:
        return RowError(BAD_JSON, str(error))
    except ValueError:  # Python's limit on the digits of an int.
        return RowError(BAD_JSON, "a whole number has thousands of digits")
    if not isinstance(value, dict):
        return RowError(BAD_JSON, f"a JSON object is expected, not {_kind(value)}: {_shown(text)}")
    row = cast("dict[str, Any]", value)
    return _surrogate_fault(text, row) or row


def _depth_fault(text: str) -> str | None:
    """Return the fault of a text that nests too deeply. Only texts with many brackets are scanned character by character."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return None
    depth, in_string, escaped = 0, False, False
    for character in text:
        if escaped:
            escaped = False
        elif in_string:
            escaped = character == "\\"
            in_string = character != '"'
        elif character == '"':
            in_string = True
        elif character in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                return f"nested more than {MAX_DEPTH} levels deep"
        elif character in "]}":
            depth -= 1
    return None


def _surrogate_fault(text: str, row: dict[str, Any]) -> RowError | None:
    """Return the fault of half a surrogate pair. It can only come from an escape `\\ud...`, so other lines are not searched."""
    if "\\ud" not in text and "\\uD" not in text:
        return None
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        return RowError("bad_unicode", f"the escape \\u{code:04x} is half of a surrogate pair, which is not a character")
    return None


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    listed = list(pairs)
    row = dict(listed)
    if len(row) != len(listed):
        seen: set[str] = set()
        twice = next(key for key, _ in listed if key in seen or seen.add(key))
        raise _Refused(f"the key {twice[:MAX_SHOWN]!r} occurs twice")
    return row


def _refuse_constant(name: str) -> NoReturn:
    raise _Refused(f"{name} is not JSON; write null or a number")


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise _Refused(f"the number {digits[:MAX_SHOWN]} is too large for a 64-bit float")
    return value


def _shown(text: str) -> str:
    return repr(text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…")


def _kind(value: object) -> str:
    names: dict[type, str] = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite)
