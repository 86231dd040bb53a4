"""The GPU's sampling kernels against the plain path on the same logits, parameters and keys, and against exact probabilities.

Without a GPU most of this runs in Triton's interpreter: see `support.interpreter`.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from support.interpreter import DEVICES, INTERPRETING
from support.sampling import chi_square_is_plausible, rows_of, sampler_inputs

from tokabatch.model.partition import VocabularyShard
from tokabatch.model.sampling.philox import uniform
from tokabatch.model.sampling.sampler import Sampled, sample
from tokabatch.parallel.mesh import Mesh

# The interpreter takes a tenth of a second for a row with filters.
DTYPES = [torch.float32, torch.bfloat16] if INTERPRETING else [torch.float32, torch.bfloat16, torch.float16]
ROWS = 2 if INTERPRETING else 32


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


def kernels():
    return import_module("tokabatch.model.sampling.triton_sampling")


def fused(logits, device, last_token=None, **params) -> Sampled:
    given = sampler_inputs(len(logits), device=device, **params)
    return Sampled(Sampled(kernels().sample(logits.to(device), given, last_token)).packed.cpu())


def plain(logits, **params) -> Sampled:
    return sample(logits, sampler_inputs(len(logits), **params))


def agree(logits, device, at_least=1.0, **params) -> Sampled:
    """The kernels draw what the plain path draws. Their sums have another order: a draw that falls between two tokens to within
    rounding may differ, in a small share of the rows, and is then next to the exact place."""
    got, want = fused(logits, device, **params), plain(logits, **params)
    assert torch.equal(got.finite_S, want.finite_S)
    same = got.token_S == want.token_S
    assert same.float().mean() >= at_least, f"{int((~same).sum())} of {len(same)} differ"
    for row in (~same).nonzero()[:, 0].tolist():
        assert is_near(logits[row], row, int(got.token_S[row]), len(logits), params), f"row {row}"
    if params.get("logprobs") is not None:
        torch.testing.assert_close(got.logprob_S[same], want.logprob_S[same], rtol=0, atol=2e-5, equal_nan=True)
    return got


def exact(logits_V, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Probabilities in float64. As `support.sampling.reference`, whose sort has no order among many that are tied."""
    scores_V = logits_V.double() / temperature
    if 0 < top_k < len(scores_V):
        scores_V = scores_V.masked_fill(scores_V < scores_V.sort(descending=True).values[top_k - 1], -torch.inf)
    probs_V, order_V = scores_V.softmax(0), scores_V.sort(stable=True).indices.flip(0)
    before_V = probs_V[order_V].cumsum(0) - probs_V[order_V]
    if top_p < 1:
        probs_V[order_V[before_V >= torch.tensor(top_p).double()]] = 0.0
    probs_V[probs_V < min_p * probs_V.max()] = 0.0
    return probs_V / probs_V.sum()


def is_near(logits_V, row, token, num_rows, params) -> bool:
    """Whether the row's uniform number lies in the token's part of the exact distribution, or within 1e-4 of it."""
    names = ("temperature", "top_k", "top_p", "min_p")
    own = {name: params[name][row] if isinstance(params[name], list) else params[name] for name in names if name in params}
    given = sampler_inputs(num_rows, **params)
    columns = given.table.columns(given.slot_S)
    at = uniform(columns.seed, columns.row, columns.sample, given.position_S)[row]
    probs_V = exact(logits_V, **own)
    end = probs_V.cumsum(0)[token]
    return bool((end - probs_V[token] - 1e-4 <= at) & (at <= end + 1e-4))


def random_logits(rows, vocab, dtype, spread=3.0):
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)) * spread).to(dtype)


def few_values(rows, vocab, dtype):
    """Ties everywhere, both zeros among them, and masked tokens."""
    generator = torch.Generator().manual_seed(rows)
    values = torch.tensor([-torch.inf, -3.0, -1.0, -0.0, 0.0, 0.5, 1.0, 1.0078125])
    return values[torch.randint(0, 8, (rows, vocab), generator=generator)].to(dtype)


