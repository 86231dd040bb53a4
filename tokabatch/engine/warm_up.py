"""Steps that touch every kernel once, so that none is compiled or loaded while the clock runs.

They write to slots and pages that the first real steps overwrite before they read them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tokabatch.engine.sizing import ReplicaSizes
from tokabatch.messages import Int32, PrefixLevel, SlotInit, StepBatch

MAX_PROMPT = 1024
"""Tokens of the longest prompt: enough for the kernels that take long runs only."""
MAX_SAMPLES = 256


def warm_up_steps(sizes: ReplicaSizes) -> Iterator[StepBatch]:
    """One prompt computed; many samples behind it, each with its last page copied; the same with the prompt as a shared
    prefix. Every sample's own page is one and the same, which nobody minds."""
    page = sizes.page_size
    full = min(MAX_PROMPT // page, sizes.max_pages_per_sequence - 1, sizes.num_pages - 2, (sizes.max_step_tokens - 1) // page)
    if full < 1:
        return
    pages = np.arange(full + 1, dtype=np.int32)
    first = np.zeros(1, np.int32)
    length = full * page + 1
    yield _step(0, _table(first, pages), runs=(first, first, first + length), prefill=1, samples=1)
    slots = np.arange(min(MAX_SAMPLES, sizes.max_running), dtype=np.int32)
    start = np.full(len(slots), full * page, np.int32)
    once = np.ones(len(slots), np.int32)
    copy = first + full, first + full + 1
    yield _step(1, _table(slots, pages), runs=(slots, start, once), copy=copy, temperature=0.7, samples=len(slots))
    level = PrefixLevel(first, first + len(slots), first, first, first + full)
    yield _step(2, _table(first, pages), runs=(slots, start, once), level=level, skip=once * full, samples=len(slots))


def _step(
    index: int,
    table: tuple[Int32, Int32, Int32],
    runs: tuple[Int32, Int32, Int32],
    samples: int,
    prefill: int = 0,
    copy: tuple[Int32, Int32] | None = None,
    level: PrefixLevel | None = None,
    skip: Int32 | None = None,
    temperature: float = 0.0,
) -> StepBatch:
    none = np.zeros(0, np.int32)
    slots, start, length = runs
    opened = np.arange(samples, dtype=np.int32)
    zero, wide = np.zeros(samples, np.int32), np.zeros(samples, np.int64)
    one = np.ones(samples, np.float32)
    return StepBatch(
        index=index,
        inits=SlotInit(opened, wide, zero, wide, one * temperature, one, zero, one * 0, zero - 1),
        table_slot=table[0],
        table_column=table[1],
        table_page=table[2],
        clear_pages=none,
        copy_src=copy[0] if copy else none,
        copy_dst=copy[1] if copy else none,
        num_prefill_runs=prefill,
        run_slot=slots,
        run_start=start,
        run_length=length,
        run_samples=np.ones(len(slots), np.bool_),
        run_skip=np.zeros(len(slots), np.int32) if skip is None else skip,
        token_ids=np.zeros(int(length[:prefill].sum()), np.int32),
        prefix_levels=() if level is None else (level,),
    )


def _table(slots: Int32, pages: Int32) -> tuple[Int32, Int32, Int32]:
    """The cells that give each slot the same pages."""
    column = np.arange(len(pages), dtype=np.int32)
    return np.repeat(slots, len(pages)), np.tile(column, len(slots)), np.tile(pages, len(slots))
