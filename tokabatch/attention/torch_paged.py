"""Paged attention in plain torch: the backend of the CPU, and the oracle every other backend is compared with.

Pages are gathered into contiguous keys and values, a cache-sized block at a time, so that the product that follows reads
them while they are still near the cores: on a CPU the gather, not the arithmetic, is the cost, and a shared prefix that is
gathered once for its whole group is where Hydragen pays.

Shapes: T tokens of the step, H query heads, K key-value heads, G = H / K, D head dim, P page size, B runs of a block,
Q queries a run of a block, L keys of a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from tokabatch.attention.base import KVShape
from tokabatch.messages import Int32, StepBatch

BLOCK_BYTES = 8 << 20
"""Keys and values gathered at a time; measured on a 32 MB L3: 4 to 16 MB are within 5 % of each other, 50 MB costs 30 %."""
MAX_SCORES = 1 << 23
"""Scores held at a time; splits long prompts along their queries, so that each part also skips the keys it may not see."""


@dataclass(frozen=True, slots=True)
class _Block:
    """Runs computed together: B runs of Q queries each over L padded keys."""

    tokens: slice | torch.Tensor
    pages: torch.Tensor
    """Page ids, B * (L / P), run after run."""
    num_runs: int
    mask_BQL: torch.Tensor | None


class TorchPagedAttention:
    """See `AttentionBackend`. The cache of a layer is [K, pages, P * D], so that a gathered page is one contiguous copy and
    the gathered block already has the layout of a batched matrix product."""

    def __init__(self, shape: KVShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.page_table = np.zeros((shape.num_slots, shape.max_pages), np.int32)
        cache = (shape.num_layers, shape.num_kv_heads, shape.num_pages, shape.page_size * shape.head_dim)
        self.k_cache = torch.zeros(cache, dtype=dtype, device=device)
        self.v_cache = torch.zeros(cache, dtype=dtype, device=device)
        page_bytes = 2 * shape.num_kv_heads * shape.page_size * shape.head_dim * dtype.itemsize
        self._block_pages = max(1, BLOCK_BYTES // page_bytes)
        self._write_T = torch.empty(0, dtype=torch.int64)
        self._blocks: list[_Block] = []
        self._groups: list[_Block] = []

    def prepare(self, step: StepBatch) -> None:
        self.page_table[step.table_slot, step.table_column] = step.table_page
        if len(step.copy_src):
            src, dst = self._tensor(step.copy_src), self._tensor(step.copy_dst)
            self.k_cache[:, :, dst] = self.k_cache[:, :, src]
            self.v_cache[:, :, dst] = self.v_cache[:, :, src]
        size = self.shape.page_size
        run_T = np.repeat(np.arange(len(step.run_slot)), step.run_length)
        first_T = np.cumsum(step.run_length) - step.run_length
        position_T = np.arange(step.num_tokens) - first_T[run_T] + step.run_start[run_T]
        page_T = self.page_table[step.run_slot[run_T], position_T // size]
        self._write_T = self._tensor(page_T.astype(np.int64) * size + position_T % size)
        self._blocks = self._plan_single(step, first_T) + self._plan_long(step, first_T)
        self._groups = [
            _Block(slice(int(start), int(stop)), self._tensor(self.page_table[slot, first:last]), 1, None)
            for level in step.prefix_levels
            for start, stop, slot, first, last in zip(
                level.token_start, level.token_stop, level.slot, level.page_start, level.page_stop, strict=True
            )
        ]

    def attend(self, layer: int, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> torch.Tensor:
        shape = self.shape
        k_cache, v_cache = self.k_cache[layer], self.v_cache[layer]
        for cache, new_TKD in ((k_cache, k_TKD), (v_cache, v_TKD)):
            flat = cache.view(shape.num_kv_heads, -1, shape.head_dim)
            flat.index_copy_(1, self._write_T, new_TKD.to(self.dtype).transpose(0, 1))
        q_KTGD = q_THD.view(len(q_THD), shape.num_kv_heads, -1, shape.head_dim).transpose(0, 1)
        out_KTGD = torch.empty(q_KTGD.shape, dtype=q_THD.dtype, device=self.device)
        lse_KTG = torch.empty(q_KTGD.shape[:-1], dtype=q_THD.dtype, device=self.device) if self._groups else None
        for block in self._blocks:
            out, lse = self._pass(block, q_KTGD, k_cache, v_cache, need_lse=lse_KTG is not None)
            out_KTGD[:, block.tokens] = out
            if lse_KTG is not None:
                lse_KTG[:, block.tokens] = lse
        for block in self._groups:
            assert lse_KTG is not None
            out, lse = self._pass(block, q_KTGD, k_cache, v_cache, need_lse=True)
            _merge_into(out_KTGD[:, block.tokens], lse_KTG[:, block.tokens], out, lse)
        return out_KTGD.transpose(0, 1).reshape(q_THD.shape)

    def _pass(
        self, block: _Block, q_KTGD: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, need_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One block's attention: outputs [K, tokens, G, D] and natural log-sum-exp [K, tokens, G] (empty unless asked for)."""
        heads, dim = self.shape.num_kv_heads, self.shape.head_dim
        group = q_KTGD.shape[2]
        q = q_KTGD[:, block.tokens]
        batch = heads * block.num_runs
        q_BQD = q.reshape(batch, -1, dim)
        k_BLD = k_cache.index_select(1, block.pages).view(batch, -1, dim)
        v_BLD = v_cache.index_select(1, block.pages).view(batch, -1, dim)
        limit = max(1, MAX_SCORES // (batch * k_BLD.shape[1]))
        if block.mask_BQL is None and q_BQD.shape[1] > limit:
            parts = [self._softmax_pass(part, k_BLD, v_BLD, None, group, need_lse) for part in q_BQD.split(limit, dim=1)]
            out, lse = torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1)
        else:
            out, lse = self._softmax_pass(q_BQD, k_BLD, v_BLD, block.mask_BQL, group, need_lse)
        return out.view(q.shape), lse.view(q.shape[:-1]) if need_lse else lse

    def _softmax_pass(
        self,
        q_BQD: torch.Tensor,
        k_BLD: torch.Tensor,
        v_BLD: torch.Tensor,
        mask_BQL: torch.Tensor | None,
        group: int,
        need_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.bmm(q_BQD * self.shape.head_dim**-0.5, k_BLD.transpose(1, 2))
        if mask_BQL is not None:
            runs, queries, keys = mask_BQL.shape
            scores.view(-1, runs, queries, group, keys).add_(mask_BQL.unsqueeze(2))
        if not need_lse:
            return torch.bmm(torch.softmax(scores, -1), v_BLD), scores.new_empty(0)
        lse = torch.logsumexp(scores, -1)
        return torch.bmm(scores.sub_(lse.unsqueeze(-1)).exp_(), v_BLD), lse

    def _plan_single(self, step: StepBatch, first_T: np.ndarray) -> list[_Block]:
        """Runs of one token, longest first, cut into blocks of similar length that fit the cache budget."""
        runs = np.nonzero(step.run_length == 1)[0]
        keys = step.run_start[runs] + 1 - step.run_skip[runs] * self.shape.page_size
        num_pages = -(-keys // self.shape.page_size)
        order = np.argsort(-num_pages, kind="stable")
        runs, keys, num_pages = runs[order], keys[order], num_pages[order]
        blocks: list[_Block] = []
        begin = 0
        while begin < len(runs):
            width = int(num_pages[begin])
            end = min(len(runs), begin + max(1, self._block_pages // width))
            end = max(begin + 1, int(np.searchsorted(-num_pages[:end], -(3 * width // 4), side="right")))
            part = slice(begin, end)
            columns = np.minimum(np.arange(width), num_pages[part, None] - 1) + step.run_skip[runs[part], None]
            pages = self.page_table[step.run_slot[runs[part], None], columns]
            hidden = np.arange(width * self.shape.page_size) >= keys[part, None]
            blocks.append(
                _Block(self._tensor(first_T[runs[part]]), self._tensor(pages.ravel()), end - begin, self._mask(hidden[:, None]))
            )
            begin = end
        return blocks

    def _plan_long(self, step: StepBatch, first_T: np.ndarray) -> list[_Block]:
        """Runs of several tokens, each alone, split along its queries where the scores would grow too large."""
        size = self.shape.page_size
        blocks: list[_Block] = []
        for run in np.nonzero(step.run_length > 1)[0]:
            slot, skip = step.run_slot[run], int(step.run_skip[run])
            start, length, token = int(step.run_start[run]), int(step.run_length[run]), int(first_T[run])
            keys = start + length - skip * size
            stride = max(16, MAX_SCORES // (self.shape.num_heads * keys))
            for begin in range(0, length, stride):
                end = min(length, begin + stride)
                last = -(-(start + end) // size)
                position_Q = np.arange(start + begin, start + end)
                hidden = np.arange(skip * size, last * size)[None, :] > position_Q[:, None]
                pages = self._tensor(self.page_table[slot, skip:last])
                blocks.append(_Block(slice(token + begin, token + end), pages, 1, self._mask(hidden[None])))
        return blocks

    def _mask(self, hidden: np.ndarray) -> torch.Tensor | None:
        if not hidden.any():
            return None
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device)
        return mask.masked_fill_(torch.from_numpy(hidden).to(self.device), -math.inf)

    def _tensor(self, values: np.ndarray | Int32) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self.device)


def _merge_into(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> None:
    """Fold a second pass over disjoint keys into (out, lse), in place: softmax over the union of the keys."""
    total = torch.logaddexp(lse, other_lse)
    out.mul_(torch.exp(lse - total).unsqueeze(-1)).add_(other * torch.exp(other_lse - total).unsqueeze(-1))
    lse.copy_(total)


Backend = TorchPagedAttention
