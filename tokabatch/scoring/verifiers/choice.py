r"""Right when the option chosen is the reference's: one of A, B, C and D, in either case.

The choice is the first of these that the text holds, and of several the last: the letter in a box (`\boxed{B}`); the one after
"answer" (`the answer is (B)`, `Answer: b`); the one that is picked (`I choose (d)`, `C is correct`); the one that the text
begins with (`B`, `b.`, `(B) because`); the one after "option" or "choice"; one in brackets or bold (`(B)`, `**B**`). A letter
that goes on as a sentence does (`A train leaves`, `answer: a number`) is none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_LETTERS = "ABCD"
_DASHES, _QUOTES = r"\-\N{EN DASH}\N{EM DASH}", "\"'`\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}"
_APOSTROPHES = "'\N{RIGHT SINGLE QUOTATION MARK}"
_WORDS = "is|are|choice|option|letter|would|should|must|be|the|correct|right|best|final"
_BEFORE = rf"(?: [\s:=(\[{{*$_<>{_QUOTES}{_DASHES}] | \\[(\[] | \\(?:text|textbf|mathrm|mathbf)\{{ | (?i:{_WORDS})\b ){{0,40}}"
_CLOSED = rf"[*_${_QUOTES}]* (?: \s*$ | \s*[.,;:!?)\]}}<\n] | \s+[{_DASHES}] | \\ )"
_GOES_ON = r"\s+(?:is|because|since)\b"
_LETTER = rf"""(?P<letter>
    [B-D] (?! [A-Za-z0-9{_APOSTROPHES}] | -[0-9A-Za-z] )
    | A (?= {_CLOSED} | {_GOES_ON} | \s+(?:as|which)\b | \s+[A-Z0-9(] )
    | [a-d] (?= {_CLOSED} | {_GOES_ON} )
)"""
_NOT = r"\s+(?:not|wrong|incorrect|false)\b"
_EVIDENCE = tuple(
    re.compile(pattern, re.VERBOSE)
    for pattern in (
        rf"\\boxed\s*\{{ {_BEFORE} {_LETTER}",
        rf"(?i:answer) {_BEFORE} {_LETTER}",
        rf"""\b(?i:choose|chose|pick|select|go\ with) {_BEFORE} {_LETTER}
        | (?<![A-Za-z0-9]) (?P<other>[A-D]|[a-d](?=\))) [)\]*"'.]* \s+is\s+(?:the\s+)?(?:correct|right|best|answer)\b""",
        # A text may begin with the article, so that what follows has to end the letter.
        rf"""\A {_BEFORE} (?P<letter>[A-D]|[a-d](?!\s+[a-z])) (?: \s*$ | \s*[).\]:,*\n] | \s+(?:because|since)\b )
        | \A {_BEFORE} (?P<other>[A-D]) \s+is\b (?!{_NOT})""",
        rf"\b(?i:option|choice) {_BEFORE} {_LETTER} (?! [^\w\s]*\s+(?:is|are|was){_NOT} | [^\w\s]*\s+isn )",
        r"""[(\[{] \s* (?P<letter>[A-Da-d]) \s* [)\]}]
        | \*\* \s* \(? (?P<other>[A-Da-d]) \s* (?:[).:][^*\n]*)? \*\*""",
    )
)


COLUMNS = {"extracted": str}


def verify(text: str, row: Mapping[str, Any], *, answer: str) -> dict[str, Any]:
    """Whether `text` chooses the reference: a letter in any case, bare or in brackets, or its index from 0.

    ValueError for a reference that is neither.
    """
    extracted = find_choice(text)
    return {"score": extracted == _letter(row.get(answer)), "extracted": extracted}


def check(row: Mapping[str, Any], *, answer: str) -> None:
    """Raises ValueError where the reference is no choice."""
    _letter(row.get(answer))


def find_choice(text: str) -> str | None:
    """The letter chosen, or None where the text chooses none."""
    for evidence in _EVIDENCE:
        found = list(evidence.finditer(text))
        if found:
            groups = found[-1].groupdict()
            return str(groups["letter"] or groups["other"]).upper()
    return None


def _letter(reference: Any) -> str:
    if isinstance(reference, int) and not isinstance(reference, bool) and 0 <= reference < len(_LETTERS):
        return _LETTERS[reference]
    letter = reference.strip().strip("()[]{}. ").upper() if isinstance(reference, str) else ""
    if len(letter) != 1 or letter not in _LETTERS:
        raise ValueError(f"the reference answer {str(reference)[:80]!r} is no letter from A to D and no index from 0 to 3")
    return letter
