"""Each figure against its definition: every subset of k samples counted, exactly."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokabatch.scoring import estimates
from tokabatch.scoring.early_stopping import StopRule
from tokabatch.scoring.estimates import Estimate, Judged, distinct, estimate_all


def judged(rows: list[list[tuple[bool, int, float]]], seed: int = 0) -> Judged:
    """Samples (right, answer, log-probability) of each row, shuffled."""
    flat = [(row, *sample) for row, samples in enumerate(rows) for sample in samples]
    np.random.default_rng(seed).shuffle(flat)  # type: ignore[arg-type]
    row, correct, answer, logprob = (np.array(each) for each in zip(*flat, strict=True))
    return of_arrays(row, correct, answer, logprob)


def of_arrays(row: np.ndarray, correct: np.ndarray, answer: np.ndarray, logprob: np.ndarray) -> Judged:
    return Judged(
        row=row.astype(np.int64),
        number=np.zeros(len(row), np.int64),
        correct=correct.astype(bool),
        score=correct.astype(float),
        answer=answer.astype(np.int64),
        logprob=logprob.astype(float),
        cancelled=np.zeros(len(row), bool),
    )


def values(found: tuple[estimates.Estimate, ...]) -> dict[str, float]:
    return {each.name: each.value for each in found}


def by_definition(rows: list[list[tuple[bool, int, float]]], k: int) -> dict[str, float]:
    sums: Counter[str] = Counter()
    for samples in rows:
        subsets = list(combinations(samples, k))
        for subset in subsets:
            weight = 1 / len(subsets) / len(rows)
            sums[f"pass@{k}"] += weight * any(right for right, *_ in subset)
            sums[f"best-of-{k}"] += weight * max(subset, key=lambda sample: sample[2])[0]
            votes = Counter(answer for _, answer, _ in subset if answer >= 0)
            winners = [answer for answer, count in votes.items() if count == max(votes.values())]
            right_of = {answer: right for right, answer, _ in samples}
            sums[f"maj@{k}"] += weight * (np.mean([right_of[answer] for answer in winners]) if winners else 0.0)
    return dict(sums)


@st.composite
def some_rows(draw: st.DrawFn) -> list[list[tuple[bool, int, float]]]:
    n = draw(st.integers(3, 6))
    rows: list[list[tuple[bool, int, float]]] = []
    for _ in range(draw(st.integers(1, 4))):
        right = draw(st.integers(0, 2))
        answers = draw(st.lists(st.integers(-1, 2), min_size=n, max_size=n))
        likely = draw(st.permutations(range(n)))
        rows.append([(answer == right, answer, float(place)) for answer, place in zip(answers, likely, strict=True)])
    return rows


@settings(max_examples=60, deadline=None)
@given(some_rows())
def test_figures_equal_their_definitions(rows: list[list[tuple[bool, int, float]]]) -> None:
    found, n = values(estimate_all(judged(rows))), len(rows[0])
    assert found["mean score"] == pytest.approx(np.mean([right for row in rows for right, *_ in row]))
    for k in {1, 2, 4 if n >= 4 else n, n}:
        for name, value in by_definition(rows, k).items():
            if name in found and (not name.startswith("maj") or k == n):
                assert found[name] == pytest.approx(value, abs=1e-9), name
    if any(answer >= 0 for row in rows for _, answer, _ in row):
        assert f"maj@{n}" in found


def test_majority_of_subsets_is_near_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    rows = []
    for _ in range(60):
        answers = random.integers(0, 3, 8).tolist()
        rows.append([(answer == 0, answer, float(place)) for place, answer in enumerate(answers)])
    found = values(estimate_all(judged(rows)))
    assert found["maj@4"] == pytest.approx(by_definition(rows, 4)["maj@4"], abs=0.02)
    assert found["maj@8"] == pytest.approx(by_definition(rows, 8)["maj@8"], abs=1e-12)
    assert estimate_all(judged(rows)) == estimate_all(judged(rows)), "the same at every call"


@pytest.mark.parametrize("rule", [None, StopRule(majority=3), StopRule(1)])
@pytest.mark.parametrize("likely", [np.nan, 0.0])
def test_figures_do_not_depend_on_the_order_of_arrival(likely: float, rule: StopRule | None) -> None:
    random = np.random.default_rng(2)
    answer = random.integers(-1, 4, 40 * 16)
    row = np.repeat(np.arange(40), 16)
    made = of_arrays(row, answer == 0, answer, np.full(len(answer), likely))
    made = replace(made, number=np.tile(np.arange(16), 40))
    assert estimate_all(made, rule) == estimate_all(made.take(random.permutation(len(answer))), rule)


def test_what_was_not_recorded_gives_no_figure() -> None:
    rows = [[(True, -1, float("nan"))] * 4, [(False, -1, float("nan"))] * 4]
    assert list(values(estimate_all(judged(rows)))) == ["mean score", "pass@1", "pass@2", "pass@4"]
    none = np.zeros(0)
    assert estimate_all(of_arrays(none, none, none, none)) == ()


def test_intervals_hold_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 300 experiments with 50 problems each, about 95% of the intervals hold the true pass@1; the normal one as well."""
    monkeypatch.setattr(estimates, "RESAMPLES", 300)
    for bootstrapped in (10**6, 1):
        monkeypatch.setattr(estimates, "BOOTSTRAPPED_ROWS", bootstrapped)
        random, held = np.random.default_rng(2), 0
        for _ in range(300):
            p = random.beta(2, 3, 50)
            correct = (random.random((50, 8)) < p[:, None]).ravel()
            row = np.repeat(np.arange(50), 8)
            nothing = np.full(400, np.nan)
            found = estimate_all(of_arrays(row, correct, np.full(400, -1), nothing))
            pass_at_1 = next(each for each in found if each.name == "pass@1")
            assert pass_at_1.low <= pass_at_1.value <= pass_at_1.high
            held += pass_at_1.low <= 0.4 <= pass_at_1.high
        assert 0.90 <= held / 300 <= 0.985


