"""FlashInfer's calls as `flashinfer_paged` makes them, in plain torch on CPU tensors: in its place where there is no GPU.

Only the arguments that the backend gives are taken: caches [pages, K, P, D] (HND), page lists by offsets, the length
of each last page, log-sum-exp in base 2. FlashInfer's own kernels are tested on a GPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch

State = tuple[torch.Tensor, torch.Tensor]


class _Wrapper:
    def __init__(self, workspace: torch.Tensor, layout: str, **options: Any) -> None:
        assert layout == "HND"

    def _keep(self, queries, indptr, indices, last_length, causal: bool) -> None:
        self._queries, self._indptr, self._last = (values.tolist() for values in (queries, indptr, last_length))
        self._indices, self._causal = indices.long(), causal

    def run(self, q_NHD: torch.Tensor, cache: State, *, out: torch.Tensor, lse: Any = None, return_lse: bool = False) -> Any:
        group = q_NHD.shape[1] // cache[0].shape[1]
        for index, length in enumerate(self._last):
            tokens = slice(self._queries[index], self._queries[index + 1])
            pages = self._indices[self._indptr[index] : self._indptr[index + 1]]
            num_keys = (len(pages) - 1) * cache[0].shape[2] + length
            k_HLD, v_HLD = (
                each[pages].transpose(0, 1).flatten(1, 2)[:, :num_keys].float().repeat_interleave(group, 0) for each in cache
            )
            scores = torch.einsum("nhd,hld->nhl", q_NHD[tokens].float(), k_HLD) / math.sqrt(q_NHD.shape[2])
            if self._causal:
                future = torch.ones(len(scores), num_keys, dtype=torch.bool).triu(num_keys - len(scores) + 1)
                scores.masked_fill_(future[:, None], -torch.inf)
            out[tokens] = torch.einsum("nhl,hld->nhd", scores.softmax(-1), v_HLD).to(out.dtype)
            if lse is not None:
                lse[tokens] = scores.logsumexp(-1) / math.log(2)
        return (out, lse) if return_lse else out


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def plan(self, queries, indptr, indices, last_length, heads, kv_heads, dim, page, *, causal: bool, **types: Any) -> None:
        self._keep(queries, indptr, indices, last_length, causal)


class BatchPrefillWithRaggedKVCacheWrapper(BatchPrefillWithPagedKVCacheWrapper):
    """Keys and values [keys, K, D] (NHD), given as pages of one key."""

    def __init__(self, workspace: torch.Tensor, layout: str, **options: Any) -> None:
        assert layout == "NHD"

    def plan(self, queries, offsets, heads, kv_heads, dim, *, causal: bool, **types: Any) -> None:
        self._keep(queries, offsets, torch.arange(int(offsets[-1])), torch.ones(len(offsets) - 1).int(), causal)

    def run(self, q_NHD: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **where: Any) -> Any:
        return super().run(q_NHD, (k[:, :, None], v[:, :, None]), **where)


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def plan(self, indptr, indices, last_length, heads, kv_heads, dim, page, **types: Any) -> None:
        self._keep(torch.arange(len(indptr)), indptr, indices, last_length, causal=False)


def merge_state(v_a: torch.Tensor, s_a: torch.Tensor, v_b: torch.Tensor, s_b: torch.Tensor) -> State:
    total = torch.logaddexp2(s_a, s_b)
    merged = v_a.float() * torch.exp2(s_a - total)[..., None] + v_b.float() * torch.exp2(s_b - total)[..., None]
    return merged.to(v_a.dtype), total


def merge_state_in_place(v: torch.Tensor, s: torch.Tensor, v_other: torch.Tensor, s_other: torch.Tensor) -> None:
    merged, total = merge_state(v, s, v_other, s_other)
    v.copy_(merged)
    s.copy_(total)
