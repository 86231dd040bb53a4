"""Which prompts may run after a worker has crashed, so that a prompt that kills workers is found after few crashes.

Most crashes have an external cause, so after the first one everything runs again together. If the worker crashes again before
the samples that ran are past the point of the first crash, they are suspects: they run in halves, the half that crashes is
halved again (adaptive group testing by binary splitting, Hwang 1972), and a prompt that crashes the worker twice while
nothing else runs is condemned.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

LONE_CRASHES = 2

Sample = tuple[int, int]
"""A request and the number of its sample."""


class Quarantine:
    """Group testing of suspected requests. `trial` holds the requests that may run; None means all."""

    def __init__(self) -> None:
        self.trial: frozenset[int] | None = None
        self._bars: dict[Sample, int] = {}
        """The suspects, each with the number of output tokens at which it is past the point of the crash."""
        self._untried: list[list[int]] = []
        self._lone_crashes = 0

    @property
    def active(self) -> bool:
        """Whether any sample is suspected."""
        return bool(self._bars)

    @property
    def suspects(self) -> frozenset[int]:
        """The requests of which one is assumed to kill workers; empty after a single crash."""
        return frozenset() if self.trial is None else self.trial.union(*self._untried)

    def crash(self, running: Mapping[Sample, int], depth: int) -> int | None:
        """Record a crash of the worker with `depth` steps in flight. `running` maps the samples in these steps to the output
        tokens received of each. Return the request that is condemned, or None."""
        if not running:
            return None
        requests = {request for request, _ in running}
        suspects = frozenset(requests & {request for request, _ in self._bars})
        bars = {sample: count + depth for sample, count in running.items()}
        if not suspects:
            self._bars, self._untried, self.trial = bars, [], None
            return None
        untried = {request for group in self._untried for request in group}
        self._bars = {sample: bar for sample, bar in self._bars.items() if sample[0] in untried}
        self._bars |= {sample: bar for sample, bar in bars.items() if sample[0] in suspects}
        if len(suspects) > 1 or self.trial != suspects:
            self._split(sorted(suspects))
            return None
        self._lone_crashes += len(requests) == 1
        return self._condemn() if self._lone_crashes >= LONE_CRASHES else None

    def advance(self, generated: Mapping[Sample, int], ended: Collection[Sample]) -> None:
        """Clear suspects after results: `generated` maps the running samples to their output tokens, `ended` holds the samples
        that have ended."""
        self._bars = {
            sample: bar for sample, bar in self._bars.items() if sample not in ended and generated.get(sample, 0) < bar
        }
        if self.trial is not None and not any(request in self.trial for request, _ in self._bars):
            self._try_next()

    def release(self) -> None:
        """Clear all suspicions, so that every request may run."""
        self.trial, self._bars, self._untried = None, {}, []

    def _split(self, suspects: list[int]) -> None:
        half = (len(suspects) + 1) // 2
        if len(suspects) > 1:
            self._untried.append(suspects[half:])
        self._set_trial(suspects[:half])

    def _condemn(self) -> int:
        assert self.trial is not None
        (request,) = self.trial
        self._bars = {sample: bar for sample, bar in self._bars.items() if sample[0] != request}
        self._try_next()
        return request

    def _try_next(self) -> None:
        barred = {request for request, _ in self._bars}
        while self._untried:
            # A group whose requests have all ended, by cancellation for example, would block all others for good.
            if group := [request for request in self._untried.pop() if request in barred]:
                self._set_trial(group)
                return
        self.release()

    def _set_trial(self, requests: list[int]) -> None:
        self.trial = frozenset(requests)
        self._lone_crashes = 0
