"""Partial attention for a work list of tiles (`tiles`), by a fixed number of programs, each of which computes one tile after
another.

The launch does not depend on the step: the number of tiles and what they cover are read on the device. The partial states are
written to planes: outputs [planes, T, H, D] and their log-sum-exp in base 2, [planes, T, H]. `triton_decode` merges them and
resets the counters by which programs take tiles.

On Hopper GPUs and later ones, a layer's three kernels overlap (programmatic dependent launch): the narrow tiles start once all
programs of the wide ones have started, the decode kernel once those of the narrow ones have. Neither reads what the kernel in
front of it writes, until the decode kernel, with its own keys done, merges. By then both have ended, as the last of the narrow
programs to end has seen the end of the wide ones.

Imports triton: loaded only for captured steps. Shape legend: T tokens, H query heads, K key-value heads, D head
dimension, P page size.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokabatch.attention.capturable import PagedCache
from tokabatch.attention.tiles import WORDS, TileShape

if TYPE_CHECKING:
    from tokabatch.attention.triton_hopper_tiles import HopperTiles

_WORDS = tl.constexpr(WORDS)
FIRST_OVERLAPPING = 9
"""The compute capability (major) from which a kernel may start before the one in front of it has ended."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How a kind of tile is computed: its number in the header of a work list, rows of a tile, keys read at once, warps and
    pipeline stages of a program, and programs on each multiprocessor."""

    kind: int
    rows: int
    keys: int
    warps: int
    stages: int
    programs: int


WIDE = Launch(0, 128, 64, 4, 3, 2)
NARROW = Launch(1, 16, 64, 1, 3, 8)


@dataclass(frozen=True, slots=True)
class Planes:
    """The partial states of a step's tokens and the counters of the work lists."""

    state_NTHD: torch.Tensor
    lse_NTH: torch.Tensor
    counter: torch.Tensor
    """int32 [2], zero before a launch and after the merge."""


def tile_shape(page_size: int, num_heads: int, num_kv_heads: int, num_cores: int, hopper: HopperTiles | None) -> TileShape:
    """Return the sizes of tiles for `attend_tiles` on a device with `num_cores` multiprocessors, or for `hopper` and
    `attend_tiles`."""
    group = num_heads // num_kv_heads
    wide, narrow = (max(launch.rows, triton.next_power_of_2(group)) for launch in (WIDE, NARROW))
    programs = num_cores * WIDE.programs
    if hopper is not None:
        wide, programs = hopper.rows, hopper.num_programs
    return TileShape(page_size, num_kv_heads, group, wide, narrow, programs, num_cores * NARROW.programs)


def hopper_tiles(cache: PagedCache, num_heads: int, dtype: torch.dtype, num_cores: int) -> HopperTiles | None:
    """Return the faster kernel for wide tiles, or None where there is none for this GPU or cache, or it does not compile."""
    _, _, num_kv_heads, page_size, head_dim = cache.k_LNKPD.shape
    if cache.table.device.type != "cuda" or torch.cuda.get_device_capability(cache.table.device)[0] != 9:
        return None
    is_whole = page_size in (8, 16, 32, 64) and head_dim in (64, 128) and num_heads // num_kv_heads <= WIDE.rows
    if cache.k_LNKPD.dtype != dtype or dtype.itemsize != 2 or not is_whole:
        return None
    try:
        return import_module("tokabatch.attention.triton_hopper_tiles").HopperTiles(cache, num_heads, num_cores)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        # Its language is experimental: any release of Triton may change it.
        logging.getLogger(__name__).warning("the attention kernel for Hopper GPUs does not compile here: %s", error)
        return None


