r"""Right when the option chosen is the reference's: one of `verify.options.letters` (A, B, C and D), in either case.

With `verify.options.choices`, a column that holds the options' texts, there are as many letters as options, and a text that
names no letter chooses the option whose text it is, or which alone of all it contains; one that is an option's text to the
letter chooses that in any case, unless it is one letter and other options are longer. The reference is a letter, bare or in
brackets, an index from 0, or an option's text.

The choice is the first of these that the text holds, and of several the last: the letter in a box (`\boxed{B}`); the one after
"answer" (`the answer is (B)`, `Answer: b`); the one that is picked (`I choose (d)`, `C is correct`); the one that the text
begins with (`B`, `b.`, `(B) because`); the one after "option" or "choice"; one in brackets or bold (`(B)`, `**B**`). A letter
that goes on as a sentence does (`A train leaves`, `answer: a number`) is none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

_DASHES, _QUOTES = r"\-\N{EN DASH}\N{EM DASH}", "\"'`\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}"
_APOSTROPHES = "'\N{RIGHT SINGLE QUOTATION MARK}"
_WORDS = "is|are|choice|option|letter|would|should|must|be|the|correct|right|best|final"
_BEFORE = rf"(?: [\s:=(\[{{*$_<>{_QUOTES}{_DASHES}] | \\[(\[] | \\(?:text|textbf|mathrm|mathbf)\{{ | (?i:{_WORDS})\b ){{0,40}}"
_CLOSED = rf"[*_${_QUOTES}]* (?: \s*$ | \s*[.,;:!?)\]}}<\n] | \s+[{_DASHES}] | \\ )"
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ASIDE = r"\s+(?:as|which)\b | \s+[A-Z0-9(]"
_GOES_ON = r"\s+(?:is|because|since)\b"
_NOT = r"\s+(?:not|wrong|incorrect|false)\b"
COLUMNS = {"extracted": str}


def verify(
    text: str, row: Mapping[str, Any], *, answer: str, letters: str = "ABCD", choices: str | None = None
) -> dict[str, Any]:
    """Return whether `text` chooses the reference. Raises ValueError for a reference that is no choice."""
    options, letters = _options(row, letters, choices)
    wanted = _letter(row.get(answer), letters, options)
    same = [letter for letter, option in zip(letters, options, strict=False) if option.strip() == text.strip()]
    alike = len(text.strip()) > 1 or all(len(option.strip()) == 1 for option in options)
    exact = same[0] if len(same) == 1 and alike else None
    extracted = exact or find_choice(text, letters) or _by_text(text, letters, options)
    return {"score": extracted == wanted, "extracted": extracted}


def check_options(*, letters: Any = "ABCD") -> None:
    """Raise ValueError for letters that cannot name options."""
    if not isinstance(letters, str) or not letters.isalpha() or letters != letters.upper() or len(set(letters)) != len(letters):
        raise ValueError(f"verify.options.letters is {letters!r}; write different capital letters, such as ABCDEFGHIJ")


def check(row: Mapping[str, Any], *, answer: str, letters: str = "ABCD", choices: str | None = None) -> None:
    """Raise ValueError if the reference is no choice."""
    options, letters = _options(row, letters, choices)
    _letter(row.get(answer), letters, options)


def expected(row: Mapping[str, Any], *, answer: str, letters: str = "ABCD", choices: str | None = None) -> list[str]:
    """Return the reference's letter."""
    options, letters = _options(row, letters, choices)
    return [_letter(row.get(answer), letters, options)]


