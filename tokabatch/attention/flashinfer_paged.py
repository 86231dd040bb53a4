"""Paged attention by FlashInfer's kernels: the backend of the GPU, for 16-bit types.

The scheduler's passes map onto FlashInfer's wrappers one to one: runs of one token decode, longer runs prefill causally over
their own pages, and each prefix level is one unmasked prefill over the pages that its groups share. States merge by
log-sum-exp (base 2 throughout, as the kernels return it). Short contexts decode on CUDA cores, long ones on tensor cores.

Shapes: T tokens of the step, H query heads, K key-value heads, D head dim, P page size, N passes of one kernel call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import flashinfer
import numpy as np
import torch

from tokabatch.attention.base import KVShape, cache_places
from tokabatch.messages import Int32, StepBatch
from tokabatch.transfer import to_device

WORKSPACE_BYTES = 256 << 20
RING = 4
"""Sets of wrappers; more than the steps that are ever in flight."""
LONG_CONTEXT = 700
"""Mean keys a decode run from which tensor cores win; on an H200 they lose at 200 and win at 1,500."""
DECODE_GROUPS = (1, 2, 4, 8)
"""Query heads per key-value head that the CUDA-core decode kernel is built for."""

_Kernel = Callable[[torch.Tensor, tuple[torch.Tensor, torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class _Call:
    """One planned kernel call: the step's tokens that it takes, and the wrapper's run."""

    tokens: slice | torch.Tensor
    run: _Kernel


class FlashInferPagedAttention:
    """See `AttentionBackend`. The caches are [layers, pages, P, K, D]; the page table is on the host, and a step's page lists
    travel to the device flat."""

    def __init__(self, shape: KVShape, dtype: torch.dtype, device: torch.device) -> None:
        assert dtype in (torch.bfloat16, torch.float16), "FlashInfer computes in 16-bit types"
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.page_table = np.zeros((shape.num_slots, shape.max_pages), np.int32)
        cache = (shape.num_layers, shape.num_pages, shape.page_size, shape.num_kv_heads, shape.head_dim)
        self.k_cache = torch.zeros(cache, dtype=dtype, device=device)
        self.v_cache = torch.zeros(cache, dtype=dtype, device=device)
        # One scratch for all wrappers: their kernels run one after another on one stream.
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._sets = [_Wrappers(self._workspace) for _ in range(RING)]
        self._use = self._sets[0]
        self._write_T = torch.empty(0, dtype=torch.int64, device=device)
        self._own: list[_Call] = []
        self._shared: list[_Call] = []

    def prepare(self, step: StepBatch) -> None:
        self.page_table[step.table_slot, step.table_column] = step.table_page
        if len(step.clear_pages):
            cleared = self._to_device(step.clear_pages).long()
            self.k_cache[:, cleared] = 0
            self.v_cache[:, cleared] = 0
        if len(step.copy_src):
            src, dst = self._to_device(step.copy_src).long(), self._to_device(step.copy_dst).long()
            self.k_cache[:, dst] = self.k_cache[:, src]
            self.v_cache[:, dst] = self.v_cache[:, src]
        self._write_T = self._to_device(cache_places(step, self.page_table, self.shape.page_size))
        self._use = self._sets[step.index % RING]
        self._own = self._plan_own(step)
        self._plan_levels(step)

    def attend(self, layer: int, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> torch.Tensor:
        cache = (self.k_cache[layer], self.v_cache[layer])
        for pages, new_TKD in zip(cache, (k_TKD, v_TKD), strict=True):
            pages.view(-1, self.shape.num_kv_heads, self.shape.head_dim).index_copy_(0, self._write_T, new_TKD)
        q_THD = q_THD.contiguous()
        states = [call.run(q_THD[call.tokens], cache) for call in self._own]
        if len(states) == 1:
            out_THD, lse_TH = states[0]
        else:
            out_THD, lse_TH = (torch.cat(parts) for parts in zip(*states, strict=True))
        for call in self._shared:
            out, lse = call.run(q_THD[call.tokens], cache)
            if isinstance(call.tokens, slice):
                flashinfer.merge_state_in_place(out_THD[call.tokens], lse_TH[call.tokens], out, lse)
            else:
                merged = flashinfer.merge_state(out_THD[call.tokens], lse_TH[call.tokens], out, lse)
                out_THD[call.tokens], lse_TH[call.tokens] = merged
        return out_THD

    def _plan_own(self, step: StepBatch) -> list[_Call]:
        """Each run over its slot's own pages: the host's runs in one prefill call, then the decoding runs in one."""
        size = self.shape.page_size
        stop = step.run_start + step.run_length
        last = -(-stop // size)
        last_length = (stop - 1) % size + 1
        calls: list[_Call] = []
        split = step.num_prefill_runs
        tokens = int(step.run_length[:split].sum())
        for part, span in ((slice(0, split), slice(0, tokens)), (slice(split, len(stop)), slice(tokens, step.num_tokens))):
            if span.start == span.stop:
                continue
            indptr, indices = self._page_lists(step.run_slot[part], step.run_skip[part], last[part])
            if part.start == 0 and split:
                prefill = self._use.prefill
                self._plan_prefill(prefill, step.run_length[part], indptr, indices, last_length[part], causal=True)
                calls.append(_Call(span, _returning_lse(prefill)))
            else:
                keys = stop[part] - step.run_skip[part] * size
                calls.append(_Call(span, _returning_lse(self._plan_decode(indptr, indices, last_length[part], keys))))
        return calls

    def _plan_levels(self, step: StepBatch) -> None:
        self._shared = []
        levels = [level for level in step.prefix_levels if len(level.slot)]
        for wrapper, level in zip(self._use.levels(len(levels)), levels, strict=True):
            queries = level.token_stop - level.token_start
            indptr, indices = self._page_lists(level.slot, level.page_start, level.page_stop)
            full = np.full(len(level.slot), self.shape.page_size, np.int32)
            self._plan_prefill(wrapper, queries, indptr, indices, full, causal=False)
            begin, end = int(level.token_start[0]), int(level.token_stop[-1])
            tokens: slice | torch.Tensor = slice(begin, end)
            if int(queries.sum()) != end - begin:
                gaps = np.repeat(level.token_start - (np.cumsum(queries) - queries), queries)
                tokens = self._to_device(np.arange(int(queries.sum())) + gaps)
            self._shared.append(_Call(tokens, _returning_lse(wrapper)))

    def _plan_decode(
        self, indptr: Int32, indices: torch.Tensor, last_length: Int32, keys: Int32
    ) -> flashinfer.BatchDecodeWithPagedKVCacheWrapper:
        shape = self.shape
        group = shape.num_heads // shape.num_kv_heads
        wrapper = self._use.decoders[group not in DECODE_GROUPS or float(keys.mean()) > LONG_CONTEXT]
        wrapper.plan(
            _host(indptr),
            indices,
            _host(last_length),
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            shape.page_size,
            q_data_type=self.dtype,
            kv_data_type=self.dtype,
            seq_lens=_host(keys),
        )
        return wrapper

    def _plan_prefill(
        self,
        wrapper: flashinfer.BatchPrefillWithPagedKVCacheWrapper,
        queries: Int32,
        indptr: Int32,
        indices: torch.Tensor,
        last_length: Int32,
        causal: bool,
    ) -> None:
        shape = self.shape
        wrapper.plan(
            _host(np.append(0, np.cumsum(queries))),
            _host(indptr),
            indices,
            _host(last_length),
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            shape.page_size,
            causal=causal,
            q_data_type=self.dtype,
            kv_data_type=self.dtype,
        )

    def _page_lists(self, slots: Int32, first: Int32, last: Int32) -> tuple[Int32, torch.Tensor]:
        """`page_table[slot, first : last]` of N passes: offsets [N + 1] on the host, page ids end to end on the device."""
        counts = last - first
        indptr = np.append(0, np.cumsum(counts)).astype(np.int32)
        column = np.arange(int(indptr[-1])) - np.repeat(indptr[:-1] - first, counts)
        return indptr, self._to_device(self.page_table[np.repeat(slots, counts), column])

    def _to_device(self, values: np.ndarray) -> torch.Tensor:
        return to_device(values, self.device)


class _Wrappers:
    """The kernels' wrappers of one step in flight. Planning fills a pinned buffer of the wrapper's that the device reads later:
    a wrapper may be planned again only when its step has run."""

    def __init__(self, workspace: torch.Tensor) -> None:
        self._workspace = workspace
        self.decoders = {
            tensor_cores: flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=tensor_cores)
            for tensor_cores in (False, True)
        }
        self.prefill = self._new_prefill()
        self._levels: list[flashinfer.BatchPrefillWithPagedKVCacheWrapper] = []

    def levels(self, count: int) -> list[flashinfer.BatchPrefillWithPagedKVCacheWrapper]:
        """A wrapper for each prefix level."""
        while len(self._levels) < count:
            self._levels.append(self._new_prefill())
        return self._levels[:count]

    def _new_prefill(self) -> flashinfer.BatchPrefillWithPagedKVCacheWrapper:
        return flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD", backend="fa2")


def _returning_lse(
    wrapper: flashinfer.BatchDecodeWithPagedKVCacheWrapper | flashinfer.BatchPrefillWithPagedKVCacheWrapper,
) -> _Kernel:
    return lambda q_THD, cache: wrapper.run(q_THD, cache, return_lse=True)


def _host(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int32)).pin_memory()


Backend = FlashInferPagedAttention
