"""When a sample ends by itself: stop token ids and stop strings, tested for a whole step at once.

A table over the vocabulary marks the tokens that can end anything; only samples that just drew one of those are looked at
singly. Knows no tokenizer: the caller brings `decode` and the text of each token id.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tokabatch.messages import Int32, SamplingParams


@dataclass(frozen=True, slots=True)
class TokenText:
    """What stop strings need of a tokenizer: `pieces[i]` is the text of token i alone, `decode` the texts of several token
    lists, special tokens left out; `special` holds the ids of those by their text."""

    pieces: Sequence[str]
    decode: Callable[[list[list[int]]], list[str]]
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
            # Some tokenizers strip a piece's leading space when it is decoded alone.
            may_end = [
                _may_complete(piece, strings) or _may_complete(" " + piece, strings) for piece in text.pieces[:vocab_size]
            ]
            self._suspect[: len(may_end)] |= np.array(may_end)

    def suspects(self, tokens: Int32) -> Int32:
        """Places in `tokens` of those that may end their sample."""
        return np.nonzero(self._suspect[tokens])[0].astype(np.int32)

    def check(self, params: Sequence[int], outputs: Sequence[Int32]) -> list[int | str | None]:
        """For each sample, by its parameters and its whole output, the stop id or string that its last token completes; None to
        go on. All texts are decoded at once."""
        reasons: list[int | str | None] = [
            int(tokens[-1]) if int(tokens[-1]) in self._ids[p] else None for p, tokens in zip(params, outputs, strict=True)
        ]
        open_places = [i for i, p in enumerate(params) if reasons[i] is None and self._strings[p]]
        if open_places:
            assert self._text is not None
            tails = self._text.decode([outputs[i][self._tail_start(outputs[i]) :].tolist() for i in open_places])
            for i, tail in zip(open_places, tails, strict=True):
                found = [(tail.find(s), s) for s in self._strings[params[i]] if s in tail]
                reasons[i] = min(found)[1] if found else None
        return reasons

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


def _may_complete(piece: str, strings: Collection[str]) -> bool:
    """Whether a text that goes on with `piece` may come to hold one of the strings inside it: the string ends in the piece, or
    its end stands at the piece's beginning. A piece that is not valid text alone may complete any character."""
    if "\ufffd" in piece:
        return True
    return any(
        s in piece or any(piece.startswith(s[-size:]) for size in range(1, min(len(s), len(piece)) + 1)) for s in strings
    )
