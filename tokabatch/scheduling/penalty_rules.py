"""The penalties and biases of sampling parameters, in the form sent to the worker when a slot opens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from tokabatch.arrays import Int32, Int64
from tokabatch.scheduling.contracts import SamplingParams, SlotPenalties

ALWAYS = np.iinfo(np.int32).max
"""The `until` of a rule that applies to all output tokens."""
BANNED = float("-inf")


class PenaltyTable:
    """The penalties of all entries of `Requests.sampling`. `stop_ids(entry)` returns the tokens that end a sample."""

    def __init__(self, stop_ids: Callable[[int], Collection[int]]) -> None:
        self._stop_ids = stop_ids
        self._sampling: list[SamplingParams] = []
        self._penalised = np.zeros(0, np.bool_)
        self._numbers = np.zeros((0, 3), np.float64)
        self._rules: dict[int, Int32] = {}

    def extend(self, sampling: Sequence[SamplingParams]) -> None:
        """Append further entries."""
        self._sampling += sampling
        self._penalised = np.append(self._penalised, np.array([params.penalised for params in sampling], np.bool_))
        numbers = [(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in sampling]
        self._numbers = np.append(self._numbers, np.array(numbers, np.float64).reshape(-1, 3), axis=0)

    def of(self, slots: Int64, entries: Int32, prompt_lengths: Int32) -> SlotPenalties | None:
        """Return the penalties of slots that have just been opened, or None if none has any. Arrays have one value a slot."""
        chosen = np.flatnonzero(self._penalised[entries])
        if not len(chosen):
            return None
        entries = entries[chosen]
        repetition, presence, frequency = self._numbers[entries].T
        rules = [self._rules_of(entry) for entry in entries.tolist()]
        width = max(each.shape[1] for each in rules)
        return SlotPenalties(
            slot=slots[chosen].astype(np.int32),
            prompt_length=prompt_lengths[chosen],
            repetition=repetition.copy(),
            presence=presence.copy(),
            frequency=frequency.copy(),
            num_rules=np.array([len(each) for each in rules], np.int32),
            rules=np.concatenate([np.insert(each, [3] * (width - each.shape[1]), -1, axis=1) for each in rules]),
        )

    def _rules_of(self, entry: int) -> Int32:
        if entry not in self._rules:
            params = self._sampling[entry]
            stops = sorted(self._stop_ids(entry)) if params.min_tokens else []
            self._rules[entry] = _rules(
                [
                    *((token, bias, ALWAYS, ()) for token, bias in params.logit_bias),
                    *((word[-1], BANNED, ALWAYS, word[:-1]) for word in params.bad_words),
                    *((token, BANNED, params.min_tokens, ()) for token in stops),
                ]
            )
        return self._rules[entry]


def _rules(rules: Sequence[tuple[int, float, int, tuple[int, ...]]]) -> Int32:
    """Return rules of (token, bias, until, preceding tokens) in the layout of `SlotPenalties.rules`."""
    longest = max((len(before) for *_, before in rules), default=0)
    words = np.full((len(rules), 3 + longest), -1, np.int32)
    for word, (token, value, until, before) in zip(words, rules, strict=True):
        word[:3] = token, np.float32(value).view(np.int32), until
        word[3 + longest - len(before) :] = before
    return words
