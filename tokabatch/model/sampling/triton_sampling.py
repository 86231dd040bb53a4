"""Samples on a GPU: every logit is read once, in its own dtype, whatever the batch needs besides filters.

The first kernel leaves, for each part of 128 tokens of a row, its largest logit and its sum of exponentials. In the second,
one program a row makes the row's uniform number, finds the part that it falls into by the running mass, and walks that part:
the inverse of the cumulative distribution in token-id order, as in `inverse_cdf`. The log of the row's whole mass, and with
it every logprob, comes from the same sums. Two launches a step; batches that filter or report alternatives add
`triton_filters` and `triton_alternatives` between and behind. Tensor ranks gather each other's parts in between.

A row's draw depends on nothing but the row, to the last bit: sums have one order, which the number of rows has no part in, and
products are rounded before they are added, whichever variant of a kernel the rest of the batch calls for.

Imports triton: only `sampler` loads this module, for CUDA tensors. Shape legend: S rows, V vocabulary, N parts of a row.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from tokabatch.model.partition import VocabularyShard
from tokabatch.model.sampling.slot_table import SamplerInputs
from tokabatch.model.sampling.triton_alternatives import report_alternatives
from tokabatch.model.sampling.triton_filters import apply_filters
from tokabatch.model.sampling.triton_rows import (
    PART,
    Rows,
    filters_of,
    finite_or_zero,
    inverse_temperature,
    is_filtered,
    key_of,
    logprobs_of,
    record_of,
    temperature_of,
    uniform_of,
)
from tokabatch.parallel.collectives import all_gather_last, all_reduce
from tokabatch.parallel.mesh import Mesh

_PARTS_AT_ONCE = 64
_GATHERED = 1 << 26
"""Logits of all ranks that are gathered at a time, for rows that take all of theirs."""


@triton.jit(do_not_specialize_on_alignment=["slot_ptr"])
def _summarise(
    logits_ptr, words_ptr, slot_ptr, highest_ptr, mass_ptr, plain_ptr,
    vocab, row_stride, part_stride, num_blocks, PARTS: tl.constexpr, WANT_PLAIN: tl.constexpr,
):  # fmt: skip
    """Per row and part: the largest logit, and the sum of exp((x - largest) / temperature); the same at temperature 1.

    A NaN or positive infinity makes the sum NaN.
    """
    row, block = (tl.program_id(0) // num_blocks).to(tl.int64), tl.program_id(0) % num_blocks
    part = block * PARTS + tl.arange(0, PARTS)
    token = part[:, None] * PART + tl.arange(0, PART)[None, :]
    x = tl.load(logits_ptr + row * row_stride + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
    inverse = inverse_temperature(temperature_of(record_of(words_ptr, slot_ptr, row)))
    highest = tl.max(x, 1)
    below = x - tl.where(highest == float("-inf"), 0.0, highest)[:, None]
    # Places behind the last part are written too (as empty parts): whole lines can then be read.
    at, exists = row * part_stride + part, part < part_stride
    tl.store(highest_ptr + at, highest, mask=exists)
    tl.store(mass_ptr + at, tl.sum(tl.exp(below * inverse), 1), mask=exists)
    if WANT_PLAIN:
        tl.store(plain_ptr + at, tl.sum(tl.exp(below), 1), mask=exists)


@triton.jit
def _locate(mass, place, uniform):
    """The place at which the running mass passes a share `uniform` of it all, and how far into that place, in [0, 1].

    Never a place without mass, unless all are.
    """
    running = tl.cumsum(mass, 0)
    target = uniform * tl.sum(mass, 0)
    last = tl.max(tl.where(mass > 0, place, 0), 0)
    # Rounding may put the target at the end of all mass: the last that has any is meant then.
    found = tl.min(tl.where((running > target) & (mass > 0), place, last), 0)
    own = tl.sum(tl.where(place == found, mass, 0.0), 0)
    before = tl.sum(tl.where(place == found, running - mass, 0.0), 0)
    return found, tl.minimum(tl.maximum((target - before) / own, 0.0), 1.0)


@triton.jit
def _dropped(tied, drop):
    """How many of each part's tied tokens are among the first `drop` of the row's."""
    return tl.minimum(tl.maximum(drop - (tl.cumsum(tied, 0) - tied), 0), tied)


@triton.jit
def _kept(weight, key, inside, edge, dropped, min_p):
    """A part's weights without those that the filters drop: below the edge, the first few at it, below min-p's bound."""
    rank = tl.cumsum(((key == edge) & inside).to(tl.int32), 0)
    passes = (key > edge) | ((key == edge) & (rank > dropped))
    return tl.where(passes & (weight >= min_p), weight, 0.0)


# Neither the number of rows nor how a step's arrays are aligned is compiled in: a step runs what the first one compiled.
@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["slot_ptr", "position_ptr"])
def _draw(
    logits_ptr, words_ptr, slot_ptr, position_ptr, highest_ptr, mass_ptr, plain_ptr, edge_ptr, tied_ptr,
    results_ptr, log_total_ptr, last_token_ptr, vocab, own_vocab, first_part, row_stride, num_parts, part_stride, num_rows,
    WIDTH: tl.constexpr, SHIFT: tl.constexpr, RANDOM: tl.constexpr, FILTERED: tl.constexpr, WANT_PLAIN: tl.constexpr,
    KEEP_LAST: tl.constexpr, SHARDED: tl.constexpr,
):  # fmt: skip
    """One row: its token, whether it is finite, the token's logprob, and the log of the row's mass at temperature 1. Where the
    vocabulary is spread over ranks, the first three are zero on those that do not hold the part that the draw falls into."""
    row = tl.program_id(0).to(tl.int64)
    record = record_of(words_ptr, slot_ptr, row)
    temperature = temperature_of(record)
    inverse = inverse_temperature(temperature)
    part = tl.arange(0, WIDTH)
    at, exists = row * part_stride + part, part < part_stride
    highest = tl.load(highest_ptr + at, mask=exists, other=float("-inf"))
    mass = tl.load(mass_ptr + at, mask=exists, other=0.0)
    top = tl.max(highest, 0)
    base = finite_or_zero(top)
    scaled = mass.to(tl.float64) * tl.exp((highest - base) * inverse).to(tl.float64)
    if FILTERED:
        # `mass` is now relative to the row's largest logit, and leaves out the tokens that are tied at the edge.
        filtered = is_filtered(record)
        edge = tl.load(edge_ptr + row * 4, mask=filtered, other=-(2**31))
        drop = tl.load(edge_ptr + row * 4 + 1, mask=filtered, other=0)
        each = tl.load(edge_ptr + row * 4 + 2, mask=filtered, other=0).to(tl.float32, bitcast=True)
        tied = tl.load(tied_ptr + at, mask=part < tl.where(filtered, part_stride, 0), other=0)
        dropped = _dropped(tied, drop)
        kept_mass = mass.to(tl.float64) + (tied - dropped).to(tl.float64) * each.to(tl.float64)
        scaled = tl.where(filtered, kept_mass, scaled)

    found = tl.min(tl.where(highest == top, part, num_parts - 1), 0)
    if RANDOM:
        drawn, share = _locate(scaled, part, uniform_of(record, tl.load(position_ptr + row)))
        found = tl.where(temperature > 0, tl.minimum(drawn, num_parts - 1), found)
    place = tl.arange(0, PART)
    at_own = (found - first_part) * PART + place
    inside = at_own < own_vocab
    if SHARDED:
        inside = inside & (at_own >= 0)
        is_own = tl.max(inside.to(tl.int32), 0) > 0
    x = tl.load(logits_ptr + row * row_stride + at_own, mask=inside, other=float("-inf")).to(tl.float32)
    chosen = tl.min(tl.where((x == top) & inside, place, PART - 1), 0)
    if RANDOM:
        weight = tl.exp((x - finite_or_zero(tl.max(x, 0))) * inverse)
        if FILTERED:
            _, min_p, _ = filters_of(record)
            weight = tl.where(filtered, tl.exp((x - base) * inverse), weight)
            dropped_here = tl.sum(tl.where(part == found, dropped, 0), 0)
            weight = _kept(weight, key_of(x, SHIFT), inside, edge, dropped_here, min_p)
        walked, _ = _locate(weight.to(tl.float64), place, share)
        chosen = tl.where(temperature > 0, walked, chosen)

    total = tl.sum(scaled, 0)
    finite = (top > float("-inf")) & (top < float("inf")) & (total == total)
    token = tl.where(finite, tl.minimum(found * PART + chosen, vocab - 1), 0)
    logprob = tl.full((), float("nan"), tl.float32)
    if WANT_PLAIN:
        plain = tl.load(plain_ptr + at, mask=exists, other=0.0) * tl.exp(highest - base)
        log_total = tl.log(tl.sum(plain.to(tl.float64), 0).to(tl.float32)) + base
        logit = tl.sum(tl.where(place == chosen, x, 0.0), 0)
        logprob = tl.where(logprobs_of(record) >= 0, logit - log_total, logprob)
        tl.store(log_total_ptr + row, log_total)
    if SHARDED:
        token, finite = tl.where(is_own, token, 0), finite & is_own
        logprob = tl.where(is_own, logprob, 0.0)
    tl.store(results_ptr + row, token)
    tl.store(results_ptr + num_rows + row, finite.to(tl.int32))
    tl.store(results_ptr + 2 * num_rows + row, logprob.to(tl.int32, bitcast=True))
    if KEEP_LAST:
        tl.store(last_token_ptr + tl.load(slot_ptr + row).to(tl.int64), token.to(last_token_ptr.dtype.element_ty))


def sample(
    logits_SV: torch.Tensor, inputs: SamplerInputs, last_token: torch.Tensor | None, shard: VocabularyShard | None = None
) -> torch.Tensor:
    """The packed form of `sampler.Sampled`; `last_token` and `shard` as there. Logits are float32, bfloat16 or float16."""
    shard = shard or VocabularyShard.of(logits_SV.shape[1], Mesh.single())
    num_rows, mesh = logits_SV.shape[0], shard.mesh
    sharded = mesh.tensor_size > 1
    num_alternatives = min(max(inputs.max_logprobs, 0), shard.vocab_size)
    results = torch.empty((3 + 2 * num_alternatives, num_rows), dtype=torch.int32, device=logits_SV.device)
    if num_rows == 0:
        return results
    if sharded and (inputs.any_filter or num_alternatives):
        # These take whole rows. They are gathered some at a time.
        block = max(1, _GATHERED // shard.vocab_size)
        for start in range(0, num_rows, block):
            rows = slice(start, start + block)
            whole_SV = all_gather_last(logits_SV[rows], mesh)[:, : shard.vocab_size]
            of_block = replace(inputs, slot_S=inputs.slot_S[rows], position_S=inputs.position_S[rows])
            results[:, rows] = sample(whole_SV, of_block, last_token)
        return results
    rows = Rows.of(logits_SV, inputs, shard)
    summaries = summarise(rows, inputs.max_logprobs >= 0, shard)
    if sharded:
        draw(rows, inputs, all_gather_last(summaries, mesh), None, results, sharded=True)
        all_reduce(results, mesh)
        if last_token is not None:
            last_token.index_copy_(0, inputs.slot_S.long(), results[0].to(last_token.dtype))
        return results
    log_total_S = draw(rows, inputs, summaries, last_token, results)
    if num_alternatives:
        report_alternatives(rows, summaries[0], log_total_S, results)
    return results


def summarise(rows: Rows, want_plain: bool, shard: VocabularyShard) -> torch.Tensor:
    """Of each row and each of this rank's parts the largest logit, the mass at the row's temperature, and where needed
    the mass at temperature 1: float32, [2 or 3, S, N]."""
    device, num_rows = rows.logits_SV.device, len(rows.logits_SV)
    part_stride = rows.part_stride // shard.mesh.tensor_size
    summaries = torch.empty((2 + want_plain, num_rows, part_stride), dtype=torch.float32, device=device)
    num_blocks = triton.cdiv(part_stride, _PARTS_AT_ONCE)
    _summarise[(num_rows * num_blocks,)](
        rows.logits_SV, rows.words, rows.slot_S, summaries[0], summaries[1], summaries[-1],
        rows.own_vocab, rows.row_stride, part_stride, num_blocks,
        PARTS=_PARTS_AT_ONCE, WANT_PLAIN=want_plain, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return summaries


def draw(
    rows: Rows,
    inputs: SamplerInputs,
    summaries: torch.Tensor,
    last_token: torch.Tensor | None,
    results: torch.Tensor,
    sharded: bool = False,
) -> torch.Tensor:
    """Fill the first three rows of `results`, from the summaries of all parts. Returns the log of each row's mass at
    temperature 1, as far as that was summed up."""
    highest, mass, plain = summaries[0], summaries[1], summaries[-1]
    num_rows = len(rows.logits_SV)
    log_total_S = torch.empty(num_rows, dtype=torch.float32, device=results.device)
    filtered = apply_filters(rows, highest, mass) if inputs.any_filter else None
    _draw[(num_rows,)](
        rows.logits_SV, rows.words, rows.slot_S, inputs.position_S, highest, mass, plain,
        filtered.edge if filtered else results, filtered.tied if filtered else results,
        results, log_total_S, results if last_token is None else last_token,
        rows.vocab, rows.own_vocab, rows.first_part, rows.row_stride, rows.num_parts, rows.part_stride, num_rows,
        WIDTH=rows.width, SHIFT=rows.shift, RANDOM=inputs.any_random, FILTERED=inputs.any_filter,
        WANT_PLAIN=len(summaries) > 2, KEEP_LAST=last_token is not None, SHARDED=sharded, num_warps=rows.num_warps,
        enable_fp_fusion=False,
    )  # fmt: skip
    return log_total_S
