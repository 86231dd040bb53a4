"""How many prompt tokens and how many samples a step should have, given a cost model and the remaining work.

A step reads the weights and is launched once, whatever it computes. The more tokens share that cost, the less each pays, and
beyond some number a larger step only takes memory. Simulated over workloads from chat to long prompts, total time changes by
less than 1 % above the number of prompt tokens found here (benchmarks/LOG.md).

More running samples mean fewer steps, of which each pays less of what a step costs whatever it computes, and more memory. The
number of steps follows from the number of samples and the distribution of their lengths, in a fluid model of admission; their
cost from the cost model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tokabatch.arrays import Float64
from tokabatch.forecast.step_work import Number, StepWork

FIXED_SHARE = 0.02
"""Once a step's fixed cost is below this share of the cost of its prompt tokens, more of them gain little."""
FEWEST, MOST = 512, 32_768
STEP_SHARE = 0.05
"""Once a decode step's fixed cost is below this share of the cost of its samples, more of them gain little."""
ALIKE = 0.015
"""Of numbers of running samples that differ by less in time, the smallest is chosen: it needs less memory. On two H200, GSM8K
with 64 samples took 8.20 and 7.89 s with 8,192 at once, 7.16 and 7.29 with 16,384, 7.27 and 7.34 with 24,576."""
MEAN_SHARE = 1 / 6
"""The assumed mean length, as a share of max_tokens, before any sample has finished, as it was in `benchmarks.gpu.real`:
lengths are exponential, cut at max_tokens."""
_BINS, _ROUNDS = 64, 16


@dataclass(frozen=True, slots=True)
class Survival:
    """The distribution of lengths: `alive[i]` is the share of the samples that have more than i x `width` output tokens, shape
    [B], descending from 1."""

    alive: Float64
    width: float


def assumed_survival(limits: Sequence[int], given: Sequence[bool], weights: Float64) -> Survival:
    """Return the lengths of samples of which only `max_tokens` is known, one entry for each kind: `given` ones have that
    length, the others are assumed to be shorter (`MEAN_SHARE`). `weights` are their numbers."""
    limit, kept = np.maximum(np.array(limits, np.float64), 1.0), weights > 0
    longest = float(limit[kept].max(initial=1.0))
    bins = int(min(_BINS, longest))
    start = np.arange(bins)[:, None] * (longest / bins)
    rate = np.where(np.array(given, np.bool_), 0.0, 1.0 / (MEAN_SHARE * limit))
    alive = np.where(start < limit, np.exp(-rate * start), 0.0) @ weights
    return Survival(alive / max(float(weights.sum()), 1.0), longest / bins)


def prefill_tokens(seconds: Callable[[StepWork], Number]) -> int:
    """Return the prompt tokens to compute in a step besides its decoding samples: a power of two from `FEWEST` to `MOST`, the
    largest at which the fixed cost of the model `seconds` is still at least `FIXED_SHARE` of the tokens' own."""
    fixed = float(seconds(_prefill(1)))
    each = float(seconds(_prefill(2 * MOST)) - seconds(_prefill(MOST))) / MOST
    if each <= 0:
        return MOST
    return 2 ** int(math.log2(min(max(fixed / (FIXED_SHARE * each), FEWEST), MOST)))


def running_samples(seconds: Callable[[StepWork], Number], num_samples: int, survival: Survival) -> int:
    """Return the samples to run at once on a GPU whose cache has room: 2^k or 3 x 2^k from `FEWEST` to `MOST`, no more than
    `STEP_SHARE` allows, and the smallest number that takes hardly longer than the best."""
    each = float(seconds(_decode(2.0 * MOST)) - seconds(_decode(1.0 * MOST))) / MOST
    worth = MOST if each <= 0 else float(seconds(_decode(1.0))) / (STEP_SHARE * each)
    tried = sorted(number for power in range(9, 16) for number in (1 << power, 3 << (power - 1)) if number <= MOST)
    tried = [number for number in tried if number <= max(worth, FEWEST)]
    total = np.array([expected_seconds(seconds, num_samples, number, survival) for number in tried])
    return tried[int(np.argmax(total <= (1 + ALIKE) * total.min()))]


def expected_seconds(seconds: Callable[[StepWork], Number], num_samples: int, running: int, survival: Survival) -> float:
    """Return the time of all decode steps with `running` samples at once as long as there are enough. Prompts are left out:
    they cost the same whatever runs beside them."""
    stays = np.append(survival.alive[1:] / np.maximum(survival.alive[:-1], 1e-12), 0.0)
    # Many rounds are alike: a few show how they mix and end; the others take as long as a full one.
    waiting = float(min(num_samples, _ROUNDS * running))
    more = (num_samples - waiting) * float(survival.alive.sum()) / running
    ages, counts = np.zeros(len(stays)), list[tuple[float, float]]()
    own = (np.arange(len(stays)) + 0.5) * survival.width
    while waiting > 0 or ages.sum() >= 0.5:
        enter = min(waiting, running - ages.sum())
        waiting -= enter
        ages[0] += enter
        counts.append((float(ages.sum()), float(ages @ own)))
        ages = np.append(0.0, (ages * stays)[:-1])
    taken = seconds(_decode(*np.array(counts).T)) * survival.width * np.ones(len(counts))
    mixed = float(survival.alive @ own / survival.alive.sum())
    full = float(seconds(_decode(float(running), running * mixed))) * survival.width
    return float(taken.sum()) + more * full


def _decode(samples: Number, own: Number = 0.0) -> StepWork:
    """Return the work of a step of decoding samples that read `own` outputs in total."""
    return StepWork(tokens=samples, sampled=samples, sequences=samples, decoded=samples, decode_kv=own)


def _prefill(tokens: int) -> StepWork:
    """Return the work of a step of prompt tokens only, without their attention, which depends on the prompts and not on the
    step."""
    return StepWork(tokens=float(tokens), sampled=1.0, sequences=1.0)
