"""Right when the text is the reference, white space around either aside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS = {"extracted": str}


def verify(text: str, row: Mapping[str, Any], *, answer: str) -> dict[str, Any]:
    """Whether `text` equals the reference, a string or what `str` makes of it. ValueError for a null reference."""
    extracted = text.strip()
    return {"score": extracted == _expected(row, answer), "extracted": extracted}


def check(row: Mapping[str, Any], *, answer: str) -> None:
    """Raises ValueError where the reference is null."""
    _expected(row, answer)


def _expected(row: Mapping[str, Any], answer: str) -> str:
    if row.get(answer) is None:
        raise ValueError("the reference answer is null")
    return str(row[answer]).strip()
