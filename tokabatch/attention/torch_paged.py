"""Paged attention in plain torch: the backend of the CPU, and the oracle every other backend is compared with.

Pages are gathered into contiguous keys and values, a cache-sized block at a time, so that the product that follows reads
them while they are still near the cores: on a CPU the gather, not the arithmetic, is the cost, and a shared prefix that is
gathered once for its whole group is where Hydragen pays.

Shapes: T tokens of the step, H query heads, K key-value heads, G = H / K, D head dim, P page size, B passes of a block,
Q queries a pass, L keys a pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from tokabatch.arrays import Int32
from tokabatch.attention.base import KVShape, token_slots
from tokabatch.attention.upload import Outbox, to_device
from tokabatch.scheduling.contracts import StepBatch

BLOCK_BYTES = 8 << 20
"""Keys and values gathered at a time; measured on a 32 MB L3: 4 to 16 MB are within 5 % of each other, 50 MB costs 30 %."""
MAX_SCORES = 1 << 23
"""Scores held at a time; splits long prompts along their queries, so that each part also skips the keys it may not see."""
MAX_BATCHED_QUERIES = 64
"""Passes of more queries are computed alone: their own product fills the cores."""
MAX_QUERIES = 128
"""Of a part of a long prompt, which skips the keys behind it. Of 96, 128, 192 and all at prompts of 400 tokens, the first two
took least."""
UNMASKED = -1


@dataclass(frozen=True, slots=True)
class _PagePasses:
    """What to attend to, arrays of N: tokens `token : token + queries` over pages `page_table[slot, first : last]`.

    `position` is that of the first query, for the causal mask; `UNMASKED` where every query sees every key.
    """

    token: Int32
    queries: Int32
    slot: Int32
    first: Int32
    last: Int32
    position: Int32

    def take(self, index: np.ndarray) -> _PagePasses:
        names = ("token", "queries", "slot", "first", "last", "position")
        return _PagePasses(*(getattr(self, name)[index] for name in names))


@dataclass(frozen=True, slots=True)
class _Block:
    """Passes computed together: B of Q queries each over L keys, both padded. Padding repeats a pass's last query, so that
    what it writes back is written twice and is the same."""

    tokens: slice | torch.Tensor
    pages: torch.Tensor
    """Page ids, B * (L / P), pass after pass."""
    num_passes: int
    mask_BQL: torch.Tensor | None
    merged: bool
    """Some of its tokens attend to other pages in a pass of their own, so that the log-sum-exp is wanted."""


class TorchPagedAttention:
    """See `AttentionBackend`. The cache of a layer is [K, pages, P * D], so that a gathered page is one contiguous copy and
    the gathered block already has the layout of a batched matrix product."""

    def __init__(self, shape: KVShape, dtype: torch.dtype, device: torch.device, kv_dtype: torch.dtype | None = None) -> None:
        assert kv_dtype in (None, dtype), "keys and values are kept as they come"
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self._compute = torch.float64 if dtype == torch.float64 else torch.float32
        """Scores, sums and merges are at least float32: a 16-bit log-sum-exp is off by percents."""
        self.page_table = np.zeros((shape.num_slots, shape.max_pages), np.int32)
        cache = (shape.num_layers, shape.num_kv_heads, shape.num_pages, shape.page_size * shape.head_dim)
        self.k_cache, self.v_cache = (_zeros(cache, dtype, device) for _ in range(2))
        page_bytes = 2 * shape.num_kv_heads * shape.page_size * shape.head_dim * dtype.itemsize
        self._block_pages = max(1, BLOCK_BYTES // page_bytes)
        self._write_T = torch.empty(0, dtype=torch.int64)
        self._own: list[_Block] = []
        self._shared: list[_Block] = []

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
        assert k_TKD is not None and v_TKD is not None, "this cache is written here alone"
        shape = self.shape
        k_cache, v_cache = self.k_cache[layer], self.v_cache[layer]
        for cache, new_TKD in ((k_cache, k_TKD), (v_cache, v_TKD)):
            flat = cache.view(shape.num_kv_heads, -1, shape.head_dim)
            flat.index_copy_(1, self._write_T, new_TKD.to(self.dtype).transpose(0, 1))
        q_KTGD = q_THD.view(len(q_THD), shape.num_kv_heads, -1, shape.head_dim).transpose(0, 1)
        out_KTGD = torch.empty(q_KTGD.shape, dtype=self._compute, device=self.device)
        lse_KTG = torch.empty(q_KTGD.shape[:-1], dtype=self._compute, device=self.device) if self._shared else None
        for block in self._own:
            out, lse = self._pass(block, q_KTGD, k_cache, v_cache, need_lse=block.merged)
            out_KTGD[:, block.tokens] = out
            if block.merged and lse_KTG is not None:
                lse_KTG[:, block.tokens] = lse
        for block in self._shared:
            assert lse_KTG is not None
            out, lse = self._pass(block, q_KTGD, k_cache, v_cache, need_lse=True)
            _merge_into(out_KTGD, lse_KTG, block.tokens, out, lse)
        return out_KTGD.transpose(0, 1).reshape(q_THD.shape).to(q_THD.dtype)

    def _pass(
        self, block: _Block, q_KTGD: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, need_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One block's attention: outputs [K, tokens, G, D] and natural log-sum-exp [K, tokens, G] (empty unless asked for)."""
        dim, group = self.shape.head_dim, q_KTGD.shape[2]
        q = q_KTGD[:, block.tokens]
        batch = self.shape.num_kv_heads * block.num_passes
        q_BQD = (q.to(self._compute) * dim**-0.5).reshape(batch, -1, dim)
        k_BLD = k_cache.index_select(1, block.pages).view(batch, -1, dim).to(self._compute)
        v_BLD = v_cache.index_select(1, block.pages).view(batch, -1, dim).to(self._compute)
        scores = torch.bmm(q_BQD, k_BLD.transpose(1, 2))
        if block.mask_BQL is not None:
            runs, queries, keys = block.mask_BQL.shape
            scores.view(-1, runs, queries, group, keys).add_(block.mask_BQL.unsqueeze(2))
        if not need_lse:
            return torch.bmm(torch.softmax(scores, -1), v_BLD).view(q.shape), scores.new_empty(0)
        highest = scores.amax(-1, keepdim=True)
        total = scores.sub_(highest).exp_().sum(-1, keepdim=True)
        out = torch.bmm(scores, v_BLD).div_(total)
        return out.view(q.shape), highest.add_(total.log_()).view(q.shape[:-1])

    def _plan(self, passes: _PagePasses) -> list[_Block]:
        """Passes of like numbers of queries and pages together, in blocks that fit the cache budget; long ones alone."""
        alone = np.nonzero(passes.queries > MAX_BATCHED_QUERIES)[0].tolist()
        blocks = [block for index in alone for block in self._plan_alone(passes, index)]
        pages = passes.last - passes.first
        query_class = np.ceil(np.log2(passes.queries)).astype(np.int32)
        for chosen in np.unique(query_class[passes.queries <= MAX_BATCHED_QUERIES]):
            members = np.nonzero(query_class == chosen)[0]
            members = members[np.argsort(-pages[members], kind="stable")]
            begin = 0
            while begin < len(members):
                width = int(pages[members[begin]])
                scores = self.shape.num_heads * (1 << int(chosen)) * width * self.shape.page_size
                fits = max(1, min(self._block_pages // width, MAX_SCORES // scores))
                narrow = np.searchsorted(-pages[members], -(3 * width // 4), side="right")
                end = min(begin + fits, max(begin + 1, int(narrow)))
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

    def _plan_alone(self, passes: _PagePasses, index: int) -> list[_Block]:
        """One pass of many queries, split along them where the scores would grow too large."""
        size, slot = self.shape.page_size, passes.slot[index]
        first, all_pages = int(passes.first[index]), int(passes.last[index])
        token, queries, position = int(passes.token[index]), int(passes.queries[index]), int(passes.position[index])
        stride = max(16, min(MAX_QUERIES, MAX_SCORES // (self.shape.num_heads * (all_pages - first) * size)))
        blocks: list[_Block] = []
        for begin in range(0, queries, stride):
            end = min(queries, begin + stride)
            last = all_pages if position == UNMASKED else -(-(position + end) // size)
            mask = None
            if position != UNMASKED:
                key_L, position_Q = np.arange(first * size, last * size), np.arange(position + begin, position + end)
                mask = self._mask(key_L[None, None, :] > position_Q[None, :, None])
            pages = self._tensor(self.page_table[slot, first:last])
            blocks.append(_Block(slice(token + begin, token + end), pages, 1, mask, merged=first > 0))
        return blocks

    def _mask(self, hidden: np.ndarray) -> torch.Tensor | None:
        if not hidden.any():
            return None
        mask = torch.zeros(hidden.shape, dtype=self._compute, device=self.device)
        return mask.masked_fill_(torch.from_numpy(hidden).to(self.device), -math.inf)

    def _tensor(self, values: np.ndarray | Int32) -> torch.Tensor:
        return to_device(values.astype(np.int64), self.device)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that take host memory only where they are written: torch clears its own, numpy asks for clear pages."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def _merge_into(
    out: torch.Tensor, lse: torch.Tensor, tokens: slice | torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> None:
    """Fold a second pass of some tokens, over other keys, into (out, lse): the softmax over the union of the keys."""
    own_lse = lse[:, tokens]
    total = torch.logaddexp(own_lse, other_lse)
    merged = out[:, tokens] * torch.exp(own_lse - total).unsqueeze(-1)
    out[:, tokens] = merged.add_(other.mul_(torch.exp(other_lse - total).unsqueeze(-1)))
    lse[:, tokens] = total


Backend = TorchPagedAttention
