"""A profile recovers what steps cost from their record, and keeps to the roofline where the record says nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest
from forecast.test_roofline import LLAMA_1B

from tokabatch.errors import UsageError
from tokabatch.forecast.profile import TERMS, Profile, fit_profile, load_profile, profile_document, solve_nonnegative
from tokabatch.forecast.roofline import H200, Roofline
from tokabatch.forecast.step_log import StepLog, Steps, StepState
from tokabatch.forecast.step_work import StepWork

TRUE = Profile(Roofline(LLAMA_1B, H200), (0.003, 1e-6, 2e-5, 1.3, 1.5, 2.0, 1.8, 1.6, 1.4))


def record(rng: np.random.Generator, count: int, noise: float, decode_only: bool = False) -> Steps:
    trace = StepLog()
    for _ in range(count):
        sequences = float(rng.integers(10, 8000))
        prefill = 0.0 if decode_only else float(rng.integers(0, 8000))
        work = StepWork(
            tokens=sequences + prefill,
            sampled=sequences,
            sequences=sequences,
            prefill_pairs=prefill * float(rng.integers(10, 2000)),
            prefill_kv=prefill * 2,
            decode_kv=sequences * float(rng.integers(20, 900)),
            prefix_pairs=0.0 if decode_only else sequences * float(rng.integers(0, 2000)),
            prefix_kv=0.0 if decode_only else float(rng.integers(0, 60_000)),
            groups=0.0 if decode_only else float(rng.integers(0, 200)),
        )
        trace.add(work, StepState(float(TRUE.seconds(work)) * np.exp(rng.normal(0, noise)), int(sequences), 0, 0, 1, 0))
    return trace.steps()


def test_another_workload_is_predicted_from_one_run():
    rng = np.random.default_rng(0)
    profile = fit_profile(LLAMA_1B, H200, record(rng, 300, 0.05))
    other = record(rng, 200, 0.0)
    predicted, actual = np.asarray(profile.seconds(other.work)), other["seconds"]
    assert predicted.sum() == pytest.approx(actual.sum(), rel=0.02)
    assert np.quantile(np.abs(predicted / actual - 1), 0.9) < 0.06


def test_what_was_not_exercised_stays_near_the_roofline():
    rng = np.random.default_rng(1)
    profile = fit_profile(LLAMA_1B, H200, record(rng, 300, 0.02, decode_only=True))
    factors = dict(zip(TERMS, profile.coefficients, strict=True))
    assert 0.7 < factors["prefix"] < 4
    assert 0.7 < factors["prefill"] < 4


def test_slow_first_steps_do_not_count():
    steps = record(np.random.default_rng(2), 200, 0.01)
    columns = {name: values.copy() for name, values in steps.columns.items()}
    columns["seconds"][:5] += 20
    slow, clean = (fit_profile(LLAMA_1B, H200, s) for s in (Steps(columns), steps))
    work = record(np.random.default_rng(3), 50, 0.0).work
    assert np.sum(slow.seconds(work)) == pytest.approx(float(np.sum(clean.seconds(work))), rel=0.03)


def test_results_that_come_in_bursts_do_not_mislead():
    """Two steps in flight: every other result is late, and the next one comes right behind it."""
    steps = record(np.random.default_rng(4), 400, 0.01)
    columns = {name: values.copy() for name, values in steps.columns.items()}
    late = 0.9 * columns["seconds"][1::2]
    columns["seconds"][0::2] += late
    columns["seconds"][1::2] -= late
    profile = fit_profile(LLAMA_1B, H200, Steps(columns))
    other = record(np.random.default_rng(5), 200, 0.0)
    predicted, actual = np.asarray(profile.seconds(other.work)), other["seconds"]
    assert predicted.sum() == pytest.approx(actual.sum(), rel=0.03)
    assert np.quantile(np.abs(predicted / actual - 1), 0.9) < 0.1


def test_a_profile_is_read_as_it_was_written(tmp_path):
    (tmp_path / "profile.json").write_text(profile_document(TRUE))
    assert load_profile(tmp_path / "profile.json").of_model(LLAMA_1B) == TRUE


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.update(kind="tokabatch job"),
        lambda document: document.pop("device"),
        lambda document: document["device"].update(flops="fast"),
        lambda document: document["device"].update(flops=0),
        lambda document: document["device"].update(bytes_per_second=float("inf")),
        lambda document: document["coefficients"].update(dense=float("nan")),
        lambda document: document["coefficients"].update(dense=-1.0),
        lambda document: document["coefficients"].pop("decode"),
        lambda document: document.update(itemsize=0),
        lambda document: document.update(coefficients=[1.0]),
    ],
)
def test_a_file_that_is_no_profile_is_refused(tmp_path, change):
    document = json.loads(profile_document(TRUE))
    change(document)
    (tmp_path / "other.json").write_text(json.dumps(document))
    with pytest.raises(UsageError, match=r"other\.json is not a profile.*tokabatch profile OUT --to profile\.json"):
        load_profile(tmp_path / "other.json")


def test_a_profile_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"none\.json: No such file"):
        load_profile(tmp_path / "none.json")


def test_too_few_steps_are_refused():
    with pytest.raises(UsageError, match="at least"):
        fit_profile(LLAMA_1B, H200, record(np.random.default_rng(0), 3, 0.0))


@pytest.mark.parametrize("seed", range(5))
def test_no_other_nonnegative_solution_is_better(seed):
    rng = np.random.default_rng(seed)
    matrix, target = rng.normal(size=(30, 6)), rng.normal(size=30)
    x = solve_nonnegative(matrix, target)
    gradient = matrix.T @ (matrix @ x - target)
    assert (x >= 0).all()
    # The conditions of Karush, Kuhn and Tucker: no descent inside, none into the feasible side at the bounds.
    assert np.abs(gradient[x > 0]).max(initial=0) < 1e-8
    assert (gradient[x == 0] > -1e-8).all()
