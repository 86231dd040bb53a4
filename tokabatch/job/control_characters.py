"""Control characters in the texts of a job: mostly a backslash that began an escape, as in "\\boxed" or "\\frac".

In double quotes of YAML, JSON and Python, some letters behind a backslash mean such a character. A newline, a tab and a
carriage return are used in prompts, the others are not. Independent of the job's keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import Any, cast

from tokabatch.job.refusals import Path, Refusal

_ESCAPES = {
    "\0": ("\\0", "a null character"),
    "\a": ("\\a", "a bell character"),
    "\b": ("\\b", "a backspace character"),
    "\v": ("\\v", "a vertical tab"),
    "\f": ("\\f", "a form feed"),
    "\x1b": ("\\e", "an escape character"),
}
"""How each is written in double quotes, and its name."""
_ALLOWED = "\t\n\r"
_SHOWN = 12


def control_characters(values: Any, path: Path = ()) -> Iterator[Refusal]:
    """Iterate over one refusal for each text, at any depth of `values`, that holds a control character."""
    if isinstance(values, Mapping):
        for key, value in cast("Mapping[str, Any]", values).items():
            yield from control_characters(value, (*path, key))
    elif isinstance(values, list | tuple):
        for index, value in enumerate(cast("list[Any]", values)):
            yield from control_characters(value, (*path, index))
    elif isinstance(values, str):
        place = next((place for place, sign in enumerate(values) if sign < " " and sign not in _ALLOWED), None)
        if place is not None:
            yield Refusal(path, _describe(values[place], values[place + 1 :]))


def _describe(sign: str, behind: str) -> str:
    number = f"U+{ord(sign):04X}"
    if sign not in _ESCAPES:
        return f"holds the control character {number}; remove it"
    written, name = _ESCAPES[sign]
    shown = "".join(takewhile(str.isprintable, behind[:_SHOWN]))
    where = f" of `{written}{shown}{'…' if len(behind) > len(shown) else ''}`" if shown else ""
    return (
        f"the {written}{where} became {name} ({number}), as in double quotes; to keep the backslash, put the text in single "
        f"quotes or below a block `|`, or write \\{written}"
    )
