"""Collected prompts as work for processes: their order, which process gets which, and the limits of a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tokabatch.arrays import Int32
from tokabatch.input.prompt_order import Order, order_prompts
from tokabatch.scheduling.contracts import Requests, SamplingParams

MOST_RULES, MOST_RULE_TOKENS = 300, 8
"""Of one request's `logit_bias`, `bad_words` and `min_tokens`: the worker's table has room in every slot for as many as the one
with most has, and is not sized beforehand."""
MOST_STOP_CHARACTERS = 1000
"""Of each of a request's stop strings, of which there may be `MOST_RULES`: steps are held up while they are searched for."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One prompt: its tokens, how its samples are drawn, the place whose random numbers it gets (None is one of its own), and
    how many of its last tokens are scored, which `params.max_tokens` counts, too."""

    token_ids: Int32
    params: SamplingParams
    key: int | None = None
    scored: int = 0


def beyond_limits(params: SamplingParams) -> tuple[str, str] | None:
    """Return the field that requests more than the server has room for, with its limit; None if no field does."""
    words = f"at most {MOST_RULES} entries of {MOST_RULE_TOKENS} tokens each"
    if len(params.bad_words) > MOST_RULES or any(len(word) > MOST_RULE_TOKENS for word in params.bad_words):
        return "bad_words", words
    if len(params.stop) > MOST_RULES or any(len(stop) > MOST_STOP_CHARACTERS for stop in params.stop):
        return "stop", f"at most {MOST_RULES} texts of {MOST_STOP_CHARACTERS:,} characters each"
    if params.min_tokens and len(params.stop_token_ids) > MOST_RULES:
        return "stop_token_ids", f"at most {MOST_RULES} tokens beside min_tokens"
    if len(params.logit_bias) + len(params.bad_words) > MOST_RULES:
        return "logit_bias", f"at most {MOST_RULES} entries, those of bad_words included"
    return None


def ordered(prompts: Sequence[Int32], backwards: bool) -> Order:
    """Sorted, so that neighbours share what they can; `backwards` every other time: the first prompts are like the last ones of
    the time before then, which may still hold what they share."""
    lengths = np.array([len(tokens) for tokens in prompts], np.int32)
    order = order_prompts(np.concatenate(prompts), (np.cumsum(lengths) - lengths).astype(np.int64), lengths)
    return Order(order.permutation[::-1], np.append(order.lcp[:1], order.lcp[:0:-1])) if backwards else order


def divided(order: Order, samples: Sequence[int], load: Mapping[int, int]) -> Iterator[tuple[int, list[int], Int32]]:
    """Which process gets which prompts: its number, their places, and the prefix that each shares with the one before it.
    Each gets a part that lies together, the largest the one that has least to do. `samples` of each prompt are to be drawn;
    `load` are those that each process has already."""
    places, counts, begin = order.permutation.tolist(), np.array(samples, np.int64)[order.permutation], 0
    for number, share in _level(load, int(counts.sum())):
        stop = min(begin + int(np.searchsorted(np.cumsum(counts[begin:]), share)) + 1, len(places)) if share else begin
        if stop > begin:
            yield number, places[begin:stop], order.lcp[begin:stop]
        begin = stop
    if begin < len(places):
        yield min(load, key=load.__getitem__), places[begin:], order.lcp[begin:]


def _level(load: Mapping[int, int], more: int) -> Iterator[tuple[int, int]]:
    """How `more` samples are divided so that all have as many as can be: pairs of a process and its share. `load` are those
    that each has already."""
    level = -(-(sum(load.values()) + more) // len(load))
    for number in sorted(load, key=load.__getitem__):
        share = min(max(level - load[number], 0), more)
        more -= share
        yield number, share


def as_requests(rows: Sequence[int], prompts: Sequence[Wanted], lcp: Int32) -> Requests:
    """The table that a scheduler is given; `lcp` as `Order` has it."""
    kinds = {params: place for place, params in enumerate(dict.fromkeys(wanted.params for wanted in prompts))}
    length = np.array([len(wanted.token_ids) for wanted in prompts], np.int32)
    scored = np.array([wanted.scored for wanted in prompts], np.int32)
    begin = (np.cumsum(length) - length).astype(np.int64)
    length -= scored
    lcp = np.minimum(lcp, np.minimum(length, np.append(0, length[:-1])))
    return Requests(
        row_index=np.array(rows, np.int64),
        tokens=np.concatenate([wanted.token_ids for wanted in prompts]),
        start=begin,
        length=length,
        lcp=lcp,
        params=np.array([kinds[wanted.params] for wanted in prompts], np.int32),
        sampling=tuple(kinds),
        given=scored if scored.any() else None,
        key=np.array([row if wanted.key is None else wanted.key for row, wanted in zip(rows, prompts, strict=True)], np.int64),
    )