@lru_cache(maxsize=32)
def _evidence(letters: str) -> tuple[re.Pattern[str], ...]:
    """Return the patterns that name one of `letters`, the strongest first."""
    upper, lower = letters, letters.lower()
    # A and I are words, too: what follows must end them.
    plain = "".join(letter for letter in letters if letter not in "AI") or "\\Z"
    one = rf"""(?P<letter>
        [{plain}] (?! [A-Za-z0-9{_APOSTROPHES}] | -[0-9A-Za-z] )
        {rf"| A (?= {_CLOSED} | {_GOES_ON} | {_ASIDE} )" if "A" in letters else ""}
        {rf"| I (?= {_CLOSED} )" if "I" in letters else ""}
        | [{lower}] (?= {_CLOSED} | {_GOES_ON} )
    )"""
    patterns = (
        rf"\\boxed\s*\{{ {_BEFORE} {one}",
        rf"(?i:answer) {_BEFORE} {one}",
        rf"""\b(?i:choose|chose|pick|select|go\ with) {_BEFORE} {one}
        | (?<![A-Za-z0-9]) (?P<other>[{upper}]|[{lower}](?=\)))
          [)\]*"'.]* \s+is\s+(?:the\s+)?(?:correct|right|best|answer)\b""",
        # A text may begin with the article: what follows must end the letter.
        rf"""\A {_BEFORE} (?P<letter>[{upper}]|[{lower}](?!\s+[a-z])) (?: \s*$ | \s*[).\]:,*\n] | \s+(?:because|since)\b )
        | \A {_BEFORE} (?P<other>[{upper}]) \s+is\b (?!{_NOT})""",
        rf"\b(?i:option|choice) {_BEFORE} {one} (?! [^\w\s]*\s+(?:is|are|was){_NOT} | [^\w\s]*\s+isn )",
        rf"""[(\[{{] \s* (?P<letter>[{upper}{lower}]) \s* [)\]}}]
        | \*\* \s* \(? (?P<other>[{upper}{lower}]) \s* (?:[).:][^*\n]*)? \*\*""",
    )
    return tuple(re.compile(pattern, re.VERBOSE) for pattern in patterns)


def find_choice(text: str, letters: str = "ABCD") -> str | None:
    """Return the chosen letter, None if the text chooses none."""
    for evidence in _evidence(letters):
        found = list(evidence.finditer(text))
        if found:
            groups = found[-1].groupdict()
            return str(groups["letter"] or groups["other"]).upper()
    return None


def _by_text(text: str, letters: str, options: list[str]) -> str | None:
    """Return the option whose text this is, or which alone it contains as whole words, ignoring letter case."""
    said = _plain(text)
    same = [letter for letter, option in zip(letters, options, strict=False) if _plain(option) == said]
    inside = [
        letter for letter, option in zip(letters, options, strict=False) if option and f" {_plain(option)} " in f" {said} "
    ]
    found = same or inside
    return found[0] if len(found) == 1 else None


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _options(row: Mapping[str, Any], letters: str, choices: str | None) -> tuple[list[str], str]:
    """Return the options' texts, empty if the row has none, and their letters."""
    if choices is None:
        return [], letters
    options = row.get(choices)
    # A multiple-choice data set may hold texts with labels: {"text": [...], "label": [...]}.
    options = options.get("text") if isinstance(options, Mapping) else options
    if not isinstance(options, list) or not 0 < len(options) <= len(_ALPHABET):
        raise ValueError(f"its column {choices!r} is not a list of 1 to {len(_ALPHABET)} options")
    return [str(option) for option in options], _ALPHABET[: len(options)]


def _letter(reference: Any, letters: str, options: list[str]) -> str:
    if isinstance(reference, int) and not isinstance(reference, bool) and 0 <= reference < len(letters):
        return letters[reference]
    letter = reference.strip().strip("()[]{}. ").upper() if isinstance(reference, str) else ""
    if len(letter) == 1 and letter in letters:
        return letter
    same = [
        letter
        for letter, option in zip(letters, options, strict=False)
        if isinstance(reference, str) and option.strip() == reference.strip()
    ]
    if len(same) != 1:
        what = f"no letter from {letters[0]} to {letters[-1]} and no index from 0 to {len(letters) - 1}"
        raise ValueError(f"the reference answer {str(reference)[:80]!r} is {what}{', nor one of the options' * bool(options)}")
    return same[0]
