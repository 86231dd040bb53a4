"""Right when the answer is the reference's number, as in GSM8K (Cobbe et al., 2021): `... #### 42`.

The answer is the first number on the line of the first `####`; without one, the last number of the text. Numbers are
compared exactly, as decimals: 18 equals 18.00, $1,234 equals 1234 and 20% equals 20. Commas group digits in threes or part
numbers. A fraction or a power of ten is not understood as one number.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

_MARKER = "####"
_MINUS = "-\N{MINUS SIGN}"
_NUMBER = re.compile(
    rf"""
    (?<![0-9A-Za-z_]) (?<![0-9]\.)          # the 2 of x2 is no number, nor is the minus of 3-4 a sign
    (?P<sign> [{_MINUS}+]? \$? [{_MINUS}]? )
    (?P<digits>
        (?: [0-9]{{1,3}} (?: ,[0-9]{{3}} )+ (?![0-9]) | [0-9]+ ) (?: \.[0-9]+ )?
        | (?<!\.) \.[0-9]+
    )
    """,
    re.VERBOSE,
)


def verify(text: str, reference: Any) -> bool:
    """Whether the answer in `text` equals the reference: a number, or a text that ends in one as solutions do.

    ValueError for a reference without a number.
    """
    spelled = f"{Decimal(str(reference)):f}" if isinstance(reference, float) else str(reference)
    expected = None if reference is None else find_answer(spelled)
    if expected is None:
        raise ValueError(f"the reference answer {str(reference)[:80]!r} holds no number")
    return find_answer(text) == expected


def find_answer(text: str) -> Decimal | None:
    """The number that a solution ends in, or None where it holds none."""
    _, marker, after = text.partition(_MARKER)
    marked = _NUMBER.search(after.lstrip().partition("\n")[0]) if marker else None
    if marked:
        return _value(marked)
    last = None
    for last in _NUMBER.finditer(text):  # noqa: B007
        pass
    return _value(last) if last else None


def _value(match: re.Match[str]) -> Decimal:
    value = Decimal(match["digits"].replace(",", ""))
    return -value if set(match["sign"]) & set(_MINUS) else value
