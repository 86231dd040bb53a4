"""Draws from logits on a GPU in one pass over them, without filters: greedy or by temperature.

Two stages over chunks of the vocabulary. The first reads every logit once and leaves, per row and chunk, the largest logit
and the sum of exponentials below it; from those the chunk that the row's uniform number falls into is chosen, and the second
reads that chunk again and walks it. The draw is the inverse of the cumulative distribution in token-id order, as in
`inverse_cdf`, computed in float32. Imports triton: only `sampler` loads this module, for CUDA tensors.

Shape legend: S rows, V vocabulary, N chunks of a row, C tokens of a chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

CHUNK = 8192


@triton.jit
def _summarise(
    logits_ptr, temperature_ptr, highest_ptr, first_ptr, mass_ptr, plain_ptr,
    vocab, row_stride, num_chunks, CHUNK: tl.constexpr, WANT_PLAIN: tl.constexpr,
):  # fmt: skip
    """Per row and chunk: largest logit and its first place, sum of exp((x - largest) / temperature), and at temperature 1.

    A NaN makes the largest logit of its chunk NaN.
    """
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offset = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = offset < vocab
    x = tl.load(logits_ptr + row * row_stride + offset, mask=inside, other=float("-inf")).to(tl.float32)
    nans = tl.sum((x != x).to(tl.int32), 0)
    highest = tl.max(x, 0)
    temperature = tl.load(temperature_ptr + row)
    inverse = tl.where(temperature > 0, 1.0 / temperature, 1.0)
    # A chunk of -inf only would give -inf - -inf.
    base = tl.where(highest == float("-inf"), 0.0, highest)
    mass = tl.sum(tl.exp((x - base) * inverse), 0)
    first = tl.min(tl.where((x == highest) & inside, offset, vocab), 0)
    at = row * num_chunks + chunk
    tl.store(highest_ptr + at, tl.where(nans > 0, float("nan"), highest))
    tl.store(first_ptr + at, first)
    tl.store(mass_ptr + at, mass)
    if WANT_PLAIN:
        tl.store(plain_ptr + at, tl.sum(tl.exp(x - base), 0))


@triton.jit
def _walk(
    logits_ptr, temperature_ptr, chunk_ptr, base_ptr, rest_ptr, token_ptr, logit_ptr, vocab, row_stride, CHUNK: tl.constexpr
):
    """The token of the chosen chunk at which the running mass passes `rest`, and its logit."""
    row = tl.program_id(0).to(tl.int64)
    chunk, base, rest = tl.load(chunk_ptr + row), tl.load(base_ptr + row), tl.load(rest_ptr + row)
    temperature = tl.load(temperature_ptr + row)
    inverse = tl.where(temperature > 0, 1.0 / temperature, 1.0)
    place = tl.arange(0, CHUNK)
    offset = chunk * CHUNK + place
    x = tl.load(logits_ptr + row * row_stride + offset, mask=offset < vocab, other=float("-inf")).to(tl.float32)
    mass = tl.exp((x - base) * inverse)
    passed = tl.sum((tl.cumsum(mass, 0) <= rest).to(tl.int32), 0)
    # Rounding may leave `rest` at the end of the chunk's mass: the last token that has any is meant then.
    last = tl.max(tl.where(mass > 0, place, 0), 0)
    chosen = tl.minimum(passed, last)
    # A token without mass adds nothing to the running sum, so the walk never ends on one but through `last`.
    tl.store(token_ptr + row, chunk * CHUNK + chosen)
    tl.store(logit_ptr + row, tl.sum(tl.where(place == chosen, x, 0.0), 0))


def draw(
    logits_SV: torch.Tensor, temperature_S: torch.Tensor, uniform_S: torch.Tensor | None, want_logprob: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token (int64), whether the row is finite, and the token's log-probability at temperature 1 (NaN unless wanted).

    `uniform_S` in (0, 1) is None where every row is greedy. Waits for nothing.
    """
    num_rows, vocab = logits_SV.shape
    num_chunks = -(-vocab // CHUNK)
    device = logits_SV.device
    highest_SN = torch.empty(num_rows, num_chunks, dtype=torch.float32, device=device)
    mass_SN, plain_SN = torch.empty_like(highest_SN), torch.empty_like(highest_SN)
    first_SN = torch.empty(num_rows, num_chunks, dtype=torch.int32, device=device)
    if num_rows == 0:
        return first_SN[:, 0].long(), first_SN[:, 0].bool(), highest_SN[:, 0]
    _summarise[(num_rows, num_chunks)](
        logits_SV, temperature_S, highest_SN, first_SN, mass_SN, plain_SN,
        vocab, logits_SV.stride(0), num_chunks, CHUNK=CHUNK, WANT_PLAIN=want_logprob, num_warps=8,
    )  # fmt: skip
    highest_S, top_chunk_S = highest_SN.max(1)
    finite_S = highest_S.isfinite()
    token_S = first_SN.gather(1, top_chunk_S[:, None])[:, 0].long()
    logit_S = highest_S
    if uniform_S is not None:
        drawn_S, drawn_logit_S = _draw(logits_SV, temperature_S, uniform_S, highest_SN, mass_SN)
        random_S = temperature_S > 0
        token_S = torch.where(random_S, drawn_S, token_S)
        logit_S = torch.where(random_S, drawn_logit_S, logit_S)
    logprob_S = torch.full_like(highest_S, torch.nan)
    if want_logprob:
        scale_SN = torch.exp(highest_SN - highest_S[:, None])
        logprob_S = logit_S - highest_S - (plain_SN * scale_SN).sum(1).log()
    return token_S.masked_fill_(~finite_S, 0), finite_S, logprob_S


def _draw(
    logits_SV: torch.Tensor,
    temperature_S: torch.Tensor,
    uniform_S: torch.Tensor,
    highest_SN: torch.Tensor,
    mass_SN: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose each row's chunk by its share of the mass, then walk it."""
    num_rows, vocab = logits_SV.shape
    inverse_S1 = 1.0 / temperature_S.clamp(min=1e-30)[:, None]
    scale_SN = torch.exp(((highest_SN - highest_SN.amax(1, keepdim=True)) * inverse_S1).double())
    running_SN = (mass_SN * scale_SN).cumsum(1)
    target_S1 = uniform_S.double()[:, None] * running_SN[:, -1:]
    chunk_S1 = (running_SN <= target_S1).sum(1, keepdim=True).clamp_(max=mass_SN.shape[1] - 1)
    before_SN = torch.nn.functional.pad(running_SN, (1, 0))
    rest_S = ((target_S1 - before_SN.gather(1, chunk_S1)) / scale_SN.gather(1, chunk_S1))[:, 0].float()
    base_S = highest_SN.gather(1, chunk_S1)[:, 0].nan_to_num(neginf=0.0)
    token_S = torch.empty(num_rows, dtype=torch.int32, device=logits_SV.device)
    logit_S = torch.empty_like(base_S)
    _walk[(num_rows,)](
        logits_SV, temperature_S, chunk_S1.int(), base_S, rest_S, token_S, logit_S,
        vocab, logits_SV.stride(0), CHUNK=CHUNK, num_warps=8,
    )  # fmt: skip
    return token_S.long(), logit_S
