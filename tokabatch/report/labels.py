"""The word in front of a message on standard error, in colour on a terminal.

`note:` is something that the user may want to know, `warning:` something that may make results wrong or a run slow, `error:`
what ended a command. A text that begins with none of them is a note; the text of a warning or an error includes its word.
"""

from __future__ import annotations

import os
import re
from typing import IO

_COLOURS = {"note": 6, "warning": 3, "error": 1, "errors": 1}
"""By number, as terminals have them."""
_LABELLED = re.compile(rf"({'|'.join(_COLOURS)}):")


def labelled(text: str) -> str:
    """The message with its word in front."""
    return text if _LABELLED.match(text) else f"note: {text}"


def coloured_part(text: str, stream: IO[str]) -> tuple[str, int]:
    """The part of a message that `stream` shows in bold, and its colour: on a terminal the word in front, elsewhere nothing."""
    label = _LABELLED.match(text)
    return (label[0], _COLOURS[label[1]]) if label and takes_colour(stream) else ("", 0)


def coloured(text: str, stream: IO[str]) -> str:
    """The message as it is written to `stream`."""
    word, colour = coloured_part(text, stream)
    return f"\x1b[1;3{colour}m{word}\x1b[0m{text[len(word) :]}" if word else text


def behind_label(text: str, subject: str) -> str:
    """The message with its subject between the word in front, if there is one, and the rest."""
    label = _LABELLED.match(text)
    return f"{label[0]} {subject}{text[label.end() :]}" if label else f"{subject} {text}"


def takes_colour(stream: IO[str]) -> bool:
    """Whether `stream` is a terminal that shows colours, and the user wants them."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
