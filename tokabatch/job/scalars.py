"""The meaning of an unquoted word in a job file or override: YAML 1.2 core scalars, plus `1K` (1,024) and `1k` (1,000).

Differs from YAML 1.1 in its pitfalls: `1e3` and `1e-5` are numbers; `yes`, `on` and `12:30` are text. `1e3` is a whole number,
valid wherever one is required.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

Scalar = str | int | float | bool | None

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOL = {word: value for value in (True, False) for word in (str(value), str(value).lower(), str(value).upper())}
_INT = re.compile(r"[-+]?[0-9]{1,40}")
_HEX = re.compile(r"0x[0-9a-fA-F]{1,32}")
_OCTAL = re.compile(r"0o[0-7]{1,40}")
_SUFFIXED = re.compile(r"([-+]?[0-9]{1,15})([KMGkmg])")
_WHOLE_EXPONENT = re.compile(r"([-+]?[0-9]{1,15})[eE]\+?0*([0-9]{1,2})")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NON_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_MULTIPLIER = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "k": 10**3, "m": 10**6, "g": 10**9}


def parse_scalar(text: str) -> Scalar:
    """Parse one plain (unquoted) scalar; whatever is neither null, boolean nor number is text."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text):
        return int(text)
    if match := _SUFFIXED.fullmatch(text):
        return int(match[1]) * _MULTIPLIER[match[2]]
    if match := _WHOLE_EXPONENT.fullmatch(text):
        return int(match[1]) * 10 ** int(match[2])
    if _HEX.fullmatch(text):
        return int(text, 16)
    if _OCTAL.fullmatch(text):
        return int(text, 8)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _NON_FINITE.fullmatch(text):
        return float(text.replace(".", "").lower())
    return text


def write_value(value: Any) -> str:
    """Write a value as in YAML, on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        plain = value == value.strip() and value.isprintable() and not isinstance(parse_scalar(value), int | float)
        return value if plain else _quote(value)
    if isinstance(value, list | tuple):
        items: list[Any] | tuple[Any, ...] = value
        return f"[{', '.join(_quote(item) if isinstance(item, str) else write_value(item) for item in items)}]"
    if isinstance(value, Mapping):
        pairs: Mapping[Any, Any] = value
        return f"{{{', '.join(f'{key}: {write_value(item)}' for key, item in pairs.items())}}}"
    return str(value)


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
