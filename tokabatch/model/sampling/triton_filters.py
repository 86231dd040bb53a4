"""Top-k, top-p and min-p on a GPU without a sort: the smallest logit that passes is searched, not the order of the rest.

All three keep the most likely tokens, so what is left of a row is described by its edge: logits above it pass, those equal to
it pass but for a number of lowest ids (top-p's rule for ties, see `filters`), and min-p's bound is checked on each. Logits
are compared as integers that sort as they do (`triton_rows.key_of`): a 16-bit type has few, and two that differ by one have
none in between, so the search ends with the exact edge.

The first kernel bounds the edge from below by the summaries of `triton_sampling`: by the k-th largest of the parts' maxima,
by an equal share of what top-p drops, by min-p. It lists the parts that reach above; only those are read again. A pass over
them narrows the edge by four pivots, to a fifth: five passes in steps of the logit, then in steps of the integer. That is four
or five passes mostly for a 16-bit type, at most 5 + 7, and for float32 at most 5 + 14. Top-k starts with a list of little more
than k parts. Top-p alone starts with nearly all, makes two passes, and lists anew what is still undecided or above. Behind
top-k it takes one pass for the mass that top-k left, and searches among that. A last pass sums up what is kept. Rows without
a filter leave each kernel at once.

All sums have a fixed order and no atomics: a row's edge does not depend on the rest of the batch.

Shape legend: S rows, N parts of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tokabatch.model.sampling.triton_rows import (
    PART,
    Rows,
    filters_of,
    inverse_temperature,
    is_filtered,
    key_of,
    record_of,
    temperature_of,
    value_of,
)

_TILE = tl.constexpr(32)
STAGES = 3
"""How many tiles of the loops over the logits are under way at once."""
_STEPS_BY_VALUE = tl.constexpr(5)
_FIRST_STEPS = tl.constexpr(2)
_NO_END = tl.constexpr(1000)


@triton.jit
def _kth_largest(key, exists, k, SHIFT: tl.constexpr):
    """The k-th largest key of those that exist, by halving; at least k must."""
    low, high = tl.full((), -(2 ** (31 - SHIFT)), tl.int64), tl.full((), 2 ** (31 - SHIFT) - 1, tl.int64)
    for _ in range(32 - SHIFT):
        middle = (low + high + 1) >> 1
        enough = tl.sum((exists & (key >= middle)).to(tl.int32), 0) >= k
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle - 1)
    return low.to(tl.int32)


@triton.jit
def _list_parts(highest, low, finite, list_ptr, mass_ptr, part_stride, WIDTH: tl.constexpr, SHIFT: tl.constexpr):
    """Lists a row's parts that reach above a key, sets the masses of the others to 0, and returns how many there are."""
    part = tl.arange(0, WIDTH)
    # A row that is not finite lists no part and keeps its masses, which show that.
    considered = part < tl.where(finite, part_stride, 0)
    key = key_of(highest, SHIFT)
    active = considered & (key > low)
    tl.store(list_ptr + tl.cumsum(active.to(tl.int32), 0) - 1, part, mask=active)
    tl.store(mass_ptr + part, 0.0, mask=considered & (key <= low))
    return tl.sum(active.to(tl.int32), 0)


@triton.jit
def _by_mass_alone(record, vocab):
    """Whether top-p is searched among all tokens, not among top-k's."""
    top_p, _, top_k = filters_of(record)
    return is_filtered(record) & (top_p < 1.0) & ((top_k <= 0) | (top_k >= vocab))