@triton.jit
def _over_keys(
    q, acc, highest, mass, k_ptr, v_ptr, table_ptr, begin, end, last, page_stride, scale,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Continue the online softmax over keys `begin : end` of one slot: whole blocks, or with MASKED any range, of which row r
    attends to keys up to `last[r]`."""
    dim = tl.arange(0, DIM_PAD)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        if MASKED:
            page = tl.load(table_ptr + at // PAGE, mask=at < end, other=0).to(tl.int64)
        else:
            page = tl.load(table_ptr + at // PAGE).to(tl.int64)
        key = page * page_stride + (at % PAGE) * DIM
        place = key[:, None] + dim[None, :]
        if MASKED or DIM < DIM_PAD:
            inside = (at < end)[:, None] & (dim < DIM)[None, :]
            k = tl.load(k_ptr + place, mask=inside, other=0.0)
            v = tl.load(v_ptr + place, mask=inside, other=0.0)
        else:
            k = tl.load(k_ptr + place)
            v = tl.load(v_ptr + place)
        scores = tl.dot(q, tl.trans(k.to(q.dtype)))
        if MASKED:
            scores = tl.where((at[None, :] <= last[:, None]) & (at < end)[None, :], scores, float("-inf"))
        next_highest = tl.maximum(highest, tl.max(scores, 1) * scale)
        base = next_highest
        if MASKED:
            # A row may have had no key so far.
            base = tl.where(next_highest == float("-inf"), 0.0, next_highest)
        kept = tl.exp2(highest - base)
        weight = tl.exp2(scores * scale - base[:, None])
        mass = mass * kept + tl.sum(weight, 1)
        acc = acc * kept[:, None]
        acc = tl.dot(weight.to(q.dtype), v.to(q.dtype), acc)
        highest = next_highest
    return acc, highest, mass


@triton.jit(do_not_specialize=["plane_rows"], do_not_specialize_on_alignment=["list_ptr"])
def _attend(
    q_ptr, k_ptr, v_ptr, state_ptr, lse_ptr, table_ptr, list_ptr, counter_ptr,
    plane_rows, page_stride, head_stride, table_stride, scale, num_kv_heads,
    KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, PAGE: tl.constexpr,
    BLOCK: tl.constexpr, FP8: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Compute the tiles of one kind. `list` begins with the number of tiles of each kind and the offset in words of the first
    of each. A plane has `plane_rows` = T * H rows."""
    if OVERLAPS:
        gdc_launch_dependents()
    total = tl.load(list_ptr + KIND) * num_kv_heads
    tiles_ptr = list_ptr + tl.load(list_ptr + 2 + KIND)
    row, dim = tl.arange(0, ROWS), tl.arange(0, DIM_PAD)
    index = tl.atomic_add(counter_ptr + KIND, 1)
    while index < total:
        tile_ptr, kv_head = tiles_ptr + index // num_kv_heads * _WORDS, index % num_kv_heads
        token, queries = tl.load(tile_ptr), tl.load(tile_ptr + 1)
        slot = tl.load(tile_ptr + 2).to(tl.int64)
        begin, end = tl.load(tile_ptr + 3), tl.load(tile_ptr + 4)
        position, plane = tl.load(tile_ptr + 5), tl.load(tile_ptr + 6).to(tl.int64)
        query = row // GROUP
        head = (token + query).to(tl.int64) * (num_kv_heads * GROUP) + kv_head * GROUP + row % GROUP
        is_row = query < queries
        place = head[:, None] * DIM + dim[None, :]
        inside = is_row[:, None] & (dim < DIM)[None, :]
        q = tl.load(q_ptr + place, mask=inside, other=0.0)
        if FP8:
            # As in `triton_decode`.
            q = q.to(tl.float16)
        highest = tl.full([ROWS], float("-inf"), tl.float32)
        mass = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
        k_head, v_head, pages = k_ptr + kv_head * head_stride, v_ptr + kv_head * head_stride, table_ptr + slot * table_stride
        # Every row attends to every key before `whole`.
        whole = begin + (tl.maximum(tl.minimum(end, position + 1) - begin, 0)) // BLOCK * BLOCK
        last = position + query
        acc, highest, mass = _over_keys(
            q, acc, highest, mass, k_head, v_head, pages, begin, whole, last, page_stride, scale,
            DIM, DIM_PAD, PAGE, BLOCK, False,
        )  # fmt: skip
        acc, highest, mass = _over_keys(
            q, acc, highest, mass, k_head, v_head, pages, whole, end, last, page_stride, scale,
            DIM, DIM_PAD, PAGE, BLOCK, True,
        )  # fmt: skip
        out = acc / mass[:, None]
        tl.store(state_ptr + plane * plane_rows * DIM + place, out.to(state_ptr.dtype.element_ty), mask=inside)
        tl.store(lse_ptr + plane * plane_rows + head, highest + tl.log2(mass), mask=is_row)
        index = tl.atomic_add(counter_ptr + KIND, 1)
    if OVERLAPS:  # noqa: SIM102 -- decided while compiling
        if tl.program_id(0) == 0:
            # This launch has not ended before the one in front of it has.
            gdc_wait()


def overlaps(device: torch.device) -> bool:
    """Return whether a kernel on `device` may start before the one in front of it has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= FIRST_OVERLAPPING


def early(device: torch.device) -> dict[str, bool]:
    """Return the option of a launch that starts before the kernel in front of it has ended, where `device` has it."""
    return {"launch_pdl": True} if overlaps(device) else {}


def attend_tiles(
    layer: int,
    q_THD: torch.Tensor,
    cache: PagedCache,
    work: torch.Tensor,
    planes: Planes,
    num_cores: int,
    hopper: HopperTiles | None,
) -> None:
    """Write the partial states of all tiles to `planes`, whose tensors hold T tokens, the wide ones with `hopper` if it is
    given. `triton_decode.decode_and_merge` has to be launched next.

    `cache` is 16-bit or e4m3. `work` is int32: the number of wide and of narrow tiles, the offset in words of each list, and
    the lists (`tiles.WORDS` words a tile).
    """
    if hopper is not None:
        hopper.attend(layer, q_THD, work, planes)
    else:
        _launch(WIDE, layer, q_THD, cache, work, planes, num_cores)
    _launch(NARROW, layer, q_THD, cache, work, planes, num_cores, **early(q_THD.device))


def _launch(
    launch: Launch,
    layer: int,
    q_THD: torch.Tensor,
    cache: PagedCache,
    work: torch.Tensor,
    planes: Planes,
    num_cores: int,
    **options: bool,
) -> None:
    num_tokens, num_heads, head_dim = q_THD.shape
    k_cache, v_cache = cache.k_LNKPD[layer], cache.v_LNKPD[layer]
    _, num_kv_heads, page_size, _ = k_cache.shape
    assert q_THD.is_contiguous() and planes.state_NTHD.is_contiguous() and planes.lse_NTH.is_contiguous()
    assert k_cache.stride() == v_cache.stride() and k_cache.stride(2) == head_dim and k_cache.stride(3) == 1
    group = num_heads // num_kv_heads
    rows = max(launch.rows, triton.next_power_of_2(group))
    _attend[(num_cores * launch.programs,)](
        q_THD, k_cache, v_cache, planes.state_NTHD, planes.lse_NTH, cache.table, work, planes.counter,
        num_tokens * num_heads, k_cache.stride(0), k_cache.stride(1), cache.table.stride(0),
        math.log2(math.e) / math.sqrt(head_dim), num_kv_heads,
        KIND=launch.kind, GROUP=group, ROWS=rows, DIM=head_dim, DIM_PAD=triton.next_power_of_2(head_dim), PAGE=page_size,
        BLOCK=launch.keys, FP8=k_cache.itemsize == 1, OVERLAPS=overlaps(q_THD.device), num_warps=launch.warps,
        num_stages=launch.stages, **options,
    )  # fmt: skip
