"""What runs in the next step. The scheduler decides and keeps the books; it sends nothing and computes nothing.

`schedule` decides a step as if no sample ended, `apply` takes in what a step sampled, one or more steps later: any number of
steps may be in flight, results arrive in order, and what was computed for a sample that had already ended is dropped.
Order within a step: running samples decode; prefills under way continue; then samples are admitted while the forecast of
page use stays under the pool. When pages run out after all, samples wait or are preempted (see `shortage`). The worker may
be lost at any time, and its cache with it: `lost_device` takes everything back that was computed there.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

import numpy as np

from tokabatch.messages import Bool, Completion, Int32, Int64, Requests, StepBatch, StepResult
from tokabatch.scheduling.counts import SchedulerCounts
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.kv.page_pool import PagePool
from tokabatch.scheduling.kv.prefix_tree import OpenPrompt, OpenPrompts
from tokabatch.scheduling.kv.slots import Sequences
from tokabatch.scheduling.lengths.estimates import Expectations
from tokabatch.scheduling.lengths.predictor import LengthPredictor
from tokabatch.scheduling.outputs import Generated
from tokabatch.scheduling.policy.admission import Admission
from tokabatch.scheduling.policy.preemption import Shortage
from tokabatch.scheduling.quarantine import Quarantine, Sample
from tokabatch.scheduling.step_builder import SamplingTable, StepDraft
from tokabatch.scheduling.stopping import StopRules
from tokabatch.scheduling.work import Work


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What the device can hold. `max_step_tokens` is at least `max_running`."""

    page_size: int
    num_pages: int
    max_running: int
    max_step_tokens: int
    max_pages_per_sequence: int
    grouping: GroupingLimits | None
    """None turns Hydragen off: every sample reads its whole context by itself."""


@dataclass(frozen=True, slots=True)
class _InFlight:
    slots: Int64
    epochs: Int32
    run_slots: Int64
    """Those of all runs, sampled or not."""
    clear_pages: Int32


