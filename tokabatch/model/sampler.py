"""Draws one token per row of logits: greedy, or by temperature, top-k, top-p and min-p in that order, as transformers
does.

A draw is a function of the row's logits, its parameters and its (seed, row, sample, position); what else is in the
batch has no part in it. One uniform number per row is turned into a token by the inverse of the cumulative distribution
in token-id order. Non-greedy rows cost a softmax and sums over chunks; only the chunk that the draw falls into is
walked. A token that was filtered out, or whose probability is zero, is never drawn.

Nothing here waits for a CUDA device. Shape legend: S rows, V vocabulary, K alternatives reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

import torch

from tokabatch.model.filters import draw_filtered
from tokabatch.model.inverse_cdf import first_argmax, invert
from tokabatch.model.philox import uniform

# Logits worked on at a time: bounds the scratch memory, and keeps the filters' many passes in the CPU's cache.
_BLOCK_CPU = 1 << 22
_BLOCK_CPU_FILTERED = 1 << 19
_BLOCK_DEVICE = 1 << 28
_COLDEST = 1e-30


@dataclass(frozen=True, slots=True)
class SamplerInputs:
    """How each row is drawn, tensors of S on the logits' device, and what the host knows about them all.

    Integers are int32 or int64, the others float32. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 are
    off; `logprobs` is -1 for none, else how many alternatives.
    """

    seed: torch.Tensor
    row: torch.Tensor
    sample: torch.Tensor
    position: torch.Tensor
    temperature: torch.Tensor
    top_p: torch.Tensor
    top_k: torch.Tensor
    min_p: torch.Tensor
    logprobs: torch.Tensor
    any_random: bool
    """Some temperature is above 0."""
    any_filter: bool
    """Some row uses top_p, top_k or min_p."""
    max_logprobs: int
    """The maximum of `logprobs`: -1 where no row wants any."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """What a step drew. See `messages.StepResult`; these are its tensors on the logits' device."""

    token_S: torch.Tensor
    """int32; 0 where not finite."""
    finite_S: torch.Tensor
    """bool: the row has no NaN, no positive infinity, and some finite logit."""
    logprob_S: torch.Tensor
    """float32, of the drawn token under the unmodified distribution; NaN where the row asked for none."""
    top_ids_SK: torch.Tensor
    """int32, K = max(0, max_logprobs), most likely first; filled for every row."""
    top_logprobs_SK: torch.Tensor


