"""Turning a step's decisions into the message the worker gets. Knows the layout of `StepBatch`, decides nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tokabatch.messages import Int32, Int64, PrefixLevel, SamplingParams, SlotInit, StepBatch
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits, PromptRuns, find_groups
from tokabatch.scheduling.kv.prefix_tree import OpenPrompts
from tokabatch.scheduling.kv.slots import Sequences
from tokabatch.scheduling.work import Work

_NONE, _NO_SLOTS = np.zeros(0, np.int32), np.zeros(0, np.int64)


class SamplingTable:
    """`Requests.sampling` as arrays, so that a step's slots are initialised by one lookup."""

    def __init__(self, sampling: Sequence[SamplingParams]) -> None:
        self.seed = np.array([p.seed for p in sampling], np.int64)
        self.temperature = np.array([p.temperature for p in sampling], np.float32)
        # Below float32's resolution nothing would be kept; the most likely token always is.
        self.top_p = np.array([max(p.top_p, 1e-6) for p in sampling], np.float32)
        self.top_k = np.array([p.top_k for p in sampling], np.int32)
        self.min_p = np.array([p.min_p for p in sampling], np.float32)
        self.logprobs = np.array([-1 if p.logprobs is None else p.logprobs for p in sampling], np.int32)


class StepDraft:
    """Collects a step's changes to slots and pages while the scheduler decides."""

    def __init__(self, index: int) -> None:
        self.index = index
        self._opened: list[Int64] = []
        self._cells: list[tuple[Int64, Int32, Int32]] = []
        self._copies: list[tuple[Int32, Int32]] = []

    def open_slots(self, slots: Int64) -> None:
        self._opened.append(slots)

    def set_pages(self, cells: tuple[Int64, Int32, Int32]) -> None:
        """Changed page-table cells: slots, columns, pages. No cell is set twice in a step."""
        self._cells.append(cells)

    def copy_pages(self, src: Int32, dst: Int32) -> None:
        self._copies.append((src, dst))

    def build(
        self,
        seq: Sequences,
        prompts: OpenPrompts,
        work: Work,
        table: SamplingTable,
        prefill: tuple[Int64, Int32],
        decoding: Int64,
        grouping: GroupingLimits | None,
        page_size: int,
        clear_pages: Int32,
    ) -> StepBatch:
        """The step that computes `prefill` (slots and token counts, in plan order) and one token of each decoding slot."""
        prefilling, takes = prefill
        slots = np.concatenate((prefilling, decoding))
        start = seq.computed[slots]
        length = np.concatenate((takes, np.ones(len(decoding), np.int32)))
        levels: list[PrefixLevel] = []
        skip = np.zeros(len(slots), np.int32)
        if grouping is not None:
            token = np.append(0, np.cumsum(length)).astype(np.int32)
            for section in (slice(0, len(prefilling)), slice(len(prefilling), len(slots))):
                found, skip[section] = _group_section(seq, prompts, slots, start // page_size, token, section, grouping)
                levels.extend(found)
        cells, copies = self._cells, self._copies
        return StepBatch(
            index=self.index,
            inits=_slot_inits(seq, work, table, np.concatenate(self._opened) if self._opened else _NO_SLOTS),
            table_slot=np.concatenate([c[0] for c in cells], dtype=np.int32) if cells else _NONE,
            table_column=np.concatenate([c[1] for c in cells]) if cells else _NONE,
            table_page=np.concatenate([c[2] for c in cells]) if cells else _NONE,
            clear_pages=clear_pages,
            copy_src=np.concatenate([c[0] for c in copies]) if copies else _NONE,
            copy_dst=np.concatenate([c[1] for c in copies]) if copies else _NONE,
            num_prefill_runs=len(prefilling),
            run_slot=slots.astype(np.int32),
            run_start=start,
            run_length=length,
            run_samples=start + length == seq.length[slots],
            run_skip=skip,
            token_ids=_host_tokens(seq, work, prefilling, takes),
            prefix_levels=tuple(levels),
        )


def _slot_inits(seq: Sequences, work: Work, table: SamplingTable, slots: Int64) -> SlotInit:
    params = seq.params[slots]
    return SlotInit(
        slot=slots.astype(np.int32),
        row=work.row_index[seq.request[slots]],
        sample=seq.sample[slots],
        seed=table.seed[params],
        temperature=table.temperature[params],
        top_p=table.top_p[params],
        top_k=table.top_k[params],
        min_p=table.min_p[params],
        logprobs=table.logprobs[params],
    )


def _host_tokens(seq: Sequences, work: Work, slots: Int64, takes: Int32) -> Int32:
    """Token ids of the prefill runs, one run after another: prompt tokens, then those a preempted sample had produced."""
    if not len(slots):
        return _NONE
    run = np.repeat(np.arange(len(slots)), takes)
    position = np.arange(len(run)) - (np.cumsum(takes) - takes)[run] + seq.computed[slots][run]
    length = seq.prompt_length[slots][run]
    in_prompt = position < length
    tokens = np.empty(len(run), np.int32)
    tokens[in_prompt] = work.tokens_at(seq.request[slots][run][in_prompt], position[in_prompt])
    begin = np.cumsum(takes) - takes
    # Few runs reach behind their prompts: those of samples that were preempted or taken back.
    for i in np.flatnonzero(seq.computed[slots] + takes > seq.prompt_length[slots]).tolist():
        place = slice(int(begin[i]), int(begin[i] + takes[i]))
        output = position[place] - length[place]
        tokens[place][output >= 0] = seq.outputs.tokens(slots[i : i + 1])[0][output[output >= 0]]
    return tokens


def _group_section(
    seq: Sequences,
    prompts: OpenPrompts,
    slots: Int64,
    full_pages: Int32,
    token: Int32,
    section: slice,
    limits: GroupingLimits,
) -> tuple[list[PrefixLevel], Int32]:
    """Hydragen groups among the runs of `section`, which stand in plan order; and the pages covered for each run."""
    own = slots[section]
    if len(own) < limits.min_group:
        return [], np.zeros(len(own), np.int32)
    request = seq.request[own]
    first = np.nonzero(np.append(True, request[1:] != request[:-1]))[0]
    counts = np.diff(np.append(first, len(own))).astype(np.int32)
    distinct = request[first]
    if int(counts.max()) < limits.min_group and not prompts.neighbours.any_shared(limits.min_pages):
        return [], np.zeros(len(own), np.int32)
    levels, covered = find_groups(
        PromptRuns(
            num_runs=counts,
            token_start=token[section.start + first],
            token_stop=token[section.start + first + counts],
            slot=own[first].astype(np.int32),
            shared_before=prompts.neighbours.shared_between(distinct),
            shared_within=prompts.full_pages(distinct),
            limit=np.minimum.reduceat(full_pages[section], first),
        ),
        limits,
    )
    return levels, np.repeat(covered, counts)
