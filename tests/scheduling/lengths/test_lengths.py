"""What is learned of lengths, against the distributions that they were drawn from."""

from __future__ import annotations

import numpy as np
import pytest

from tokabatch.scheduling.lengths.hazard import Bins, HazardTable, run_hazard, strata
from tokabatch.scheduling.lengths.predictor import Caution, LengthModel

NO_REQUEST = np.zeros(0, np.int32)


def learn(lengths: np.ndarray, cut: np.ndarray, limit: int) -> LengthModel:
    """Samples of single-sample prompts; those whose `cut` comes before their length are still running there."""
    model = LengthModel(limit, np.zeros(len(lengths), np.bool_))
    done = lengths <= cut
    request = np.arange(len(lengths), dtype=np.int32)
    model.observe(request[done], np.minimum(lengths, limit)[done].astype(np.int32), lengths[done] <= limit)
    assert model.refresh(request[~done], cut[~done].astype(np.int32))
    return model


def remaining(model: LengthModel, generated: int, count: int = 20_000, request: int = 0) -> np.ndarray:
    """Many draws of what remains for samples of one prompt at one age."""
    age = np.full(count, generated, np.int32)
    limit = np.full(count, model.bins.edge[-1], np.int32)
    key = np.full(count, request, np.int32)
    return model.predict(key, np.zeros(count, np.int32), age, limit, np.arange(count)) - generated


@pytest.mark.parametrize("generated", [0, 100, 400])
def test_running_samples_count_as_not_yet_ended(generated):
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(5.3, 0.8, 40_000)).astype(np.int64) + 1
    # Half of the samples are cut off at a random age: to call those finished would halve the estimate.
    model = learn(lengths, rng.integers(1, 800, 40_000), 4096)
    rest = lengths[lengths > generated] - generated
    drawn = remaining(model, generated)
    for chance in (0.1, 0.25, 0.5, 0.75):
        assert np.quantile(drawn, chance) == pytest.approx(np.quantile(rest, chance), rel=0.12, abs=2)


def test_short_or_never_is_distinguished_by_age():
    rng = np.random.default_rng(1)
    never = rng.random(20_000) < 0.2
    lengths = np.where(never, 2049, rng.integers(50, 300, 20_000))
    model = learn(lengths, np.full(20_000, 4000), 2048)
    assert np.quantile(remaining(model, 0), [0.5, 0.95]).tolist() == pytest.approx([206, 2048], rel=0.1)
    assert (remaining(model, 400) == 1648).mean() > 0.97


def test_before_anything_ended_samples_are_taken_to_be_long():
    bins = Bins(4000)
    nothing = np.zeros(bins.count)
    table = HazardTable(bins, run_hazard(bins, nothing, nothing)[None])
    assert 1000 < table.expected(np.array([0]), np.array([4000]))[0] < 3500


def test_the_mean_under_each_limit_is_that_of_lengths_cut_there():
    lengths = np.random.default_rng(4).integers(1, 401, 50_000)
    model = learn(lengths, np.full(50_000, 1000), 1000)
    limits = np.array([1, 10, 100, 250, 1000])
    cut = np.minimum(lengths[:, None], limits).mean(axis=0)
    assert model.expected(np.zeros_like(limits), limits).tolist() == pytest.approx(cut.tolist(), rel=0.02)


def test_a_prompt_whose_samples_all_still_run_is_taken_to_be_long():
    rng = np.random.default_rng(2)
    prompts, samples = 60, 32
    scale = np.exp(rng.normal(5.5, 1.0, prompts))
    lengths = (scale[:, None] * np.exp(rng.normal(0, 0.3, (prompts, samples)))).astype(np.int64) + 1
    model = LengthModel(8192, np.ones(prompts, np.bool_))
    # Each was seen until it ended or had 150 tokens.
    request, first = np.repeat(np.arange(prompts, dtype=np.int32), samples), lengths.ravel()
    ended = first <= 150
    model.observe(request[ended], first[ended].astype(np.int32), np.ones(int(ended.sum()), np.bool_))
    model.refresh(request[~ended], np.full(int((~ended).sum()), 150, np.int32))
    long = [prompt for prompt in range(prompts) if scale[prompt] > 300]
    assert long
    assert min(float(np.median(remaining(model, 0, 2000, prompt))) for prompt in long) > 300