def test_one_row_says_nothing_of_others() -> None:
    (mean, *_) = estimate_all(judged([[(True, 0, 0.0), (False, 1, 1.0)]]))
    assert (mean.value, mean.low, mean.high) == (0.5, 0.0, 1.0)


def test_rows_that_stopped_tell_what_all_samples_do() -> None:
    """Of many rows with a chance of their own, whose wrong answers differ: figures of the rows as stopped against the truth."""
    random = np.random.default_rng(5)
    rows, n = 4000, 16
    chance = random.beta(0.7, 1.2, rows)
    right = random.random((rows, n)) < chance[:, None]
    answer = np.where(right, 0, random.integers(1, 3, (rows, n)))
    score = right + 0.25 * random.random((rows, n))
    place = np.indices((rows, n))
    for rule in (StopRule(1), StopRule(2), StopRule(majority=3)):
        stop = [next((i for i in range(1, n) if reached(rule, right[row, :i], answer[row, :i])), n) for row in range(rows)]
        cancelled = place[1] >= np.array(stop)[:, None]
        found = estimate_all(
            Judged(
                row=place[0].ravel(),
                number=place[1].ravel(),
                correct=right.ravel(),
                score=score.ravel(),
                answer=answer.ravel(),
                logprob=np.full(rows * n, np.nan),
                cancelled=cancelled.ravel(),
            ),
            rule,
        )
        truth = {f"pass@{k}": float(np.mean(1 - (1 - chance) ** k)) for k in (1, 2, 4, 8, 16)}
        truth["mean score"] = float(np.mean(chance)) + 0.125
        votes = [Counter(answer[row, : stop[row]].tolist()) for row in range(rows)]
        winners = [[each for each, count in row.items() if count == max(row.values())] for row in votes]
        truth["first to 3"] = float(np.mean([(0 in best) / len(best) for best in winners]))
        names = ["mean score", *(f"pass@{k}" for k in ((1, 2, 4, 8, 16) if rule.after_correct else (1, 2, 3)))]
        assert [each.name for each in found if not each.name.startswith("maj")] == names + ["first to 3"] * (
            not rule.after_correct
        )
        for each in found:
            wide = each.high - each.low
            if each.name in truth:
                assert abs(each.value - truth[each.name]) < wide, (rule, each)
        naive = np.mean([right[row, : stop[row]].mean() for row in range(rows)])
        assert not rule.after_correct or naive - np.mean(chance) > 0.02


