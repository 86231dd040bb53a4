"""What the verdicts of a run's samples say of the model, each figure with its 95% interval.

Every figure is the mean over rows of what one row estimates without bias, whatever its number of samples: the mean score;
pass@k (`pass_at_k`); maj@k, whether the answer that most of k samples give is right, ties shared out; best-of-k, the score of
the most likely of k samples by cumulative log-probability. Samples that ended in an error or have no verdict count as wrong.
Intervals are the bootstrap's over rows (Efron, 1979; percentiles of 1,000 resamples), and for very many rows the normal one,
which that approaches. Where all rows give the same figure, such as 0 or 1, no resample differs: then they are those of Clopper
and Pearson (1934) for none of so many rows being another. This module does not know where the samples come from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from tokabatch.arrays import Bool, Float64, Int64
from tokabatch.number_text import first_counted
from tokabatch.scoring.early_stopping import StopRule, estimate_stopped
from tokabatch.scoring.pass_at_k import estimate, ks_of, log_binomials

MEAN_SCORE = "mean score"
RESAMPLES = 1000
BOOTSTRAPPED_ROWS = 20_000
DRAWN_SAMPLES = 8_000_000
"""Of random subsets, for one maj@k: so many samples are looked at, in 32 subsets of each row at most."""
MOST_DRAWS = 32


@dataclass(frozen=True, slots=True)
class Estimate:
    """One figure, such as `pass@4`, with the bounds of its interval: infinite where scores of any size do not differ."""

    name: str
    value: float
    low: float
    high: float

    def interval(self, form: str) -> str:
        """Return the bounds in this format, in brackets after a space; empty if there are none."""
        return f" ({self.low:{form}} to {self.high:{form}})" if np.isfinite(self.low) else ""


def distinct(estimates: Sequence[Estimate]) -> tuple[Estimate, ...]:
    """Return the estimates to show, without the mean score if it equals pass@1, as it does if verdicts are right or wrong."""
    # The two are summed in different orders.
    first = [each.value for each in estimates if each.name == "pass@1"]
    same = [each for each in estimates if each.name == MEAN_SCORE and any(math.isclose(each.value, value) for value in first)]
    return tuple(each for each in estimates if each not in same)


def right_from(estimates: Sequence[Estimate]) -> str:
    """Return what counts as right, if scores are given for samples that are neither right nor wrong; else an empty text."""
    if all(each.name != MEAN_SCORE for each in distinct(estimates)):
        return ""
    return "a score of verify.correct_from (1.0 by default) or more; others count in the mean score alone"


@dataclass(frozen=True, slots=True)
class Judged:
    """The samples of a run, in any order, each array of shape [S]: its row and its number in it, whether it is right, its score
    (0 where there is none), the number of its answer (-1 where none was found; two samples of a row have the same where they
    answer the same), its cumulative log-probability (NaN where that was not recorded), and whether its row had stopped before
    it, so that it was never drawn."""

    row: Int64
    number: Int64
    correct: Bool
    score: Float64
    answer: Int64
    logprob: Float64
    cancelled: Bool

    def take(self, places: Int64 | Bool) -> Judged:
        """Return these samples, in this order."""
        return Judged(*(getattr(self, field.name)[places] for field in fields(self)))

    def rows(self) -> tuple[Int64, Int64]:
        """Return where each row begins, and how many samples it has, if the samples are ordered by row."""
        begins = np.flatnonzero(np.diff(self.row, prepend=self.row[:1] - 1))
        return begins, np.diff(np.append(begins, len(self.row)))


def estimator(rule: StopRule | None) -> str:
    """Return in words how `estimate_all` computes its figures."""
    if rule is None:
        return "pass@k by Chen et al. (2021) of all samples"
    if rule.majority is not None:
        samples = first_counted(rule.majority, "sample")
        return f"of the {samples} of each row, which no row stops before; pass@k by Chen et al. (2021)"
    return (
        "pass@k by Chen et al. (2021) of all samples of a row. Rows that stopped at right sample "
        f"{rule.after_correct} count without it, as it is right by the rule and not by chance (Girshick et al., 1946)"
    )


CHOICES = "share of rows whose likeliest continuation is right; normalized: its log-probability divided by its characters"
"""How `estimate_choices` computes its figures."""


def estimate_choices(judged: Judged, characters: Int64) -> tuple[Estimate, ...]:
    """Return, for rows whose given continuations were scored and judged, how often the most likely one is right: by its
    log-probability, and by that divided by its `characters` (acc and acc_norm of lm-evaluation-harness). Of equals the first
    counts."""
    if not len(judged.row):
        return ()
    columns: dict[str, Float64] = {}
    for name, likely in (("accuracy", judged.logprob), ("normalized accuracy", judged.logprob / np.maximum(characters, 1))):
        j = judged.take(np.lexsort((judged.number, -np.nan_to_num(likely, nan=-np.inf), judged.row)))
        columns[name] = j.correct[j.rows()[0]].astype(np.float64)
    return _with_intervals(list(columns), np.stack(list(columns.values()), axis=1))


def estimate_all(judged: Judged, rule: StopRule | None = None) -> tuple[Estimate, ...]:
    """Return every figure that the samples can give; maj@k needs answers, best-of-k log-probabilities. If a `rule` stopped
    rows, return the figures that it leaves without bias. Empty for no samples."""
    if judged.cancelled.all():
        return ()
    if rule is None:
        columns = _of_all_samples(judged)
    elif rule.majority is not None:
        columns = _of_rows_stopped_by_majority(judged, rule.majority)
    else:
        columns = _of_rows_stopped_when_right(judged, rule.after_correct or 1)
    are_shares = bool(((judged.score >= 0) & (judged.score <= 1)).all())
    return _with_intervals(list(columns), np.stack(list(columns.values()), axis=1), are_shares=are_shares)


def _of_rows_stopped_when_right(judged: Judged, after: int) -> dict[str, Float64]:
    """Return pass@k for every k that the rows would have had samples for, and the mean score. The samples before the one that
    stopped a row come in a random order, so that any of them estimates the score of the first one without bias; if there is
    none, the first one is the one that stopped the row."""
    j = judged.take(np.lexsort((judged.number, judged.row)))
    ks, cut = ks_of(j.rows()[1]), np.unique(j.row[j.cancelled])
    j = j.take(~j.cancelled)
    begins, n = j.rows()
    right = np.add.reduceat(j.correct.astype(np.int64), begins)
    # A verdict may be gone since it was counted, with a column that could not be written or a damaged file.
    stopped = (right >= after) | np.isin(j.row[begins], cut)
    right = np.where(stopped, np.minimum(np.minimum(right + 1, after), n), right)
    shortened = stopped & (n > 1)
    scores = np.add.reduceat(j.score, begins) - np.where(shortened, j.score[begins + n - 1], 0.0)
    columns = {MEAN_SCORE: scores / (n - shortened)}
    return columns | {f"pass@{k}": estimate_stopped(n, right, stopped, k) for k in ks}


def _of_rows_stopped_by_majority(judged: Judged, votes: int) -> dict[str, Float64]:
    """Return the figures of the first `votes` samples, before which no row stops, as without a rule; and whether the answer is
    right that the samples of a row settled on, or that most of them give if they did not settle."""
    taken = judged.take(~judged.cancelled)
    columns = _of_all_samples(taken.take(taken.number < votes))
    j = taken.take(np.lexsort((taken.number, taken.row)))
    begins, n = j.rows()
    return columns | {f"first to {votes}": majority(j, begins, n, [int(n.max())])[0]}


def _of_all_samples(judged: Judged) -> dict[str, Float64]:
    # Samples of one log-probability by their number: the subsets that maj@k draws do not depend on the order of arrival.
    j = judged.take(np.lexsort((judged.number, judged.logprob, judged.row)))
    begins, n = j.rows()
    ks = ks_of(n)
    right = np.add.reduceat(j.correct.astype(np.int64), begins)
    columns = {MEAN_SCORE: np.add.reduceat(j.score, begins) / n}
    columns |= {f"pass@{k}": estimate(n, right, k) for k in ks}
    if (j.answer >= 0).any():
        voting = [k for k in ks if k > 2]
        columns |= {f"maj@{k}": value for k, value in zip(voting, majority(j, begins, n, voting), strict=True)}
    if not np.isnan(j.logprob).any():
        columns |= {f"best-of-{k}": best_of(j.score, begins, n, k) for k in ks if k > 1}
    return columns


def majority(j: Judged, begins: Int64, n: Int64, ks: Sequence[int]) -> list[Float64]:
    """Return maj@k of each row, shape [R], for each of the `ks`; `j` is ordered by row, each of which begins at `begins` and
    has `n` samples. If k < n, it is the mean over random subsets of k, the same at every call."""
    rows = len(begins)
    of_row = np.repeat(np.arange(rows), n)
    # The answers of a row stand together, the rows in order: counts of one row are a range.
    width = int(j.answer.max(initial=-1)) + 2
    pairs, place = np.unique(of_row * width + j.answer + 1, return_inverse=True)
    row_of_pair, valid = pairs // width, pairs % width > 0
    share_right = np.bincount(place, j.correct, len(pairs)) / np.bincount(place, minlength=len(pairs))
    first = np.searchsorted(row_of_pair, np.arange(rows))
    draws = [1 if (n <= k).all() else int(np.clip(DRAWN_SAMPLES // len(of_row), 1, MOST_DRAWS)) for k in ks]
    random, totals = np.random.default_rng(0), [np.zeros(rows) for _ in ks]
    for draw in range(max(draws, default=0)):
        rank = _random_ranks(random, begins, n)
        for k, total, count in zip(ks, totals, draws, strict=True):
            if draw < count:
                votes = np.where(valid, np.bincount(place[rank < k], minlength=len(pairs)), 0)
                most = np.maximum.reduceat(votes, first)
                wins = (votes == most[row_of_pair]) & (votes > 0)
                shares = np.add.reduceat(wins * share_right, first)
                total += shares / np.maximum(np.add.reduceat(wins.astype(np.int64), first), 1) / count
    return totals


def _random_ranks(random: np.random.Generator, begins: Int64, n: Int64) -> Int64:
    """Return the place of each sample in a random order of its row, shape [S]. Rows of one length are sorted together."""
    ranks = np.empty(int(n.sum()), np.int64)
    for length in np.unique(n).tolist():
        place = begins[n == length][:, None] + np.arange(length)
        ranks[place] = random.random(place.shape).argsort(axis=1)
    return ranks


def best_of(score: Float64, begins: Int64, n: Int64, k: int) -> Float64:
    """Return best-of-k of each row, shape [R]; `score` is ordered by row and by rising log-probability. The sample with i less
    likely ones below it is the best of k with probability C(i, k - 1) / C(n, k)."""
    below = np.arange(len(score)) - np.repeat(begins, n)
    possible = below >= k - 1
    log_chance = log_binomials(np.where(possible, below, k - 1), k - 1) - np.repeat(log_binomials(n, k), n)
    return np.add.reduceat(np.where(possible, np.exp(log_chance), 0.0) * score, begins)


def _with_intervals(names: list[str], values: Float64, *, are_shares: bool = True) -> tuple[Estimate, ...]:
    """Return the figures with their intervals; `values` has shape [rows, figures]. `are_shares` is whether all scores are from
    0 to 1."""
    rows, means = len(values), values.mean(axis=0)
    # Chances are between 0 and 1, scores where all of them are.
    bounded = np.array([are_shares or not name.startswith((MEAN_SCORE, "best-of-")) for name in names])
    if rows == 1:
        # One row says nothing about others.
        low, high = np.where(bounded, 0.0, -np.inf), np.where(bounded, 1.0, np.inf)
    elif rows > BOOTSTRAPPED_ROWS:
        spread = 1.96 * values.std(axis=0, ddof=1) / rows**0.5
        low, high = means - spread, means + spread
    else:
        random = np.random.default_rng(0)
        resampled = np.stack([random.multinomial(rows, np.full(rows, 1 / rows)) @ values / rows for _ in range(RESAMPLES)])
        low, high = np.quantile(resampled, (0.025, 0.975), axis=0)
    # Of rows that are all alike, others may be this share of all rows, whose figures are between 0 and 1.
    alike, others = (np.ptp(values, axis=0) < 1e-12) & (rows > 1), 1 - 0.025 ** (1 / rows)
    low = np.where(alike, np.where(bounded, means * (1 - others), -np.inf), low)
    high = np.where(alike, np.where(bounded, means * (1 - others) + others, np.inf), high)
    return tuple(Estimate(*each) for each in zip(names, means.tolist(), low.tolist(), high.tolist(), strict=True))
