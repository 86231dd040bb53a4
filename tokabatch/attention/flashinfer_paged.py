"""Paged attention on a GPU, for 16-bit types: FlashInfer's kernels (Ye et al. 2025, arXiv:2501.01005), and our own kernel for
decode runs with short contexts.

Each kind of pass is one kernel call: a prefix level is an unmasked prefill over the pages that its groups share, the prefill
runs are a causal prefill over their own pages, and the decode runs are one call that merges its result with the state of the
levels (`triton_decode`, or FlashInfer's decode kernel if contexts are long). States are merged by log-sum-exp, which is in base
2 throughout, as the kernels return it.

Where many queries read the same keys, these are first copied out of their pages: the kernel for Hopper GPUs (fa3) brings keys
that lie next to each other to shared memory in boxes (TMA), but collects those in pages row by row.

Shapes: T tokens of the step, H query heads, K key-value heads, D head dimension, P page size, N passes of one kernel call.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import flashinfer
import numpy as np
import torch

from tokabatch.arrays import Int32, Int64
from tokabatch.attention.base import KVShape, token_slots
from tokabatch.attention.triton_decode import decode
from tokabatch.attention.triton_page_store import PageStore, copy_list, copy_out
from tokabatch.attention.upload import Outbox, Parcel
from tokabatch.scheduling.contracts import PrefixLevel, StepBatch

WORKSPACE_BYTES = 256 << 20
RING = 6
"""The number of sets of wrappers: more than there are ever steps in flight."""
LONG_CONTEXT = 2048
"""The mean number of keys of a decode run above which FlashInfer's decode kernel is used if there are too few sequences to
occupy the GPU: it splits their keys."""
TILE_QUERIES = 128
"""The queries of one program of the prefill kernel for Hopper GPUs: with fewer, part of it is idle."""
LONG_PREFILL = 512
"""Mean queries from which causal passes use the prefill kernel for Hopper GPUs (fa3): its plan takes 1.3 ms on the host, that
of the generic kernel (fa2) 0.15 ms."""
COPIED_ROWS = 4096
"""Rows for each key, on average, from which the keys are copied out of their pages; a row is a query with one of the query
heads of a key-value head. On an H200, 8,192 queries of 32 heads and 32,768 keys then take 4.2 ms for 4.8 with heads of 64
dimensions, 6.2 for 7.6 with heads of 128."""
COPIED_BYTES = 256 << 20
"""The most bytes of keys and values that are copied for one kernel call."""

PrefillWrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper | flashinfer.BatchPrefillWithRaggedKVCacheWrapper
Wrapper = PrefillWrapper | flashinfer.BatchDecodeWithPagedKVCacheWrapper
State = tuple[torch.Tensor, torch.Tensor]
"""Outputs [N, H, D] and their log-sum-exp [N, H], base 2."""


class _Kernel(Enum):
    """The kernel of a prefill call: the generic one, the one for Hopper GPUs, and the latter over keys copied out of their
    pages."""

    FA2 = "fa2"
    FA3 = "fa3"
    FA3_COPIED = "fa3, copied"


@dataclass(frozen=True, slots=True)
class _CallPasses:
    """The passes of one kernel call, arrays of N, and their page lists, which are sent to the device."""

    queries: Int32
    indptr: Int32
    indices: Parcel
    last_length: Int32
    keys: Int32
    causal: bool
    kernel: _Kernel
    copied: Parcel | None
    """What `copy_out` copies for `_Kernel.FA3_COPIED`."""


@dataclass(frozen=True, slots=True)
class _Level:
    """A prefix level and the tokens that it covers: `span` from the first to the last, and their indices in `gaps` if some in
    between are not covered."""

    span: slice
    gaps: Parcel | None
    passes: _CallPasses
    unchanged: bytes
    """The bytes that determine its plan: equal bytes, equal plan."""


@dataclass(frozen=True, slots=True)
class _StepSection:
    """The prefill runs or the decode runs of a step: a range of tokens, the prefix levels over it, and the passes over the
    runs' own pages."""

    span: slice
    levels: tuple[_Level, ...]
    own: _CallPasses | None
    """None if `triton_decode` computes them, which reads the page table itself and needs `skip`."""
    skip: Parcel | None

    @property
    def is_covered(self) -> bool:
        """Whether the first level covers every token, so that its states are the ones that others are merged into."""
        first = self.levels[0] if self.levels else None
        return first is not None and first.gaps is None and first.span == self.span


@dataclass(frozen=True, slots=True)
class _Planned:
    """A section with planned kernels; `own` is None if `triton_decode` is used."""

    section: _StepSection
    levels: tuple[Wrapper, ...]
    own: Wrapper | None


