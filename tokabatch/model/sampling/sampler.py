"""Draws one token per row of logits: greedy, or by temperature, top-k, top-p and min-p in that order, as transformers
does.

A draw is a function of the row's logits, its parameters and its (seed, row, sample, position); what else is in the
batch has no part in it. One uniform number per row is turned into a token by the inverse of the cumulative distribution
in token-id order, from the maxima and masses of its parts; only the part that the draw falls into is walked. A token that was
filtered out, or whose probability is zero, is never drawn.

Where the vocabulary is spread over tensor ranks, the parts' maxima and masses are gathered, not the logits: every rank places
the draw alike, and the one that holds the part walks it. Only rows with filters or penalties are gathered whole (on a
GPU all rows of a step that has any, or that reports alternatives). Given equal logits the tokens are those of one rank, to the
last bit.

What is written here serves CPUs and is the reference; on a CUDA device `triton_sampling` does the same by kernels of its
own. Nothing waits for the device. Shape legend: S rows, V vocabulary, K alternatives reported.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module

import torch

from tokabatch.model.partition import PART, VocabularyShard
from tokabatch.model.sampling.filters import draw_filtered
from tokabatch.model.sampling.inverse_cdf import first_of_part, locate, part_masses, part_maxima, relative_masses, walk
from tokabatch.model.sampling.penalties import PenalisedRows
from tokabatch.model.sampling.philox import uniform
from tokabatch.model.sampling.slot_table import SamplerInputs, SlotColumns
from tokabatch.parallel.collectives import all_gather_last, all_reduce
from tokabatch.parallel.mesh import Mesh

# Logits worked on at a time: bounds the scratch memory, and keeps the filters' many passes in the CPU's cache.
_BLOCK_CPU = 1 << 22
_BLOCK_CPU_FILTERED = 1 << 19
_BLOCK_DEVICE = 1 << 28
_COLDEST = 1e-30


@dataclass(frozen=True, slots=True)
class Sampled:
    """What a step drew, in one tensor, so that one copy brings it to the host. See `contracts.StepResult`.

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
        """float32, of the drawn token under the unmodified distribution; NaN where the row has `logprobs` off."""
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
    shard: VocabularyShard | None = None,
) -> Sampled:
    """Draw a token per row, in float32, or in float64 for float64 logits. `logits_SV`, which is not changed, are the logits of
    `shard`, or of the whole vocabulary. Every tensor rank must call this for the same rows, and gets the same tokens.

    `last_token` (integers, one per slot) receives the token drawn for each row's slot: the next step reads it there.
    Rows that are `penalised` are drawn from changed logits; their logprobs are those of the unchanged ones, as everyone's.
    """
    shard = shard or _whole(logits_SV)
    if penalised is not None:
        return _sample_penalised(logits_SV, inputs, last_token, penalised, shard)
    if logits_SV.is_cuda and logits_SV.dtype != torch.float64:
        return Sampled(import_module("tokabatch.model.sampling.triton_sampling").sample(logits_SV, inputs, last_token, shard))
    sampled = _sample_plain(logits_SV, inputs, shard)
    if last_token is not None:
        last_token[inputs.slot_S] = sampled.token_S.to(last_token.dtype)
    return sampled


