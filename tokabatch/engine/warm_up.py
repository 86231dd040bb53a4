"""Warm-up steps that launch every kernel once, so that none is compiled or loaded during the run.

They write to slots and pages that the first real steps overwrite before reading them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tokabatch.arrays import Int32
from tokabatch.engine.replica_sizes import ReplicaSizes
from tokabatch.scheduling.contracts import PrefixLevel, SamplingParams, SlotInit, SlotPenalties, StepBatch

MAX_PROMPT = 1024
"""The most tokens of the prompt: enough to launch the kernels that are used only for long runs."""
MANY_SAMPLES, FEW_SAMPLES = 1024, 8
"""The samples of a decode step that fills the device, and of one that does not: attention launches other kernels for it."""


def warm_up_steps(sizes: ReplicaSizes, draws: Sequence[SamplingParams]) -> Iterator[StepBatch]:
    """Yield the steps: a prefill of one prompt; decode steps of few and of many samples of it, the first of which copies its
    last page; the same with the prompt as a shared prefix; and a step for each of `draws`. All samples use the same page of
    their own, as their results are discarded. Yields nothing if the sizes leave no room for a full page."""
    page = sizes.page_size
    full = min(MAX_PROMPT // page, sizes.max_pages_per_sequence - 1, sizes.num_pages - 2, (sizes.max_step_tokens - 1) // page)
    if full < 1:
        return
    pages = np.arange(full + 1, dtype=np.int32)
    first = np.zeros(1, np.int32)
    length = full * page + 1
    greedy = SamplingParams(temperature=0.0)
    yield _step(0, _table(first, pages), (first, first, first + length), greedy, prefill=1)
    copy, index = (first + full, first + full + 1), 1
    runs = first, first, first
    for count in sorted({min(count, sizes.max_running) for count in (FEW_SAMPLES, MANY_SAMPLES)}):
        slots = np.arange(count, dtype=np.int32)
        runs = slots, np.full(count, full * page, np.int32), np.ones(count, np.int32)
        yield _step(index, _table(slots, pages), runs, greedy, copy=copy)
        level = PrefixLevel(first, first + count, first, first, first + full)
        yield _step(index + 1, _table(first, pages), runs, greedy, level=level, skip=runs[2] * full)
        copy, index = None, index + 2
    # The larger step is repeated for each kind of drawing.
    for place, params in enumerate(draws):
        yield _step(index + place, _table(first, pages), runs, params)


def kinds_of_drawing(sampling: Sequence[SamplingParams]) -> tuple[SamplingParams, ...]:
    """Return one of the parameters for each kind of drawing that uses different kernels, and one that combines all kinds."""
    kinds = {_kind(params): params for params in sampling}
    found = zip(*kinds, strict=True) if kinds else ((False,), (False,), (-1,), (False,))
    random, filtered, logprobs, penalised = (max(values) for values in found)
    everything = SamplingParams(
        temperature=1.0 if random else 0.0,
        top_p=0.9 if filtered else 1.0,
        logprobs=None if logprobs < 0 else logprobs,
        repetition_penalty=1.1 if penalised else 1.0,
    )
    return tuple({**kinds, _kind(everything): everything}.values())


def _kind(params: SamplingParams) -> tuple[bool, bool, int, bool]:
    random = params.temperature > 0
    filtered = random and (params.top_p < 1 or params.top_k > 0 or params.min_p > 0)
    return random, filtered, -1 if params.logprobs is None else params.logprobs, params.penalised


def _step(
    index: int,
    table: tuple[Int32, Int32, Int32],
    runs: tuple[Int32, Int32, Int32],
    params: SamplingParams,
    prefill: int = 0,
    copy: tuple[Int32, Int32] | None = None,
    level: PrefixLevel | None = None,
    skip: Int32 | None = None,
) -> StepBatch:
    none = np.zeros(0, np.int32)
    slots, start, length = runs
    zero, one = np.zeros(len(slots), np.int32), np.ones(len(slots), np.float32)
    # All penalties, and for each slot one rule about one token.
    rules = np.zeros((len(slots), 4), np.int32)
    each = np.ones(len(slots))
    penalties = SlotPenalties(slots, zero, each, each, each, num_rules=zero + np.int32(1), rules=rules)
    inits = SlotInit(
        slot=slots,
        row=zero.astype(np.int64),
        sample=zero,
        seed=zero.astype(np.int64),
        temperature=one * np.float32(params.temperature),
        top_p=one * np.float32(params.top_p),
        top_k=zero + np.int32(params.top_k),
        min_p=one * np.float32(params.min_p),
        logprobs=zero + np.int32(-1 if params.logprobs is None else params.logprobs),
        penalties=penalties if params.penalised else None,
    )
    return StepBatch(
        index=index,
        inits=inits,
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
    """Return the changes of the page table (slots, columns, pages) that give each slot the same pages."""
    column = np.arange(len(pages), dtype=np.int32)
    return np.repeat(slots, len(pages)), np.tile(column, len(slots)), np.tile(pages, len(slots))
