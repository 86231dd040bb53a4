"""JSON that any parser reads: no NaN or Infinity (they become null), and a text for every value without a JSON type.

Bytes become base64, other values their `str`.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any


def to_json(value: object, *, indent: int | None = None) -> str:
    """Return one JSON text, with non-ASCII characters unescaped."""
    try:
        return _dump(value, indent)
    except ValueError:
        return _dump(_finite(value), indent)


def to_document(value: object) -> bytes:
    """Return the content of a JSON file, with indentation and a final line break."""
    # A file name need not be text; its other bytes are escaped, as in JSON.
    return (to_json(value, indent=2) + "\n").encode(errors="backslashreplace")


def _dump(value: object, indent: int | None) -> str:
    separators = (",", ":") if indent is None else None
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain, indent=indent, separators=separators)


def _plain(value: object) -> str:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(value).decode("ascii")
    return str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview)):
        return [_finite(item) for item in value]
    return value