class FlashInferPagedAttention:
    """See `AttentionBackend` and `Capturable`. FlashInfer's plans take page lists, which are made from the host's copy of the
    page table."""

    def __init__(self, shape: KVShape, dtype: torch.dtype, device: torch.device, kv_dtype: torch.dtype | None = None) -> None:
        assert dtype in (torch.bfloat16, torch.float16), "FlashInfer computes in 16-bit types"
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.kv_dtype = kv_dtype or dtype
        self._store = PageStore(shape, self.kv_dtype, device)
        self.cache = self._store.cache
        self._num_cores = torch.cuda.get_device_properties(device).multi_processor_count
        self._has_fa3 = torch.cuda.get_device_capability(device)[0] == 9 and self.kv_dtype == dtype
        row_bytes = 2 * shape.num_kv_heads * shape.head_dim * dtype.itemsize
        most = COPIED_BYTES // row_bytes if self._has_fa3 else 0
        self._copied = torch.empty(2, most, shape.num_kv_heads, shape.head_dim, dtype=dtype, device=device)
        if self._has_fa3:
            # Compiles it, so that no step has to: no row is copied.
            nothing = torch.zeros(1, 3, dtype=torch.int32, device=device)
            copy_out((self.cache.k_LNKPD[0], self.cache.v_LNKPD[0]), nothing, self._copied)
        # All wrappers share one workspace: their kernels run one after another on one stream.
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._sets = [_Wrappers(self._workspace) for _ in range(RING)]
        self._planned: list[_Planned] = []
        self._slot_T = self._position_T = torch.empty(0, dtype=torch.int32, device=device)

    def update_cache(self, step: StepBatch, outbox: Outbox) -> None:
        self._store.update_cache(step, outbox)

    def plan(self, step: StepBatch, outbox: Outbox) -> None:
        self._store.update_cache(step, outbox)
        slot, position = outbox.add(token_slots(step)), outbox.add(step.positions().astype(np.int32))
        split = int(step.run_length[: step.num_prefill_runs].sum())
        runs = slice(0, step.num_prefill_runs), slice(step.num_prefill_runs, len(step.run_slot))
        spans = slice(0, split), slice(split, step.num_tokens)
        sections = [
            self._section(step, part, span, outbox) for part, span in zip(runs, spans, strict=True) if span.start < span.stop
        ]

        def plan_kernels() -> None:
            self._slot_T, self._position_T = slot.tensor, position.tensor
            wrappers = self._sets[step.index % RING]
            wrappers.begin()
            self._planned = [self._plan_section(section, wrappers) for section in sections]

        outbox.once_sent(plan_kernels)

    def attend(self, layer: int, q_THD: torch.Tensor, k_TKD: torch.Tensor | None, v_TKD: torch.Tensor | None) -> torch.Tensor:
        cache = (self.cache.k_LNKPD[layer], self.cache.v_LNKPD[layer])
        if k_TKD is not None and v_TKD is not None:
            self._write(cache, k_TKD, v_TKD)
        q_THD = q_THD.contiguous()
        out_THD = torch.empty_like(q_THD)
        lse_TH = torch.empty(q_THD.shape[:2], dtype=torch.float32, device=self.device)
        for planned in self._planned:
            self._attend_section(planned, q_THD, cache, out_THD, lse_TH)
        return out_THD

    def _write(self, cache: State, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> None:
        size = self.shape.page_size
        position_T = self._position_T.long()
        page_T = self.cache.table[self._slot_T.long(), position_T // size].long()
        for pages, new_TKD in zip(cache, (k_TKD, v_TKD), strict=True):
            pages[page_T, :, position_T % size] = new_TKD.to(self.kv_dtype)

    def _attend_section(
        self, planned: _Planned, q_THD: torch.Tensor, cache: State, out_THD: torch.Tensor, lse_TH: torch.Tensor
    ) -> None:
        section = planned.section
        span, levels = section.span, section.levels
        out, lse = out_THD[span], lse_TH[span]
        if levels and not section.is_covered:
            out.zero_()
            lse.fill_(-torch.inf)
        for level, wrapper in zip(levels, planned.levels, strict=True):
            if level is levels[0] and section.is_covered:
                self._run(wrapper, level.passes, q_THD[span], cache, (out, lse))
            elif level.gaps is None:
                state = self._state(wrapper, level.passes, q_THD[level.span], cache)
                flashinfer.merge_state_in_place(out_THD[level.span], lse_TH[level.span], *state)
            else:
                tokens = level.gaps.tensor
                state = self._state(wrapper, level.passes, q_THD[tokens], cache)
                merged = flashinfer.merge_state(out_THD[tokens], lse_TH[tokens], *state)
                out_THD[tokens], lse_TH[tokens] = merged
        if planned.own is None:
            assert section.skip is not None
            place = self._slot_T[span], self._position_T[span], section.skip.tensor
            decode(q_THD[span], cache, self.cache.table, *place, out, lse if levels else None)
            return
        assert section.own is not None
        if levels:
            state = self._state(planned.own, section.own, q_THD[span], cache)
            flashinfer.merge_state_in_place(out, lse, *state)
        else:
            self._run(planned.own, section.own, q_THD[span], cache, (out, None))

    def _state(self, wrapper: Wrapper, passes: _CallPasses, q_NHD: torch.Tensor, cache: State) -> State:
        """Return the state of one kernel call. FlashInfer would zero outputs that it allocates itself; these are not zeroed."""
        state = torch.empty_like(q_NHD), torch.empty(q_NHD.shape[:2], dtype=torch.float32, device=q_NHD.device)
        self._run(wrapper, passes, q_NHD, cache, state)
        return state

    def _run(
        self,
        wrapper: Wrapper,
        passes: _CallPasses,
        q_NHD: torch.Tensor,
        cache: State,
        state: tuple[torch.Tensor, torch.Tensor | None],
    ) -> None:
        keys: tuple[torch.Tensor | State, ...] = (cache,)
        if passes.copied is not None:
            copy_out(cache, passes.copied.tensor, self._copied)
            keys = tuple(self._copied[:, : int(passes.keys.sum())])
        wrapper.run(q_NHD, *keys, out=state[0], lse=state[1], return_lse=state[1] is not None)

    def _section(self, step: StepBatch, part: slice, span: slice, outbox: Outbox) -> _StepSection:
        levels = tuple(
            self._level(level, outbox)
            for level in step.prefix_levels
            if len(level.slot) and span.start <= level.token_start[0] < span.stop
        )
        size, skip = self.shape.page_size, step.run_skip[part]
        stop = (step.run_start + step.run_length)[part]
        keys = stop - skip * size
        is_decode = part.start == step.num_prefill_runs
        fills = len(keys) * self.shape.num_kv_heads >= 2 * self._num_cores
        if is_decode and (fills or keys.mean() <= LONG_CONTEXT):
            return _StepSection(span, levels, None, outbox.add(skip))
        page_ids = self._page_ids(step.run_slot[part], skip, -(-stop // size), outbox)
        own = self._passes(step.run_length[part], page_ids, keys, causal=not is_decode, outbox=outbox)
        return _StepSection(span, levels, own, None)

    def _level(self, level: PrefixLevel, outbox: Outbox) -> _Level:
        queries = level.token_stop - level.token_start
        page_ids = self._page_ids(level.slot, level.page_start, level.page_stop, outbox)
        keys = (level.page_stop - level.page_start) * self.shape.page_size
        span = slice(int(level.token_start[0]), int(level.token_stop[-1]))
        gaps = None
        if int(queries.sum()) != span.stop - span.start:
            shift = np.repeat(level.token_start - (np.cumsum(queries) - queries), queries)
            gaps = outbox.add(np.arange(int(queries.sum()), dtype=np.int64) + shift)
        unchanged = b"|".join((queries.tobytes(), page_ids[0].tobytes(), page_ids[2].tobytes()))
        return _Level(span, gaps, self._passes(queries, page_ids, keys, causal=False, outbox=outbox), unchanged)

    def _page_ids(self, slots: Int32, first: Int32, last: Int32, outbox: Outbox) -> tuple[Int32, Parcel, Int32]:
        """Return `page_table[slot, first : last]` of N passes: offsets [N + 1], the concatenated page ids as sent to the
        device, and the same on the host."""
        counts = last - first
        indptr = np.append(0, np.cumsum(counts)).astype(np.int32)
        column = np.arange(int(indptr[-1])) - np.repeat(indptr[:-1] - first, counts)
        pages = self._store.page_table[np.repeat(slots, counts), column]
        return indptr, outbox.add(pages), pages

    def _plan_section(self, section: _StepSection, wrappers: _Wrappers) -> _Planned:
        levels = tuple(self._plan_prefill(level.passes, wrappers, level.unchanged) for level in section.levels)
        own = section.own
        if own is None:
            return _Planned(section, levels, None)
        if own.causal:
            return _Planned(section, levels, self._plan_prefill(own, wrappers))
        wrappers.decoder.plan(*self._keys(own), **self._types(own))
        return _Planned(section, levels, wrappers.decoder)

    def _passes(
        self, queries: Int32, page_ids: tuple[Int32, Parcel, Int32], keys: Int32, *, causal: bool, outbox: Outbox
    ) -> _CallPasses:
        indptr, indices, pages = page_ids
        kernel = self._kernel(queries.astype(np.int64), keys.astype(np.int64), causal)
        copied = outbox.add(copy_list(pages, keys, self.shape.page_size)) if kernel is _Kernel.FA3_COPIED else None
        return _CallPasses(queries, indptr, indices, (keys - 1) % self.shape.page_size + 1, keys, causal, kernel, copied)

    def _kernel(self, queries: Int64, keys: Int64, causal: bool) -> _Kernel:
        """Return the fastest kernel for prefill: see `TILE_QUERIES`, `LONG_PREFILL` and `COPIED_ROWS`."""
        fewest = LONG_PREFILL if causal else TILE_QUERIES
        programs = int((-(-queries // TILE_QUERIES)).sum()) * self.shape.num_heads
        if not self._has_fa3 or float(queries.mean()) < fewest or programs < self._num_cores:
            return _Kernel.FA2
        seen = keys - (queries - 1) / 2 if causal else keys
        rows = float((queries * seen).sum()) * (self.shape.num_heads // self.shape.num_kv_heads)
        num_keys = int(keys.sum())
        is_worth = rows >= COPIED_ROWS * num_keys and num_keys <= self._copied.shape[1]
        return _Kernel.FA3_COPIED if is_worth else _Kernel.FA3

    def _plan_prefill(self, passes: _CallPasses, wrappers: _Wrappers, unchanged: bytes = b"") -> Wrapper:
        """Plan the step's next prefill wrapper, unless it already holds the plan of the same `unchanged` bytes: groups do not
        change while samples only decode. A plan without them is not used again."""
        kept = wrappers.prefill(passes.kernel)
        if not unchanged or kept.planned != unchanged:
            kept.planned = b""
            kept.wrapper.plan(_offsets(passes.queries), *self._keys(passes), causal=passes.causal, **self._types(passes))
            kept.planned = unchanged
        return kept.wrapper

    def _keys(self, passes: _CallPasses) -> tuple[torch.Tensor | int, ...]:
        """Return the arguments of a plan that say which keys there are, and of which sizes."""
        shape = self.shape
        sizes = shape.num_heads, shape.num_kv_heads, shape.head_dim
        if passes.copied is not None:
            return _offsets(passes.keys), *sizes
        return _host(passes.indptr), passes.indices.tensor, _host(passes.last_length), *sizes, shape.page_size

    def _types(self, passes: _CallPasses) -> dict[str, Any]:
        types = {"q_data_type": self.dtype, "kv_data_type": self.kv_dtype}
        return types if passes.copied is not None else {**types, "seq_lens": _host(passes.keys)}


@dataclass(slots=True)
class _Kept:
    """A prefill wrapper and the `_Level.unchanged` of its plan; empty if the plan cannot be used again."""

    wrapper: PrefillWrapper
    planned: bytes = b""


class _Wrappers:
    """The kernel wrappers of one step in flight. Planning fills a pinned buffer of the wrapper that the device reads later: a
    wrapper may be planned again only when its step has finished."""

    def __init__(self, workspace: torch.Tensor) -> None:
        self._workspace = workspace
        self.decoder = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        self._prefill: dict[_Kernel, list[_Kept]] = {kernel: [] for kernel in _Kernel}
        self._used = dict.fromkeys(_Kernel, 0)

    def begin(self) -> None:
        """Begin a new step, which uses the wrappers from the first one on."""
        self._used = dict.fromkeys(_Kernel, 0)

    def prefill(self, kernel: _Kernel) -> _Kept:
        """Return the step's next wrapper of a kernel."""
        kept, place = self._prefill[kernel], self._used[kernel]
        if place == len(kept):
            if kernel is _Kernel.FA3_COPIED:
                kept.append(_Kept(flashinfer.BatchPrefillWithRaggedKVCacheWrapper(self._workspace, "NHD", backend="fa3")))
            else:
                kept.append(_Kept(flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "HND", backend=kernel.value)))
        self._used[kernel] += 1
        return kept[place]


def _offsets(lengths: Int32) -> torch.Tensor:
    return _host(np.append(0, np.cumsum(lengths)))


def _host(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int32)).pin_memory()


Backend = FlashInferPagedAttention
