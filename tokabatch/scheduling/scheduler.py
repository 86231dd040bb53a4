"""The scheduler of one replica: decides its steps one by one, applies their results, and returns finished samples.

`schedule` makes a step as if no sample ended, `apply` applies what a step sampled, one or more steps later: any number of
steps may be in flight, results arrive in order, and what was computed for a sample that had already ended is dropped.
`policy/` decides what a step computes, `sample_ends` when a sample ends, `quarantine` which prompts may have killed a
worker; `kv` owns the pages. Work is open-ended: `extend` adds prompts, `give_back` returns some for another scheduler,
`cancel` stops a row. The worker may be lost at any time, and its cache with it: `lost_device` requeues every running sample.
This package neither sends nor computes the steps.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import numpy as np

from tokabatch.arrays import Bool, Int32, Int64
from tokabatch.scheduling.contracts import Alike, Completion, Requests, StepBatch, StepResult
from tokabatch.scheduling.counts import SchedulerCounts
from tokabatch.scheduling.generated import Generated
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.kv.manager import KVCacheManager
from tokabatch.scheduling.lengths.length_estimates import LengthEstimates
from tokabatch.scheduling.lengths.predictor import LengthPredictor
from tokabatch.scheduling.policy.forecast_policy import ForecastPolicy
from tokabatch.scheduling.policy.policy import Policy
from tokabatch.scheduling.policy.step_decision import StepDecisions
from tokabatch.scheduling.quarantine import Quarantine, Sample
from tokabatch.scheduling.sample_ends import BAD_LOGITS, SampleEnds, completion, killed, overflow
from tokabatch.scheduling.step_builder import StepBuilder
from tokabatch.scheduling.stop_conditions import StopRules
from tokabatch.scheduling.work import Work

COMPACTED_PROMPTS = 4096
"""The least number of finished prompts that `compact` forgets at once."""


UNEVEN = 1.03
"""The largest wave as a multiple of the average: members of a fleet do not draw equal parts."""


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """The limits of the device. `max_step_tokens` is at least `max_running`."""

    page_size: int
    num_pages: int
    max_running: int
    max_step_tokens: int
    max_pages_per_sequence: int
    grouping: GroupingLimits | None
    """None turns Hydragen off: every sample reads its whole context by itself."""
    stages: int = 1
    """Pipeline stages of the worker. With several, sampled tokens return to the first stage through the scheduler, so a sample
    is in at most one step in flight; the caller should keep `stages + 1` steps in flight."""
    alike: Alike | None = None
    """What is to be drawn in all, if all samples have one given length; None if the number that run is not to depend on it."""

    def even_wave(self, num_pages: int) -> int:
        """Return the most samples to run at once with so many pages. Samples of one length begin and end together, wave after
        wave; of waves as large as possible the last may be so small that it leaves most of the device idle."""
        if self.alike is None or not self.alike.samples:
            return self.max_running
        fitting = max(1, min(self.max_running, int(num_pages / self.alike.pages)))
        waves = -(-self.alike.samples // fitting)
        return min(self.max_running, math.ceil(UNEVEN * self.alike.samples / waves))


@dataclass(frozen=True, slots=True)
class _InFlight:
    slots: Int64
    """Slots that sample, shape [S]; `epochs` holds their epochs."""
    epochs: Int32
    run_slots: Int64
    """Slots of all runs, sampled or not."""
    scored: Int64
    """The slot of each given token that is scored, shape [R]; `scored_epochs` holds their epochs."""
    scored_epochs: Int32


class Scheduler:
    """Schedules `requests` on one replica, in their order."""

    def __init__(
        self,
        requests: Requests,
        limits: SchedulerLimits,
        stops: StopRules,
        lengths: LengthPredictor | None = None,
        policy: Callable[[Work, KVCacheManager, LengthEstimates], Policy] = ForecastPolicy,
        counts: SchedulerCounts | None = None,
    ) -> None:
        """`lengths` replaces the predictor that learns online, for simulations and comparisons; `counts` continues the totals
        of a scheduler that this one replaces."""
        self.work = Work(requests)
        self.limits = limits
        self.counts = counts or SchedulerCounts()
        sizes = limits.num_pages, limits.page_size, limits.max_running, limits.max_pages_per_sequence
        self.kv = KVCacheManager(self.work, self.counts, *sizes)
        self._stops = stops
        self._ends = SampleEnds(self.work, self.kv.slots, self._stops)
        self._lengths = LengthEstimates(self.work, self.kv.slots, self.counts, lengths)
        self._quarantine = Quarantine()
        self._decisions = StepDecisions(self.work, self.kv, self._lengths, self.counts, self._quarantine, policy)
        self._builder = StepBuilder(self.work, self.kv, limits.grouping, self._stops)
        self._in_flight: deque[_InFlight] = deque()
        self._last_token = np.zeros(limits.max_running, np.int32)
        """The last token received of each slot, shape [slots]; kept up to date only for a worker of several stages."""

    @property
    def done(self) -> bool:
        """Whether every sample of every request has been returned as a completion."""
        if self.num_running or self._in_flight or not self.work.exhausted:
            return False
        return not self.kv.tree.suspended and not self.kv.tree.with_pending()

    @property
    def num_running(self) -> int:
        """Samples that have a slot."""
        return len(self.kv.slots.order)

    @property
    def num_in_flight(self) -> int:
        """Steps decided whose results have not been applied."""
        return len(self._in_flight)

    def suspected_rows(self) -> Int64:
        """Return the rows of which one is assumed to kill workers, ascending; none after a single crash."""
        return np.unique(self.work.row_index[sorted(self._quarantine.suspects)])

    def learn(self, length: Int32, stopped: Bool) -> None:
        """Learn from samples of other prompts that ended on another replica, with these lengths; `stopped` is True where the
        model ended them, not the limit."""
        self._lengths.learn(length, stopped)

    def expected_tokens_left(self, waiting: int) -> int:
        """Return the expected number of output tokens still to come, including those of `waiting` samples not yet admitted."""
        return self._lengths.tokens_left(waiting)

    @property
    def headway(self) -> float:
        """How much of the work of the running samples is done, in samples: their number, less the output tokens expected of
        them in the near future over those of a sample that begins. Negative if these samples are expected to take longer."""
        return self._lengths.headway

    def schedule(self) -> StepBatch | None:
        """Return the next step, or None if nothing can be computed before further results are applied."""
        slots, limits = self.kv.slots, self.limits
        decided = self._decisions.decide(limits.max_step_tokens, limits.stages, in_flight=bool(self._in_flight))
        if decided is None:
            return None
        self.counts.steps += 1
        last = self._last_token[decided.decoding] if limits.stages > 1 else None
        step = self._builder.build(self.counts.steps, decided.runs, decided.decoding, last)
        sampled = self.kv.advance(step)
        run_slots = step.run_slot.astype(np.int64)
        scored_slots = run_slots[:0]
        if step.scored is not None:
            scored_slots = np.repeat(run_slots, step.run_length)[step.scored.token]
        epochs = slots.epoch[sampled], slots.epoch[scored_slots]
        self._in_flight.append(_InFlight(sampled, epochs[0], run_slots, scored_slots, epochs[1]))
        self.counts.prefilled_tokens += int(decided.runs.tokens.sum())
        self.counts.waited_steps += decided.num_waiting
        return step

    def apply(self, result: StepResult) -> list[Completion]:
        """Apply the result of the oldest step in flight. Return the samples that it finished. A sample whose logits are not
        finite is computed once more alone, and ends with the error code `nan_logits` if they are not finite again."""
        step, seq = self._in_flight.popleft(), self.kv.slots
        bad = self._ends.add_scores(step.scored, step.scored_epochs, result.scores)
        if not result.finite.all() or bad.any():
            self._compute_again(step, result.finite, bad)
        matches = seq.epoch[step.slots] == step.epochs
        current = slice(None) if matches.all() else matches
        slots, tokens = step.slots[current], result.token[current]
        seq.outputs.append(slots, tokens, result.logprob[current], result.top_ids[current], result.top_logprobs[current])
        if self.limits.stages > 1:
            self._last_token[slots] = tokens
        self.counts.output_tokens += len(slots)
        bad_texts = step.scored[(seq.epoch[step.scored] == step.scored_epochs) & bad]
        ends = self._ends.find(slots, tokens, result.finite[current], bad_texts)
        if self._quarantine.active:
            self._quarantine.advance(self._received(seq.order), self._received(ends.slots))
        if not len(ends.slots):
            return []
        self._lengths.observe(ends.slots, np.array([reason is not None for reason in ends.reasons], np.bool_))
        request, completions = seq.request[ends.slots], self._ends.completions(ends)
        if self.work.continuations is not None:
            self.counts.output_tokens += sum(len(each.token_ids) - 1 for each in completions if each.error_code is None)
        finished = self.kv.close(ends.slots)
        self._lengths.forget(finished)
        self.counts.finished += len(completions)
        self.counts.finished_prompts += len(finished)
        if not ends.finite.all() and self.work.continuations is None:
            # The first token's logits depend on the prompt alone, which all of its samples share.
            bad_prompts = {
                prompt
                for prompt, each in zip(request.tolist(), completions, strict=True)
                if each.error_code and len(each.token_ids) == 1
            }
            for prompt in sorted(bad_prompts.difference(finished)):
                completions += self._give_up(prompt, BAD_LOGITS)
        return completions

    def extend(self, requests: Requests) -> list[Completion]:
        """Append prompts in their order. Return the samples that do not fit the cache (see `settle_pages`)."""
        kinds = len(self.work.sampling)
        added = self.work.extend(requests)
        self._stops.extend(self.work.sampling[kinds:])
        self.kv.widen()
        self._lengths.extend()
        self._decisions.invalidate()
        return self._refuse_misfits(added)

    def give_back(self, most: int) -> Requests | None:
        """Remove at most `most` samples that have never been admitted, the last ones in plan order, and return them for another
        scheduler's `extend`; None if there are none. All come from one call of `extend` (or from the constructor), so a
        further call may return more."""
        work, begun = self.work, [prompt.request for prompt in self.kv.tree.with_unadmitted()]
        sources = np.array([*begun, *work.not_begun().tolist()], np.int32)[::-1]
        taken: list[tuple[int, int, int]] = []
        for prompt in sources[work.part_of(sources) == work.part_of(sources[:1])].tolist():
            if not most:
                break
            samples = self.kv.tree.unadmitted(prompt)[-most:]
            taken.append((prompt, int(samples[0]), int(samples[-1]) + 1))
            most -= len(samples)
        if not taken:
            return None
        prompts, first, stop = (np.array(column, np.int32) for column in zip(*reversed(taken), strict=True))
        given = work.requests(prompts, (first, stop))
        for prompt, number in zip(prompts.tolist(), first.tolist(), strict=True):
            self.kv.take_unadmitted(prompt, number)
        self.kv.settle(prompts)
        self._decisions.invalidate()
        return given

    def cancel(self, row: int, from_sample: int = 0) -> Int32:
        """Cancel the samples of a row from number `from_sample` on; running ones stop and their output is lost. Return the
        numbers of the cancelled samples, ascending; finished ones are not among them."""
        prompts, cancelled = self.work.of_row(row), list[int]()
        for prompt in prompts:
            gone = self.kv.cancel(prompt, from_sample)
            cancelled += gone
            if self._quarantine.active:
                self._quarantine.advance(self._received(self.kv.slots.order), {(prompt, sample) for sample in gone})
        self.kv.settle(np.array(prompts, np.int32))
        self._decisions.invalidate()
        return np.array(sorted(cancelled), np.int32)

    def under_way(self, rows: Collection[int]) -> list[tuple[int, int, Generated]]:
        """Return the running samples of these rows that have at least one token: row, sample number, and a copy of the
        output."""
        seq = self.kv.slots
        row = self.work.row_index[seq.request[seq.order]]
        of_rows = np.isin(row, np.fromiter(rows, np.int64, len(rows))) & (seq.generated[seq.order] > 0)
        slots = seq.order[of_rows]
        return list(zip(row[of_rows].tolist(), seq.sample[slots].tolist(), seq.read(slots), strict=True))

    def compact(self, least: int = COMPACTED_PROMPTS) -> None:
        """Forget the prompts before the first unfinished one, if they number at least `least` and half of all, so that the
        memory of endless work is bounded by the unfinished part."""
        if self._quarantine.active or len(self.work) < least:
            return
        count = self.work.forgettable(self.kv.first_prompt())
        if count < least or count < len(self.work) // 2:
            return
        self._lengths.before_forgetting()
        kept = self.work.forget(count)
        self._stops.keep(kept)
        self.kv.forget(count, kept)
        self._lengths.forget_first(count)
        self._decisions.invalidate()

    def settle_pages(self, num_pages: int) -> list[Completion]:
        """Set the number of pages to what the device holds; only before the first step, or when no page is held. Return the
        unfinished samples that do not fit, with the error code `kv_cache_overflow`."""
        wave = self.limits.even_wave(num_pages)
        if wave < self.limits.max_running:
            self.kv.restrict(wave)
        # Only once: of a lost worker's samples some are finished, and the rest may fit into one wave.
        self.limits = replace(self.limits, num_pages=num_pages, max_running=wave, alike=None)
        self.kv.resize(num_pages)
        self._decisions.invalidate()
        suspended = np.array([prompt.request for prompt in self.kv.tree.suspended], np.int32)
        return self._refuse_misfits(np.concatenate((suspended, self.work.not_begun())))

    def lost_device(self, crash: str | None = None) -> list[Completion]:
        """Record that the worker is lost, with every step in flight and every page it had computed. Running samples are
        requeued and keep the tokens received; their keys and values are computed again from the beginning.

        `crash` describes how the worker died if what it ran may be the cause, and is None otherwise. A prompt found to kill
        workers is given up: its row's unfinished samples are returned with the error code `worker_crash`.
        """
        condemned = None
        if crash is not None:
            ran = np.unique(np.concatenate([np.zeros(0, np.int64), *(step.run_slots for step in self._in_flight)]))
            samples = self._received(ran[self.kv.slots.request[ran] >= 0])
            condemned = self._quarantine.crash(samples, len(self._in_flight))
        self.kv.lose()
        self._in_flight.clear()
        self._decisions.invalidate()
        if crash is None or condemned is None:
            return []
        # A row may have several prompts, each with a part of its samples.
        of_row = self.work.of_row(int(self.work.row_index[condemned]))
        unfinished = [prompt for prompt in of_row if prompt >= self.work.next or self.kv.tree.begun(prompt) is not None]
        prompts, completions = np.array(unfinished, np.int32), list[Completion]()
        for prompt in prompts.tolist():
            completions += self._give_up(prompt, killed(crash))
        self.work.take_out(prompts[prompts >= self.work.next])
        given_up = {(prompt, completion.sample_index) for completion in completions for prompt in prompts.tolist()}
        self._quarantine.advance(self._received(self.kv.slots.order), given_up)
        return completions

    def halve(self) -> None:
        """Halve the size of all further steps, and limit the running samples to what such a step holds. Call it only right
        after `lost_device`."""
        tokens = max(1, self.limits.max_step_tokens // 2)
        running = min(self.limits.max_running, tokens)
        self.limits = replace(self.limits, max_step_tokens=tokens, max_running=running)
        self.kv.restrict(running)

    def check_integrity(self) -> None:
        """Assert that page references, slots and prompts agree; for tests, after any operation."""
        self.kv.check_integrity()

    def _compute_again(self, step: _InFlight, finite: Bool, bad_scores: Bool) -> None:
        """Requeue samples whose logits were not finite, once each, to be computed alone in cleared pages. The cause may be
        another sample: keys and values that are not finite affect everything computed from their page, even behind a mask, and
        a sample may have been given that page, or a part of a prompt, before the fault was detected."""
        seq, spoilt = self.kv.slots, list[int]()
        for slots, epochs, bad in ((step.slots, step.epochs, ~finite), (step.scored, step.scored_epochs, bad_scores)):
            spoilt += slots[bad & (seq.epoch[slots] == epochs)].tolist()
        self.kv.pool.clears = True
        for slot in sorted(set(spoilt)):
            sample = int(seq.sample[slot])
            if sample not in self.kv.tree[int(seq.request[slot])].alone:
                self.kv.requeue(slot, spoilt=True)
        self._decisions.invalidate()

    def _received(self, slots: Int64) -> dict[Sample, int]:
        """Return the number of output tokens received of each sample in these slots."""
        seq = self.kv.slots
        pairs = zip(seq.request[slots].tolist(), seq.sample[slots].tolist(), strict=True)
        return dict(zip(pairs, seq.generated[slots].tolist(), strict=True))

    def _refuse_misfits(self, prompts: Int32) -> list[Completion]:
        """Give up those of these prompts, none of which is running, whose longest possible sample does not fit the cache."""
        misfits, limits = self.kv.misfits(prompts), self.limits
        completions: list[Completion] = []
        for prompt in misfits.tolist():
            completions += self._give_up(prompt, overflow(self.work, prompt, limits.page_size, limits.num_pages))
        self.work.take_out(misfits[misfits >= self.work.next])
        return completions

    def _give_up(self, request: int, error: tuple[str, str]) -> list[Completion]:
        """Drop a prompt with no running sample. Return its unfinished samples, each with the error."""
        row, length = int(self.work.row_index[request]), int(self.work.length[request])
        completions = [
            completion(output or Generated(np.zeros(0, np.int32)), row, sample, length, error=error)
            for sample, output in self.kv.drop(request)
        ]
        self.counts.finished += len(completions)
        self.counts.finished_prompts += 1
        self._lengths.forget([request])
        return completions
