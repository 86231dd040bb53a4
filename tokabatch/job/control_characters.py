"""Control characters in the prompts of a job that were meant as commands of LaTeX, as in "\\boxed" or "\\frac".

In double quotes of YAML, JSON and Python, some letters behind a backslash mean such a character. Directly in front of a
letter it is taken for a mistake; elsewhere, and in texts such as stop texts, it may be meant.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

from tokabatch.job.refusals import Refusal

_ESCAPES = {
    "\a": ("\\a", "a bell character"),
    "\b": ("\\b", "a backspace character"),
    "\v": ("\\v", "a vertical tab"),
    "\f": ("\\f", "a form feed"),
    "\x1b": ("\\e", "an escape character"),
}
"""How each is written in double quotes, and its name."""
_MISTAKE = re.compile(r"([\a\b\v\f\x1b])(?=[A-Za-z])")
_PROMPTS = (
    ("prompt", "template"),
    ("prompt", "system"),
    ("prompt", "chat_template"),
    ("prompt", "few_shot", "template"),
)
_SHOWN = 12


def control_characters(values: Mapping[str, Any]) -> Iterator[Refusal]:
    """Iterate over one refusal for each text of a prompt that holds such a character in front of a letter."""
    for path in _PROMPTS:
        value: Any = values
        for part in path:
            value = cast("Mapping[str, Any]", value).get(part) if isinstance(value, Mapping) else None
        if isinstance(value, str) and (found := _MISTAKE.search(value)):
            yield Refusal(path, _describe(found[0], value[found.end() :]))


def _describe(sign: str, behind: str) -> str:
    written, name = _ESCAPES[sign]
    shown = re.match(r"[^\x00-\x1f]*", behind[:_SHOWN])
    start = shown[0] if shown else ""
    return (
        f"the {written} of `{written}{start}{'…' if len(behind) > len(start) else ''}` became {name} (U+{ord(sign):04X}), "
        f"as in double quotes; to keep the backslash, write \\{written} (or, in YAML, use single quotes or a block `|`; in "
        f'Python, r"…"); if the character is meant, write it there, likewise, as {{{{ "\\x{ord(sign):02x}" }}}}'
    )
