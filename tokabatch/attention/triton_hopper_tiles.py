"""The wide tiles of a work list (`tiles`) on Hopper GPUs, in Gluon, Triton's language of explicit layouts and copies.

The loop is that of FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608). One warp copies pages of keys and values to shared
memory (TMA); two or three groups of four warps compute 64 rows of a tile each. A group starts the scores of the next keys
before it multiplies its last weights with their values, and computes the softmax beside that product. On an H200 a tile takes
half to four fifths of the time that it takes in `triton_tiles`.

Gluon is experimental: `triton_tiles.hopper_tiles` imports this module, and does without it where the kernel does not compile.
Shape legend: T tokens, H query heads, K key-value heads, D head dimension, P page size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents

from tokabatch.attention.capturable import PagedCache
from tokabatch.attention.tiles import WORDS
from tokabatch.attention.triton_tiles import Planes

_BOX_DIMS = 64
"""Dimensions that one copy brings: 128 bytes, a swizzled row of shared memory."""
_ROWS = 64
"""Rows of a tile for each group of warps: the least that a product has."""
_COPYING_REGISTERS = 24

_load_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_RENAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
"""Triton 3.9 has both under the first name, earlier versions under the second."""
_WORDS = gl.constexpr(WORDS)
_BOX = gl.constexpr(_BOX_DIMS)


@gluon.jit
def _as_blocks(pages, STAGES: gl.constexpr, KEYS: gl.constexpr, DIM: gl.constexpr, LAYOUT: gl.constexpr):
    """Boxes of one page each as blocks [STAGES, KEYS, DIM]: in this layout, all rows of the first 64 dimensions come first."""
    if _RENAMED:
        return pages.reinterpret(pages.dtype, [STAGES, KEYS, DIM], LAYOUT)
    else:
        return pages._reinterpret(pages.dtype, [STAGES, KEYS, DIM], LAYOUT)


@gluon.jit
def _copy_pages(pages, memory, STAGES: gl.constexpr, KEYS: gl.constexpr, PAGE: gl.constexpr, DIM: gl.constexpr):
    """Bring the keys and values of all tiles of this program, block after block. Behind the last page of a tile, that page is
    brought again: what is behind a range may not be finite, and no weight of zero would hide it."""
    k_box, v_box, table_ptr, list_ptr, table_stride, num_kv_heads = pages
    k_pages, v_pages, k_ready, v_ready, free = memory
    PAGES: gl.constexpr = KEYS // PAGE
    BOXES: gl.constexpr = DIM // _BOX
    total = gl.load(list_ptr) * num_kv_heads
    tiles_ptr = list_ptr + gl.load(list_ptr + 2)
    filled = 0
    index = gl.program_id(0)
    while index < total:
        tile_ptr, kv_head = tiles_ptr + index // num_kv_heads * _WORDS, index % num_kv_heads
        pages_ptr = table_ptr + gl.load(tile_ptr + 2).to(gl.int64) * table_stride
        begin, end = gl.load(tile_ptr + 3), gl.load(tile_ptr + 4)
        last_page = (end - 1) // PAGE
        for start in range(begin, end, KEYS):
            stage = filled % STAGES
            mbarrier.wait(free.index(stage), ((filled // STAGES) & 1) ^ 1)
            mbarrier.expect(k_ready.index(stage), KEYS * DIM * 2)
            mbarrier.expect(v_ready.index(stage), KEYS * DIM * 2)
            for page in gl.static_range(PAGES):
                number = gl.load(pages_ptr + gl.minimum(start // PAGE + page, last_page))
                row = (number * num_kv_heads + kv_head) * PAGE
                for box in gl.static_range(BOXES):
                    place = (stage * BOXES + box) * PAGES + page
                    _load_box(k_box, [row, box * _BOX], k_ready.index(stage), k_pages.index(place))
                    _load_box(v_box, [row, box * _BOX], v_ready.index(stage), v_pages.index(place))
            filled += 1
        index += gl.num_programs(0)


@gluon.jit
def _weigh(scores, highest, mass, start, whole, last, end, scale, KEYS: gl.constexpr, LAYOUT: gl.constexpr):
    """Continue the online softmax: the weights of a block, the factor of what was summed before, the highest score, and the
    mass. From key `whole` on, row r attends to keys up to `last[r]` and before `end` only."""
    if start >= whole:
        at = start + gl.arange(0, KEYS, gl.SliceLayout(0, LAYOUT))
        seen = (gl.expand_dims(at, 0) <= gl.expand_dims(last, 1)) & gl.expand_dims(at < end, 0)
        scores = gl.where(seen, scores, float("-inf"))
    next_highest = gl.maximum(highest, gl.max(scores, 1) * scale)
    # A row may have had no key so far.
    base = gl.where(next_highest == float("-inf"), 0.0, next_highest)
    kept = gl.exp2(highest - base)
    weight = gl.exp2(scores * scale - gl.expand_dims(base, 1))
    return weight, kept, next_highest, mass * kept + gl.sum(weight, 1)


@gluon.jit
def _compute_rows(
    rows, memory,
    FIRST: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, KEYS: gl.constexpr, DIM: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Compute rows FIRST to FIRST + ROWS - 1 of all tiles of this program, with four warps."""
    q_ptr, state_ptr, lse_ptr, list_ptr, plane_rows, scale, num_kv_heads = rows
    k_pages, v_pages, k_ready, v_ready, free = memory
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    MEMORY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    k_blocks, v_blocks = _as_blocks(k_pages, STAGES, KEYS, DIM, LAYOUT), _as_blocks(v_pages, STAGES, KEYS, DIM, LAYOUT)
    total = gl.load(list_ptr) * num_kv_heads
    tiles_ptr = list_ptr + gl.load(list_ptr + 2)
    row = FIRST + gl.arange(0, ROWS, gl.SliceLayout(1, MEMORY))
    s_row = FIRST + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    dim = gl.arange(0, DIM, gl.SliceLayout(0, MEMORY))
    zero = gl.zeros([ROWS, KEYS], gl.float32, SCORES)
    used = 0
    index = gl.program_id(0)
    while index < total:
        tile_ptr, kv_head = tiles_ptr + index // num_kv_heads * _WORDS, index % num_kv_heads
        token, queries = gl.load(tile_ptr), gl.load(tile_ptr + 1)
        begin, end = gl.load(tile_ptr + 3), gl.load(tile_ptr + 4)
        position, plane = gl.load(tile_ptr + 5), gl.load(tile_ptr + 6).to(gl.int64)
        head = (token + row // GROUP).to(gl.int64) * (num_kv_heads * GROUP) + kv_head * GROUP + row % GROUP
        inside = gl.expand_dims(row // GROUP < queries, 1)
        place = gl.expand_dims(head, 1) * DIM + gl.expand_dims(dim, 0)
        q = gl.convert_layout(gl.load(q_ptr + place, mask=inside, other=0.0), gl.DotOperandLayout(0, SCORES, 2))
        # Every row attends to every key before `whole`.
        whole = begin + gl.maximum(gl.minimum(end, position + 1) - begin, 0) // KEYS * KEYS
        last = position + s_row // GROUP
        highest = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
        mass = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
        acc = gl.zeros([ROWS, DIM], gl.float32, OUT)
        stage = used % STAGES
        mbarrier.wait(k_ready.index(stage), (used // STAGES) & 1)
        scores = warpgroup_mma(q, k_blocks.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        weight, kept, highest, mass = _weigh(scores, highest, mass, begin, whole, last, end, scale, KEYS, SCORES)
        weights = gl.convert_layout(weight.to(q_ptr.dtype.element_ty), gl.DotOperandLayout(0, OUT, 2))
        for start in range(begin + KEYS, end, KEYS):
            following = (used + 1) % STAGES
            mbarrier.wait(k_ready.index(following), ((used + 1) // STAGES) & 1)
            scores = warpgroup_mma(q, k_blocks.index(following).permute((1, 0)), zero, use_acc=False, is_async=True)
            mbarrier.wait(v_ready.index(stage), (used // STAGES) & 1)
            acc = warpgroup_mma(weights, v_blocks.index(stage), acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[scores])
            weight, kept, highest, mass = _weigh(scores, highest, mass, start, whole, last, end, scale, KEYS, SCORES)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(free.index(stage), count=1)
            acc = acc * gl.expand_dims(gl.convert_layout(kept, gl.SliceLayout(1, OUT)), 1)
            weights = gl.convert_layout(weight.to(q_ptr.dtype.element_ty), gl.DotOperandLayout(0, OUT, 2))
            used += 1
            stage = following
        mbarrier.wait(v_ready.index(stage), (used // STAGES) & 1)
        acc = warpgroup_mma(weights, v_blocks.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(free.index(stage), count=1)
        used += 1
        out = acc / gl.expand_dims(gl.convert_layout(mass, gl.SliceLayout(1, OUT)), 1)
        out = gl.convert_layout(out.to(state_ptr.dtype.element_ty), MEMORY)
        gl.store(state_ptr + plane * plane_rows * DIM + place, out, mask=inside)
        s_head = (token + s_row // GROUP).to(gl.int64) * (num_kv_heads * GROUP) + kv_head * GROUP + s_row % GROUP
        gl.store(lse_ptr + plane * plane_rows + s_head, highest + gl.log2(mass), mask=s_row // GROUP < queries)
        index += gl.num_programs(0)


@gluon.jit(do_not_specialize=["plane_rows"], do_not_specialize_on_alignment=["list_ptr"])
def _attend(
    q_ptr, k_box, v_box, state_ptr, lse_ptr, table_ptr, list_ptr, plane_rows, table_stride, scale, num_kv_heads,
    GROUP: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, KEYS: gl.constexpr, PAGE: gl.constexpr, DIM: gl.constexpr,
    LAYOUT: gl.constexpr, WARP_GROUPS: gl.constexpr, REGISTERS: gl.constexpr, COPYING_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Compute the wide tiles. `list` and planes are as in `triton_tiles`; program p takes tiles p, p + programs, and so on. A
    tile has at least one key."""
    gdc_launch_dependents()
    BOXES: gl.constexpr = STAGES * (KEYS // PAGE) * (DIM // _BOX)
    k_pages = gl.allocate_shared_memory(k_box.dtype, [BOXES, PAGE, _BOX], LAYOUT)
    v_pages = gl.allocate_shared_memory(v_box.dtype, [BOXES, PAGE, _BOX], LAYOUT)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(v_ready.index(stage), count=1)
        # One arrival of each group of warps.
        mbarrier.init(free.index(stage), count=WARP_GROUPS)
    memory = (k_pages, v_pages, k_ready, v_ready, free)
    rows = (q_ptr, state_ptr, lse_ptr, list_ptr, plane_rows, scale, num_kv_heads)
    pages = (k_box, v_box, table_ptr, list_ptr, table_stride, num_kv_heads)
    if WARP_GROUPS == 2:
        gl.warp_specialize(
            [
                (_compute_rows, (rows, memory, 0, GROUP, ROWS, STAGES, KEYS, DIM, LAYOUT)),
                (_compute_rows, (rows, memory, ROWS, GROUP, ROWS, STAGES, KEYS, DIM, LAYOUT)),
                (_copy_pages, (pages, memory, STAGES, KEYS, PAGE, DIM)),
            ],
            [4, 1],
            [REGISTERS, COPYING_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_compute_rows, (rows, memory, 0, GROUP, ROWS, STAGES, KEYS, DIM, LAYOUT)),
                (_compute_rows, (rows, memory, ROWS, GROUP, ROWS, STAGES, KEYS, DIM, LAYOUT)),
                (_compute_rows, (rows, memory, 2 * ROWS, GROUP, ROWS, STAGES, KEYS, DIM, LAYOUT)),
                (_copy_pages, (pages, memory, STAGES, KEYS, PAGE, DIM)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, COPYING_REGISTERS],
        )


@dataclass(frozen=True, slots=True)
class Tiling:
    """The keys of a block, the blocks that shared memory holds, the groups of four warps, and the registers of a thread."""

    keys: int
    stages: int
    warp_groups: int
    registers: int

    @classmethod
    def of(cls, head_dim: int, group: int) -> Tiling:
        """Return the fastest of those tried on an H200 for heads of 64 or 128 dimensions, `group` for each key-value head."""
        if head_dim == 128:
            return cls(64, 4, 2, 240)
        # 64 samples of three heads fill a tile of three groups; otherwise these are as fast as two, or slower.
        return cls(64, 6, 3, 160) if group % 3 == 0 else cls(128, 4, 2, 240)


def box_layout() -> gl.NVMMASharedLayout:
    """Return the layout of one page's box in shared memory."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


class HopperTiles:
    """Computes the wide tiles over the pages of one cache, 16-bit, with heads of 64 or 128 dimensions and P from 8 to 64."""

    def __init__(self, cache: PagedCache, num_heads: int, num_cores: int) -> None:
        """Compile the kernel, for queries of `num_heads` heads, with one program on each of `num_cores` multiprocessors."""
        num_layers, _, self._num_kv_heads, self._page_size, self._head_dim = cache.k_LNKPD.shape
        self._tiling = Tiling.of(self._head_dim, num_heads // self._num_kv_heads)
        self._table, self.num_programs = cache.table, num_cores
        box = [self._page_size, _BOX_DIMS]
        self._boxes = [
            [
                TensorDescriptor.from_tensor(pages[layer].view(-1, self._head_dim), box, box_layout())
                for pages in (cache.k_LNKPD, cache.v_LNKPD)
            ]
            for layer in range(num_layers)
        ]
        queries = torch.zeros(1, num_heads, self._head_dim, dtype=cache.k_LNKPD.dtype, device=cache.table.device)
        no_tiles = torch.zeros(4, dtype=torch.int32, device=queries.device)
        self.attend(0, queries, no_tiles, Planes(queries[None], queries[None, :, :, 0].float(), no_tiles))

    @property
    def rows(self) -> int:
        """The rows of a tile."""
        return _ROWS * self._tiling.warp_groups

    def attend(self, layer: int, q_THD: torch.Tensor, work: torch.Tensor, planes: Planes) -> None:
        """Write the partial states of the wide tiles in `work` to `planes`, as `triton_tiles.attend_tiles` does."""
        assert q_THD.is_contiguous() and planes.state_NTHD.is_contiguous() and planes.lse_NTH.is_contiguous()
        num_tokens, num_heads, _ = q_THD.shape
        group, tiling = num_heads // self._num_kv_heads, self._tiling
        _attend[(self.num_programs,)](
            q_THD, *self._boxes[layer], planes.state_NTHD, planes.lse_NTH, self._table, work,
            num_tokens * num_heads, self._table.stride(0), math.log2(math.e) / math.sqrt(self._head_dim), self._num_kv_heads,
            PAGE=self._page_size, num_warps=4, **constants(tiling, group, self._head_dim),
        )  # fmt: skip


def constants(tiling: Tiling, group: int, head_dim: int) -> dict[str, Any]:
    """Return the constants of the kernel besides the page size."""
    return {
        "GROUP": group,
        "ROWS": _ROWS,
        "STAGES": tiling.stages,
        "KEYS": tiling.keys,
        "DIM": head_dim,
        "LAYOUT": box_layout(),
        "WARP_GROUPS": tiling.warp_groups,
        "REGISTERS": tiling.registers,
        "COPYING_REGISTERS": _COPYING_REGISTERS,
    }
