"""When a sample ends by itself: stop token ids and stop strings, tested for a whole step at once.

A table over the vocabulary marks the tokens that can end anything; only samples that just drew one of those are looked at
singly. Whether a stop string may end in a token is found out when the token is first drawn: to look at a whole vocabulary would
hold up a step for each request that comes with strings of its own. Most samples that a string ends are ended by the same
tokens, so that what the last tokens end is noted and not decoded again. The tokenizer stays with the caller, which brings
`decode` and the text of each token id.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tokabatch.arrays import Int32, Int64
from tokabatch.scheduling.contracts import SamplingParams
from tokabatch.scheduling.generated import Outputs

TAIL = 8
"""Characters at the end of a stop string that the table over the vocabulary looks at."""
PARTIAL = "\ufffd"
"""In the text of a token that is a part of a character."""
NO, YES, UNKNOWN = 0, 1, 2
TAIL_TOKENS = 16
"""Last tokens of a sample that are looked at first."""
MOST_NOTED = 1 << 14
"""Outcomes that are noted at a time."""


@dataclass(frozen=True, slots=True)
class TokenText:
    """What stop strings need of a tokenizer: `pieces[i]` is what token i adds to a text, nothing where `decode` leaves it out;
    `decode` gives the texts of several token lists; `special` holds the ids of special tokens by their text. What a token of
    `lone_bytes` (byte fallback) adds depends on the tokens beside it."""

    pieces: Sequence[str]
    decode: Callable[[list[list[int]]], list[str]]
    special: Mapping[str, int]
    lone_bytes: Collection[int] = ()


class PossibleEnds:
    """In which texts some stop strings may end, in a time that hardly depends on how many they are."""

    def __init__(self, strings: Iterable[str] = ()) -> None:
        self._tails: set[str] = set()
        self._tail_lengths: list[int] = []
        self._ends: set[str] = set()
        self._last: set[str] = set()
        self.add(strings)

    def add(self, strings: Iterable[str]) -> None:
        """These strings, too."""
        tails = {s[-TAIL:] for s in strings} - self._tails
        self._tails |= tails
        self._tail_lengths = sorted({*self._tail_lengths, *map(len, tails)})
        self._ends.update(tail[-size:] for tail in tails for size in range(1, len(tail) + 1))
        self._last.update(tail[-1] for tail in tails)

    def __bool__(self) -> bool:
        return bool(self._tails)

    def may_be_in(self, piece: str) -> bool:
        """Whether one of the strings may end inside `piece`, whatever text is before it: the piece begins with an end of the
        string, or holds the string's last `TAIL` characters. A piece that is not text alone may complete any character."""
        if PARTIAL in piece:
            return True
        if self._last.isdisjoint(piece):
            return False
        if any(piece[:end] in self._ends for end in range(1, min(len(piece), TAIL) + 1)):
            return True
        return any(_windows(piece, length, self._tails) for length in self._tail_lengths)


class StopStrings:
    """Some stop strings, looked for in a time that hardly depends on how many they are."""

    def __init__(self, strings: Iterable[str]) -> None:
        self._strings = frozenset(strings)

    # Rows with strings of their own are many, and of most only some of this is needed.
    @cached_property
    def longest(self) -> int:
        """Bytes of the longest string."""
        return max((len(s.encode()) for s in self._strings), default=0)

    @cached_property
    def ends(self) -> PossibleEnds:
        """Where they may end."""
        return PossibleEnds(self._strings)

    @cached_property
    def _lengths(self) -> list[int]:
        return sorted({len(s) for s in self._strings})

    def __bool__(self) -> bool:
        return bool(self._strings)

    def first_in(self, text: str, behind: int = 0) -> str | None:
        """The string that begins first in `text`, the shortest of several that do, of those that end after `behind`
        characters."""
        found = [
            (at, length)
            for length in self._lengths
            for at in [at for at in _windows(text, length, self._strings) if at + length > behind][:1]
        ]
        at, length = min(found, default=(0, 0))
        return text[at : at + length] or None


