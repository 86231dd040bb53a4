"""When a row has been sampled enough: rules that stop a row early, and what its samples then estimate.

A rule looks at the verdicts of a row's samples in the order of their numbers, and only as far as all of them are known: at the
longest prefix 0, 1, ... m - 1 that is judged. Never at the order in which they came in: the first to end are the short ones,
which are right more or less often than others. So where a row stops follows from its samples alone, on any hardware, in any
company and after any resume. Samples behind that number are cancelled, or left out where they were finished already.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from tokabatch.arrays import Bool, Float64, Int32, Int64
from tokabatch.scoring.pass_at_k import estimate

FIRST_WAVE = 4
GOES_ON = -1
"""In place of the number of samples that a row takes."""


@dataclass(frozen=True, slots=True)
class StopRule:
    """Stop a row at its `after_correct`-th right sample; or once `majority` of its samples give the same answer. One of the two
    is None."""

    after_correct: int | None = None
    majority: int | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a rule looks at of one judged sample; `answer` is None where none was found in its text. An error, or a sample that
    the judge could not tell of, is not right."""

    correct: bool
    answer: Hashable = None


class Tallies:
    """The verdicts of rows, in any order, and what a rule makes of them, arrays of shape [rows]. A row takes 12 bytes, and more
    only for verdicts beyond its judged prefix, and for its votes where the rule counts these."""

    def __init__(self, rule: StopRule, rows: int) -> None:
        self._rule = rule
        self._ahead: dict[int, dict[int, Outcome | None]] = {}
        self._votes: dict[int, dict[Hashable, int]] = {}
        self._correct: Int32 = np.zeros(rows, np.int32)
        self.judged: Int32 = np.zeros(rows, np.int32)
        """Length of the prefix that is judged; it does not grow beyond `stop`."""
        self.stop: Int32 = np.full(rows, GOES_ON, np.int32)
        """How many samples the row takes; GOES_ON until the prefix tells."""

    def add(self, row: int, number: int, outcome: Outcome | None) -> None:
        """The verdict of a sample; None of one that was cancelled already, in front of which the row had stopped."""
        judged, stop = int(self.judged[row]), GOES_ON
        if self.stop[row] != GOES_ON or number < judged:
            return
        ahead = self._ahead.setdefault(row, {})
        ahead[number] = outcome
        while stop == GOES_ON and judged in ahead:
            found = ahead.pop(judged)
            if found is None or self._decides(row, found):
                stop = judged + (found is not None)
            judged += found is not None
        self.judged[row], self.stop[row] = judged, stop
        if stop != GOES_ON or not ahead:
            del self._ahead[row]
        if stop != GOES_ON:
            self._votes.pop(row, None)

    def _decides(self, row: int, outcome: Outcome) -> bool:
        self._correct[row] += outcome.correct
        if self._rule.majority is None:
            return bool(self._correct[row] == self._rule.after_correct)
        if outcome.answer is None:
            return False
        votes = self._votes.setdefault(row, {})
        votes[outcome.answer] = votes.get(outcome.answer, 0) + 1
        return votes[outcome.answer] == self._rule.majority


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
    few = stopped & (n < k)
    value = np.ones(len(n))
    value[~few] = estimate(n[~few], c[~few], k)
    return value
