"""The paged KV cache on a GPU: keys, values and the page table, and the changes that a step makes to them.

Pages are copied for all layers in one launch: thousands of samples may branch off a prompt in one step, each copying a page.
Keys and values can also be copied out of their pages, for kernels that read them faster where they lie next to each other.

Imports triton: only a GPU backend loads this module. Shapes: L layers, N pages, K key-value heads, P page size, D head dim.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from tokabatch.arrays import Int32
from tokabatch.attention.base import KVShape
from tokabatch.attention.capturable import PagedCache
from tokabatch.attention.upload import Outbox
from tokabatch.scheduling.contracts import StepBatch

_BLOCK = 4096


@triton.jit(do_not_specialize_on_alignment=["source_ptr", "target_ptr"])
def _copy(k_ptr, v_ptr, source_ptr, target_ptr, layer_bytes, page_bytes, num_layers, BLOCK: tl.constexpr):
    """Copy the keys and values of one page of one layer."""
    index, layer = tl.program_id(0) // num_layers, (tl.program_id(0) % num_layers).to(tl.int64)
    source = layer * layer_bytes + tl.load(source_ptr + index).to(tl.int64) * page_bytes
    target = layer * layer_bytes + tl.load(target_ptr + index).to(tl.int64) * page_bytes
    for start in range(0, page_bytes, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < page_bytes
        k = tl.load(k_ptr + source + place, mask=inside)
        v = tl.load(v_ptr + source + place, mask=inside)
        tl.store(k_ptr + target + place, k, mask=inside)
        tl.store(v_ptr + target + place, v, mask=inside)


@triton.jit(do_not_specialize_on_alignment=["list_ptr"])
def _copy_out(
    k_ptr, v_ptr, k_out_ptr, v_out_ptr, list_ptr, page_stride, num_kv_heads,
    DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy the keys and values of one head of one page."""
    index, head = tl.program_id(0) // num_kv_heads, tl.program_id(0) % num_kv_heads
    page = tl.load(list_ptr + index * 3).to(tl.int64)
    row, count = tl.load(list_ptr + index * 3 + 1).to(tl.int64), tl.load(list_ptr + index * 3 + 2)
    for start in range(0, PAGE * DIM, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < count * DIM
        source = page * page_stride + head * PAGE * DIM + at
        target = (row + at // DIM) * num_kv_heads * DIM + head * DIM + at % DIM
        tl.store(k_out_ptr + target, tl.load(k_ptr + source, mask=inside), mask=inside)
        tl.store(v_out_ptr + target, tl.load(v_ptr + source, mask=inside), mask=inside)


class PageStore:
    """The cache of all layers and its page table. The keys, and the values, of a layer have shape [N, K, P, D] (FlashInfer's
    HND layout), so that the part of a page that one program reads is contiguous. `page_table` is the host's copy of the
    table."""

    def __init__(self, shape: KVShape, kv_dtype: torch.dtype, device: torch.device) -> None:
        size = (shape.num_layers, shape.num_pages + 1, shape.num_kv_heads, shape.page_size, shape.head_dim)
        table = torch.full((shape.num_slots + 1, shape.max_pages), shape.num_pages, dtype=torch.int32, device=device)
        k_LNKPD, v_LNKPD = (torch.zeros(size, dtype=kv_dtype, device=device) for _ in range(2))
        self.cache = PagedCache(k_LNKPD, v_LNKPD, table)
        self.page_table = np.zeros((shape.num_slots, shape.max_pages), np.int32)

    def update_cache(self, step: StepBatch, outbox: Outbox) -> None:
        """See `Capturable`; the host's copy of the table is changed at once."""
        self.page_table[step.table_slot, step.table_column] = step.table_page
        cell = step.table_slot.astype(np.int64) * self.page_table.shape[1] + step.table_column
        values = (cell, step.table_page, step.clear_pages.astype(np.int64), step.copy_src, step.copy_dst)
        changes = [outbox.add(each) for each in values]

        def change() -> None:
            cell, page, clear, source, target = (parcel.tensor for parcel in changes)
            cache = self.cache
            if len(cell):
                cache.table.view(-1).index_copy_(0, cell, page)
            if len(clear):
                for values in (cache.k_LNKPD, cache.v_LNKPD):
                    raw = values.view(torch.uint8) if values.dtype.itemsize == 1 else values
                    raw.index_fill_(1, clear, 0)
            copy_pages(cache.k_LNKPD, cache.v_LNKPD, source, target)

        outbox.once_sent(change)


def copy_pages(k_LNKPD: torch.Tensor, v_LNKPD: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy the pages `source` to the pages `target`, integers [C] each. No page may be a target twice, or a target and a
    source."""
    assert k_LNKPD.is_contiguous() and v_LNKPD.is_contiguous()
    layers, pages = k_LNKPD.shape[:2]
    k, v = (values.view(torch.uint8).view(layers, pages, -1) for values in (k_LNKPD, v_LNKPD))
    if len(source):
        grid = (len(source) * layers,)
        _copy[grid](k, v, source, target, k.stride(0), k.stride(1), layers, BLOCK=_BLOCK, num_warps=4)


def copy_list(pages: Int32, keys: Int32, page_size: int) -> Int32:
    """Return what `copy_out` copies, [C, 3]: each page, its first row and its number of rows. `pages` are the pages of one
    context after the other, `keys` the keys of each context, whose last page may not be full."""
    count = -(-keys // page_size)
    of = np.repeat(np.arange(len(keys)), count)
    first = (np.arange(len(of)) - np.repeat(np.cumsum(count) - count, count)) * page_size
    row = (np.cumsum(keys) - keys)[of] + first
    return np.stack((pages, row, np.minimum(page_size, keys[of] - first)), axis=1).astype(np.int32)


def copy_out(cache: tuple[torch.Tensor, torch.Tensor], pages_C3: torch.Tensor, out: torch.Tensor) -> None:
    """Copy keys and values, each [N, K, P, D], to `out[0]` and `out[1]`, each [rows, K, D], as `copy_list` says."""
    k_NKPD, v_NKPD = cache
    _, num_kv_heads, page_size, head_dim = k_NKPD.shape
    assert k_NKPD[0].is_contiguous() and k_NKPD.stride() == v_NKPD.stride() and out.is_contiguous()
    _copy_out[(len(pages_C3) * num_kv_heads,)](
        k_NKPD, v_NKPD, out[0], out[1], pages_C3, k_NKPD.stride(0), num_kv_heads,
        DIM=head_dim, PAGE=page_size, BLOCK=min(_BLOCK, triton.next_power_of_2(page_size * head_dim)), num_warps=4,
    )  # fmt: skip