@triton.jit(do_not_specialize_on_alignment=["slot_ptr"])
def _bound(
    words_ptr, slot_ptr, highest_ptr, mass_ptr, list_ptr, tied_ptr, bound_ptr, vocab, num_parts, part_stride,
    WIDTH: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """A filtered row's `bound`: a key below the edge, the number of parts listed above it, the row's mass, its largest logit,
    that logit's key (the edge is not above), and the mass above that key."""
    row = tl.program_id(0).to(tl.int64)
    record = record_of(words_ptr, slot_ptr, row)
    if is_filtered(record):
        top_p, min_p, top_k = filters_of(record)
        temperature = temperature_of(record)
        inverse = inverse_temperature(temperature)
        part = tl.arange(0, WIDTH)
        at, exists = row * part_stride + part, part < part_stride
        highest = tl.load(highest_ptr + at, mask=exists, other=float("-inf"))
        mass = tl.load(mass_ptr + at, mask=exists, other=0.0)
        top = tl.max(highest, 0)
        scaled = mass * tl.exp((highest - top) * inverse)
        total = tl.sum(scaled.to(tl.float64), 0).to(tl.float32)
        finite = (top > float("-inf")) & (top < float("inf")) & (total == total)
        key = key_of(highest, SHIFT)

        low = key_of(tl.full((), float("-inf"), tl.float32), SHIFT)
        by_k = (top_k > 0) & (top_k < vocab)
        if by_k & (top_k <= num_parts):
            low = tl.maximum(low, _kth_largest(key, part < num_parts, top_k, SHIFT) - 1)
        if finite & (top_p < 1.0) & (not by_k):
            # Tokens below an equal share of what top-p drops are dropped together; the factor is for rounding.
            share = tl.maximum(0.99 * (1.0 - top_p) * total / vocab, 1e-37)
            low = tl.maximum(low, key_of(top + tl.log(share) / inverse, SHIFT) - 1)
        # Top-p behind top-k takes its share of all that top-k leaves: min-p may not shorten that.
        if finite & (min_p > 0.0) & ((not by_k) | (top_p >= 1.0)):
            least = top + tl.log(min_p) / inverse
            low = tl.maximum(low, key_of(least - 1e-5 * (tl.abs(least) + tl.abs(top)) - 1e-4 / inverse, SHIFT) - 1)

        row_start = row * part_stride
        count = _list_parts(highest, low, finite, list_ptr + row_start, mass_ptr + row_start, part_stride, WIDTH, SHIFT)
        tl.store(tied_ptr + at, 0, mask=exists)
        tl.store(bound_ptr + row * 8, low)
        tl.store(bound_ptr + row * 8 + 1, count)
        tl.store(bound_ptr + row * 8 + 2, total.to(tl.int32, bitcast=True))
        tl.store(bound_ptr + row * 8 + 3, top.to(tl.int32, bitcast=True))
        tl.store(bound_ptr + row * 8 + 4, key_of(top, SHIFT))
        tl.store(bound_ptr + row * 8 + 5, 0)


@triton.jit
def _tile(logits_ptr, list_ptr, start, count, vocab):
    """Logits of _TILE listed parts, eight tokens a line, so that a thread reads a line at once and adds it up alone."""
    line = tl.arange(0, _TILE * 16)
    at = start + line // 16
    part = tl.load(list_ptr + at, mask=at < count, other=0)
    token = (part * PART + line % 16 * 8)[:, None] + tl.arange(0, 8)[None, :]
    inside = (at < count)[:, None] & (token < vocab)
    return tl.load(logits_ptr + token, mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def _above(
    logits_ptr, list_ptr, count, vocab, top, inverse, first, second, third, fourth, COUNT: tl.constexpr, SHIFT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The mass (or number, if COUNT) of the tokens above each of four keys."""
    above_1 = tl.zeros((_TILE * 16,), tl.float32)
    above_2, above_3, above_4 = above_1, above_1, above_1
    for start in tl.range(0, count, _TILE, num_stages=STAGES):
        x = _tile(logits_ptr, list_ptr, start, count, vocab)
        key = key_of(x, SHIFT)
        weight = tl.full(x.shape, 1.0, tl.float32) if COUNT else tl.exp((x - top) * inverse)
        above_1 += tl.sum(tl.where(key > first, weight, 0.0), 1)
        above_2 += tl.sum(tl.where(key > second, weight, 0.0), 1)
        above_3 += tl.sum(tl.where(key > third, weight, 0.0), 1)
        above_4 += tl.sum(tl.where(key > fourth, weight, 0.0), 1)
    return tl.sum(above_1, 0), tl.sum(above_2, 0), tl.sum(above_3, 0), tl.sum(above_4, 0)


@triton.jit
def _pivot(low, high, fifths: tl.constexpr, by_value, SHIFT: tl.constexpr):
    """A key strictly between two others, if there is one: that many fifths of the way in logits, or in keys."""
    low_value, high_value = value_of(low.to(tl.int32), SHIFT), value_of(high.to(tl.int32), SHIFT)
    in_values = key_of(low_value + (high_value - low_value) * (fifths * 0.2), SHIFT).to(tl.int64)
    in_keys = low + (high - low) * fifths // 5
    pivot = tl.where(by_value, in_values, in_keys)
    return tl.maximum(tl.minimum(pivot, high - 1), tl.minimum(low + 1, high - 1)).to(tl.int32)


@triton.jit
def _edge(
    logits_ptr, list_ptr, count, vocab, top, inverse, low_key, high_key, above, wanted, step, stop, COUNT: tl.constexpr,
    SHIFT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Narrows (low, high] around the largest key with `wanted` mass (or tokens) at or above it, until it holds one key or steps
    run out. Returns both and what is above `high`. If less than `wanted` is above `low` already, that is low + 1."""
    low, high = low_key.to(tl.int64), high_key.to(tl.int64)
    above, step = above + tl.zeros((), tl.float32), step + tl.zeros((), tl.int32)
    while (high - low > 1) & (step < stop):
        by_value = (step < _STEPS_BY_VALUE) & (high - low > 8) & (value_of(low.to(tl.int32), SHIFT) > -1e30)
        key_1, key_2 = _pivot(low, high, 1, by_value, SHIFT), _pivot(low, high, 2, by_value, SHIFT)
        key_3, key_4 = _pivot(low, high, 3, by_value, SHIFT), _pivot(low, high, 4, by_value, SHIFT)
        above_1, above_2, above_3, above_4 = _above(
            logits_ptr, list_ptr, count, vocab, top, inverse, key_1, key_2, key_3, key_4, COUNT, SHIFT, STAGES
        )
        # The pivots ascend. The edge lies above those that have enough above them, and not above the others.
        low = tl.where(above_1 >= wanted, key_1.to(tl.int64), low)
        low = tl.where(above_2 >= wanted, key_2.to(tl.int64), low)
        low = tl.where(above_3 >= wanted, key_3.to(tl.int64), low)
        low = tl.where(above_4 >= wanted, key_4.to(tl.int64), low)
        high, above = tl.where(above_4 < wanted, key_4.to(tl.int64), high), tl.where(above_4 < wanted, above_4, above)
        high, above = tl.where(above_3 < wanted, key_3.to(tl.int64), high), tl.where(above_3 < wanted, above_3, above)
        high, above = tl.where(above_2 < wanted, key_2.to(tl.int64), high), tl.where(above_2 < wanted, above_2, above)
        high, above = tl.where(above_1 < wanted, key_1.to(tl.int64), high), tl.where(above_1 < wanted, above_1, above)
        step += 1
    return low.to(tl.int32), high.to(tl.int32), above


@triton.jit(do_not_specialize_on_alignment=["slot_ptr"])
def _narrow(
    logits_ptr, words_ptr, slot_ptr, list_ptr, bound_ptr, vocab, row_stride, part_stride,
    SHIFT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The first steps of top-p's search: after them few parts are left to read."""
    row = tl.program_id(0).to(tl.int64)
    record = record_of(words_ptr, slot_ptr, row)
    if _by_mass_alone(record, vocab):
        top_p, _, _ = filters_of(record)
        inverse = inverse_temperature(temperature_of(record))
        bound_ptr += row * 8
        low, count = tl.load(bound_ptr), tl.load(bound_ptr + 1)
        wanted = top_p * tl.load(bound_ptr + 2).to(tl.float32, bitcast=True)
        top = tl.load(bound_ptr + 3).to(tl.float32, bitcast=True)
        if count > 0:
            low, high, above = _edge(
                logits_ptr + row * row_stride, list_ptr + row * part_stride, count, vocab, top, inverse,
                low, tl.load(bound_ptr + 4), 0.0, wanted, 0, _FIRST_STEPS, False, SHIFT, STAGES,
            )  # fmt: skip
            tl.store(bound_ptr, low)
            tl.store(bound_ptr + 4, high)
            tl.store(bound_ptr + 5, above.to(tl.int32, bitcast=True))


@triton.jit(do_not_specialize_on_alignment=["slot_ptr"])
def _relist(
    words_ptr, slot_ptr, highest_ptr, mass_ptr, list_ptr, bound_ptr, vocab, part_stride,
    WIDTH: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Lists the parts again, above what `_narrow` found."""
    row = tl.program_id(0).to(tl.int64)
    if _by_mass_alone(record_of(words_ptr, slot_ptr, row), vocab):
        part, row_start = tl.arange(0, WIDTH), row * part_stride
        highest = tl.load(highest_ptr + row_start + part, mask=part < part_stride, other=float("-inf"))
        finite = tl.load(bound_ptr + row * 8 + 1) > 0
        low = tl.load(bound_ptr + row * 8)
        count = _list_parts(highest, low, finite, list_ptr + row_start, mass_ptr + row_start, part_stride, WIDTH, SHIFT)
        tl.store(bound_ptr + row * 8 + 1, count)


@triton.jit(do_not_specialize_on_alignment=["slot_ptr"])
def _filter(
    logits_ptr, words_ptr, slot_ptr, list_ptr, bound_ptr, mass_ptr, tied_ptr, edge_ptr,
    vocab, row_stride, part_stride, SHIFT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A filtered row's `edge`: the key, how many of the tokens tied there are dropped, and the mass of each. Sets the masses of
    the listed parts to what is above the edge, and `tied` to their tokens at it."""
    row = tl.program_id(0).to(tl.int64)
    record = record_of(words_ptr, slot_ptr, row)
    if is_filtered(record):
        top_p, min_p, top_k = filters_of(record)
        inverse = inverse_temperature(temperature_of(record))
        logits_ptr += row * row_stride
        list_ptr += row * part_stride
        bound_ptr += row * 8
        low, count = tl.load(bound_ptr), tl.load(bound_ptr + 1)
        total = tl.load(bound_ptr + 2).to(tl.float32, bitcast=True)
        top = tl.load(bound_ptr + 3).to(tl.float32, bitcast=True)
        high, above = tl.load(bound_ptr + 4), tl.load(bound_ptr + 5).to(tl.float32, bitcast=True)
        by_k = (top_k > 0) & (top_k < vocab)
        edge, keep = low + 1, tl.full((), 2**30, tl.int32)
        step = tl.where(by_k, 0, _FIRST_STEPS)
        if by_k & (count > 0):
            _, edge, _ = _edge(
                logits_ptr, list_ptr, count, vocab, top, inverse, low, high, 0.0, top_k.to(tl.float32),
                0, _NO_END, True, SHIFT, STAGES,
            )  # fmt: skip
        if (top_p < 1.0) & (count > 0):
            if by_k:
                at = edge - 1
                total, _, _, _ = _above(logits_ptr, list_ptr, count, vocab, top, inverse, at, at, at, at, False, SHIFT, STAGES)
            wanted = top_p * total
            _, edge, above = _edge(
                logits_ptr, list_ptr, count, vocab, top, inverse, edge - 1, high, above, wanted,
                step, _NO_END, False, SHIFT, STAGES,
            )  # fmt: skip
            # A tied token passes while those before it hold less than the required mass.
            ties = (wanted - above) / tl.exp((value_of(edge, SHIFT) - top) * inverse)
            keep = tl.ceil(tl.minimum(tl.maximum(ties, 1.0), 2.0**30)).to(tl.int32)
        each = tl.exp((value_of(edge, SHIFT) - top) * inverse)
        each = tl.where(each >= min_p, each, 0.0)

        num_tied = tl.zeros((), tl.int32)
        for start in tl.range(0, count, _TILE, num_stages=STAGES):
            x = _tile(logits_ptr, list_ptr, start, count, vocab)
            key, weight = key_of(x, SHIFT), tl.exp((x - top) * inverse)
            above_line = tl.sum(tl.where((key > edge) & (weight >= min_p), weight, 0.0), 1)
            tied_line = tl.sum((key == edge).to(tl.int32), 1)
            at = start + tl.arange(0, _TILE)
            part = tl.load(list_ptr + at, mask=at < count, other=0)
            tied_part = tl.sum(tl.reshape(tied_line, (_TILE, 16)), 1)
            tl.store(mass_ptr + row * part_stride + part, tl.sum(tl.reshape(above_line, (_TILE, 16)), 1), mask=at < count)
            tl.store(tied_ptr + row * part_stride + part, tied_part, mask=at < count)
            num_tied += tl.sum(tied_part, 0)
        tl.store(edge_ptr + row * 4, edge)
        tl.store(edge_ptr + row * 4 + 1, tl.maximum(num_tied - keep, 0))
        tl.store(edge_ptr + row * 4 + 2, each.to(tl.int32, bitcast=True))


@dataclass(frozen=True, slots=True)
class Filtered:
    """What `triton_sampling` needs to draw from what the filters leave; defined for filtered rows only."""

    edge: torch.Tensor
    """int32 [S, 4]: the edge's key, how many tokens tied there are dropped, the bits of the mass of each, unused."""
    tied: torch.Tensor
    """int32: tokens at the edge, per row and part."""


def apply_filters(rows: Rows, highest: torch.Tensor, mass: torch.Tensor) -> Filtered:
    """Finds each filtered row's edge and changes its `mass` to that of the tokens above, relative to its largest logit."""
    num_rows, vocab = rows.logits_SV.shape
    listed, tied = rows.summary(torch.int32), rows.summary(torch.int32)
    bound, edge = (torch.empty((num_rows, words), dtype=torch.int32, device=rows.logits_SV.device) for words in (8, 4))
    _bound[(num_rows,)](
        rows.words, rows.slot_S, highest, mass, listed, tied, bound, vocab, rows.num_parts, rows.part_stride,
        WIDTH=rows.width, SHIFT=rows.shift, num_warps=rows.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    _narrow[(num_rows,)](
        rows.logits_SV, rows.words, rows.slot_S, listed, bound, vocab, rows.row_stride, rows.part_stride,
        SHIFT=rows.shift, STAGES=STAGES, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    _relist[(num_rows,)](
        rows.words, rows.slot_S, highest, mass, listed, bound, vocab, rows.part_stride,
        WIDTH=rows.width, SHIFT=rows.shift, num_warps=rows.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    _filter[(num_rows,)](
        rows.logits_SV, rows.words, rows.slot_S, listed, bound, mass, tied, edge,
        vocab, rows.row_stride, rows.part_stride, SHIFT=rows.shift, STAGES=STAGES, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return Filtered(edge, tied)