FILTERS = [
    {"top_k": 1},
    {"top_k": 7, "temperature": 0.6},
    {"top_k": 300},
    {"top_k": 10**6},
    {"top_p": 0.95},
    {"top_p": 0.3, "temperature": 1.7},
    {"top_p": 1e-6},
    {"top_p": 0.99999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.8},
    {"top_p": 0.9, "min_p": 0.1},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.03, "temperature": 1.3},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 100, 129, 1500])
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.3])
def test_the_same_tokens_and_logprobs_without_filters(device, dtype, vocab, temperature):
    agree(random_logits(2 * ROWS, vocab, dtype), device, temperature=temperature, logprobs=0)


# Of one block of the vocabulary, and of many; the interpreter takes each filter once in either, in one type.
SIZES = (
    [(700, torch.bfloat16, 2), (2_000, torch.float32, 2)]
    if INTERPRETING
    else [(vocab, dtype, rows) for vocab, rows in ((700, 32), (20_000, 48), (128_256, 48)) for dtype in DTYPES]
)


@pytest.mark.parametrize("params", [{}, {"temperature": 0.0}, *FILTERS], ids=str)
@pytest.mark.parametrize(("vocab", "dtype", "rows"), SIZES, ids=str)
def test_the_same_tokens_with_filters(device, vocab, dtype, rows, params):
    logprobs = -1 if vocab == 700 else 1
    agree(random_logits(rows, vocab, dtype), device, at_least=1.0 if vocab == 700 else 0.85, logprobs=logprobs, **params)


@pytest.mark.parametrize("params", FILTERS, ids=str)
@pytest.mark.parametrize(
    ("vocab", "flat", "rows"), [(700, 512, 2)] if INTERPRETING else [(700, 512, 32), (128_256, 128_256, 48)]
)
def test_the_same_tokens_where_many_are_tied(device, vocab, flat, rows, params):
    # Where top_p times the number of tokens tied is a whole number, it is for rounding whether one more passes.
    agree(few_values(rows, vocab, torch.bfloat16), device, at_least=0.9 if vocab == 700 else 0.85, **params)
    agree(torch.zeros(rows, flat).half(), device, at_least=0.85, **params)


@pytest.mark.parametrize("top_p", [0.25, 0.5, 0.75])
def test_of_equals_at_the_edge_those_of_higher_id_pass(device, top_p):
    """All masses are alike and powers of two, so the edge is exact."""
    got = fused(torch.full((8 if INTERPRETING else 192, 512), 2.0).bfloat16(), device, top_p=top_p).token_S
    assert got.min() >= 512 * (1 - top_p) and got.max() > 450


@pytest.mark.parametrize(
    "params", [{"temperature": 0.0}, {}, *([] if INTERPRETING else [FILTERS[4], FILTERS[1]]), FILTERS[12]], ids=str
)
def test_rows_that_are_not_finite_are_reported_and_harm_no_other(device, params):
    logits = random_logits(7, 600, torch.float32)
    clean = fused(logits, device, **params)
    broken = logits.clone()
    broken[1, 200] = torch.nan
    broken[2] = -torch.inf
    broken[3, 5] = torch.inf
    broken[5] = torch.nan
    broken[6, :-1] = -torch.inf
    got = fused(broken, device, logprobs=2, **params)
    assert got.finite_S.tolist() == [True, False, False, False, True, False, True]
    assert got.token_S[[1, 2, 3, 5]].tolist() == [0, 0, 0, 0] and got.token_S[6] == 599
    assert torch.equal(got.token_S[[0, 4]], clean.token_S[[0, 4]])
    assert ((got.top_ids_SK >= 0) & (got.top_ids_SK < 600)).all()


