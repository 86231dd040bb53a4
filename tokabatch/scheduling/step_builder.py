"""Turn a step's decisions into the `StepBatch` that is sent to the worker. No decision is made here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tokabatch.arrays import Int32, Int64
from tokabatch.scheduling.contracts import PrefixLevel, SamplingParams, ScoredPlaces, SlotInit, StepBatch
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits, PromptRuns, find_groups
from tokabatch.scheduling.kv.manager import KVCacheManager, Runs
from tokabatch.scheduling.kv.slots import Slots
from tokabatch.scheduling.penalty_rules import PenaltyTable
from tokabatch.scheduling.stop_conditions import StopRules
from tokabatch.scheduling.work import Work

_NONE = np.zeros(0, np.int32)


class SamplingTable:
    """`Requests.sampling` as arrays, so that a step's slots are initialised by one lookup."""

    def __init__(self) -> None:
        self.seed = np.zeros(0, np.int64)
        self.temperature = self.top_p = self.min_p = np.zeros(0, np.float32)
        self.top_k = np.zeros(0, np.int32)

    def extend(self, sampling: Sequence[SamplingParams]) -> None:
        """Append further entries."""
        self.seed = np.append(self.seed, np.array([p.seed for p in sampling], np.int64))
        self.temperature = np.append(self.temperature, np.array([p.temperature for p in sampling], np.float32))
        # A top_p below float32's resolution would keep no token; the most likely one must always be kept.
        self.top_p = np.append(self.top_p, np.array([max(p.top_p, 1e-6) for p in sampling], np.float32))
        self.top_k = np.append(self.top_k, np.array([p.top_k for p in sampling], np.int32))
        self.min_p = np.append(self.min_p, np.array([p.min_p for p in sampling], np.float32))


