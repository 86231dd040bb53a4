"""Draws one token per row of logits: greedy, or by temperature, top-k, top-p and min-p in that order, as transformers
does.

A draw is a function of the row's logits, its parameters and its (seed, row, sample, position); what else is in the
batch has no part in it. One uniform number per row is turned into a token by the inverse of the cumulative distribution
in token-id order. Non-greedy rows cost a softmax and sums over chunks; only the chunk that the draw falls into is
walked. A token that was filtered out, or whose probability is zero, is never drawn.

What is written here serves CPUs and is the reference; on a CUDA device `triton_sampling` does the same by kernels of its
own. Nothing waits for the device. Shape legend: S rows, V vocabulary, K alternatives reported.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module

import torch

from tokabatch.model.sampling.filters import draw_filtered
from tokabatch.model.sampling.inverse_cdf import first_argmax, invert
from tokabatch.model.sampling.penalties import PenalisedRows
from tokabatch.model.sampling.philox import uniform
from tokabatch.model.sampling.slot_table import SamplerInputs, SlotColumns

# Logits worked on at a time: bounds the scratch memory, and keeps the filters' many passes in the CPU's cache.
_BLOCK_CPU = 1 << 22
_BLOCK_CPU_FILTERED = 1 << 19
_BLOCK_DEVICE = 1 << 28
_COLDEST = 1e-30


@dataclass(frozen=True, slots=True)
class Sampled:
    """What a step drew, in one tensor, so that one copy brings it to the host. See `messages.StepResult`.

    The rows of `packed` (int32, [3 + 2 K, S]) are the tokens, whether the logits were finite, the bits of the logprobs, K
    rows of ids and K of the bits of their logprobs, K = max(0, max_logprobs). The properties read it wherever it lies.
    """

    packed: torch.Tensor

    @property
    def num_alternatives(self) -> int:
        return (self.packed.shape[0] - 3) // 2

    @property
    def token_S(self) -> torch.Tensor:
        """int32; 0 where not finite."""
        return self.packed[0]

    @property
    def finite_S(self) -> torch.Tensor:
        """bool: the row has no NaN, no positive infinity, and some finite logit."""
        return self.packed[1] != 0

    @property
    def logprob_S(self) -> torch.Tensor:
        """float32, of the drawn token under the unmodified distribution; NaN where the row asked for none."""
        return self.packed[2].view(torch.float32)

    @property
    def top_ids_SK(self) -> torch.Tensor:
        """int32, most likely first; filled for every row."""
        return self.packed[3 : 3 + self.num_alternatives].T

    @property
    def top_logprobs_SK(self) -> torch.Tensor:
        return self.packed[3 + self.num_alternatives :].view(torch.float32).T


def sample(
    logits_SV: torch.Tensor,
    inputs: SamplerInputs,
    last_token: torch.Tensor | None = None,
    penalised: PenalisedRows | None = None,
) -> Sampled:
    """Draws a token per row. Computes in float32, in float64 for float64 logits. `logits_SV` is left as it is.

    `last_token` (integers, one per slot) receives the token drawn for each row's slot: the next step reads it there.
    Rows that are `penalised` are drawn from changed logits; their logprobs are those of the unchanged ones, as everyone's.
    """
    if penalised is not None:
        return _sample_penalised(logits_SV, inputs, last_token, penalised)
    if logits_SV.is_cuda and logits_SV.dtype != torch.float64:
        return Sampled(import_module("tokabatch.model.sampling.triton_sampling").sample(logits_SV, inputs, last_token))
    sampled = _sample_plain(logits_SV, inputs)
    if last_token is not None:
        last_token[inputs.slot_S] = sampled.token_S.to(last_token.dtype)
    return sampled


def _sample_penalised(
    logits_SV: torch.Tensor, inputs: SamplerInputs, last_token: torch.Tensor | None, penalised: PenalisedRows
) -> Sampled:
    """The other rows first, then in blocks those whose logits are changed."""
    num_rows, vocab_size = logits_SV.shape
    if penalised.count < num_rows:
        packed = sample(logits_SV, inputs, last_token).packed
    else:
        num_alternatives = min(max(inputs.max_logprobs, 0), vocab_size)
        packed = torch.empty(3 + 2 * num_alternatives, num_rows, dtype=torch.int32, device=logits_SV.device)
    for block in penalised.blocks(vocab_size):
        plain_BV = logits_SV.index_select(0, block.row_B)
        of_block = replace(inputs, slot_S=block.slot_B, position_S=block.position_B, max_logprobs=-1)
        drawn = sample(block.apply(plain_BV), of_block, last_token)
        wanted_B = inputs.table.columns(block.slot_B).logprobs
        if plain_BV.dtype != torch.float64:
            plain_BV = plain_BV.float()
        packed[:, block.row_B] = _packed(plain_BV, drawn.token_S.long(), drawn.finite_S, wanted_B, inputs.max_logprobs)
    return Sampled(packed)


def _sample_plain(logits_SV: torch.Tensor, inputs: SamplerInputs) -> Sampled:
    """In blocks of rows, with torch alone: on a CPU, and for float64."""
    num_rows, vocab_size = logits_SV.shape
    if logits_SV.device.type != "cpu":
        block = max(1, _BLOCK_DEVICE // vocab_size)
    else:
        block = max(1, (_BLOCK_CPU_FILTERED if inputs.any_filter else _BLOCK_CPU) // vocab_size)
    columns = inputs.table.columns(inputs.slot_S)
    uniform_S = None
    if inputs.any_random:
        uniform_S = uniform(columns.seed, columns.row, columns.sample, inputs.position_S)
    parts: list[torch.Tensor] = []
    for start in range(0, max(num_rows, 1), block):
        rows = slice(start, start + block)
        own_columns = SlotColumns(columns.words_SW[rows])
        own_uniform_S = None if uniform_S is None else uniform_S[rows]
        parts.append(_sample_block(logits_SV[rows], inputs, own_columns, own_uniform_S).packed)
    return Sampled(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))


def _sample_block(
    logits_SV: torch.Tensor, inputs: SamplerInputs, columns: SlotColumns, uniform_S: torch.Tensor | None
) -> Sampled:
    if logits_SV.dtype not in (torch.float32, torch.float64):
        logits_SV = logits_SV.float()
    token_S, highest_S = first_argmax(logits_SV)
    finite_S = highest_S.isfinite()
    if uniform_S is not None:
        drawn_S = _draw(logits_SV, inputs, columns, uniform_S)
        token_S = torch.where(columns.temperature > 0, drawn_S, token_S)
    token_S = token_S.masked_fill(~finite_S, 0)
    return Sampled(_packed(logits_SV, token_S, finite_S, columns.logprobs, inputs.max_logprobs))


def _packed(
    logits_SV: torch.Tensor, token_S: torch.Tensor, finite_S: torch.Tensor, wanted_S: torch.Tensor, max_wanted: int
) -> torch.Tensor:
    """What was drawn with its logprobs under these logits, as `Sampled.packed` has it."""
    logprob_S, top_ids_SK, top_logprobs_SK = _logprobs(logits_SV, token_S, wanted_S, max_wanted)
    scalars_3S = torch.stack((token_S.int(), finite_S.int(), logprob_S.view(torch.int32)))
    return torch.cat((scalars_3S, top_ids_SK.T.int(), top_logprobs_SK.view(torch.int32).T))


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


def _draw(logits_SV: torch.Tensor, inputs: SamplerInputs, columns: SlotColumns, uniform_S: torch.Tensor) -> torch.Tensor:
    # Greedy rows are drawn too and then overruled: no row selection, so nothing waits for a device.
    temperature_S1 = columns.temperature[:, None].clamp(min=_COLDEST)
    if not inputs.any_filter:
        scaled_SV = logits_SV / temperature_S1
        return invert(torch.softmax(scaled_SV, -1, out=scaled_SV), uniform_S)
    top_k_S, top_p_S, min_p_S = columns.top_k, columns.top_p, columns.min_p
    if logits_SV.device.type != "cpu":
        return draw_filtered(logits_SV / temperature_S1, top_k_S, top_p_S, min_p_S, uniform_S)
    filtered_S = ((top_k_S > 0) | (top_p_S < 1) | (min_p_S > 0)) & (columns.temperature > 0)
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
