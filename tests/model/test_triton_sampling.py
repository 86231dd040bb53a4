"""The GPU's one-pass draws against the plain path on the same logits, parameters and keys, and against exact probabilities."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.sampling import sampler_inputs

from tokabatch.model import sampler
from tokabatch.model.sampler import sample
from tokabatch.model.slot_table import SamplerInputs

pytestmark = pytest.mark.gpu


def inputs(rows: int, temperature: float, logprobs: int = -1, row=None) -> SamplerInputs:
    return sampler_inputs(rows, temperature, logprobs=logprobs, seed=3, row=row, device="cuda")


@pytest.fixture(autouse=True)
def fused_calls(monkeypatch):
    """Every test here has to reach the fused path."""
    calls: list[int] = []
    fused = sampler._sample_fused
    monkeypatch.setattr(sampler, "_sample_fused", lambda *arguments: calls.append(1) or fused(*arguments))
    yield calls
    assert calls


def plain(logits: torch.Tensor, given: SamplerInputs) -> sampler.Sampled:
    """The path that filters take, made to run without any."""
    return sample(logits, replace(given, any_filter=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocab", [100, 8192, 20_000, 128_256])
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.3])
def test_the_same_tokens_and_logprobs_as_the_plain_path(dtype, vocab, temperature):
    torch.manual_seed(vocab)
    logits = (torch.randn(512, vocab, device="cuda") * 3).to(dtype)
    given = inputs(512, temperature, logprobs=0)
    fused, reference = sample(logits, given), plain(logits, given)
    # The two sum in different orders: a draw that falls between two tokens to within rounding may differ.
    assert (fused.token_S == reference.token_S).float().mean() > 0.985
    chosen = logits.double().log_softmax(-1).gather(1, fused.token_S.long()[:, None])[:, 0]
    torch.testing.assert_close(fused.logprob_S.double(), chosen, rtol=0, atol=1e-4)
    if temperature == 0:
        assert torch.equal(fused.token_S, reference.token_S)


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_the_distribution_is_that_of_softmax(temperature):
    """Pearson's chi-square at 200,000 draws; the tokens spread over several chunks."""
    torch.manual_seed(1)
    draws, vocab = 200_000, 30_000
    logits_V = torch.full((vocab,), -40.0, device="cuda")
    tokens = torch.randperm(vocab, device="cuda")[:40]
    logits_V[tokens] = torch.randn(40, device="cuda")
    probs = (logits_V.double() / temperature).softmax(-1)[tokens]
    counts = torch.zeros(vocab, dtype=torch.float64, device="cuda")
    for begin in range(0, draws, 20_000):
        given = inputs(20_000, temperature, row=range(begin, begin + 20_000))
        got = sample(logits_V.expand(20_000, vocab).contiguous(), given).token_S.long()
        counts += torch.bincount(got, minlength=vocab)
    chi_square = float(((counts[tokens] - draws * probs) ** 2 / (draws * probs)).sum())
    assert counts[tokens].sum() == draws
    assert chi_square < 39 + 5 * (2 * 39) ** 0.5


def test_rows_that_are_not_finite_are_told():
    logits = torch.randn(4, 20_000, device="cuda")
    logits[1, 9000] = torch.nan
    logits[2] = -torch.inf
    logits[3, :-1] = -torch.inf
    for temperature in (0.0, 1.0):
        got = sample(logits, inputs(4, temperature))
        assert got.finite_S.tolist() == [True, False, False, True]
        assert int(got.token_S[3]) == 19_999


def test_a_masked_token_is_never_drawn():
    logits = torch.zeros(50_000, 64, device="cuda")
    logits[:, ::2] = -torch.inf
    assert bool((sample(logits, inputs(50_000, 1.0)).token_S % 2 == 1).all())
