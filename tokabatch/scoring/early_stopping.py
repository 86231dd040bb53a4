"""Rules that stop sampling a row early, and unbiased estimates from the samples of stopped rows.

A rule considers the verdicts of a row's samples in the order of their numbers, and only the longest judged prefix 0, 1, ... m -
1. It never considers the order in which samples finish: short ones finish first, and they are right more or less often than
others. So where a row stops follows from its samples alone, on any hardware, alongside any other rows and after any restart.
Samples after that number are cancelled, or dropped if they were finished already.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import dataclass

import numpy as np

from tokabatch.arrays import Bool, Float64, Int32, Int64
from tokabatch.errors import JobError
from tokabatch.job import VerifyConfig
from tokabatch.scoring.judge import ANSWER
from tokabatch.scoring.pass_at_k import estimate

FIRST_WAVE = 4
GOES_ON = -1
"""In place of the number of samples of a row that has not stopped."""


def refuse_majority(verify: VerifyConfig, columns: Collection[str]) -> None:
    """Raise JobError if rows are to stop once answers agree, and the judge, which has these columns, extracts none."""
    if verify.stop is not None and verify.stop.majority is not None and ANSWER not in columns:
        raise JobError(
            f"verify.stop.majority counts equal answers, and the judge extracts none: its COLUMNS have no {ANSWER!r}. Use one "
            "that does, such as gsm8k or choice, or verify.stop.after_correct"
        )


@dataclass(frozen=True, slots=True)
class StopRule:
    """Stop a row at its `after_correct`-th right sample, or once `majority` of its samples give the same answer. One of the two
    is None."""

    after_correct: int | None = None
    majority: int | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a rule considers of one judged sample; `answer` is None if its text has none. An error, or a sample without a
    verdict, is not right."""

    correct: bool
    answer: Hashable = None


class Tallies:
    """The verdicts of rows, in any order, and the rule's decisions, arrays of shape [rows]. A row takes 12 bytes, plus the
    verdicts beyond its judged prefix, and its votes if the rule counts them."""

    def __init__(self, rule: StopRule, rows: int) -> None:
        self._rule = rule
        self._ahead: dict[int, dict[int, Outcome | None]] = {}
        self._votes: dict[int, dict[Hashable, int]] = {}
        self._correct: Int32 = np.zeros(rows, np.int32)
        self.judged: Int32 = np.zeros(rows, np.int32)
        """Length of the judged prefix; it does not grow beyond `stop`."""
        self.stop: Int32 = np.full(rows, GOES_ON, np.int32)
        """Number of samples of the row; GOES_ON until the prefix decides it."""

    def add(self, row: int, number: int, outcome: Outcome | None) -> None:
        """Add the verdict of a sample; None for one that was cancelled because its row had stopped before it."""
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
    """Return how many samples of a row may have begun once its first `judged` ones are judged and did not stop it: waves that
    double, 4, 8, 16, ..., so that few are computed in vain and the number follows from the verdicts alone."""
    wave = FIRST_WAVE
    while wave <= judged:
        wave *= 2
    return min(wave, num_samples)


def estimate_stopped(num_samples: Int64, num_correct: Int64, stopped: Bool, k: int) -> Float64:
    """Return pass@k of each row, shape [R], without bias for rows that stopped at a right sample (`stopped`).

    A row that stopped at its r-th right sample, after N, gives Chen's estimate for N - 1 samples with r - 1 right: the sample
    that stopped it is left out, since it is right by the rule and not by chance (Girshick, Mosteller and Savage, 1946: the
    share of the paths to the stopping point without a right sample among their first k). If k exceeds the number of wrong ones,
    it is 1. A row that took all its samples gives Chen's estimate for them. Chen's estimate for N samples with r right would be
    too high. k must not exceed the number of samples that a row without a rule would have.
    """
    n, c = num_samples - stopped, num_correct - stopped
    # With fewer than k left, there cannot be k wrong ones among them.
    few = stopped & (n < k)
    value = np.ones(len(n))
    value[~few] = estimate(n[~few], c[~few], k)
    return value
