"""Right when the option chosen is the reference's: one of A, B, C and D.

The choice is the letter after the last "answer" (`the answer is (B)`, `Answer: B`, `**Answer: B**`); without one, the letter
that the text begins with (`B`, `B.`, `(B) because`); without that, the last letter in brackets.
"""

from __future__ import annotations

import re
from typing import Any

_LETTERS = "ABCD"
_OPTION = r"[(\[{*$\s]* (?P<letter>[A-D]) (?![A-Za-z0-9'])"
_STATED = re.compile(r"(?i:answer) (?: [\s*:=]|(?i:is|choice|option|would|be|the|correct)\b )*" + _OPTION, re.VERBOSE)
# A text may begin with the article: `A train leaves` is no choice, `A`, `A.` and `A)` are.
_LEADING = re.compile(_OPTION + r"(?: \s*$ | \s*[).\]:,*\n] | \s+(?i:because|since|is)\b )", re.VERBOSE)
_BRACKETED = re.compile(r"[(\[{] \s* (?P<letter>[A-D]) \s* [)\]}]", re.VERBOSE)


def verify(text: str, reference: Any) -> bool:
    """Whether `text` chooses the reference: a letter in any case, bare or in brackets, or its index from 0.

    ValueError for a reference that is neither.
    """
    return find_choice(text) == _letter(reference)


def find_choice(text: str) -> str | None:
    """The letter chosen, or None where the text chooses none."""
    stated = list(_STATED.finditer(text))
    if stated:
        return stated[-1]["letter"]
    leading = _LEADING.match(text)
    if leading:
        return leading["letter"]
    bracketed = list(_BRACKETED.finditer(text))
    return bracketed[-1]["letter"] if bracketed else None


def _letter(reference: Any) -> str:
    if isinstance(reference, int) and not isinstance(reference, bool) and 0 <= reference < len(_LETTERS):
        return _LETTERS[reference]
    letter = reference.strip().strip("()[]{}. ").upper() if isinstance(reference, str) else ""
    if len(letter) != 1 or letter not in _LETTERS:
        raise ValueError(f"the reference answer {str(reference)[:80]!r} is no letter from A to D and no index from 0 to 3")
    return letter