def mixed(rows):
    return {
        "temperature": [(0.0, 1.0, 0.7, 1.3)[i % 4] for i in range(rows)],
        "top_k": [(0, 0, 25, 3)[i // 4 % 4] for i in range(rows)],
        "top_p": [(1.0, 0.9, 1.0)[i // 5 % 3] for i in range(rows)],
        "min_p": [(0.0, 0.0, 0.07)[i // 7 % 3] for i in range(rows)],
        "logprobs": [(-1, 0, 2)[i % 3] for i in range(rows)],
    }


def test_a_draw_is_the_same_alone_and_in_any_company(device):
    rows = 12 if INTERPRETING else 500
    logits = random_logits(rows, 1040 if INTERPRETING else 20_000, torch.bfloat16).to(device)
    given = sampler_inputs(rows, device=device, **mixed(rows))
    together = Sampled(kernels().sample(logits, given, None))
    shuffled = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    again = Sampled(kernels().sample(logits[shuffled.to(device)], rows_of(given.table, shuffled), None))
    assert torch.equal(again.packed, together.packed[:, shuffled.to(device)])
    for row in range(0, rows, 2 if INTERPRETING else 7):
        # Alone, a row without filters or logprobs runs other variants of the kernels.
        alone = Sampled(kernels().sample(logits[row : row + 1], rows_of(given.table, torch.tensor([row])), None))
        assert torch.equal(alone.packed[:3, 0], together.packed[:3, row])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("wanted", "vocab"), [(1, 300), (5, 1500), (20, 1500), (20, 15), (32, 128), (40, 300)])
def test_alternatives_are_the_most_likely_with_their_logprobs(device, dtype, wanted, vocab):
    logits = random_logits(4, vocab, dtype)
    got = fused(logits, device, temperature=0.8, logprobs=wanted)
    exact = logits.double().log_softmax(-1)
    count = min(wanted, vocab)
    assert got.top_ids_SK.shape == (4, count)
    torch.testing.assert_close(got.top_logprobs_SK.double(), exact.topk(count, dim=-1).values, rtol=0, atol=2e-5)
    torch.testing.assert_close(got.top_logprobs_SK.double(), exact.gather(1, got.top_ids_SK.long()), rtol=0, atol=2e-5)
    assert all(len(set(ids)) == count for ids in got.top_ids_SK.tolist())


def test_of_equal_alternatives_the_lower_id_comes_first(device):
    logits = torch.zeros(2, 900)
    logits[0, [850, 3, 400]] = 1.0
    logits[1, [130, 700]] = -0.0
    ids = fused(logits.bfloat16(), device, logprobs=5).top_ids_SK
    assert ids.tolist() == [[3, 400, 850, 0, 1], [0, 1, 2, 3, 4]]


def test_the_last_token_of_each_slot_is_set(device):
    logits = random_logits(6, 300, torch.bfloat16).to(device)
    given = sampler_inputs(10, device=device)
    slots = torch.tensor([7, 0, 9, 3, 4, 1])
    for dtype in (torch.int32, torch.int64):
        last = torch.full((10,), -1, dtype=dtype, device=device)
        got = Sampled(kernels().sample(logits, rows_of(given.table, slots), last))
        assert torch.equal(last[slots.to(device)].int(), got.token_S)
        assert (last[torch.tensor([2, 5, 6, 8], device=device)] == -1).all()


def test_no_rows_are_no_work(device):
    got = fused(torch.empty(0, 300), device, logprobs=3)
    assert got.token_S.shape == (0,) and got.top_ids_SK.shape == (0, 0)


def test_masked_and_vanishing_tokens_are_never_drawn(device):
    rows = 6 if INTERPRETING else 50_000
    logits = torch.zeros(rows, 64)
    logits[:, ::2] = -torch.inf
    assert (fused(logits, device).token_S % 2 == 1).all()
    logits = torch.full((rows, 300), -torch.inf)
    logits[:, 130], logits[:, 259] = 0.0, -200.0
    assert (fused(logits, device).token_S == 130).all()
    assert (fused(logits, device, top_p=0.9999).token_S == 130).all()


def test_a_tiny_temperature_is_nearly_greedy_and_finite(device):
    logits = random_logits(ROWS, 300, torch.float32)
    for temperature in (1e-12, 1e-38):
        for params in ({}, {"top_p": 0.9}, {"top_k": 4, "min_p": 0.1}):
            got = fused(logits, device, temperature=temperature, **params)
            assert got.finite_S.all() and torch.equal(got.token_S, logits.argmax(-1).int())


def test_uniform_numbers_are_those_of_philox(device):
    """Two tokens of probability 1/2 show the first bit; a flat vocabulary of 2**14 the first fourteen."""
    rows = 32 if INTERPRETING else 20_000
    seeds = [(-1) ** i * ((i * 0x9E3779B97F4A7 + i) % 2**63) for i in range(rows)]
    keys = [(-1) ** (i // 2) * i * 0x1234567890AB for i in range(rows)]
    got = fused(torch.zeros(1, 1 << 14).expand(rows, -1), device, seed=seeds, row=keys).token_S
    given = sampler_inputs(rows, seed=seeds, row=keys)
    columns = given.table.columns(given.slot_S)
    expected = uniform(columns.seed, columns.row, columns.sample, given.position_S)
    assert torch.equal(got, (expected * (1 << 14)).int())


def draw_many(logits_V, draws, device, **params):
    """Counts of each token, in batches of one row many times over."""
    rows = min(draws, 8192)
    given = sampler_inputs(rows, device=device, **params)
    counts = torch.zeros(len(logits_V), dtype=torch.int64, device=device)
    for turn in range(draws // rows):
        step = replace(given, position_S=given.position_S + turn)
        drawn = Sampled(kernels().sample(logits_V.expand(rows, -1), step, None)).token_S
        counts += drawn.long().bincount(minlength=len(logits_V))
    return counts.cpu().double()


@pytest.mark.parametrize("dtype", DTYPES[:1] if INTERPRETING else DTYPES, ids=str)
@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.6}, {"temperature": 1.9}, *FILTERS[4:6], FILTERS[8], FILTERS[12]], ids=str
)
def test_many_draws_follow_the_exact_distribution(device, dtype, params):
    vocab, draws = (4, 6) if INTERPRETING else (32_000, 4_000_000)
    logits_V = random_logits(1, vocab, dtype)[0]
    counts = draw_many(logits_V.to(device), draws, device, **params)
    assert counts.sum() > 0.99 * draws
    assert chi_square_is_plausible(counts, exact(logits_V, **params))


def test_random_filters_draw_what_the_plain_path_draws(device):
    generator = torch.Generator().manual_seed(7)
    rows, vocab = (2, 700) if INTERPRETING else (64, 50_257)
    for spread in (0.01, 0.5, 2.0, 8.0):

        def pick(low, high):
            return (torch.rand(rows, generator=generator) * (high - low) + low).tolist()

        off = torch.rand(3, rows, generator=generator) < 0.4
        params = {
            "temperature": pick(0.1, 2.0),
            "top_k": torch.randint(1, 4000, (rows,), generator=generator).masked_fill(off[0], 0).tolist(),
            "top_p": torch.tensor(pick(0.01, 1.0)).masked_fill(off[1], 1.0).tolist(),
            "min_p": torch.tensor(pick(0.0, 0.3)).masked_fill(off[2], 0.0).tolist(),
        }
        for dtype in DTYPES[:1] if INTERPRETING and spread < 2 else DTYPES:
            agree(random_logits(rows, vocab, dtype, spread), device, at_least=0.85, **params)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("vocab", [100, 700])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": [0.0, 0.8], "logprobs": [0, -1]}], ids=str)
def test_ranks_that_know_each_others_parts_draw_what_one_draws(device, params, vocab, ranks):
    """To the last bit: what each rank leaves, added up, is what one leaves that has all logits."""
    logits = random_logits(2, vocab, torch.bfloat16)
    logits = torch.cat((logits, few_values(2, vocab, torch.bfloat16), logits.new_full((2, vocab), torch.nan)))
    params = {name: (value * 3 if isinstance(value, list) else value) for name, value in params.items()}
    given, module = sampler_inputs(6, device=device, **params), kernels()
    whole = module.sample(logits.to(device), given, None)
    rows, summaries = [], []
    for rank in range(ranks):
        shard = VocabularyShard.of(vocab, Mesh(rank, ranks, 1))
        own = logits[:, shard.tokens.start : shard.tokens.stop]
        padded = torch.nn.functional.pad(own, (0, shard.width - len(shard.tokens))).to(device)
        rows.append(module.Rows.of(padded, given, shard))
        summaries.append(module.summarise(rows[-1], given.max_logprobs >= 0, shard))
    gathered = torch.cat(summaries, dim=-1)
    added = torch.zeros_like(whole)
    for own in rows:
        results = torch.empty_like(whole)
        module.draw(own, given, gathered, None, results, sharded=True)
        added += results
    assert torch.equal(added, whole)