def score(
    logits_RV: torch.Tensor, target_R: torch.Tensor, shard: VocabularyShard, alternatives: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logprob_R (float64) of given tokens (int64), whether each is the most likely one, the first of several, and the
    most likely `alternatives` as ids_RK (int32) and logprobs_RK (float32). Computed in float32, or in float64 for float64
    logits; a row with a NaN has the logprob NaN. Ranks as in `sample`."""
    logits_RV = all_gather_last(logits_RV, shard.mesh)[:, : shard.vocab_size]
    if logits_RV.dtype != torch.float64:
        logits_RV = logits_RV.float()
    total_R, target_logit_R = logits_RV.logsumexp(-1), logits_RV.gather(1, target_R[:, None])[:, 0]
    if logits_RV.is_cpu:
        # The place of the first of the largest is needed only in the rows whose given token may be it.
        greedy_R = target_logit_R == logits_RV.amax(-1)
        rows = greedy_R.nonzero()[:, 0]
        greedy_R[rows] = logits_RV.index_select(0, rows).argmax(-1) == target_R[rows]
    else:
        greedy_R = logits_RV.argmax(-1) == target_R
    top_RK, ids_RK = logits_RV.topk(alternatives, dim=-1)
    logprobs_RK = (top_RK - total_R[:, None]).float()
    return (target_logit_R - total_R).double(), greedy_R, ids_RK.int(), logprobs_RK


def _whole(logits_SV: torch.Tensor) -> VocabularyShard:
    return VocabularyShard.of(logits_SV.shape[1], Mesh.single())


def _sample_penalised(
    logits_SV: torch.Tensor,
    inputs: SamplerInputs,
    last_token: torch.Tensor | None,
    penalised: PenalisedRows,
    shard: VocabularyShard,
) -> Sampled:
    """Draw the other rows first, then in blocks those whose logits are changed, all of which every rank gathers."""
    num_rows = logits_SV.shape[0]
    if penalised.count < num_rows:
        packed = sample(logits_SV, inputs, last_token, None, shard).packed
    else:
        num_alternatives = min(max(inputs.max_logprobs, 0), shard.vocab_size)
        packed = torch.empty(3 + 2 * num_alternatives, num_rows, dtype=torch.int32, device=logits_SV.device)
    for block in penalised.blocks(shard.vocab_size):
        plain_BV = all_gather_last(logits_SV.index_select(0, block.row_B), shard.mesh)[:, : shard.vocab_size]
        of_block = replace(inputs, slot_S=block.slot_B, position_S=block.position_B, max_logprobs=-1)
        drawn = sample(penalised.table.apply(plain_BV, block), of_block, last_token)
        unchanged = _Block(plain_BV, inputs, inputs.table.columns(block.slot_B), _whole(plain_BV))
        packed[:, block.row_B] = unchanged.packed(drawn.token_S.long(), drawn.finite_S)
    return Sampled(packed)


def _sample_plain(logits_SV: torch.Tensor, inputs: SamplerInputs, shard: VocabularyShard) -> Sampled:
    """Draw in blocks of rows, with torch alone: on a CPU, and for float64."""
    num_rows = logits_SV.shape[0]
    if logits_SV.device.type != "cpu":
        block = max(1, _BLOCK_DEVICE // shard.vocab_size)
    else:
        block = max(1, (_BLOCK_CPU_FILTERED if inputs.any_filter else _BLOCK_CPU) // shard.vocab_size)
    columns = inputs.table.columns(inputs.slot_S)
    uniform_S = None
    if inputs.any_random:
        uniform_S = uniform(columns.seed, columns.row, columns.sample, inputs.position_S)
    parts: list[torch.Tensor] = []
    for start in range(0, max(num_rows, 1), block):
        rows = slice(start, start + block)
        own_columns = SlotColumns(columns.words_SW[rows])
        own_uniform_S = None if uniform_S is None else uniform_S[rows]
        parts.append(_Block(logits_SV[rows], inputs, own_columns, shard).draw(own_uniform_S))
    return Sampled(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))


class _Block:
    """Some rows of a step. What is computed of the parts of this rank's tokens is exchanged by `_everywhere`."""

    def __init__(self, logits_SV: torch.Tensor, inputs: SamplerInputs, columns: SlotColumns, shard: VocabularyShard) -> None:
        if logits_SV.dtype not in (torch.float32, torch.float64):
            logits_SV = logits_SV.float()
        self._padded_SV, self._logits_SV = logits_SV, logits_SV[:, : len(shard.tokens)]
        self._inputs, self._columns, self._shard = inputs, columns, shard
        self._own_highest_SN = part_maxima(self._logits_SV)
        self._highest_SN = self._everywhere(self._own_highest_SN, -torch.inf)

    def draw(self, uniform_S: torch.Tensor | None) -> torch.Tensor:
        columns = self._columns
        top_S, part_S = self._highest_SN.max(-1)
        finite_S = top_S.isfinite()
        rest_S = None
        filtered_S = (columns.top_k > 0) | (columns.top_p < 1) | (columns.min_p > 0)
        if uniform_S is not None:
            # Greedy rows are drawn too and then overruled, on a device also those with filters: nothing waits for it.
            selects = self._inputs.any_filter and filtered_S.device.type == "cpu"
            rows = (~filtered_S).nonzero()[:, 0] if selects else torch.arange(len(part_S), device=part_S.device)
            rest_S = torch.zeros_like(uniform_S)
            if len(rows):
                drawn_S, rest = locate(self._masses(self._temperature_S1(), rows), uniform_S[rows])
                part_S = part_S.index_copy(0, rows, torch.where(columns.temperature[rows] > 0, drawn_S, part_S[rows]))
                rest_S.index_copy_(0, rows, rest)
        token_S = self._walked(part_S, rest_S)
        if uniform_S is not None and self._inputs.any_filter:
            token_S = self._filtered(token_S, uniform_S, filtered_S & (columns.temperature > 0))
        return self.packed(token_S.masked_fill(~finite_S, 0), finite_S)

    def packed(self, token_S: torch.Tensor, finite_S: torch.Tensor) -> torch.Tensor:
        """Return what was drawn, with its logprobs under these logits, in the layout of `Sampled.packed`."""
        logprob_S, top_ids_SK, top_logprobs_SK = self._logprobs(token_S)
        scalars_3S = torch.stack((token_S.int(), finite_S.int(), logprob_S.view(torch.int32)))
        return torch.cat((scalars_3S, top_ids_SK.T.int(), top_logprobs_SK.view(torch.int32).T))

    def _everywhere(self, own_SN: torch.Tensor, empty: float) -> torch.Tensor:
        """Return a value for each part of the whole vocabulary, given those of this rank's parts."""
        if self._shard.mesh.tensor_size == 1:
            return own_SN
        width = self._shard.width // PART
        padded_SN = torch.nn.functional.pad(own_SN, (0, width - own_SN.shape[1]), value=empty)
        return all_gather_last(padded_SN, self._shard.mesh)[:, : -(-self._shard.vocab_size // PART)]

    def _temperature_S1(self) -> torch.Tensor:
        return self._columns.temperature[:, None].clamp(min=_COLDEST).to(self._logits_SV.dtype)

    def _masses(self, temperature_S1: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Return the masses of all parts of some rows, or of all rows, relative to each row's largest logit."""
        logits_SV, own_SN, highest_SN = self._logits_SV, self._own_highest_SN, self._highest_SN
        if rows is not None and len(rows) < len(logits_SV):
            logits_SV, own_SN, highest_SN = logits_SV[rows], own_SN[rows], highest_SN[rows]
            temperature_S1 = temperature_S1[rows]
        mass_SN = self._everywhere(part_masses(logits_SV, own_SN, temperature_S1), 0.0)
        return relative_masses(mass_SN, highest_SN, temperature_S1)

    def _walked(self, part_S: torch.Tensor, rest_S: torch.Tensor | None) -> torch.Tensor:
        """Return the token of each row's draw within its part: if the row is random, the one at the share `rest` of the part's
        mass, else the first of the largest."""
        tokens, columns = self._shard.tokens, self._columns
        local_S = part_S - tokens.start // PART
        own_S = (local_S >= 0) & (local_S * PART < len(tokens))
        if not len(tokens):
            return all_reduce(torch.zeros_like(part_S), self._shard.mesh)
        local_S = local_S.masked_fill(~own_S, 0)
        token_S = first_of_part(self._logits_SV, local_S)
        if rest_S is not None:
            walked_S = walk(self._logits_SV, local_S, rest_S, self._temperature_S1())
            token_S = torch.where(columns.temperature > 0, walked_S, token_S)
        return all_reduce((token_S + tokens.start).masked_fill_(~own_S, 0), self._shard.mesh)

    def _filtered(self, token_S: torch.Tensor, uniform_S: torch.Tensor, filtered_S: torch.Tensor) -> torch.Tensor:
        """Return the same tokens except for the rows with filters, which are drawn again from all of their logits."""
        columns, shard = self._columns, self._shard
        if self._logits_SV.device.type == "cpu":
            rows = filtered_S.nonzero()[:, 0]
            if not len(rows):
                return token_S
        else:
            rows = torch.arange(len(token_S), device=token_S.device)
        whole = all_gather_last(self._padded_SV.index_select(0, rows), shard.mesh)[:, : shard.vocab_size]
        scaled = whole / columns.temperature[rows, None].clamp(min=_COLDEST)
        params = (columns.top_k[rows], columns.top_p[rows], columns.min_p[rows])
        drawn = draw_filtered(scaled, *params, uniform_S[rows])
        return token_S.index_copy(0, rows, torch.where(filtered_S[rows], drawn, token_S[rows]))

    def _logprobs(self, token_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the logprobs of the drawn tokens, NaN for rows that report none, and the ids and logprobs of the most likely
        tokens."""
        logits_SV, shard, wanted = self._logits_SV, self._shard, self._inputs.max_logprobs
        none_SK = torch.empty(len(token_S), 0, dtype=torch.float32, device=token_S.device)
        if wanted < 0:
            return none_SK.new_full((len(token_S),), torch.nan), none_SK.int(), none_SK
        one_11 = torch.ones(1, 1, dtype=logits_SV.dtype, device=logits_SV.device)
        total_S = self._masses(one_11).sum(-1).log().to(logits_SV.dtype) + self._highest_SN.amax(-1)
        local_S = token_S - shard.tokens.start
        own_S = (local_S >= 0) & (local_S < len(shard.tokens))
        logit_S = torch.zeros_like(total_S)
        if len(shard.tokens):
            logit_S = logits_SV.gather(1, local_S.masked_fill(~own_S, 0)[:, None])[:, 0].masked_fill(~own_S, 0.0)
        chosen_S = (all_reduce(logit_S, shard.mesh) - total_S).float()
        chosen_S = chosen_S.masked_fill(self._columns.logprobs < 0, torch.nan)
        if wanted == 0:
            return chosen_S, none_SK.int(), none_SK
        count = min(wanted, shard.vocab_size)
        top_SK, ids_SK = logits_SV.topk(min(count, len(shard.tokens)), dim=-1)
        ids_SK = ids_SK + shard.tokens.start
        if shard.mesh.tensor_size > 1:
            missing = (0, count - top_SK.shape[1])
            top_SK = all_gather_last(torch.nn.functional.pad(top_SK, missing, value=-torch.inf), shard.mesh)
            ids_SK = all_gather_last(torch.nn.functional.pad(ids_SK, missing), shard.mesh)
            top_SK, place_SK = top_SK.topk(count, dim=-1)
            ids_SK = ids_SK.gather(1, place_SK)
        return chosen_S, ids_SK, (top_SK - total_S[:, None]).float()