class StopRules:
    """The stop conditions of a scheduler, one set for each entry of its sampling parameters."""

    def __init__(
        self, sampling: Sequence[SamplingParams], eos_token_ids: Sequence[int], vocab_size: int, text: TokenText | None
    ) -> None:
        """`text` is needed for stop strings."""
        self._ends = tuple(eos_token_ids)
        self._vocab_size = vocab_size
        self._text = text
        self._adds: dict[int, tuple[int, bool]] = {}
        """What `_weigh` has found, by token."""
        self._set(sampling)

    def extend(self, sampling: Sequence[SamplingParams]) -> None:
        """Add the conditions of further sampling parameters, behind the others."""
        special = {} if self._text is None else self._text.special
        fresh = {p.stop for p in sampling} - self._of_stop.keys()
        for stop in fresh:
            strings = StopStrings(s for s in stop if s not in special)
            self._of_stop[stop] = strings, tuple(special[s] for s in stop if s in special)
        # Rows with settings of their own mostly have these in common.
        every = [(p.stop_token_ids, p.ignore_eos, self._of_stop[p.stop][1]) for p in sampling]
        for kind in set(every) - self._ids_of.keys():
            listed, ignore_eos, meant = kind
            self._ids_of[kind] = frozenset((*listed, *(() if ignore_eos else self._ends), *meant))
            self._suspect[[i for i in self._ids_of[kind] if 0 <= i < self._vocab_size]] = YES
        if strings := {s for stop in fresh for s in stop if s not in special}:
            assert self._text is not None, "stop strings need the tokenizer's text"
            self._any_ends.add(strings)
            self._suspect[self._suspect == NO] = UNKNOWN
        self.ids += [self._ids_of[kind] for kind in every]
        self._least += [p.min_tokens for p in sampling]
        self._strings += [self._of_stop[p.stop][0] for p in sampling]
        self._sampling += sampling

    def keep(self, entries: Int32) -> None:
        """Forget the conditions of all sampling parameters but these entries, which move up."""
        self._set([self._sampling[entry] for entry in entries.tolist()])

    def _set(self, sampling: Sequence[SamplingParams]) -> None:
        self._sampling: list[SamplingParams] = []
        self.ids: list[Collection[int]] = []
        """The tokens that end a sample, of each entry."""
        self._least: list[int] = []
        self._strings: list[StopStrings] = []
        self._ids_of: dict[tuple[tuple[int, ...], bool, tuple[int, ...]], Collection[int]] = {}
        self._of_stop: dict[tuple[str, ...], tuple[StopStrings, tuple[int, ...]]] = {}
        """The texts to look for of each `stop`, and the special tokens that it means."""
        self._any_ends = PossibleEnds()
        self._suspect = np.full(self._vocab_size, NO, np.int8)
        """Whether a token may end anything; UNKNOWN until it is drawn."""
        self._noted: dict[tuple[StopStrings, tuple[int, ...]], int | str | None] = {}
        """What ends a text that ends in these tokens, among some strings."""
        self.extend(sampling)

    def find(self, tokens: Int32, slots: Int64, params: Int32, outputs: Outputs) -> dict[int, int | str]:
        """What ends samples that have just drawn `tokens`, by place: a stop id or string. `slots` is where their outputs are;
        `params`, of all slots, are entries of the sampling parameters."""
        places = self.suspects(tokens)
        if not len(places):
            return {}
        reasons = self.check(params[slots[places]].tolist(), outputs.tokens(slots[places]))
        return {i: reason for i, reason in zip(places.tolist(), reasons, strict=True) if reason is not None}

    def suspects(self, tokens: Int32) -> Int32:
        """Places in `tokens` of those that may end their sample."""
        suspect = self._suspect[tokens]
        if (unknown := suspect == UNKNOWN).any():
            for token in np.unique(tokens[unknown]).tolist():
                self._suspect[token] = YES if self._any_ends.may_be_in(self._piece(token)) else NO
            suspect = self._suspect[tokens]
        return np.nonzero(suspect == YES)[0].astype(np.int32)

    def check(self, params: Sequence[int], outputs: Sequence[Int32]) -> list[int | str | None]:
        """For each sample, by its parameters and its whole output, the stop id or string that its last token completes; None to
        go on. All texts are decoded at once."""
        reasons: list[int | str | None] = [
            int(tokens[-1]) if int(tokens[-1]) in self.ids[p] else None for p, tokens in zip(params, outputs, strict=True)
        ]
        keys: dict[int, tuple[StopStrings, tuple[int, ...]]] = {}
        for i, (p, tokens) in enumerate(zip(params, outputs, strict=True)):
            if reasons[i] is None and self._strings[p] and len(tokens) > self._least[p]:
                key = keys[i] = self._strings[p], self._tail(tokens, self._strings[p].longest)
                if not self._least[p] and key in self._noted:
                    reasons[i] = self._noted[key]
                    del keys[i]
        may_end = [i for i, (strings, tail) in keys.items() if strings.ends.may_be_in(self._piece(tail[-1]))]
        if may_end:
            assert self._text is not None
            tails = [list(keys[i][1]) for i in may_end]
            # What the first `min_tokens` tokens complete ends nothing, then or later.
            least = [self._least[params[i]] - len(outputs[i]) + len(tail) for i, tail in zip(may_end, tails, strict=True)]
            passed = [tail[:count] for tail, count in zip(tails, least, strict=True) if count > 0]
            behind = iter(self._text.decode(passed)) if passed else iter(())
            for i, text, count in zip(may_end, self._text.decode(tails), least, strict=True):
                reasons[i] = keys[i][0].first_in(text, len(next(behind)) if count > 0 else 0)
        if len(self._noted) + len(keys) > MOST_NOTED:
            self._noted.clear()
        self._noted |= {key: reasons[i] for i, key in keys.items() if not self._least[params[i]]}
        return reasons

    def _piece(self, token: int) -> str:
        """The text of a token; empty for an id that the model has and the tokenizer has not."""
        assert self._text is not None
        return self._text.pieces[token] if token < len(self._text.pieces) else ""

    def _tail(self, tokens: Int32, window: int) -> tuple[int, ...]:
        """The last tokens, so many that the end of their text is whole for strings of `window` bytes: those that end inside the
        last token begin so far in front of it. They begin with a token whose text is the same beside any other."""
        size, before = TAIL_TOKENS, 0
        while True:
            tail = tokens[-size:].tolist()
            for place in range(len(tail) - 1, -1, -1):
                num_bytes, begins = self._adds.get(tail[place]) or self._weigh(tail[place])
                before += num_bytes if place < len(tail) - 1 else 0
                if before >= window - 1 and begins:
                    return tuple(tail[place:])
            if size >= len(tokens):
                return tuple(tail)
            size, before = size * TAIL_TOKENS, 0

    def _weigh(self, token: int) -> tuple[int, bool]:
        """Note bytes that a token certainly adds to a text, and whether its text is the same beside any other."""
        assert self._text is not None
        piece = self._piece(token)
        begins = bool(piece) and PARTIAL not in piece and token not in self._text.lone_bytes
        # A first token may lose its leading spaces.
        self._adds[token] = max(len(piece.lstrip(" ").encode()), 1) if begins else len(piece[:1]), begins
        return self._adds[token]


def _windows(text: str, length: int, wanted: Collection[str]) -> list[int]:
    """Where one of the wanted texts of that length begins in `text`."""
    return [at for at in range(len(text) - length + 1) if text[at : at + length] in wanted]
