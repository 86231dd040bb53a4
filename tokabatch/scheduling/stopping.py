"""When a sample ends by itself: stop token ids and stop strings, tested for a whole step at once.

A table over the vocabulary marks the tokens that can end anything; only samples that just drew one of those are looked at
singly. Knows no tokenizer: the caller brings `decode` and the text of each token id.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tokabatch.messages import Int32, SamplingParams


@dataclass(frozen=True, slots=True)
class TokenText:
    """What stop strings need of a tokenizer: `pieces[i]` is the text of token i alone, `decode` that of several, special
    tokens left out; `special` holds the ids of those by their text."""

    pieces: Sequence[str]
    decode: Callable[[list[int]], str]
    special: Mapping[str, int]


class StopRules:
    """The stop conditions of a run, one set for each entry of `Requests.sampling`."""

    def __init__(
        self, sampling: Sequence[SamplingParams], eos_token_ids: Sequence[int], vocab_size: int, text: TokenText | None
    ) -> None:
        special = text.special if text is not None else {}
        self._ids = [
            frozenset(p.stop_token_ids)
            | frozenset(() if p.ignore_eos else eos_token_ids)
            | frozenset(special[s] for s in p.stop if s in special)
            for p in sampling
        ]
        self._strings = [tuple(s for s in p.stop if s not in special) for p in sampling]
        self._text = text
        self._window = max((len(s.encode()) for strings in self._strings for s in strings), default=0)
        self._suspect = np.zeros(vocab_size, np.bool_)
        self._suspect[[i for ids in self._ids for i in ids if 0 <= i < vocab_size]] = True
        strings = {s for strings in self._strings for s in strings}
        if strings:
            assert text is not None, "stop strings need the tokenizer's text"
            last = {s[-1] for s in strings}
            # A piece that is not valid text alone may complete any character.
            may_end = [any(c in piece for c in last) or "\ufffd" in piece for piece in text.pieces[:vocab_size]]
            self._suspect[: len(may_end)] |= np.array(may_end)

    def suspects(self, tokens: Int32) -> Int32:
        """Places in `tokens` of those that may end their sample."""
        return np.nonzero(self._suspect[tokens])[0].astype(np.int32)

    def check(self, params: int, tokens: Int32) -> int | str | None:
        """The stop id or string that the last of `tokens` (a sample's whole output) completes; None to go on."""
        if int(tokens[-1]) in self._ids[params]:
            return int(tokens[-1])
        strings = self._strings[params]
        if not strings:
            return None
        assert self._text is not None
        tail = self._text.decode(tokens[self._tail_start(tokens) :].tolist())
        found = [(tail.find(s), s) for s in strings if s in tail]
        return min(found)[1] if found else None

    def _tail_start(self, tokens: Int32) -> int:
        """Where to begin decoding so that the end of the text is whole: enough tokens that have text of their own to hold the
        longest stop string, beginning with one that is a whole piece, not the middle of a character."""
        assert self._text is not None
        pieces = self._text.pieces
        found = 0
        for place in range(len(tokens) - 1, -1, -1):
            token = int(tokens[place])
            piece = pieces[token] if token < len(pieces) else ""
            found += piece != ""
            if found > self._window and piece and "\ufffd" not in piece:
                return place
        return 0
