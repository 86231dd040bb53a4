"""Decode attention over short paged contexts, one kernel call a layer, for 16-bit queries on a GPU.

FlashInfer's decode kernels are built for long contexts. After a shared prefix, a sample's own context is often a few pages, and
most of the time is spent on launching work rather than on reading keys. Here a program handles one sequence and one key-value
head, reads the page table itself (nothing is planned on the host), and multiplies the head's group of queries with tensor
cores. It starts from the results of other passes, one state or planes of partial states, so that merging them takes no further
kernel. The softmax is the online one of Milakov and Gimelshein 2018 (arXiv:1805.02867), in base 2, as FlashInfer's log-sum-exp
is.

Imports triton: only a GPU backend loads this module. Shape legend: S sequences, H query heads, K key-value heads, D head
dimension, P page size.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from tokabatch.attention.triton_tiles import Planes, early, overlaps

BLOCK, WARPS, STAGES = 32, 1, 3
"""Keys read at once, warps and pipeline stages of a program. One choice serves all context lengths, as a graph holds one
launch. On an H200 it is at most 3 % slower than the best choice for each length, at 3.1 to 4.3 TB/s in 16 bits (6 % slower with
heads of 128 dimensions and 64 keys). An e4m3 cache, with half as many bytes, is read at 1.6 to 2.7 TB/s."""
FEW, FEW_BLOCK, FEW_WARPS = 512, 128, 4
"""The most programs of a launch in which each reads more keys at once, with more warps: they do not fill the device, and take
0.6 to 0.95 of the time."""
MIN_ROWS = 16
"""The fewest rows of a tensor-core product; smaller groups of query heads are padded to it."""


@triton.jit
def _merge_planes(
    highest, mass, acc, state_ptr, lse_ptr, count, plane_rows, head, at_q, is_row, is_q, DIM: tl.constexpr,
):  # fmt: skip
    """Merge `count` partial states into one: the highest score, the mass, and the outputs times the mass."""
    plane_rows = plane_rows.to(tl.int64)
    for plane in range(0, count):
        start = plane * plane_rows
        lse = tl.load(lse_ptr + start + head, mask=is_row, other=0.0)
        part = tl.load(state_ptr + start * DIM + at_q, mask=is_q, other=0.0).to(tl.float32)
        next_highest = tl.maximum(highest, lse)
        kept, added = tl.exp2(highest - next_highest), tl.exp2(lse - next_highest)
        mass = mass * kept + added
        acc = acc * kept[:, None] + part * added[:, None]
        highest = next_highest
    return mass, acc


@triton.jit(
    do_not_specialize=["plane_rows"],
    do_not_specialize_on_alignment=["lse_ptr", "slot_ptr", "position_ptr", "first_ptr", "count_ptr"],
)
def _decode(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, state_ptr, counter_ptr, table_ptr, slot_ptr, position_ptr, first_ptr, count_ptr,
    plane_rows, page_stride, head_stride, table_stride, scale, num_kv_heads,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
    HAS_PRIOR: tl.constexpr, HAS_PLANES: tl.constexpr, FIRST_UNIT: tl.constexpr, FP8: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Compute one sequence and one key-value head. With HAS_PRIOR, `out` holds a state on entry wherever `lse` is above minus
    infinity; with HAS_PLANES, `state` and `lse` hold `count` partial states of each sequence."""
    sequence, kv_head = tl.program_id(0) // num_kv_heads, tl.program_id(0) % num_kv_heads
    slot = tl.load(slot_ptr + sequence).to(tl.int64)
    stop = tl.load(position_ptr + sequence) + 1
    first = tl.load(first_ptr + sequence) * FIRST_UNIT
    row, dim = tl.arange(0, ROWS), tl.arange(0, DIM_PAD)
    head = sequence.to(tl.int64) * num_kv_heads * GROUP + kv_head * GROUP + row
    is_row = row < GROUP
    at_q = head[:, None] * DIM + dim[None, :]
    is_q = is_row[:, None] & (dim < DIM)[None, :]
    q = tl.load(q_ptr + at_q, mask=is_q, other=0.0)
    if FP8:
        # One instruction converts two e4m3 numbers to float16; bfloat16 takes several.
        q = q.to(tl.float16)
    if HAS_PRIOR:
        highest = tl.load(lse_ptr + head, mask=is_row, other=float("-inf"))
        known = highest > float("-inf")
        mass = tl.where(known, 1.0, 0.0)
        acc = tl.load(out_ptr + at_q, mask=is_q & known[:, None], other=0.0).to(tl.float32)
    else:
        highest = tl.full([ROWS], float("-inf"), tl.float32)
        mass = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
    for begin in range(first, stop, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = at < stop
        page = tl.load(table_ptr + slot * table_stride + at // PAGE, mask=inside, other=0).to(tl.int64)
        key = page * page_stride + kv_head * head_stride + (at % PAGE) * DIM
        k = tl.load(k_ptr + key[None, :] + dim[:, None], mask=inside[None, :] & (dim < DIM)[:, None], other=0.0)
        v = tl.load(v_ptr + key[:, None] + dim[None, :], mask=inside[:, None] & (dim < DIM)[None, :], other=0.0)
        scores = tl.dot(q, k.to(q.dtype)) * scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        next_highest = tl.maximum(highest, tl.max(scores, 1))
        kept = tl.exp2(highest - next_highest)
        weight = tl.exp2(scores - next_highest[:, None])
        mass = mass * kept + tl.sum(weight, 1)
        acc = acc * kept[:, None] + tl.dot(weight.to(q.dtype), v.to(q.dtype))
        highest = next_highest
    if HAS_PLANES:
        if OVERLAPS:
            gdc_wait()
        count = tl.load(count_ptr + sequence)
        mass, acc = _merge_planes(highest, mass, acc, state_ptr, lse_ptr, count, plane_rows, head, at_q, is_row, is_q, DIM)
        if tl.program_id(0) == 0:
            # The tiles of this step are finished: reset the counters for the next launch.
            tl.store(counter_ptr + tl.arange(0, 2), tl.zeros([2], tl.int32))
    out = acc / mass[:, None]
    tl.store(out_ptr + at_q, out.to(out_ptr.dtype.element_ty), mask=is_q)


def decode(
    q_SHD: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    table: torch.Tensor,
    slot_S: torch.Tensor,
    position_S: torch.Tensor,
    skip_S: torch.Tensor,
    out_SHD: torch.Tensor,
    prior_lse_SH: torch.Tensor | None = None,
) -> None:
    """Write softmax(q k / sqrt(D)) v over each slot's keys, from page `skip` to the query's position, to `out_SHD`.

    `cache` holds the keys and values of one layer, each [pages, K, P, D], 16-bit or e4m3. `table` is [slots, columns], int32;
    `slot_S`, `position_S` (of the query, whose own key is already written) and `skip_S` (the leading pages to leave out) are
    int32. With `prior_lse_SH`, `out_SHD` holds on entry an attention state over other keys, with this log-sum-exp in base 2;
    where it is minus infinity there is no such state, and `out_SHD` is not read.
    """
    page_size = cache[0].shape[2]
    prior = (prior_lse_SH, None, None)
    _launch(q_SHD, cache, table, (slot_S, position_S, skip_S, None), out_SHD, prior, page_size)


def decode_and_merge(
    q_SHD: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    table: torch.Tensor,
    places_4S: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    out_SHD: torch.Tensor,
    planes: Planes | None,
) -> None:
    """Write softmax(q k / sqrt(D)) v over the keys that each sequence reads itself, merged with its partial states, to
    `out_SHD`.

    `places_4S` are slot, position, first key to read (none is read if it is after the position) and number of planes, each
    int32 [S]. Without `planes` nothing is merged; with them, `triton_tiles.attend_tiles` has to be launched directly in front,
    and their counters are zero afterwards. The rest is as in `decode`.
    """
    prior = (None, None, None) if planes is None else (planes.lse_NTH, planes.state_NTHD, planes.counter)
    _launch(q_SHD, cache, table, places_4S, out_SHD, prior, 1)


def _launch(
    q_SHD: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    table: torch.Tensor,
    places: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None],
    out_SHD: torch.Tensor,
    prior: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    first_unit: int,
) -> None:
    num_sequences, num_heads, head_dim = q_SHD.shape
    if num_sequences == 0:
        return
    k_cache, v_cache = cache
    _, num_kv_heads, page_size, _ = k_cache.shape
    assert q_SHD.is_contiguous() and out_SHD.is_contiguous(), "queries and outputs are addressed by flat index"
    assert k_cache.stride() == v_cache.stride() and k_cache.stride(2) == head_dim and k_cache.stride(3) == 1
    group = num_heads // num_kv_heads
    lse, state, counter = prior
    slot, position, first, count = places
    num_programs = num_sequences * num_kv_heads
    block, warps = (FEW_BLOCK, FEW_WARPS) if num_programs <= FEW else (BLOCK, WARPS)
    _decode[(num_programs,)](
        q_SHD, k_cache, v_cache, out_SHD, lse, state, counter, table, slot, position, first, count,
        num_sequences * num_heads, k_cache.stride(0), k_cache.stride(1), table.stride(0),
        math.log2(math.e) / math.sqrt(head_dim), num_kv_heads,
        GROUP=group, ROWS=max(MIN_ROWS, triton.next_power_of_2(group)), DIM=head_dim, DIM_PAD=triton.next_power_of_2(head_dim),
        PAGE=page_size, BLOCK=block, HAS_PRIOR=lse is not None and state is None, HAS_PLANES=state is not None,
        FIRST_UNIT=first_unit, FP8=k_cache.itemsize == 1, OVERLAPS=overlaps(q_SHD.device), num_warps=warps, num_stages=STAGES,
        **(early(q_SHD.device) if state is not None else {}),
    )  # fmt: skip