def reached(rule: StopRule, right: np.ndarray, answer: np.ndarray) -> bool:
    if rule.after_correct is not None:
        return bool(right.sum() >= rule.after_correct)
    return max(Counter(answer.tolist()).values()) >= (rule.majority or 0)


def test_a_row_that_stopped_may_have_lost_verdicts() -> None:
    """The sample that stopped a row is left out whether or not its verdict is still there, and no verdict more than that."""
    samples, cancelled = 8, np.arange(8) >= 3
    whole = np.array([False, True, True, *[False] * 5])
    for gone, expected in (((), 1 / 2), ((2,), 1 / 2), ((1, 2), None), ((0, 1, 2), None)):
        correct = whole.copy()
        correct[list(gone)] = False
        row = of_arrays(np.zeros(samples), correct, np.full(samples, -1), np.full(samples, np.nan))
        row = replace(row, number=np.arange(samples), cancelled=cancelled)
        found = values(estimate_all(row, StopRule(after_correct=2)))
        assert expected in (None, found["pass@1"]), gone
        assert all(0 <= value <= 1 for value in found.values()) and f"pass@{samples}" in found


def test_the_scores_of_one_row_have_no_interval_where_they_are_no_shares() -> None:
    scores = np.array([7.0, 8.0, -9.0, 7.0])
    one = replace(of_arrays(*np.array([[0] * 4, [1] * 4, [-1] * 4, [0.5] * 4])), score=scores)
    found = {each.name: each for each in estimate_all(one)}
    assert (found["mean score"].low, found["mean score"].interval(".2f")) == (-np.inf, "")
    assert found["pass@1"].interval(".2f") == " (0.00 to 1.00)"
    shares = {each.name: each for each in estimate_all(replace(one, score=np.abs(scores) / 10))}
    assert shares["mean score"].interval(".2f") == shares["best-of-2"].interval(".2f") == " (0.00 to 1.00)"


def test_rows_that_are_all_wrong_or_all_right_leave_the_chance_that_others_are_not() -> None:
    """None of 20 problems solved: the true share may be 0.168 by Clopper and Pearson, where 2.5 % of experiments see none."""
    for right, interval in ((False, " (0.0000 to 0.1684)"), (True, " (0.8316 to 1.0000)")):
        found = estimate_all(judged([[(right, 0, 0.0)] * 4] * 20))
        assert {each.interval(".4f") for each in found if not each.name.startswith("maj")} == {interval}
    assert pytest.approx(0.025, rel=0.01) == (1 - 0.1684) ** 20
    large = judged([[(False, 0, 0.0)]] * 20_001)
    assert estimate_all(large)[0].high == pytest.approx(1 - 0.025 ** (1 / 20_001))
    alike = replace(judged([[(True, 0, 0.0)] * 2] * 5), score=np.full(10, 7.0))
    assert estimate_all(alike)[0].interval(".1f") == "", "scores may be any numbers"


def test_a_million_samples_are_estimated_in_seconds() -> None:
    """One sort of the answers serves every k, and one of random numbers each draw: 14 s before, half a second now."""
    rows, n, random = 62_500, 16, np.random.default_rng(0)
    row = np.repeat(np.arange(rows), n)
    many = of_arrays(row, random.random(rows * n) < 0.4, row * 4 + random.integers(0, 4, rows * n), np.zeros(rows * n))
    began = time.process_time()
    found = values(estimate_all(many))
    assert time.process_time() - began < 5
    assert all(abs(found[f"maj@{k}"] - 0.4) < 0.02 for k in (4, 8, 16)), "answers say nothing of what is right here"


def test_a_mean_score_that_is_pass_at_1_is_shown_once():
    """Summed in another order, the two may differ in the last bit."""
    shown = [Estimate("mean score", 0.05, 0.0, 0.2), Estimate("pass@1", 0.05 - 2**-56, 0.0, 0.2)]
    assert [each.name for each in distinct(shown)] == ["pass@1"]
    assert len(distinct([Estimate("mean score", 0.06, 0.0, 0.2), shown[1]])) == 2
