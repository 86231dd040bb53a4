"""The long prefix that all queries of a captured step share, computed by FlashInfer's prefill kernel for Hopper GPUs (fa3).

It takes 0.24 ms a layer for 256 queries over 32,768 keys with heads of 128 dimensions, the Triton tiles 0.41 ms. The keys are
split into parts, each a request to the kernel, so that all multiprocessors are busy. The plan depends only on the numbers of
queries and keys and is made once for a graph. The page ids are read from the page table in each step.

Shape legend: N parts, T queries, H query heads, D head dimension.
"""

from __future__ import annotations

import flashinfer
import torch

from tokabatch.attention.base import KVShape
from tokabatch.attention.capturable import PagedCache, PrefixKind

LEAST_KEYS = 8192
"""The fewest keys of a prefix that is computed this way."""
HEAD_DIM = 128
"""The head dimension for which it is faster; with heads of 64 dimensions the tiles are as fast."""
TILE_QUERIES = 128
"""The queries of one program of the kernel: with fewer, part of it is idle."""
STEP_KEYS = 4096
"""The keys of a pass are rounded down to a multiple of this, so that prefixes of many lengths share a few graphs."""


def kind_of(shape: KVShape, num_cores: int, queries: int, pages: int) -> PrefixKind | None:
    """See `Capturable.prefix_kind`; `num_cores` is the number of multiprocessors."""
    tiles = -(-queries // TILE_QUERIES)
    programs = tiles * shape.num_heads
    is_full = 4 * queries >= 3 * TILE_QUERIES * tiles and programs <= num_cores
    if shape.head_dim != HEAD_DIM or not is_full or pages * shape.page_size < LEAST_KEYS:
        return None
    step = STEP_KEYS // shape.page_size
    return PrefixKind(pages // step * step, num_cores // programs)


class HopperPrefix:
    """See `PrefixPass`."""

    def __init__(self, kind: PrefixKind, queries: int, cache: PagedCache, shape: KVShape, workspace: torch.Tensor) -> None:
        """Plan the pass. `workspace` is scratch memory that other kernels of the same stream may use as well."""
        parts, dtype, device = kind.parts, cache.k_LNKPD.dtype, workspace.device
        self._cache = cache
        self._page_ids = torch.zeros(kind.pages, dtype=torch.int32, device=device)
        self._queries_NTHD = torch.zeros(parts, queries, shape.num_heads, shape.head_dim, dtype=dtype, device=device)
        self._wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND", backend="fa3")
        bounds = torch.linspace(0, kind.pages, parts + 1).int()
        self._wrapper.plan(
            torch.arange(parts + 1, dtype=torch.int32) * queries,
            bounds,
            self._page_ids,
            torch.full((parts,), shape.page_size, dtype=torch.int32),
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            shape.page_size,
            causal=False,
            q_data_type=dtype,
            kv_data_type=dtype,
            seq_lens=bounds.diff() * shape.page_size,
        )

    def begin(self, slot_1: torch.Tensor) -> None:
        self._page_ids.copy_(self._cache.table.index_select(0, slot_1)[0, : len(self._page_ids)])

    def attend(self, layer: int, q_THD: torch.Tensor, state_NTHD: torch.Tensor, lse_NTH: torch.Tensor) -> None:
        self._queries_NTHD.copy_(q_THD)
        pages = self._cache.k_LNKPD[layer], self._cache.v_LNKPD[layer]
        out, lse = state_NTHD.flatten(0, 1), lse_NTH.flatten(0, 1)
        self._wrapper.run(self._queries_NTHD.flatten(0, 1), pages, out=out, lse=lse, return_lse=True)
