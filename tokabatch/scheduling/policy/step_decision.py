"""What a step computes: which running samples draw their next token, how the tokens left are shared out, and who comes in.

In this order: running samples decode, as far as the policy lets them and pages are there (`preemption`); prompts under way go
on, oldest first; waiting samples are admitted with the tokens that are left (`admission`). Where nothing at all could run,
something gives way and the step is decided again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tokabatch.arrays import Int64
from tokabatch.scheduling.counts import SchedulerCounts
from tokabatch.scheduling.kv.manager import KVCacheManager, Runs
from tokabatch.scheduling.lengths.length_estimates import LengthEstimates
from tokabatch.scheduling.policy.admission import Admission
from tokabatch.scheduling.policy.guarded_policy import Case, GuardedPolicy
from tokabatch.scheduling.policy.policy import Policy
from tokabatch.scheduling.policy.preemption import Preemption
from tokabatch.scheduling.quarantine import Quarantine
from tokabatch.scheduling.work import Work


@dataclass(frozen=True, slots=True)
class StepDecision:
    """What slots compute in a step."""

    decoding: Int64
    """Those that compute the token drawn last, shape [D]."""
    runs: Runs
    """Those that compute given tokens, in plan order."""
    num_waiting: int
    """Samples that could compute a token and wait for pages."""


class StepDecisions:
    """Of one scheduler. `policy` makes its policy, whose answers are bound by the cases of `GuardedPolicy`."""

    def __init__(
        self,
        work: Work,
        kv: KVCacheManager,
        lengths: LengthEstimates,
        counts: SchedulerCounts,
        quarantine: Quarantine,
        policy: Callable[[Work, KVCacheManager, LengthEstimates], Policy],
    ) -> None:
        self._kv = kv
        self._lengths = lengths
        self._counts = counts
        self._quarantine = quarantine
        self._policy = GuardedPolicy(policy(work, kv, lengths))
        self._preemption = Preemption(kv, self._policy, counts)
        self._admission = Admission(work, kv, lengths, self._policy)

    def invalidate(self) -> None:
        """See `Policy`."""
        self._policy.invalidate()

    def decide(self, max_tokens: int, stages: int, *, in_flight: bool) -> StepDecision | None:
        """The next step, of at most `max_tokens` tokens, for a worker of so many pipeline stages; `in_flight` where results of
        others are still to come. None where nothing can be computed before they have. Pages are assigned and slots opened."""
        slots = self._kv.slots
        while True:
            ready, prefilling = slots.runnable()
            if stages > 1:
                received = slots.length[ready] == slots.prompt_length[ready] + slots.generated[ready]
                # In plan order, so that those that share a prefix stay together.
                ready = ready[received][: -(-len(slots.order) // (stages + 1))]
            going = self._policy.hold(ready)
            decoding, num_short = self._preemption.make_room(going)
            budget = max_tokens - len(decoding)
            prefill = self._continue_prefill(prefilling[slots.request[prefilling] >= 0], budget)
            if self._lengths.refresh():
                self._policy.invalidate()
            alone = not len(slots.order) and not in_flight
            self._policy.case = Case(alone, num_short > 0, self._quarantine.trial)
            admitted = self._admission.admit(budget - int(prefill.tokens.sum()), self._counts.steps + 1)
            runs = Runs.joined((prefill, admitted))
            if len(decoding) or len(runs.slots):
                by_plan = np.lexsort((slots.admitted[runs.slots], slots.request[runs.slots]))
                runs = Runs(runs.slots[by_plan], runs.tokens[by_plan])
                return StepDecision(decoding, runs, len(ready) - len(going) + num_short)
            if in_flight or not (len(slots.order) or self._quarantine.active):
                return None
            if not len(slots.order):
                # The quarantine alone holds samples back.
                self._quarantine.release()
            elif not self._kv.suspend_idle():
                self._preemption.preempt()

    def _continue_prefill(self, slots: Int64, budget: int) -> Runs:
        """Share the token budget among prefills under way, oldest first; each takes what pages it needs or waits."""
        seq = self._kv.slots
        take = seq.prefill_chunks(slots, seq.length[slots], budget)
        slots, take = slots[take > 0], take[take > 0]
        keep = np.cumsum(self._kv.missing_pages(slots, take)) <= self._kv.num_free_pages
        runs = Runs(slots[keep], take[keep])
        self._kv.grow(*runs)
        return runs
