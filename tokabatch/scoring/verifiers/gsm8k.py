r"""Right when the answer is the reference's number, as in GSM8K (Cobbe et al., 2021): `... #### 42`.

The answer is on the line of the first `####`; where that holds no number, in the last `\boxed{...}`; where there is none, it is
the last number of the text. On the line and in the box it is the first number, behind the last `=` if there is one.

Numbers are read as people and models write them and compared exactly: 18 equals 18.00, $1,234 equals 1234, 20% equals 20, 5
million equals 5000000; 1/2, \frac{1}{2}, ½ and 0.5 are the same. LaTeX and typographic forms are rewritten to plain ones first;
then each run of digits and operators is one term. A term that is not one number (a sum, a power, 1e3, 2x, a ratio, a root) is
no answer, whatever numbers are in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

Value = Decimal | Fraction

_MARKER, _BOX = "####", "\\boxed{"
_FRACTION = r"\\[dt]?frac\s*(?:\{\s*(-?[0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}|([0-9])\s*([0-9]))"
_BRACES = r"(?:\{(?:[^{}]|\{[^{}]*\})*\}\s*)"
_VULGAR = dict(zip("½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞", "1/2 1/3 2/3 1/4 3/4 1/5 2/5 3/5 4/5 1/6 5/6 1/8 3/8 5/8 7/8".split(), strict=True))
_GROUP_MARKS = r"\{,\}|,?\\[,!;]|['_\N{RIGHT SINGLE QUOTATION MARK}\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}\N{THIN SPACE}]"
_UNREAD = "√0"
"""Placeholder for a term that is not parsed."""
_REWRITES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"[\N{MINUS SIGN}\N{EN DASH}]", "-"),
    (r"\\?[$€£¥₹]", "$"),
    (r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1"),
    (rf"(?<=[0-9])(?:{_GROUP_MARKS})(?=[0-9]{{3}}(?![0-9]))", ","),
    (r"(?<![0-9.,])[0-9]{1,3}(?: [0-9]{3})+(?![0-9])", lambda found: found[0].replace(" ", ",")),
    (rf"(?<=[0-9])\s*{_FRACTION}", r" \1\3/\2\4"),
    (_FRACTION, r"\1\3/\2\4"),
    (rf"\\[dt]?frac\s*{_BRACES}{{2}}|\\sqrt\s*(?:\[[^\]]*\])?\s*(?:{_BRACES}|[0-9])|√\s*\(?[0-9.]+", f" {_UNREAD} "),
    (rf"(?<=[0-9]) ?([{''.join(_VULGAR)}])", lambda found: f" {_VULGAR[found[1]]}"),
    (rf"[{''.join(_VULGAR)}]", lambda found: _VULGAR[found[0]]),
    (r"[\N{FRACTION SLASH}÷]|\\div\b", "/"),
    (r"[\N{MULTIPLICATION SIGN}·]|\\times\b|\\cdot\b", "*"),
    (r"(?<=[0-9])\*\*(?=[0-9])", "^"),
    (r"(?<=[0-9)])(?=[²³¹⁰⁴-⁹])", f"^{_UNREAD}"),
    (r"(?i)(?<=[0-9]) minus (?=[$0-9])", " - "),
    (r"(?i)\b(?:negative|minus)\s+(?=[$0-9])", "-"),
)
_COMPILED = tuple((re.compile(pattern), written) for pattern, written in _REWRITES)
_DIGITS = (
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}(?![0-9])|[0-9]+)(?:\.[0-9]+)?"
    r"|(?<![.])\.[0-9]+)"
)
_TERM = re.compile(
    rf"""
    (?P<unread> {_UNREAD} )
    | (?<![0-9A-Za-z_^]) (?<![0-9]\.)       # the 2 of x2 is no number, nor is the minus of 3-4 a sign
    (?P<sign> [-+]? (?:\$[ ]?)? -? ) (?P<digits> {_DIGITS} )
    (?P<rest> (?:
        [ \t]* (?: [*/^+] | [xX](?=[ \t]*[$(0-9]) | [ \t]-(?=[ \t]) ) [ \t]* [-+($\{{]* {_DIGITS}
        | [ ] [0-9]+ [ ]?/[ ]? [0-9]+
        | [:.] [0-9]+
        | [eE] [-+]? [0-9]+
        | [ \t]* [*/^]? [ \t]* {_UNREAD}
    )* )
    (?P<unit>
        [ ]? (?:thousand|million|billion|trillion)\b | (?:[kKMB]|bn)(?![A-Za-z])
        | [xyzn]+(?![A-Za-z0-9]) | [ ]? (?:π|\\?pi\b)
    )?
    """,
    re.VERBOSE,
)
_MAGNITUDES = {"k": 3, "thousand": 3, "m": 6, "million": 6, "b": 9, "bn": 9, "billion": 9, "trillion": 12}
_PROPER = re.compile(r"(?: (?P<over>[0-9]+))? ?/ ?(?P<under>[0-9,]+)")
_DECIMAL_COMMA = re.compile(r"(?<![0-9,])[0-9]+,$")


@dataclass(frozen=True, slots=True)
class _Term:
    """A run of digits and operators; `value` is None if it is not one number."""

    value: Value | None
    glued: bool
    """Part of a range or list without spaces (3-4, 1,2,3), of which it is one element."""


COLUMNS = {"extracted": str}


def verify(text: str, row: Mapping[str, Any], *, answer: str) -> dict[str, Any]:
    """Return whether the answer in `text` equals the reference: a number, or a text that ends in one, as solutions do. Raises
    ValueError for a reference without a number."""
    found, wanted = find_answer(text), _expected(row.get(answer))
    return {"score": found is not None and Fraction(found) == wanted, "extracted": None if found is None else _written(found)}


def check(row: Mapping[str, Any], *, answer: str) -> None:
    """Raise ValueError if the reference holds no number."""
    _expected(row.get(answer))


def expected(row: Mapping[str, Any], *, answer: str) -> list[str]:
    """Return the reference's number, written as `extracted` is."""
    return [_written(_expected(row.get(answer)))]


def find_answer(text: str) -> Value | None:
    """Return the number that a solution ends in; None if it holds none, or ends in something that is not one number."""
    _, marker, after = text.partition(_MARKER)
    places = [after.lstrip().partition("\n")[0]] if marker else []
    places += [_in_braces(text[text.rindex(_BOX) + len(_BOX) :])] if _BOX in text else []
    for place in places:
        terms = _read_terms(place.rpartition("=")[2]) or _read_terms(place)
        if terms:
            return None if terms[0].glued else terms[0].value
    terms = _read_terms(text)
    return terms[-1].value if terms else None


def _expected(reference: Any) -> Fraction:
    if isinstance(reference, float | Decimal):
        reference = f"{Decimal(str(reference)):f}"
    found = None if reference is None else find_answer(str(reference))
    if found is None:
        raise ValueError(f"the reference answer {str(reference)[:80]!r} holds no number")
    return Fraction(found)


def _written(value: Value) -> str:
    """Write equal numbers alike, so that votes can be counted: 18, 18.5 and 1/3; numbers of very many digits as they are."""
    exact = Fraction(value)
    if max(exact.numerator.bit_length(), exact.denominator.bit_length()) > 1000:
        return f"{value:f}" if isinstance(value, Decimal) else "a fraction of many digits"
    places = next((places for places in range(30) if 10**places % exact.denominator == 0), None)
    if not places:
        return str(exact)
    digits = f"{abs(exact.numerator) * 10**places // exact.denominator:0{places + 1}d}"
    return f"{'-' * (exact < 0)}{digits[:-places]}.{digits[-places:]}"


def _in_braces(text: str) -> str:
    """Return the text up to the brace that closes the opening one before it."""
    depth = 1
    for place, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[:place]
    return text


def _read_terms(text: str) -> list[_Term]:
    """Return the terms of a text, in order."""
    for pattern, written in _COMPILED:
        text = pattern.sub(written, text)
    return [_term(found, text) for found in _TERM.finditer(text)]


def _term(found: re.Match[str], text: str) -> _Term:
    after = text[found.end() : found.end() + 2]
    glued = bool(re.match(r"[-,][0-9]", after))
    if _DECIMAL_COMMA.search(text[max(0, found.start() - 40) : found.start()]) and not re.match(r",[0-9]", after):
        return _Term(None, glued)
    return _Term(None if found["unread"] else _value(found), glued)


def _value(found: re.Match[str]) -> Value | None:
    number = Decimal(found["digits"].replace(",", ""))
    value: Value | None = number
    if found["rest"]:
        value = _fraction(number, found["rest"])
    unit = (found["unit"] or "").strip().lower()
    if value is None or (unit and unit not in _MAGNITUDES):
        return None
    if unit:
        value = Fraction(value) * 10 ** _MAGNITUDES[unit]
    if value is None or "-" not in found["sign"]:
        return value
    return value.copy_negate() if isinstance(value, Decimal) else -value


def _fraction(first: Decimal, rest: str) -> Fraction | None:
    """Parse 1/2, or 1 1/2 with `first` the whole part; None for any other expression."""
    # Python refuses to parse numbers of several thousand digits.
    proper = _PROPER.fullmatch(rest) if len(rest) < 1000 else None
    if proper is None or first != int(first):
        return None
    under = int(proper["under"].replace(",", ""))
    if under == 0:
        return None
    if proper["over"] is None:
        return Fraction(int(first), under)
    return int(first) + Fraction(int(proper["over"]), under)