class StepBuilder:
    """Combine a step's decisions with the changes of the cache into a `StepBatch`."""

    def __init__(self, work: Work, kv: KVCacheManager, grouping: GroupingLimits | None, stops: StopRules) -> None:
        self._work = work
        self._kv = kv
        self._grouping = grouping
        self._stops = stops
        self._sampling: tuple[SamplingParams, ...] = ()
        """The sampling parameters in `_tables`, in their order."""
        self._tables = SamplingTable(), PenaltyTable(lambda entry: stops.ids[entry])

    def build(self, index: int, prefill: Runs, decoding: Int64, decode_ids: Int32 | None = None) -> StepBatch:
        """Return the step that computes `prefill`, in plan order, and one token of each decoding slot: the one in `decode_ids`,
        or if that is None, the one that the worker holds."""
        work, slots = self._work, self._kv.slots
        if self._sampling is not work.sampling:
            self._take_sampling()
        changes = self._kv.take_changes()
        run_slot = np.concatenate((prefill.slots, decoding))
        start = slots.computed[run_slot]
        length = np.concatenate((prefill.tokens, np.ones(len(decoding), np.int32)))
        token = np.append(0, np.cumsum(length)).astype(np.int32)
        levels: list[PrefixLevel] = []
        skip = np.zeros(len(run_slot), np.int32)
        for section in (slice(0, len(prefill.slots)), slice(len(prefill.slots), len(run_slot))):
            found, skip[section] = self._groups(run_slot[section], start[section], token[section.start : section.stop + 1])
            levels += found
        return StepBatch(
            index=index,
            inits=self._slot_inits(changes.opened),
            table_slot=changes.cells.slot.astype(np.int32),
            table_column=changes.cells.column,
            table_page=changes.cells.page,
            clear_pages=changes.clear_pages,
            copy_src=changes.copy_src,
            copy_dst=changes.copy_dst,
            num_prefill_runs=len(prefill.slots),
            run_slot=run_slot.astype(np.int32),
            run_start=start,
            run_length=length,
            run_samples=start + length == slots.length[run_slot],
            run_skip=skip,
            token_ids=_host_tokens(slots, work, prefill.slots, prefill.tokens),
            prefix_levels=tuple(levels),
            decode_ids=decode_ids,
            scored=self._scored(prefill.slots, start, length, token) if work.has_texts else None,
            draws=work.continuations is None,
        )

    def _take_sampling(self) -> None:
        known, self._sampling = self._sampling, self._work.sampling
        if known != self._sampling[: len(known)]:  # Some have been forgotten.
            stops = self._stops
            known, self._tables = (), (SamplingTable(), PenaltyTable(lambda entry: stops.ids[entry]))
        for table in self._tables:
            table.extend(self._sampling[len(known) :])

    def _scored(self, run_slot: Int64, start: Int32, length: Int32, token: Int32) -> ScoredPlaces | None:
        """Return the places of these runs at which the next token belongs to a given text, or None if there are none. Run i
        computes `length[i]` tokens from position `start[i]`, and begins at `token[i]` on the step's token axis."""
        work, given, slots = self._work, self._work.continuations, self._kv.slots
        begin, request = start[: len(run_slot)], slots.request[run_slot]
        before = slots.prompt_length[run_slot] - 1
        skipped = np.maximum(before - begin, 0)
        counts = length[: len(run_slot)]
        if given is None:
            counts = np.minimum(counts, before + work.given[request] - begin)
        counts = np.maximum(counts - skipped, 0)
        if not counts.any():
            return None
        run = np.repeat(np.arange(len(run_slot)), counts)
        place = np.arange(len(run)) - np.repeat(np.cumsum(counts) - counts, counts) + skipped[run]
        if given is None:
            # Given texts that begin a sample: their tokens directly follow the prompt's.
            target = work.tokens_at(request[run], begin[run].astype(np.int64) + place + 1)
            most = int(work.logprobs[slots.params[run_slot[counts > 0]]].max())
            return ScoredPlaces((token[run] + place).astype(np.int32), target, max(most, 0))
        number = given.first[work.row_index[request]] + slots.sample[run_slot]
        target = given.tokens[given.start[number][run] + start[run] + place - before[run]]
        return ScoredPlaces((token[run] + place).astype(np.int32), target)

    def _slot_inits(self, slots: Int64) -> SlotInit:
        seq, work, (table, penalties) = self._kv.slots, self._work, self._tables
        params = seq.params[slots]
        return SlotInit(
            slot=slots.astype(np.int32),
            row=work.key[seq.request[slots]],
            sample=seq.sample[slots],
            seed=table.seed[params],
            temperature=table.temperature[params],
            top_p=table.top_p[params],
            top_k=table.top_k[params],
            min_p=table.min_p[params],
            logprobs=work.logprobs[params],
            penalties=penalties.of(slots, params, seq.prompt_length[slots]),
        )

    def _groups(self, run_slot: Int64, start: Int32, token: Int32) -> tuple[list[PrefixLevel], Int32]:
        """Return the Hydragen groups among R runs in plan order, and the number of leading pages of each run that they cover,
        shape [R]. Run i computes from position `start[i]`, and is `token[i] : token[i + 1]` on the step's token axis."""
        nothing, limits, sharing = np.zeros(len(run_slot), np.int32), self._grouping, self._kv.tree.sharing
        if limits is None or len(run_slot) < limits.min_group:
            return [], nothing
        request = self._kv.slots.request[run_slot]
        first = np.nonzero(np.append(True, request[1:] != request[:-1]))[0]
        counts = np.diff(np.append(first, len(run_slot))).astype(np.int32)
        if int(counts.max()) < limits.min_group and not sharing.any_shared(limits.min_pages):
            return [], nothing
        prompts = PromptRuns(
            num_runs=counts,
            token_start=token[first],
            token_stop=token[first + counts],
            slot=run_slot[first].astype(np.int32),
            shared_before=sharing.shared_between(request[first]),
            shared_within=self._kv.tree.full_pages(request[first]),
            limit=np.minimum.reduceat(start // self._kv.page_size, first),
        )
        levels, covered = find_groups(prompts, limits)
        return levels, np.repeat(covered, counts)


def _host_tokens(seq: Slots, work: Work, slots: Int64, takes: Int32) -> Int32:
    """Return the token ids of the prefill runs, run after run: prompt tokens, then the output of a preempted sample."""
    if not len(slots):
        return _NONE
    run = np.repeat(np.arange(len(slots)), takes)
    position = np.arange(len(run)) - (np.cumsum(takes) - takes)[run] + seq.computed[slots][run]
    length = seq.prompt_length[slots][run]
    in_prompt = position < length
    tokens = np.empty(len(run), np.int32)
    tokens[in_prompt] = work.tokens_at(seq.request[slots][run][in_prompt], position[in_prompt])
    begin = np.cumsum(takes) - takes
    # Few runs extend beyond their prompts: those of preempted or requeued samples, and of given texts.
    for i in np.flatnonzero(seq.computed[slots] + takes > seq.prompt_length[slots]).tolist():
        place = slice(int(begin[i]), int(begin[i] + takes[i]))
        output = position[place] - length[place]
        tokens[place][output >= 0] = seq.outputs.tokens(slots[i : i + 1])[0][output[output >= 0]]
    return tokens
