r"""Right when what `verify.options.pattern` finds in the text is the reference; without `verify.answer`, when it finds any.

What is found is the pattern's first group, or all that it matched where it has none; of several matches the last, or the first
with `which: first`. White space around it and the reference is left aside, and letter case with `ignore_case: true`. The
pattern is one of Python's `re`, where `.` matches no line break unless it begins with `(?s)`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

COLUMNS = {"extracted": str}


def verify(
    text: str,
    row: Mapping[str, Any],
    *,
    pattern: str,
    answer: str | None = None,
    which: str = "last",
    ignore_case: bool = False,
) -> dict[str, Any]:
    """Return whether the match is the reference. Raises ValueError for a null reference."""
    wanted = _expected(row, answer)
    found = list(_compiled(pattern, ignore_case).finditer(text))
    if not found:
        return {"score": False}
    match = found[-1 if which == "last" else 0]
    extracted = ((match[1] if match.re.groups else match[0]) or "").strip()
    same = extracted.lower() == wanted.lower() if ignore_case and wanted is not None else extracted == wanted
    return {"score": wanted is None or same, "extracted": extracted}


def check_options(*, pattern: Any, which: str = "last") -> None:
    """Raise ValueError if the pattern or `which` is invalid."""
    if which not in ("first", "last"):
        raise ValueError(f"verify.options.which is {which!r}; write first or last")
    if not isinstance(pattern, str):
        raise ValueError(f"verify.options.pattern is {pattern!r}; write a text, in quotes")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"verify.options.pattern {pattern!r} is not a valid regular expression: {error}") from error


def check(row: Mapping[str, Any], *, answer: str | None = None) -> None:
    """Raise ValueError if the reference is null."""
    _expected(row, answer)


def expected(row: Mapping[str, Any], *, answer: str | None = None) -> list[str]:
    """Return the reference, if there is one."""
    reference = _expected(row, answer)
    return [] if reference is None else [reference]


@lru_cache(maxsize=16)
def _compiled(pattern: str, ignore_case: bool) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE if ignore_case else 0)


def _expected(row: Mapping[str, Any], answer: str | None) -> str | None:
    if answer is None:
        return None
    if row.get(answer) is None:
        raise ValueError("the reference answer is null")
    return str(row[answer]).strip()
