"""When a row has been sampled enough: rules that stop a row early, and what its samples then estimate.

A rule looks at the verdicts of a row's samples in the order of their numbers, and only as far as all of them are known: at the
longest prefix 0, 1, ... m - 1 that is judged. Never at the order in which they came in: the first to end are the short ones,
which are right more or less often than others. So where a row stops follows from its samples alone, on any hardware, in any
company and after any resume. Samples behind that number are cancelled, or left out where they were finished already.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from tokabatch.arrays import Bool, Float64, Int64
from tokabatch.scoring.pass_at_k import estimate

FIRST_WAVE = 4


@dataclass(frozen=True, slots=True)
class StopRule:
    """Stop a row at its `after_correct`-th right sample; or once `majority` of its samples give the same answer. None: never
    for that reason."""

    after_correct: int | None = None
    majority: int | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a rule looks at of one judged sample; `answer` is None where none was found in its text."""

    correct: bool
    answer: Hashable = None


def stop_after(rule: StopRule, outcomes: Sequence[Outcome | None]) -> int | None:
    """How many samples the row takes, given what is known of each sample by its number, None where nothing is yet; None where
    the judged prefix does not stop it. What is known behind the prefix never matters."""
    correct, votes = 0, dict[Hashable, int]()
    for number, outcome in enumerate(outcomes, 1):
        if outcome is None:
            return None
        correct += outcome.correct
        if rule.after_correct is not None and correct == rule.after_correct:
            return number
        if rule.majority is not None and outcome.answer is not None:
            votes[outcome.answer] = votes.get(outcome.answer, 0) + 1
            if votes[outcome.answer] == rule.majority:
                return number
    return None


def opened(num_samples: int, judged: int) -> int:
    """How many samples of a row may be begun once its first `judged` ones are judged and did not stop it: waves that double,
    4, 8, 16, ... so that few are computed in vain, and the number follows from the verdicts alone."""
    wave = FIRST_WAVE
    while wave <= judged:
        wave *= 2
    return min(wave, num_samples)


def estimate_stopped(num_samples: Int64, num_correct: Int64, stopped: Bool, k: int) -> Float64:
    """pass@k of each row, shape [R], without bias where some were stopped at a right sample (`stopped`).

    A row that was stopped at its r-th right sample, after N, gives Chen's estimate of N - 1 samples with r - 1 right: the
    sample that stopped it is left out, as it is right by the rule and not by chance (Girshick, Mosteller and Savage, 1946: the
    share of the paths to where the row stopped that have no right sample among their first k). Where k is more than the wrong
    ones of these it is 1. A row that took all its samples gives Chen's of them. Chen's estimate of N samples with r right would
    be too high. k may be no more than the samples that a row without a rule would have had.
    """
    n, c = num_samples - stopped, num_correct - stopped
    # Where fewer than k are left there cannot be k wrong ones among them.
    few = n < k
    assert not bool((few & ~stopped).any()), "pass@k needs k samples of every row that was not stopped"
    value = np.ones(len(n))
    value[~few] = estimate(n[~few], c[~few], k)
    return value
