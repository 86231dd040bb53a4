"""Paged attention in plain torch: the backend for CPUs, and the reference that tests compare every other backend with.

Pages are gathered into contiguous keys and values in blocks that fit the processor's cache, so that the matrix product that
follows reads them from there. On a CPU most of the time goes to the gather rather than to arithmetic: Hydragen saves it by
gathering a shared prefix once for its whole group.

Shapes: T tokens of the step, H query heads, K key-value heads, G = H / K, D head dimension, P page size, B passes of a block,
Q queries of a pass, L keys of a pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from tokabatch.arrays import Int32
from tokabatch.attention.base import KVShape, token_slots
from tokabatch.attention.upload import Outbox, to_device
from tokabatch.scheduling.contracts import StepBatch

BLOCK_BYTES = 8 << 20
"""Bytes of keys and values gathered at a time. With 32 MB of L3 cache, 4 to 16 MB are within 5 % of each other, and 50 MB takes
30 % longer."""
MAX_SCORES = 1 << 23
"""The most scores held at a time."""
MAX_BATCHED_QUERIES = 64
"""A pass of more queries is computed by itself: it occupies the cores without others."""
MAX_QUERIES = 64
"""The most queries of a part of such a pass; a part skips the keys after its last query. With prompts of 400 tokens, 48 and 64
were the fastest values from 32 to 128."""
FEW_SCORES = 1 << 16
"""Passes with at most this many scores in total, padding included, are computed together even if their numbers of queries
differ: another call would take longer than the padding."""
UNMASKED = -1


@dataclass(frozen=True, slots=True)
class _PagePasses:
    """Attention passes, arrays of N: tokens `token : token + queries` over pages `page_table[slot, first : last]`.

    `position` is that of the first query, for the causal mask, or `UNMASKED` if every query attends to every key.
    """

    token: Int32
    queries: Int32
    slot: Int32
    first: Int32
    last: Int32
    position: Int32

    def take(self, index: np.ndarray) -> _PagePasses:
        return _PagePasses(*(getattr(self, name)[index] for name in _PagePasses.__slots__))


@dataclass(frozen=True, slots=True)
class _Block:
    """B passes computed together, padded to Q queries over L keys each. Padding repeats the last query of a pass, so that the
    same result is written to its place twice."""

    tokens: slice | torch.Tensor
    pages: torch.Tensor
    """Page ids, shape [B * (L / P)], pass after pass."""
    num_passes: int
    mask_BQL: torch.Tensor | None
    merged: bool
    """True if some of its tokens attend to further pages in another pass, so that the log-sum-exp is needed."""


@dataclass(frozen=True, slots=True)
class _LongPass:
    """A pass of many queries, computed in parts along them. Each part skips the keys after its last query."""

    tokens: slice
    pages: torch.Tensor
    queries: int
    """The number of queries of a part."""
    seen: int
    """The number of keys that the first query attends to; UNMASKED if every query attends to all."""
    merged: bool
    """See `_Block`."""


class TorchPagedAttention:
    """See `AttentionBackend`. The keys, and the values, of a layer have shape [K, pages, P * D]: a page is gathered by one
    contiguous copy, and the gathered block has the layout of a batched matrix product."""

    def __init__(self, shape: KVShape, dtype: torch.dtype, device: torch.device, kv_dtype: torch.dtype | None = None) -> None:
        assert kv_dtype in (None, dtype), "keys and values are stored in the dtype of the queries"
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self._compute = torch.float64 if dtype == torch.float64 else torch.float32
        """The dtype of scores, sums and merges, at least float32: a log-sum-exp in 16 bits has errors of several percent."""
        self.page_table = np.zeros((shape.num_slots, shape.max_pages), np.int32)
        cache = (shape.num_layers, shape.num_kv_heads, shape.num_pages, shape.page_size * shape.head_dim)
        self.k_cache, self.v_cache = (_zeros(cache, dtype, device) for _ in range(2))
        page_bytes = 2 * shape.num_kv_heads * shape.page_size * shape.head_dim * dtype.itemsize
        self._block_pages = max(1, BLOCK_BYTES // page_bytes)
        self._write_T = torch.empty(0, dtype=torch.int64)
        self._own: list[_Block | _LongPass] = []
        self._shared: list[_Block | _LongPass] = []
        self._causal_QQ = torch.full((MAX_QUERIES, MAX_QUERIES), -math.inf, dtype=self._compute, device=device).triu_(1)

    def plan(self, step: StepBatch, outbox: Outbox) -> None:
        self.page_table[step.table_slot, step.table_column] = step.table_page
        if len(step.clear_pages):
            cleared = self._tensor(step.clear_pages)
            self.k_cache[:, :, cleared] = 0
            self.v_cache[:, :, cleared] = 0
        if len(step.copy_src):
            src, dst = self._tensor(step.copy_src), self._tensor(step.copy_dst)
            self.k_cache[:, :, dst] = self.k_cache[:, :, src]
            self.v_cache[:, :, dst] = self.v_cache[:, :, src]
        size = self.shape.page_size
        position_T = step.positions()
        page_T = self.page_table[token_slots(step), position_T // size].astype(np.int64)
        self._write_T = self._tensor(page_T * size + position_T % size)
        first = (np.cumsum(step.run_length) - step.run_length).astype(np.int32)
        last = -(-(step.run_start + step.run_length) // size)
        self._own = self._plan(_PagePasses(first, step.run_length, step.run_slot, step.run_skip, last, step.run_start))
        self._shared = [
            block
            for level in step.prefix_levels
            for block in self._plan(
                _PagePasses(
                    level.token_start,
                    level.token_stop - level.token_start,
                    level.slot,
                    level.page_start,
                    level.page_stop,
                    np.full(len(level.slot), UNMASKED, np.int32),
                )
            )
        ]

    def attend(self, layer: int, q_THD: torch.Tensor, k_TKD: torch.Tensor | None, v_TKD: torch.Tensor | None) -> torch.Tensor:
        assert k_TKD is not None and v_TKD is not None, "only this backend writes its cache"
        shape = self.shape
        k_cache, v_cache = self.k_cache[layer], self.v_cache[layer]
        for cache, new_TKD in ((k_cache, k_TKD), (v_cache, v_TKD)):
            flat = cache.view(shape.num_kv_heads, -1, shape.head_dim)
            flat.index_copy_(1, self._write_T, new_TKD.to(self.dtype).transpose(0, 1))
        q_KTGD = q_THD.view(len(q_THD), shape.num_kv_heads, -1, shape.head_dim).transpose(0, 1)
        out_THD = torch.empty(q_THD.shape, dtype=self._compute, device=self.device)
        out_KTGD = out_THD.view(len(q_THD), shape.num_kv_heads, -1, shape.head_dim).transpose(0, 1)
        lse_KTG = torch.empty(q_KTGD.shape[:-1], dtype=self._compute, device=self.device) if self._shared else None
        for block in self._own:
            for tokens, out, lse in self._passes(block, q_KTGD, k_cache, v_cache, need_lse=block.merged):
                out_KTGD[:, tokens] = out
                if block.merged and lse_KTG is not None:
                    lse_KTG[:, tokens] = lse
        for block in self._shared:
            assert lse_KTG is not None
            for tokens, out, lse in self._passes(block, q_KTGD, k_cache, v_cache, need_lse=True):
                _merge_into(out_KTGD, lse_KTG, tokens, out, lse)
        return out_THD.to(q_THD.dtype)

    def _passes(
        self, block: _Block | _LongPass, q_KTGD: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, need_lse: bool
    ) -> Iterator[tuple[slice | torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield the attention of a block in parts: the tokens, their outputs [K, tokens, G, D] and their natural log-sum-exp
        [K, tokens, G], which is empty unless `need_lse`."""
        kv_heads, _, group, dim = q_KTGD.shape
        batch = kv_heads * (block.num_passes if isinstance(block, _Block) else 1)
        k_BLD = k_cache.index_select(1, block.pages).view(batch, -1, dim).to(self._compute)
        v_BLD = v_cache.index_select(1, block.pages).view(batch, -1, dim).to(self._compute)
        q_BQD = q_KTGD[:, block.tokens].to(self._compute).reshape(batch, -1, dim) * dim**-0.5
        if isinstance(block, _Block):
            scores = torch.bmm(q_BQD, k_BLD.transpose(1, 2))
            if block.mask_BQL is not None:
                runs, queries, keys = block.mask_BQL.shape
                scores.view(-1, runs, queries, group, keys).add_(block.mask_BQL.unsqueeze(2))
            yield block.tokens, *_weighted(scores, v_BLD, (kv_heads, -1, group, dim), need_lse)
            return
        count = q_BQD.shape[1] // group
        for begin in range(0, count, block.queries):
            queries = min(block.queries, count - begin)
            keys = k_BLD.shape[1] if block.seen == UNMASKED else block.seen + begin + queries - 1
            scores = torch.bmm(q_BQD[:, begin * group : (begin + queries) * group], k_BLD[:, :keys].transpose(1, 2))
            if block.seen != UNMASKED:
                behind = scores.view(kv_heads, queries, group, keys).narrow(3, keys - queries, queries)
                behind.add_(self._causal_QQ[:queries, None, :queries])
            tokens = slice(block.tokens.start + begin, block.tokens.start + begin + queries)
            yield tokens, *_weighted(scores, v_BLD[:, :keys], (kv_heads, queries, group, dim), need_lse)

    def _plan(self, passes: _PagePasses) -> list[_Block | _LongPass]:
        """Group passes with similar numbers of queries and pages into blocks that fit the cache budget; long passes stay
        alone."""
        alone = np.nonzero(passes.queries > MAX_BATCHED_QUERIES)[0].tolist()
        blocks: list[_Block | _LongPass] = [self._plan_alone(passes, index) for index in alone]
        pages = passes.last - passes.first
        query_class = np.ceil(np.log2(passes.queries)).astype(np.int32)
        present = np.unique(query_class[passes.queries <= MAX_BATCHED_QUERIES])
        per_page = self.shape.num_heads * self.shape.page_size
        for low, high in pairwise(present):
            if int(pages[query_class == low].sum()) * (per_page << int(high)) <= FEW_SCORES:
                query_class[query_class == low] = high
        for chosen in present:
            members = np.nonzero(query_class == chosen)[0]
            members = members[np.argsort(-pages[members], kind="stable")]
            begin = 0
            while begin < len(members):
                width = int(pages[members[begin]])
                scores = (per_page << int(chosen)) * width
                fits = max(1, min(self._block_pages // width, MAX_SCORES // scores))
                narrow = int(np.searchsorted(-pages[members], -(3 * width // 4), side="right"))
                few = FEW_SCORES // max(scores, 16 * per_page * width)
                end = min(begin + fits, max(begin + 1, narrow, begin + few))
                blocks.append(self._batch(passes.take(members[begin:end])))
                begin = end
        return blocks

    def _batch(self, passes: _PagePasses) -> _Block:
        size, count = self.shape.page_size, len(passes.token)
        width, queries = int((passes.last - passes.first).max()), int(passes.queries.max())
        query_BQ = np.minimum(np.arange(queries), passes.queries[:, None] - 1)
        column_BL = np.minimum(passes.first[:, None] + np.arange(width), passes.last[:, None] - 1)
        key_BL = passes.first[:, None] * size + np.arange(width * size)
        seen_BQ = np.where(
            passes.position[:, None] == UNMASKED, passes.last[:, None] * size - 1, passes.position[:, None] + query_BQ
        )
        return _Block(
            tokens=self._tensor((passes.token[:, None] + query_BQ).ravel()),
            pages=self._tensor(self.page_table[passes.slot[:, None], column_BL].ravel()),
            num_passes=count,
            mask_BQL=self._mask(key_BL[:, None, :] > seen_BQ[:, :, None]),
            merged=bool((passes.first > 0).any()),
        )

    def _plan_alone(self, passes: _PagePasses, index: int) -> _LongPass:
        """Return a pass of many queries, in parts of at most about MAX_SCORES scores."""
        size, slot = self.shape.page_size, passes.slot[index]
        first, last = int(passes.first[index]), int(passes.last[index])
        token, queries, position = int(passes.token[index]), int(passes.queries[index]), int(passes.position[index])
        return _LongPass(
            tokens=slice(token, token + queries),
            pages=self._tensor(self.page_table[slot, first:last]),
            queries=max(16, min(MAX_QUERIES, MAX_SCORES // (self.shape.num_heads * (last - first) * size))),
            seen=UNMASKED if position == UNMASKED else position + 1 - first * size,
            merged=first > 0,
        )

    def _mask(self, hidden: np.ndarray) -> torch.Tensor | None:
        if not hidden.any():
            return None
        mask = torch.zeros(hidden.shape, dtype=self._compute, device=self.device)
        return mask.masked_fill_(torch.from_numpy(hidden).to(self.device), -math.inf)

    def _tensor(self, values: np.ndarray | Int32) -> torch.Tensor:
        return to_device(values.astype(np.int64), self.device)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros that take up host memory only once they are written: numpy allocates lazily zeroed memory, torch writes the
    zeros itself."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def _weighted(
    scores: torch.Tensor, v_BLD: torch.Tensor, shape: tuple[int, ...], need_lse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values weighted by the softmax of `scores`, in this shape, and the log-sum-exp, which is empty unless
    `need_lse`. May overwrite `scores`."""
    if not need_lse:
        return torch.bmm(torch.softmax(scores, -1), v_BLD).view(shape), scores.new_empty(0)
    highest = scores.amax(-1, keepdim=True)
    total = scores.sub_(highest).exp_().sum(-1, keepdim=True)
    out = torch.bmm(scores, v_BLD).div_(total)
    return out.view(shape), highest.add_(total.log_()).view(shape[:-1])


def _merge_into(
    out: torch.Tensor, lse: torch.Tensor, tokens: slice | torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> None:
    """Merge a second pass of some tokens, over other keys, into (out, lse): afterwards they hold the softmax over all the
    keys."""
    own_lse = lse[:, tokens]
    total = torch.logaddexp(own_lse, other_lse)
    merged = out[:, tokens] * torch.exp(own_lse - total).unsqueeze(-1)
    out[:, tokens] = merged.add_(other.mul_(torch.exp(other_lse - total).unsqueeze(-1)))
    lse[:, tokens] = total


Backend = TorchPagedAttention