class Scheduler:
    """Feeds one replica from `requests`, in their order."""

    def __init__(
        self, requests: Requests, limits: SchedulerLimits, stops: StopRules, lengths: LengthPredictor | None = None
    ) -> None:
        """`lengths` replaces what is learned of them online, for simulations and comparisons."""
        self.work = Work(requests)
        self.limits = limits
        self.counts = SchedulerCounts()
        self._stops = [(0, stops)]
        """The first kind of sampling parameters that each of these is for, and the rules."""
        self._table = SamplingTable(requests.sampling)
        self.pool = PagePool(limits.num_pages)
        self.prompts = OpenPrompts(self.work, self.pool, limits.page_size)
        most = int(self.work.logprobs.max(initial=-1))
        self.sequences = Sequences(limits.max_running, limits.max_pages_per_sequence, self.pool, limits.page_size, most)
        self._expectations = Expectations(self.work, self.sequences, self.counts, lengths)
        books = (self.pool, self.prompts, self.sequences, self.counts, self._expectations)
        self._admission = Admission(self.work, limits.page_size, *books)
        self._shortage = Shortage(limits.page_size, *books, self._admission)
        self._in_flight: deque[_InFlight] = deque()
        self._quarantine = Quarantine()

    def settle_pages(self, num_pages: int) -> list[Completion]:
        """Take so many pages, which the device turned out to hold; before the first step, or when nothing is held any more. The
        samples that do not fit them are returned with the error code `kv_cache_overflow`, as far as they are not finished."""
        self.limits = replace(self.limits, num_pages=num_pages)
        self.pool.resize(num_pages)
        self._admission.forecast_anew()
        completions: list[Completion] = []
        for prompt in self._misfits(np.array(self.prompts.suspended, np.int32)).tolist():
            completions += self._give_up(prompt, "kv_cache_overflow", self._does_not_fit(prompt))
        return completions + self._refuse_misfits(self.work.not_begun())

    def extend(self, requests: Requests, stops: StopRules | None = None) -> list[Completion]:
        """Add prompts behind all others, in their order. Samples that do not fit the cache are returned, as by `settle_pages`.
        `stops` holds the rules of `requests.sampling`. Raises ValueError without them where these have not come before."""
        known, kinds = self.work.place_of(requests.sampling) is not None, len(self.work.sampling)
        if not known and stops is None:
            raise ValueError("sampling parameters that have not come before need stop rules of their own")
        added = self.work.extend(requests)
        if not known and stops is not None:
            self._stops.append((kinds, stops))
            self._table = SamplingTable(self.work.sampling)
            self.sequences.outputs.widen(int(self.work.logprobs.max(initial=-1)))
        self._expectations.extend()
        self._admission.forecast_anew()
        return self._refuse_misfits(added)

    def give_back(self, most: int) -> Requests | None:
        """Take out at most so many samples that have never been admitted, the last ones of the plan, for another scheduler's
        `extend`. They come from one of the calls of `extend` (or the beginning), so that another call may give more; None where
        there are none."""
        work, taken, left = self.work, list[tuple[int, int, int]](), most
        begun = self.prompts.with_unadmitted()
        sources = [*([*reversed(work.not_begun().tolist())]), *(prompt.request for prompt in reversed(begun))]
        for prompt in sources:
            if not left or (taken and work.part_of(np.array([prompt])) != work.part_of(np.array([taken[0][0]]))):
                break
            open_prompt = self.prompts.begun(prompt)
            samples = work.samples(prompt) if open_prompt is None else open_prompt.samples[open_prompt.next_sample :]
            samples = samples[-left:]
            taken.append((prompt, int(samples[0]), int(samples[-1]) + 1))
            left -= len(samples)
        if not taken:
            return None
        taken.sort()
        prompts, first, stop = (np.array(column, np.int32) for column in zip(*taken, strict=True))
        given = work.requests(prompts, (first, stop))
        for prompt, number in zip(prompts.tolist(), first.tolist(), strict=True):
            self._forget_samples(prompt, number)
        self._settle(prompts)
        return given

    def cancel(self, row: int, from_sample: int = 0) -> Int32:
        """Draw no sample of a row from number `from_sample` on; those that run stop, and what they had is lost. Returns the
        numbers of the samples that had not been finished."""
        cancelled: list[int] = []
        prompts = self.work.of_row(row)
        seq, waiting = self.sequences, self._admission.waiting
        for prompt in prompts:
            begun = self.prompts.begun(prompt)
            if prompt >= self.work.next:
                samples = self.work.samples(prompt)
                cancelled += samples[samples >= from_sample].tolist()
            elif begun is not None:
                running = seq.order[(seq.request[seq.order] == prompt) & (seq.sample[seq.order] >= from_sample)]
                gone = [sample for sample in begun.requeued if sample >= from_sample]
                pending = begun.samples[begun.next_sample :]
                cancelled += [*seq.sample[running].tolist(), *gone, *pending[pending >= from_sample].tolist()]
                begun.requeued = deque(sample for sample in begun.requeued if sample < from_sample)
                for sample in gone:
                    waiting.preempted.pop((prompt, sample), None)
                ended = {(prompt, sample) for sample in [*gone, *seq.sample[running].tolist()]}
                self._admission.stop(running)
                if self._quarantine.active:
                    self._quarantine.advance(self._received(seq.order), ended)
                    waiting.confined = self._quarantine.trial
            self._forget_samples(prompt, from_sample)
        self._settle(np.array(prompts, np.int32))
        return np.array(sorted(cancelled), np.int32)

    def _forget_samples(self, prompt: int, until: int) -> None:
        """Take the samples from number `until` on out of those of a prompt that have never been admitted."""
        self.work.cut(prompt, until)
        begun = self.prompts.begun(prompt)
        if begun is not None:
            pending = begun.samples[begun.next_sample :]
            begun.samples = np.concatenate((begun.samples[: begun.next_sample], pending[pending < until]))

    def _settle(self, prompts: Int32) -> None:
        """Samples of these prompts have been taken away: take out prompts without any, and free what no sample reads."""
        unbegun = prompts[prompts >= self.work.next]
        self.work.take_out(unbegun[[len(self.work.samples(prompt)) == 0 for prompt in unbegun.tolist()]])
        begun = (self.prompts.begun(prompt) for prompt in prompts.tolist())
        self.prompts.settle([prompt for prompt in begun if prompt is not None])
        self._admission.forecast_anew()

    def _misfits(self, prompts: Int32) -> Int32:
        """Those of which a longest sample does not fit the cache or the page table."""
        most = min(self.limits.num_pages, self.limits.max_pages_per_sequence + 1)
        return prompts[self.work.num_pages(prompts, self.limits.page_size) > most]

    def _refuse_misfits(self, prompts: Int32) -> list[Completion]:
        completions: list[Completion] = []
        misfits = self._misfits(prompts)
        for prompt in misfits.tolist():
            row_index, length = int(self.work.row_index[prompt]), int(self.work.length[prompt])
            nothing, error = Generated(np.zeros(0, np.int32)), ("kv_cache_overflow", self._does_not_fit(prompt))
            samples = self.work.samples(prompt).tolist()
            completions += [nothing.completion(row_index, sample, length, error=error) for sample in samples]
        self.work.take_out(misfits)
        self.counts.finished += len(completions)
        self.counts.finished_prompts += len(misfits)
        return completions

    def _does_not_fit(self, prompt: int) -> str:
        length, limit = int(self.work.length[prompt]), int(self.work.max_tokens[self.work.params[prompt]])
        page, pages = self.limits.page_size, self.limits.num_pages
        needed = int(self.work.num_pages(np.array([prompt]), page)[0])
        return (
            f"the prompt has {length:,} tokens and max_tokens is {limit:,}, which needs {needed * page:,} tokens of KV cache "
            f"in pages of {page}; the cache holds {pages * page:,}. Shorten the prompt, lower max_tokens, or raise "
            "engine.kv_cache_tokens where memory allows"
        )

    @property
    def done(self) -> bool:
        """Every sample of every request has been returned as a completion."""
        if len(self.sequences.order) or self._in_flight or not self.work.exhausted:
            return False
        return not self.prompts.suspended and not self.prompts.with_pending()

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def expected_tokens_left(self, waiting: int) -> int:
        """Output tokens still to come, `waiting` samples not yet admitted included, by the lengths seen so far."""
        return self._expectations.tokens_left(waiting)

    def schedule(self) -> StepBatch | None:
        """Decide the next step; None when nothing can be computed before further results are applied."""
        seq = self.sequences
        draft = StepDraft(self.counts.steps + 1)
        decoding, prefilling = self._runnable()
        decoding = self._shortage.grow(self._shortage.hold(decoding), draft)
        prefilling = prefilling[seq.request[prefilling] >= 0]
        budget = self.limits.max_step_tokens - len(decoding)
        runs, takes, budget = self._continue_prefill(prefilling, budget, draft)
        alone = not len(seq.order) and not self._in_flight
        admitted, admitted_takes = self._admission.admit(0 if self._shortage.acute else budget, draft, alone)
        runs, takes = np.concatenate((runs, admitted)), np.concatenate((takes, admitted_takes))
        if not len(decoding) and not len(runs):
            if self._in_flight:
                return None
            if not len(seq.order):
                return self._lift_quarantine()
            if not self.prompts.suspend_idle():
                self._shortage.preempt()
            return self.schedule()
        self.counts.waited_steps += self._shortage.num_waiting
        by_plan = np.lexsort((seq.admitted[runs], seq.request[runs]))
        prefill = (runs[by_plan], takes[by_plan])
        batch = draft.build(
            seq,
            self.prompts,
            self.work,
            self._table,
            prefill,
            decoding,
            self.limits.grouping,
            self.limits.page_size,
            self.pool.take_to_clear(),
        )
        self._advance(batch)
        return batch

    def apply(self, result: StepResult) -> list[Completion]:
        """Take in the oldest step in flight; returns the samples it finished. Raises nothing: bad logits end their sample
        with the error code `nan_logits`."""
        step = self._in_flight.popleft()
        seq = self.sequences
        matches = seq.epoch[step.slots] == step.epochs
        current = slice(None) if matches.all() else matches
        slots, tokens, finite = step.slots[current], result.token[current], result.finite[current]
        seq.outputs.append(slots, tokens, result.logprob[current], result.top_ids[current], result.top_logprobs[current])
        self.counts.output_tokens += len(slots)
        ends: dict[int, int | str | None] = {int(i): None for i in np.nonzero(seq.generated[slots] >= seq.limit[slots])[0]}
        for first, rules in self._stops:
            suspects = rules.suspects(tokens)
            if len(self._stops) > 1:
                stop = min((other for other, _ in self._stops if other > first), default=len(self.work.sampling))
                params = seq.params[slots[suspects]]
                suspects = suspects[(params >= first) & (params < stop)]
            if len(suspects):
                asked = slots[suspects]
                reasons = rules.check((seq.params[asked] - first).tolist(), seq.outputs.tokens(asked))
                found = zip(suspects.tolist(), reasons, strict=True)
                ends.update({i: reason for i, reason in found if reason is not None})
        if not finite.all():
            ends.update({int(i): None for i in np.nonzero(~finite)[0]})
        places = np.fromiter(ends, np.int64, len(ends))
        if self._quarantine.active:
            self._clear_suspects(slots[places])
        if not ends:
            return []
        return self._finish(slots[places], list(ends.values()), finite[places])

    def lost_device(self, crash: str | None = None) -> list[Completion]:
        """The worker is gone with every step in flight and every page it had computed. Running samples go back among the
        waiting and keep the tokens received; what is computed next is computed from the beginning.

        `crash` says how the worker died where the cause may lie in what it ran. A prompt that has been found to kill workers
        is given up: its unfinished samples are returned with the error code `worker_crash`.
        """
        condemned = None
        if crash is not None:
            condemned = self._quarantine.crash(self._running_samples(), len(self._in_flight))
        for step in self._in_flight:
            # A step that was dropped has not cleared them.
            self.pool.taint(step.clear_pages)
        self._in_flight.clear()
        for slot in self.sequences.order[np.argsort(self.sequences.admitted[self.sequences.order])].tolist():
            self._admission.take_back(slot)
            self.counts.requeued += 1
        self.prompts.suspend_idle()
        self._admission.waiting.confined = self._quarantine.trial
        return (
            []
            if condemned is None
            else self._give_up(condemned, "worker_crash", f"the worker process died whenever this row ran: {crash}")
        )

    def halve(self) -> None:
        """Steps half as large from now on, with no more samples than they hold. Only right after `lost_device`."""
        tokens = max(1, self.limits.max_step_tokens // 2)
        running = min(self.limits.max_running, tokens)
        self.limits = replace(self.limits, max_step_tokens=tokens, max_running=running)
        self.sequences.restrict(running)

    def check_integrity(self) -> None:
        """Assert that page references, slots and prompts agree; for tests, after any operation."""
        seq = self.sequences
        held = [self.prompts.check_integrity(), seq.own_pages(seq.order)]
        self.pool.check_integrity(np.concatenate(held))
        assert (np.diff(seq.request[seq.order]) >= 0).all(), "slots are not in plan order"
        assert len(np.unique(seq.order)) == len(seq.order) == seq.num_slots - seq.num_free, "slots are lost or doubled"
        for slot in seq.order:
            prompt = self.prompts[int(seq.request[slot])]
            shared = int(seq.shared_pages[slot])
            assert np.array_equal(seq.page_table[slot, :shared], prompt.pages[:shared]), "a slot reads pages it does not share"
            computed = min(int(seq.computed[slot]), int(seq.prompt_length[slot] + seq.limit[slot]) - 1)
            assert seq.num_pages[slot] * self.limits.page_size >= computed, "a slot lacks pages"
        live = {int(r): int(c) for r, c in zip(*np.unique(seq.request[seq.order], return_counts=True), strict=True)}
        assert all(prompt.live == live.get(prompt.request, 0) for prompt in self.prompts), "live counts differ"

    def _runnable(self) -> tuple[Int64, Int64]:
        """Slots with something to compute: those whose last token the worker holds, in plan order, and those that the host
        has tokens for, oldest first."""
        seq = self.sequences
        pending = seq.order[(seq.length > seq.computed)[seq.order]]
        on_device = seq.on_device[pending]
        if on_device.all():
            return pending, pending[:0]
        prefilling = pending[~on_device]
        return pending[on_device], prefilling[np.argsort(seq.admitted[prefilling], kind="stable")]

    def _running_samples(self) -> dict[Sample, int]:
        """The samples in steps in flight, each with its output tokens received."""
        if not self._in_flight:
            return {}
        slots = np.unique(np.concatenate([step.run_slots for step in self._in_flight]))
        return self._received(slots[self.sequences.request[slots] >= 0])

    def _received(self, slots: Int64) -> dict[Sample, int]:
        """Output tokens received of the samples in these slots."""
        seq = self.sequences
        pairs = zip(seq.request[slots].tolist(), seq.sample[slots].tolist(), strict=True)
        return dict(zip(pairs, seq.generated[slots].tolist(), strict=True))

    def _clear_suspects(self, ended: Int64) -> None:
        """Tell the quarantine how far its suspects have got; `ended` are the slots about to be closed."""
        self._quarantine.advance(self._received(self.sequences.order), self._received(ended))
        self._admission.waiting.confined = self._quarantine.trial

    def _lift_quarantine(self) -> StepBatch | None:
        """Nothing runs and nothing may be admitted: where only the quarantine holds samples back, it ends."""
        if not self._quarantine.active:
            return None
        self._quarantine.release()
        self._admission.waiting.confined = None
        return self.schedule()

    def _give_up(self, request: int, code: str, message: str) -> list[Completion]:
        """Error rows for all unfinished samples of a prompt of which none is running."""
        prompt, row_index = self.prompts.drop(request), int(self.work.row_index[request])
        completions: list[Completion] = []
        while prompt.num_pending:
            sample = prompt.take_sample()
            output = self._admission.waiting.preempted.pop((request, sample), None) or Generated(np.zeros(0, np.int32))
            completions.append(output.completion(row_index, sample, prompt.length, error=(code, message)))
        self.counts.finished += len(completions)
        self.counts.finished_prompts += 1
        self._expectations.forget([request])
        return completions

    def _continue_prefill(self, slots: Int64, budget: int, draft: StepDraft) -> tuple[Int64, Int32, int]:
        """Share the token budget among prefills under way, oldest first; each takes what pages it needs or waits."""
        seq = self.sequences
        pending = seq.length[slots] - seq.computed[slots]
        take = np.clip(budget - (np.cumsum(pending) - pending), 0, pending).astype(np.int32)
        slots, take = slots[take > 0], take[take > 0]
        short = seq.missing_pages(slots, take)
        keep = np.cumsum(short) <= self.pool.num_free
        slots, take, short = slots[keep], take[keep], short[keep]
        draft.set_pages(seq.add_pages(slots, short))
        return slots, take, budget - int(take.sum())

    def _advance(self, batch: StepBatch) -> None:
        """Move every run's slot past the step, as if no sample ended."""
        seq = self.sequences
        slots = batch.run_slot.astype(np.int64)
        seq.computed[slots] = batch.run_start + batch.run_length
        prefilled = slots[: batch.num_prefill_runs]
        for slot, request in zip(prefilled.tolist(), seq.request[prefilled].tolist(), strict=True):
            self._advance_prompt(self.prompts[request], slot, batch.index)
        self.counts.prefilled_tokens += int(batch.run_length[: batch.num_prefill_runs].sum())
        sampled = slots[batch.run_samples]
        seq.on_device[sampled] = True
        seq.length[sampled] += 1
        full = seq.length[sampled] - seq.prompt_length[sampled] >= seq.limit[sampled]
        # The last token of the limit needs no keys and values: its slot only waits for the result.
        seq.computed[sampled[full]] = seq.length[sampled[full]]
        self._in_flight.append(_InFlight(sampled, seq.epoch[sampled], slots, batch.clear_pages))
        self.counts.steps += 1

    def _advance_prompt(self, prompt: OpenPrompt, slot: int, step: int) -> None:
        if prompt.leader == slot:
            prompt.computed = min(int(self.sequences.computed[slot]), prompt.length)
            prompt.ready_step = step
            if prompt.computed >= prompt.length - 1:
                prompt.leader = -1

    def _finish(self, slots: Int64, reasons: list[int | str | None], finite: Bool) -> list[Completion]:
        seq = self.sequences
        completions: list[Completion] = []
        touched: dict[int, OpenPrompt] = {}
        self._expectations.ended(slots, np.array([reason is not None for reason in reasons], np.bool_))
        request = seq.request[slots]
        columns = (slots, request, self.work.row_index[request], seq.sample[slots], finite)
        ended = zip(reasons, seq.read(slots), *(column.tolist() for column in columns), strict=True)
        for reason, output, slot, key, row_index, sample, valid in ended:
            touched[key] = prompt = self.prompts[key]
            prompt.live -= 1
            if not valid:
                prompt.tainted = True
                self.pool.taint(seq.page_table[slot, : seq.num_pages[slot]])
            error = None if valid else ("nan_logits", "the model's logits held NaN or no finite value")
            completions.append(output.completion(row_index, sample, prompt.length, reason=reason, error=error))
        self.counts.finished += len(completions)
        self.sequences.close(slots)
        finished = [prompt for prompt in touched.values() if prompt.finished]
        self.counts.finished_prompts += len(finished)
        self._expectations.forget([prompt.request for prompt in finished])
        self.prompts.release(finished, [prompt for prompt in touched.values() if prompt.tainted])
        return completions
