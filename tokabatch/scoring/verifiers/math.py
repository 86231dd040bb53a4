r"""Right when the text's last formula or number equals the reference as mathematics, such as 0.5 and \frac{1}{2}, or x+1 and
1+x, by the library math-verify (`pip install "tokabatch[math]"`).

The reference may be a bare formula (`\frac{1}{2}`), one between dollar signs or in a `\boxed{...}`, or a whole solution that
ends in one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import math_verify  # pyright: ignore[reportMissingImports]

COLUMNS = {"extracted": str}
_SECONDS = 5
"""The library's own limit for parsing, and for comparing."""


def verify(text: str, row: Mapping[str, Any], *, answer: str) -> dict[str, Any]:
    """Return whether the text's answer equals the reference. Raises ValueError for a reference that holds no formula."""
    wanted = _expected(row, answer)
    found = math_verify.parse(text, parsing_timeout=_SECONDS)
    if not found:
        return {"score": False}
    score = math_verify.verify(wanted, found, timeout_seconds=_SECONDS)
    return {"score": bool(score), "extracted": str(found[0])}


def check(row: Mapping[str, Any], *, answer: str) -> None:
    """Raise ValueError if the reference holds no formula."""
    _expected(row, answer)


def expected(row: Mapping[str, Any], *, answer: str) -> list[str]:
    """Return the reference as it is written in the row."""
    return [str(row[answer])]


def _expected(row: Mapping[str, Any], answer: str) -> list[Any]:
    if row.get(answer) is None:
        raise ValueError("the reference answer is null")
    parsed = _parsed(str(row[answer]))
    if not parsed:
        raise ValueError(f"the reference answer {str(row[answer])[:80]!r} holds no formula or number")
    return parsed


@lru_cache(maxsize=1024)
def _parsed(reference: str) -> list[Any]:
    delimited = any(mark in reference for mark in ("$", "\\boxed", "\\(", "\\["))
    found = math_verify.parse(reference if delimited else f"${reference}$", parsing_timeout=_SECONDS)
    return found or math_verify.parse(reference, parsing_timeout=_SECONDS)