def test_scales_are_learned_from_the_samples_that_ended():
    rng = np.random.default_rng(3)
    prompts, samples = 40, 100
    scale = np.exp(rng.normal(5.5, 0.8, prompts))
    lengths = (scale[:, None] * np.exp(rng.normal(0, 0.3, (prompts, samples)))).clip(1, 8192).astype(np.int32)
    model = LengthModel(8192, np.ones(prompts, np.bool_))
    for begin in range(0, 90, 10):
        part = lengths[:, begin : begin + 10]
        request = np.repeat(np.arange(prompts, dtype=np.int32), 10)
        model.observe(request, part.ravel(), np.ones(part.size, np.bool_))
        model.refresh(np.arange(prompts, dtype=np.int32), np.ones(prompts, np.int32))
    own = np.array([np.median(remaining(model, 0, 1000, prompt)) for prompt in range(prompts)])
    assert np.abs(np.log(own / np.median(lengths, axis=1))).mean() < 0.15
    pooled = abs(np.log(np.median(lengths) / np.median(lengths, axis=1))).mean()
    assert pooled > 0.5, "the run's distribution alone would be far off"


def test_predictions_respect_the_limit_and_what_is_there():
    model = LengthModel(100, np.zeros(3, np.bool_))
    generated, limit = np.array([0, 50, 99], np.int32), np.array([10, 51, 100], np.int32)
    zero = np.zeros(3, np.int32)
    predicted = model.predict(zero, zero, generated, limit, np.arange(3))
    assert (predicted > generated).all() and (predicted <= limit).all()


def test_strata_cover_the_distribution_evenly():
    for age in (0, 17):
        drawn = np.sort(strata(np.arange(5000, 5200), np.full(200, age, np.int32)))
        expected = -np.log1p(-(np.arange(200) + 0.5) / 200)
        assert np.abs(drawn[:180] - expected[:180]).max() < 0.12
        assert drawn.mean() == pytest.approx(1.0, rel=0.05)


def test_caution_follows_the_work_that_preemptions_cost():
    caution = Caution()
    first, computed, recomputed = caution.deviations, 0, 0
    for _ in range(10):
        computed, recomputed = computed + 100_000, recomputed + 2_000
        caution.update(computed, recomputed)
    raised = caution.deviations
    assert raised > first + 1
    for _ in range(40):
        computed += 100_000
        caution.update(computed, recomputed)
    assert caution.deviations < raised - 1


def survivors_at(lengths: np.ndarray, frontier: int, limit: int) -> tuple[LengthModel, np.ndarray]:
    """What is learned while no sample has more than `frontier` tokens, and the true lengths of those that have as many."""
    model = learn(np.minimum(lengths, limit + 1), np.full(len(lengths), frontier), limit)
    return model, np.minimum(lengths[lengths > frontier], limit)


@pytest.mark.parametrize("frontier", [3000, 5000, 10_000])
def test_a_heavy_tail_is_not_taken_for_endless(frontier):
    chance = np.random.default_rng(4).random(8000)
    model, left = survivors_at((900 * ((1 - chance) ** (-1 / 1.5) - 1)).astype(np.int64) + 1, frontier, 32_768)
    drawn = frontier + remaining(model, frontier)
    assert 0.7 < drawn.mean() / left.mean() < 1.6


@pytest.mark.parametrize("frontier", [200, 350, 450, 600])
def test_endless_samples_show_before_any_has_ended(frontier):
    rng = np.random.default_rng(5)
    lengths = np.where(rng.random(4000) < 0.2, 10_000, np.exp(rng.normal(5.0, 0.6, 4000)).astype(np.int64) + 1)
    model, left = survivors_at(lengths, frontier, 2048)
    drawn = frontier + remaining(model, frontier)
    assert 0.45 < (drawn == 2048).mean() / (left == 2048).mean() < 1.2


@pytest.mark.parametrize("max_tokens", [16_384, 32_768])
def test_thousands_that_end_at_one_length_leave_none(max_tokens):
    edges = Bins(max_tokens).edge
    for length in {int(edges[np.searchsorted(edges, want)]) + 1 for want in (8_000, 12_000, 20_000) if want < 0.9 * max_tokens}:
        model = LengthModel(max_tokens, np.zeros(1, np.bool_))
        model.observe(np.zeros(20_000, np.int32), np.full(20_000, length, np.int32), np.ones(20_000, np.bool_))
        assert model.refresh(np.zeros(0, np.int32), np.zeros(0, np.int32))
        assert 0 < model.expected(np.array([0]), np.array([max_tokens]))[0] <= max_tokens


def test_nothing_is_kept_of_a_prompt_whose_last_samples_have_been_counted():
    model = LengthModel(1024, np.ones(50, np.bool_))
    for request in range(50):
        for _ in range(2):
            model.observe(np.full(8, request, np.int32), np.arange(20, 28, dtype=np.int32), np.ones(8, np.bool_))
            model.refresh(np.full(3, request, np.int32), np.full(3, 5, np.int32))
        model.forget([request])
    for _ in range(100):
        model.refresh(np.zeros(0, np.int32), np.zeros(0, np.int32))
    model.observe(np.full(50, 49, np.int32), np.full(50, 30, np.int32), np.ones(50, np.bool_))
    model.forget([49])
    for _ in range(100):
        model.refresh(np.zeros(0, np.int32), np.zeros(0, np.int32))
    assert not model._ended and not model._finished
