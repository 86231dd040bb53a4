"""Control characters in the texts of a job that were meant as commands of LaTeX or of a pattern: "\\boxed", "\\frac", "\\b".

In double quotes of YAML, JSON and Python, some letters behind a backslash mean such a character. In a judge's pattern it is
always taken for a mistake, in its other options never, elsewhere directly in front of a letter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from tokabatch.job.refusals import Path, Refusal

_ESCAPES = {
    "\a": ("\\a", "a bell character"),
    "\b": ("\\b", "a backspace character"),
    "\v": ("\\v", "a vertical tab"),
    "\f": ("\\f", "a form feed"),
    "\x1b": ("\\e", "an escape character"),
}
"""How each is written in double quotes, and its name."""
_ANY = re.compile(r"[\a\b\v\f\x1b]")
_COMMAND = re.compile(r"[\a\b\v\f\x1b](?=[A-Za-z])")
_COMMAND_IN_OUTPUT = re.compile(r"[\a\b](?=[A-Za-z])")
"""In texts that an output may hold, such as stop texts, the others are plausible: page breaks, sequences for terminals."""
_SHOWN = 12


def control_characters(values: Mapping[str, Any]) -> Iterator[Refusal]:
    """Iterate over one refusal for each text that holds such a character."""
    for path, text in _texts(values):
        if path[:2] == ("verify", "options"):
            pattern = _ANY if path[2:] == ("pattern",) else None
        else:
            pattern = _COMMAND_IN_OUTPUT if path[0] == "generation" else _COMMAND
        if pattern is not None and (found := pattern.search(text)):
            is_template = path[0] == "prompt" and "chat_template_kwargs" not in path
            yield Refusal(path, _describe(found[0], text[found.end() :], is_template))


def _texts(value: Any, path: Path = ()) -> Iterator[tuple[Path, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in cast("Mapping[Any, Any]", value).items():
            yield from _texts(item, (*path, key))
    elif isinstance(value, list | tuple):
        for place, item in enumerate(cast("Sequence[Any]", value)):
            yield from _texts(item, (*path, place))


def _describe(sign: str, behind: str, in_template: bool) -> str:
    written, name = _ESCAPES[sign]
    shown = re.match(r"[^\x00-\x1f]*", behind[:_SHOWN])
    start = shown[0] if shown else ""
    meant = f'; if the character is meant, write {{{{ "\\x{ord(sign):02x}" }}}} in single quotes or below a block `|`'
    return (
        f"the {written} of `{written}{start}{'…' if len(behind) > len(start) else ''}` became {name} (U+{ord(sign):04X}), "
        f"as in double quotes; to keep the backslash, write \\{written} (or, in YAML, use single quotes or a block `|`; in "
        f'Python, r"…"){meant if in_template else ""}'
    )
