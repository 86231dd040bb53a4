"""When a sample ends by itself: stop token ids and stop strings, tested for a whole step at once.

A table over the vocabulary marks the tokens that can end anything; only samples that just drew one of those are looked at
singly. Whether a stop string may end in a token is found out when the token is first drawn: to look at a whole vocabulary would
hold up a step for each request that comes with strings of its own. Most samples that a string ends are ended by the same
tokens, so that what the last tokens end is noted and not decoded again. The tokenizer stays with the caller, which brings
`decode` and the text of each token id.

Shape legend: P samples that may be over, K last tokens of each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tokabatch.arrays import Bool, Int32, Int64
from tokabatch.scheduling.contracts import SamplingParams
from tokabatch.scheduling.generated import Outputs

TAIL = 8
"""Characters at the end of a stop string that the table over the vocabulary looks at."""
PARTIAL = "\ufffd"
"""In the text of a token that is a part of a character."""
NO, YES, UNKNOWN = 0, 1, 2
TAIL_TOKENS = 16
"""Last tokens of a sample whose outcome is noted, where these hold the end of its text."""
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
        self._num_bytes = np.full(vocab_size + 1, -1, np.int32)
        """Bytes that each token certainly adds to a text, -1 until that is asked for. The last entry stands for no token."""
        self._begins = np.zeros(vocab_size + 1, np.bool_)
        """Whether the token's text is the same beside any other, likewise."""
        self._num_bytes[-1] = 0
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
        self._noted: dict[tuple[StopStrings, bytes], str | None] = {}
        """What ends a text that ends in these tokens, among some strings."""
        self.extend(sampling)

    def find(self, tokens: Int32, slots: Int64, params: Int32, outputs: Outputs) -> dict[int, int | str]:
        """What ends samples that have just drawn `tokens`, by place: a stop id or string. `slots` is where their outputs are;
        `params`, of all slots, are entries of the sampling parameters."""
        places = self.suspects(tokens)
        if not len(places):
            return {}
        whose = slots[places]
        kinds = params[whose].tolist()
        reasons: list[int | str | None] = [
            token if token in self.ids[kind] else None for token, kind in zip(tokens[places].tolist(), kinds, strict=True)
        ]
        undecided = [i for i, kind in enumerate(kinds) if reasons[i] is None and self._strings[kind]]
        if undecided:
            of = [kinds[i] for i in undecided]
            for i, reason in zip(undecided, self._by_strings(of, whose[undecided], outputs), strict=True):
                reasons[i] = reason
        return {place: reason for place, reason in zip(places.tolist(), reasons, strict=True) if reason is not None}

    def _by_strings(self, params: Sequence[int], slots: Int64, outputs: Outputs) -> list[int | str | None]:
        """What `check` says of samples that no stop id has ended, each with strings to look for: as noted, where it is."""
        tails, noted = outputs.tails(slots, TAIL_TOKENS), self._noted
        whole = outputs.count[slots] <= TAIL_TOKENS
        sizes = self._tail_sizes(tails, np.array([self._strings[kind].longest for kind in params], np.int64), whole)
        keys = [
            (self._strings[kind], tail[TAIL_TOKENS - size :].tobytes()) if size and not self._least[kind] else None
            for kind, tail, size in zip(params, tails, sizes.tolist(), strict=True)
        ]
        reasons: list[int | str | None] = [None if key is None else noted.get(key) for key in keys]
        missing = [i for i, key in enumerate(keys) if key is None or key not in noted]
        if missing:
            if len(noted) + len(missing) > MOST_NOTED:
                noted.clear()
            checked = self.check([params[i] for i in missing], outputs.tokens(slots[missing]))
            for i, reason in zip(missing, checked, strict=True):
                reasons[i], key = reason, keys[i]
                if key is not None and not isinstance(reason, int):
                    noted[key] = reason
        return reasons

    def _tail_sizes(self, tails: Int32, longest: Int64, whole: Bool) -> Int64:
        """How many of the last tokens say how a text ends in which strings of so many bytes are looked for, shape [P]; 0 where
        `tails`, [P, K], right-aligned, -1 where there is none, do not. `whole` where they are all of the sample."""
        num_bytes = self._num_bytes[tails]
        if (num_bytes < 0).any():
            for token in np.unique(tails[num_bytes < 0]).tolist():
                self._weigh(token)
            num_bytes = self._num_bytes[tails]
        # A string that ends inside the last token begins so far in front of it.
        before = np.cumsum(num_bytes[:, ::-1], axis=1) - num_bytes[:, -1:]
        enough = (before >= longest[:, None] - 1) & self._begins[tails[:, ::-1]]
        return np.where(enough.any(axis=1), enough.argmax(axis=1) + 1, np.where(whole, (tails >= 0).sum(axis=1), 0))

    def _weigh(self, token: int) -> None:
        """Find out what a token adds to a text."""
        assert self._text is not None
        piece = self._piece(token)
        begins = self._begins[token] = bool(piece) and PARTIAL not in piece and token not in self._text.lone_bytes
        # A first token may lose its leading spaces.
        self._num_bytes[token] = max(len(piece.lstrip(" ").encode()), 1) if begins else bool(piece)

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
        undecided = [
            i for i, p in enumerate(params) if reasons[i] is None and self._strings[p] and len(outputs[i]) > self._least[p]
        ]
        open_places = [i for i in undecided if self._strings[params[i]].ends.may_be_in(self._piece(int(outputs[i][-1])))]
        if open_places:
            assert self._text is not None
            starts = [self._tail_start(outputs[i], self._strings[params[i]].longest) for i in open_places]
            tails = [outputs[i][start:].tolist() for i, start in zip(open_places, starts, strict=True)]
            # What the first `min_tokens` tokens complete ends nothing, then or later.
            least = [self._least[params[i]] - start for i, start in zip(open_places, starts, strict=True)]
            passed = [tail[:count] for tail, count in zip(tails, least, strict=True) if count > 0]
            behind = iter(self._text.decode(passed)) if passed else iter(())
            for i, tail, count in zip(open_places, self._text.decode(tails), least, strict=True):
                reasons[i] = self._strings[params[i]].first_in(tail, len(next(behind)) if count > 0 else 0)
        return reasons

    def _piece(self, token: int) -> str:
        """The text of a token; empty for an id that the model has and the tokenizer has not."""
        assert self._text is not None
        return self._text.pieces[token] if token < len(self._text.pieces) else ""

    def _tail_start(self, tokens: Int32, window: int) -> int:
        """Where to begin decoding so that the end of the text is whole, for strings of `window` bytes; see `_tail_sizes`."""
        before = 0
        for place in range(len(tokens) - 1, -1, -1):
            token = int(tokens[place])
            if self._num_bytes[token] < 0:
                self._weigh(token)
            if place < len(tokens) - 1:
                before += int(self._num_bytes[token])
            if before >= window - 1 and self._begins[token]:
                return place
        return 0


def _windows(text: str, length: int, wanted: Collection[str]) -> list[int]:
    """Where one of the wanted texts of that length begins in `text`."""
    return [at for at in range(len(text) - length + 1) if text[at : at + length] in wanted]
