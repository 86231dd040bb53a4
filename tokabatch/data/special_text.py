"""Special tokens spelled out in the data: recognised, and kept apart from those that a template writes.

A row's occurrence of a special token's text is hidden behind a mark before the template renders and comes back when the
rendered text is cut at the template's own special tokens, so that it is encoded as the plain text it is. The cut is where the
tokenizer itself would cut, hence all other tokens come out as ever. This module knows no tokenizer, only its special texts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # Unicode noncharacters; those in the data are hidden as well
_MARK = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")


class SpecialText:
    """The special texts of one tokenizer."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = tuple(sorted({text for text in texts if text}, key=lambda text: (-len(text), text)))
        self._stem = _common_start(self._texts)
        self._cut = re.compile("(" + ("|".join(map(re.escape, self._texts)) or "(?!)") + ")")
        self._hidden = (*self._texts, _OPEN)
        self._number = {text: number for number, text in enumerate(self._hidden)}
        self._hide = re.compile("|".join(map(re.escape, self._hidden)))

    def first_in(self, value: Any) -> str | None:
        """A special text that occurs in a string, or anywhere in lists and mappings of strings."""
        if isinstance(value, str):
            if self._stem not in value:
                return None
            found = self._cut.search(value)
            return found[0] if found and found[0] else None
        if isinstance(value, Mapping):
            return self._first(cast("Mapping[str, Any]", value).values())
        return self._first(cast("list[Any]", value)) if isinstance(value, list) else None

    def hide(self, value: Any) -> Any:
        """The value with marks in place of special texts, at any depth."""
        if isinstance(value, str):
            return self._hide.sub(lambda found: f"{_OPEN}{self._number[found[0]]}{_CLOSE}", value)
        if isinstance(value, Mapping):
            return {key: self.hide(item) for key, item in cast("Mapping[str, Any]", value).items()}
        return [self.hide(item) for item in cast("list[Any]", value)] if isinstance(value, list) else value

    def cut(self, rendered: str) -> list[tuple[str, bool]]:
        """Pieces of a rendered text with marks: (text, whether it is a special token of the template)."""
        pieces = self._cut.split(rendered)
        shown = [(self._show(piece), bool(position % 2)) for position, piece in enumerate(pieces)]
        return [(text, special) for text, special in shown if text]

    def _show(self, text: str) -> str:
        return _MARK.sub(lambda found: self._hidden[int(found[1])], text)

    def _first(self, values: Iterable[Any]) -> str | None:
        return next((found for value in values if (found := self.first_in(value))), None)


def _common_start(texts: tuple[str, ...]) -> str:
    """What all of them begin with: a text without it is not searched."""
    if not texts:
        return ""
    low, high = min(texts), max(texts)
    differs = (at for at, (one, other) in enumerate(zip(low, high, strict=False)) if one != other)
    return low[: next(differs, len(low))]
