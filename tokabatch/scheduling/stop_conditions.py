"""Stop conditions: which samples of a step end at a stop token id or a stop string, tested for the whole step at once.

A table over the vocabulary marks the tokens that can complete a stop condition; only samples that just drew one of those are
checked one by one. Whether a stop string may end in a token is computed when the token is first drawn: scanning the whole
vocabulary would delay a step for each request with strings of its own. Most samples that a string ends are ended by the same
tokens, so the outcome for the last tokens of a sample is cached and they are not decoded again. The caller owns the tokenizer,
and passes `decode` and the text of each token id in a `TokenText`.
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
"""Characters at the end of a stop string that the table over the vocabulary is built from."""
PARTIAL = "\ufffd"
"""The replacement character, present in the text of a token that is only part of a character."""
NO, YES, UNKNOWN = 0, 1, 2
TAIL_TOKENS = 16
"""Trailing tokens of a sample that are read first; more are read where these do not suffice."""
MOST_NOTED = 1 << 14
"""The most outcomes in the cache."""


@dataclass(frozen=True, slots=True)
class TokenText:
    """The parts of a tokenizer that stop strings require. `pieces[i]` is the text that token i adds, empty if `decode` omits
    it; `decode` returns the texts of several token lists; `special` maps the text of each special token to its id. The text of
    a token in `lone_bytes` (byte fallback) depends on its neighbours."""

    pieces: Sequence[str]
    decode: Callable[[list[list[int]]], list[str]]
    special: Mapping[str, int]
    lone_bytes: Collection[int] = ()


class PossibleEnds:
    """Test whether any of a set of stop strings may end in a text, in a time almost independent of the number of strings."""

    def __init__(self, strings: Iterable[str] = ()) -> None:
        self._tails: set[str] = set()
        self._tail_lengths: list[int] = []
        self._ends: set[str] = set()
        self._last: set[str] = set()
        self.add(strings)

    def add(self, strings: Iterable[str]) -> None:
        """Add strings to the set."""
        tails = {s[-TAIL:] for s in strings} - self._tails
        self._tails |= tails
        self._tail_lengths = sorted({*self._tail_lengths, *map(len, tails)})
        self._ends.update(tail[-size:] for tail in tails for size in range(1, len(tail) + 1))
        self._last.update(tail[-1] for tail in tails)

    def __bool__(self) -> bool:
        return bool(self._tails)

    def may_be_in(self, piece: str) -> bool:
        """Return whether one of the strings may end inside `piece`, whatever text precedes it: whether the piece begins with a
        suffix of the string, or contains the string's last `TAIL` characters. True for a piece with part of a character,
        which may complete any character."""
        if PARTIAL in piece:
            return True
        if self._last.isdisjoint(piece):
            return False
        if any(piece[:end] in self._ends for end in range(1, min(len(piece), TAIL) + 1)):
            return True
        return any(_windows(piece, length, self._tails) for length in self._tail_lengths)


class StopStrings:
    """A set of stop strings, searched for in a time almost independent of their number."""

    def __init__(self, strings: Iterable[str]) -> None:
        self._strings = frozenset(strings)

    # Computed on first use: there may be one set for each row, and most need only some of these.
    @cached_property
    def longest(self) -> int:
        """Length of the longest string in UTF-8 bytes."""
        return max((len(s.encode()) for s in self._strings), default=0)

    @cached_property
    def ends(self) -> PossibleEnds:
        """The test of whether any of the strings may end in a text."""
        return PossibleEnds(self._strings)

    @cached_property
    def _lengths(self) -> list[int]:
        return sorted({len(s) for s in self._strings})

    def __bool__(self) -> bool:
        return bool(self._strings)

    def first_in(self, text: str, behind: int) -> str | None:
        """Return the string that begins first in `text`, the shortest if several begin there, among matches that end after the
        first `behind` characters; None if there is none."""
        found = [
            (at, length)
            for length in self._lengths
            for at in [at for at in _windows(text, length, self._strings) if at + length > behind][:1]
        ]
        at, length = min(found, default=(0, 0))
        return text[at : at + length] or None


class StopRules:
    """The stop conditions of a scheduler, one set for each entry of `Work.sampling`."""

    def __init__(
        self, sampling: Sequence[SamplingParams], eos_token_ids: Sequence[int], vocab_size: int, text: TokenText | None
    ) -> None:
        """`text` may be None only if no entry has stop strings."""
        self._ends = tuple(eos_token_ids)
        self._vocab_size = vocab_size
        self._text = text
        self._adds: dict[int, tuple[int, bool]] = {}
        """The results of `_weigh`, by token id."""
        self._set(sampling)

    def extend(self, sampling: Sequence[SamplingParams]) -> None:
        """Append the conditions of further sampling parameters."""
        special = {} if self._text is None else self._text.special
        fresh = {p.stop for p in sampling} - self._of_stop.keys()
        for stop in fresh:
            strings = StopStrings(s for s in stop if s not in special)
            self._of_stop[stop] = strings, tuple(special[s] for s in stop if s in special)
        # Rows with sampling parameters of their own mostly share these.
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
        """Keep only the conditions of these entries, which are renumbered from 0 in the given order."""
        self._set([self._sampling[entry] for entry in entries.tolist()])

    def _set(self, sampling: Sequence[SamplingParams]) -> None:
        self._sampling: list[SamplingParams] = []
        self.ids: list[Collection[int]] = []
        """The token ids that end a sample, one collection for each entry."""
        self._least: list[int] = []
        self._strings: list[StopStrings] = []
        self._ids_of: dict[tuple[tuple[int, ...], bool, tuple[int, ...]], Collection[int]] = {}
        self._of_stop: dict[tuple[str, ...], tuple[StopStrings, tuple[int, ...]]] = {}
        """For each `SamplingParams.stop`: the strings to search for, and the ids of those that are special tokens."""
        self._any_ends = PossibleEnds()
        self._suspect = np.full(self._vocab_size, NO, np.int8)
        """Whether a token may end a sample, shape [vocabulary]; UNKNOWN until the token is first drawn."""
        self._noted: dict[tuple[StopStrings, tuple[int, ...]], int | str | None] = {}
        """By stop strings and the last tokens of a sample: the string that ends it, or None."""
        self.extend(sampling)

    def find(self, tokens: Int32, slots: Int64, params: Int32, outputs: Outputs) -> dict[int, int | str]:
        """Return the stop id or string that ends each sample which has just drawn a token, by its index in `tokens`; samples
        that continue are left out. `tokens` and `slots` have shape [S]; `params` holds the entry of the sampling parameters of
        every slot, shape [slots]."""
        places = self.suspects(tokens)
        if not len(places):
            return {}
        reasons = self.check(params[slots[places]].tolist(), outputs.tokens(slots[places]))
        return {i: reason for i, reason in zip(places.tolist(), reasons, strict=True) if reason is not None}

    def suspects(self, tokens: Int32) -> Int32:
        """Return the indices of the entries of `tokens` that may end their sample."""
        suspect = self._suspect[tokens]
        if (unknown := suspect == UNKNOWN).any():
            for token in np.unique(tokens[unknown]).tolist():
                self._suspect[token] = YES if self._any_ends.may_be_in(self._piece(token)) else NO
            suspect = self._suspect[tokens]
        return np.nonzero(suspect == YES)[0].astype(np.int32)

    def check(self, params: Sequence[int], outputs: Sequence[Int32]) -> list[int | str | None]:
        """Return for each sample, given by its parameters' entry and its whole output, the stop id or string that its last
        token completes, or None if it continues. All texts are decoded in one call."""
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
            # A string that the first `min_tokens` tokens complete never ends the sample.
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
        """Return the text of a token; empty for an id of the model that the tokenizer does not define."""
        assert self._text is not None
        return self._text.pieces[token] if token < len(self._text.pieces) else ""

    def _tail(self, tokens: Int32, window: int) -> tuple[int, ...]:
        """Return the last tokens, enough that their text contains every string of up to `window` bytes that ends inside the
        last token. The first of them is a token whose text does not depend on its neighbours, or the first of all."""
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
        """Store and return the least number of bytes that a token adds to a text, and whether its text is independent of its
        neighbours."""
        assert self._text is not None
        piece = self._piece(token)
        begins = bool(piece) and PARTIAL not in piece and token not in self._text.lone_bytes
        # A first token may lose its leading spaces.
        self._adds[token] = max(len(piece.lstrip(" ").encode()), 1) if begins else len(piece[:1]), begins
        return self._adds[token]


def _windows(text: str, length: int, wanted: Collection[str]) -> list[int]:
    """Return the positions in `text` at which one of the wanted strings of that length begins."""
    return [at for at in range(len(text) - length + 1) if text[at : at + length] in wanted]