def sample(logits_SV: torch.Tensor, inputs: SamplerInputs) -> Sampled:
    """Draws a token per row. Computes in float32, in float64 for float64 logits. `logits_SV` is left as it is."""
    num_rows, vocab_size = logits_SV.shape
    plain = not inputs.any_filter and inputs.max_logprobs <= 0
    if plain and logits_SV.is_cuda and logits_SV.dtype != torch.float64:
        return _sample_fused(logits_SV, inputs)
    if logits_SV.device.type != "cpu":
        block = max(1, _BLOCK_DEVICE // vocab_size)
    else:
        block = max(1, (_BLOCK_CPU_FILTERED if inputs.any_filter else _BLOCK_CPU) // vocab_size)
    uniform_S = None
    if inputs.any_random:
        uniform_S = uniform(inputs.seed, inputs.row, inputs.sample, inputs.position)
    if num_rows <= block:
        return _sample_block(logits_SV, inputs, uniform_S, slice(0, num_rows))
    parts = [
        _sample_block(logits_SV[start : start + block], inputs, uniform_S, slice(start, start + block))
        for start in range(0, num_rows, block)
    ]
    return Sampled(
        token_S=torch.cat([part.token_S for part in parts]),
        finite_S=torch.cat([part.finite_S for part in parts]),
        logprob_S=torch.cat([part.logprob_S for part in parts]),
        top_ids_SK=torch.cat([part.top_ids_SK for part in parts]),
        top_logprobs_SK=torch.cat([part.top_logprobs_SK for part in parts]),
    )


def _sample_fused(logits_SV: torch.Tensor, inputs: SamplerInputs) -> Sampled:
    """Without filters and alternatives, on a GPU: one pass over the logits in their own dtype."""
    uniform_S = uniform(inputs.seed, inputs.row, inputs.sample, inputs.position) if inputs.any_random else None
    fused = import_module("tokabatch.model.triton_sampling")
    token_S, finite_S, logprob_S = fused.draw(logits_SV, inputs.temperature, uniform_S, inputs.max_logprobs == 0)
    none_SK = logprob_S.new_empty(logits_SV.shape[0], 0)
    return Sampled(token_S.int(), finite_S, logprob_S.masked_fill(inputs.logprobs < 0, torch.nan), none_SK.int(), none_SK)


def _sample_block(logits_SV: torch.Tensor, inputs: SamplerInputs, uniform_S: torch.Tensor | None, rows: slice) -> Sampled:
    if logits_SV.dtype not in (torch.float32, torch.float64):
        logits_SV = logits_SV.float()
    token_S, highest_S = first_argmax(logits_SV)
    finite_S = highest_S.isfinite()
    if uniform_S is not None:
        temperature_S = inputs.temperature[rows]
        drawn_S = _draw(logits_SV, inputs, uniform_S[rows], rows)
        token_S = torch.where(temperature_S > 0, drawn_S, token_S)
    token_S = token_S.masked_fill(~finite_S, 0)
    logprob_S, top_ids_SK, top_logprobs_SK = _logprobs(logits_SV, token_S, inputs.logprobs[rows], inputs.max_logprobs)
    return Sampled(token_S.int(), finite_S, logprob_S, top_ids_SK.int(), top_logprobs_SK)


def _logprobs(
    logits_SV: torch.Tensor, token_S: torch.Tensor, wanted_S: torch.Tensor, max_wanted: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_rows = logits_SV.shape[0]
    none_SK = torch.empty(num_rows, 0, dtype=torch.float32, device=logits_SV.device)
    if max_wanted < 0:
        return none_SK.new_full((num_rows,), torch.nan), none_SK.int(), none_SK
    logprobs_SV = logits_SV.log_softmax(-1)
    chosen_S = logprobs_SV.gather(1, token_S[:, None])[:, 0].float()
    chosen_S = chosen_S.masked_fill(wanted_S < 0, torch.nan)
    if max_wanted == 0:
        return chosen_S, none_SK.int(), none_SK
    top_SK, ids_SK = logprobs_SV.topk(min(max_wanted, logits_SV.shape[1]), dim=-1)
    return chosen_S, ids_SK, top_SK.float()


def _draw(logits_SV: torch.Tensor, inputs: SamplerInputs, uniform_S: torch.Tensor, rows: slice) -> torch.Tensor:
    # Greedy rows are drawn too and then overruled: no row selection, so nothing waits for a device.
    temperature_S1 = inputs.temperature[rows, None].clamp(min=_COLDEST)
    if not inputs.any_filter:
        scaled_SV = logits_SV / temperature_S1
        return invert(torch.softmax(scaled_SV, -1, out=scaled_SV), uniform_S)
    top_k_S, top_p_S, min_p_S = inputs.top_k[rows], inputs.top_p[rows], inputs.min_p[rows]
    if logits_SV.device.type != "cpu":
        return draw_filtered(logits_SV / temperature_S1, top_k_S, top_p_S, min_p_S, uniform_S)
    filtered_S = ((top_k_S > 0) | (top_p_S < 1) | (min_p_S > 0)) & (inputs.temperature[rows] > 0)
    token_S = torch.empty(logits_SV.shape[0], dtype=torch.int64)
    plain, filtered = (~filtered_S).nonzero()[:, 0], filtered_S.nonzero()[:, 0]
    if len(plain):
        scaled = logits_SV.index_select(0, plain).div_(temperature_S1[plain])
        token_S[plain] = invert(torch.softmax(scaled, -1, out=scaled), uniform_S[plain])
    if len(filtered):
        scaled = logits_SV.index_select(0, filtered).div_(temperature_S1[filtered])
        params = (top_k_S[filtered], top_p_S[filtered], min_p_S[filtered])
        token_S[filtered] = draw_filtered(scaled, *params, uniform_S[filtered])
    return token_S
