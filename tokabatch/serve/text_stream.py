"""The text of a sample while it grows: whole characters, and nothing that might become a stop string."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
OPEN_TOKENS = 16
"""Tokens of an open character up to which all are decoded again with each further one."""


class TextStream:
    """Decodes a sample as its tokens come. What it has given out is the beginning of the sample's text, whatever follows."""

    def __init__(self, decode: Callable[[list[list[int]]], list[str]], stops: Sequence[str] = ()) -> None:
        """`decode` gives the texts of token lists; `stops` end the sample, and are no part of its text."""
        self._decode = decode
        self._stops = sorted(stops)
        self._longest = max(map(len, stops), default=0)
        """Characters of the longest of them."""
        self._before: list[int] = []
        """Tokens whose text is in `_text`; those after them are decoded together with them, since a token's text may depend on
        the ones right before it."""
        self._behind: list[int] = []
        """Tokens whose text is not in it yet."""
        self._next_look = 2 * OPEN_TOKENS
        """How many they are when all of them are decoded again, where no character seems to end before."""
        self._text = ""
        self._given = 0
        """Characters of it that have been given out."""

    def grow(self, tokens: Sequence[int]) -> str:
        """Return the further text of an unfinished sample that now has these tokens, too."""
        self._behind += tokens
        # A sample may produce parts of characters for ever: decoding all of them with each token would take quadratic time.
        many = OPEN_TOKENS < len(self._behind) < self._next_look
        if many and (not tokens or self._decode([list(tokens)])[0].endswith(REPLACEMENT)):
            return ""
        before, after = self._decode([self._before, self._before + self._behind])
        if len(after) > len(before) and not after.endswith(REPLACEMENT):
            self._text += after[len(before) :]
            self._before, self._behind = self._behind, []
        self._next_look = 2 * max(OPEN_TOKENS, len(self._behind))
        return self._give(len(self._text) - self._open_stop())

    def end(self, text: str) -> str:
        """The rest of a sample that has ended with this text."""
        given = self._given
        self._text, self._given = text, len(text)
        return text[given:]

    def _give(self, until: int) -> str:
        given = self._text[self._given : until]
        self._given = max(self._given, until)
        return given

    def _open_stop(self) -> int:
        """Characters at the end of the text that a stop string may begin with."""
        for size in range(min(self._longest, len(self._text)), 0, -1):
            end = self._text[-size:]
            at = bisect_left(self._stops, end)
            if at < len(self._stops) and self._stops[at].startswith(end):
                return size
        return 0
