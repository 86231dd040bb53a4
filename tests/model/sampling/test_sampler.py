"""The sampler's distributions against a float64 reference that follows transformers step by step, and its
invariances."""

from __future__ import annotations

import pytest
import torch
from support.sampling import chi_square_is_plausible, reference, rows_of
from support.sampling import sampler_inputs as inputs

from tokabatch.model.sampling import sampler
from tokabatch.model.sampling.sampler import sample

DRAWS = 20_000


FILTERS = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_k": 1},
    {"top_k": 12},
    {"top_k": 100_000},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"top_p": 0.35, "temperature": 1.4},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 30, "min_p": 0.05, "temperature": 0.8},
    {"top_p": 0.95, "min_p": 0.02},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.03, "temperature": 1.3},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocab_size", [50, 300])
@pytest.mark.parametrize("params", FILTERS, ids=str)
def test_draws_follow_transformers_distribution(params, vocab_size, dtype):
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(vocab_size), dtype=dtype) * 2.0
    drawn = sample(logits.expand(DRAWS, -1), inputs(DRAWS, **params))
    counts = drawn.token_S.long().bincount(minlength=vocab_size).double()
    assert drawn.finite_S.all()
    assert chi_square_is_plausible(counts, reference(logits, **params))


@pytest.mark.parametrize("params", [{"top_k": 5}, {"top_p": 0.5}, {"top_k": 9, "top_p": 0.7, "min_p": 0.2}], ids=str)
def test_ties_are_kept_and_dropped_as_transformers_does(params):
    logits = torch.tensor([2.0, 1.0, 1.0, 3.0, 1.0, 1.0, 1.0, 2.0, 0.0, 1.0, -torch.inf, 1.0])
    drawn = sample(logits.expand(DRAWS, -1), inputs(DRAWS, **params))
    counts = drawn.token_S.long().bincount(minlength=12).double()
    expected = reference(logits, **params)
    assert ((counts > 0) == (expected > 0)).all()
    assert chi_square_is_plausible(counts, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_greedy_is_the_first_of_the_largest(dtype):
    for vocab_size in (1, 7, 128, 129, 1000):
        logits = torch.randint(0, 9, (64, vocab_size)).to(dtype)
        drawn = sample(logits, inputs(64, temperature=0.0, top_k=3, top_p=0.5))
        first = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
        assert torch.equal(drawn.token_S, first.int())


def mixed(num_rows, vocab_size):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(num_rows, vocab_size, generator=generator) * 3
    kinds = torch.arange(num_rows)
    return logits, inputs(
        num_rows,
        temperature=[[0.0, 1.0, 0.7, 1.3][i % 4] for i in range(num_rows)],
        top_k=[[0, 0, 25, 3][i // 4 % 4] for i in range(num_rows)],
        top_p=[[1.0, 0.9, 1.0][i // 5 % 3] for i in range(num_rows)],
        min_p=[[0.0, 0.0, 0.07][i // 7 % 3] for i in range(num_rows)],
        logprobs=[[-1, 0, 2][i % 3] for i in range(num_rows)],
        seed=(kinds // 10).tolist(),
    )


@pytest.mark.parametrize("vocab_size", [300, 1024])
def test_a_draw_is_the_same_alone_and_in_any_company(vocab_size):
    logits, given = mixed(96, vocab_size)
    together = sample(logits, given)
    shuffled = torch.randperm(96)
    again = sample(logits[shuffled], rows_of(given.table, shuffled))
    assert torch.equal(again.token_S, together.token_S[shuffled])
    for row in range(96):
        alone = sample(logits[row : row + 1], rows_of(given.table, torch.tensor([row])))
        assert alone.token_S == together.token_S[row]
        torch.testing.assert_close(alone.logprob_S, together.logprob_S[row : row + 1], equal_nan=True)


def test_an_unfiltered_row_draws_the_same_beside_filtered_rows():
    logits, _ = mixed(64, 512)
    plain = inputs(64, temperature=1.0)
    beside = inputs(64, temperature=1.0, top_k=[0, 5] * 32)
    assert torch.equal(sample(logits, plain).token_S[::2], sample(logits, beside).token_S[::2])


def test_blocks_of_rows_change_nothing(monkeypatch):
    logits, given = mixed(50, 300)
    whole = sample(logits, given)
    monkeypatch.setattr(sampler, "_BLOCK_CPU_FILTERED", 300 * 7)
    parts = sample(logits, given)
    assert torch.equal(parts.token_S, whole.token_S)
    assert torch.equal(parts.top_ids_SK, whole.top_ids_SK)
    torch.testing.assert_close(parts.logprob_S, whole.logprob_S, equal_nan=True)


def test_logprobs_are_those_of_the_unmodified_distribution():
    logits, given = mixed(60, 300)
    drawn = sample(logits, given)
    expected = logits.double().log_softmax(-1)
    chosen = expected.gather(1, drawn.token_S.long()[:, None])[:, 0].float()
    wanted = torch.arange(60) % 3 > 0
    torch.testing.assert_close(drawn.logprob_S[wanted], chosen[wanted], rtol=1e-5, atol=1e-5)
    assert drawn.logprob_S[~wanted].isnan().all() and drawn.logprob_S.dtype == torch.float32
    top, ids = expected.topk(2, dim=-1)
    torch.testing.assert_close(drawn.top_logprobs_SK, top.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(drawn.top_ids_SK, ids.int())


@pytest.mark.parametrize(("wanted", "width"), [(-1, 0), (0, 0), (5, 5)])
def test_shapes_and_dtypes(wanted, width):
    drawn = sample(torch.randn(4, 30), inputs(4, logprobs=wanted))
    assert drawn.token_S.dtype == torch.int32 and drawn.finite_S.dtype == torch.bool
    assert drawn.top_ids_SK.shape == drawn.top_logprobs_SK.shape == (4, width)
    assert drawn.top_ids_SK.dtype == torch.int32 and drawn.top_logprobs_SK.dtype == torch.float32
    assert drawn.logprob_S.isnan().all() == (wanted < 0)
    empty = sample(torch.randn(0, 30), inputs(0))
    assert empty.token_S.shape == (0,)


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_k": 5}, {"top_p": 0.9, "min_p": 0.1}], ids=str)
def test_rows_without_finite_logits_are_flagged_and_harm_no_other(params):
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(2))
    clean = sample(logits, inputs(6, **params))
    broken = logits.clone()
    broken[1, 200] = torch.nan
    broken[2] = -torch.inf
    broken[3, 5] = torch.inf
    drawn = sample(broken, inputs(6, **params, logprobs=0))
    assert drawn.finite_S.tolist() == [True, False, False, False, True, True]
    assert drawn.token_S[1:4].tolist() == [0, 0, 0]
    assert torch.equal(drawn.token_S[[0, 4, 5]], clean.token_S[[0, 4, 5]])


def test_masked_and_vanishing_tokens_are_never_drawn():
    logits = torch.full((20_000, 300), -torch.inf)
    logits[:, 130] = 0.0
    logits[:, 259] = -200.0
    assert (sample(logits, inputs(20_000)).token_S == 130).all()
    assert (sample(logits, inputs(20_000, top_p=0.9999)).token_S == 130).all()


@pytest.mark.parametrize("extreme", [0.0, 1.0 - 2.0**-53], ids=["first", "last"])
@pytest.mark.parametrize("params", [{}, {"top_p": 0.999999}], ids=str)
def test_the_extremes_of_the_uniform_number_land_on_possible_tokens(extreme, params, monkeypatch):
    monkeypatch.setattr(sampler, "uniform", lambda seed, *_: torch.full(seed.shape, extreme, dtype=torch.float64))
    logits = torch.full((1, 700), -torch.inf)
    logits[0, 140:560] = torch.randn(420, generator=torch.Generator().manual_seed(4))
    token = sample(logits, inputs(1, **params)).token_S
    assert token == (140 if extreme == 0 else 559) or (params and 140 <= token < 560)


def test_a_tiny_temperature_is_nearly_greedy_and_finite():
    logits = torch.randn(50, 300)
    for temperature in (1e-3, 1e-12, 1e-38):
        drawn = sample(logits, inputs(50, temperature=temperature))
        assert drawn.finite_S.all()
        assert torch.equal(drawn.token_S, logits.argmax(-1).int()) or temperature == 1e-3
