"""Which prompts may run after a worker has crashed, so that one that kills workers is found at the cost of few crashes.

Most crashes come from outside, so after the first everything runs again together. Where the worker crashes again before the
samples that ran have got past the point of the first crash, they are suspects: they run in halves, the half that crashes is
halved again (adaptive group testing by binary splitting, Hwang 1972), and a prompt that crashes the worker twice when nothing
else runs is condemned.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

LONE_CRASHES = 2

Sample = tuple[int, int]
"""A request and the number of its sample."""


class Quarantine:
    """`trial` names the requests that may run; None is all."""

    def __init__(self) -> None:
        self.trial: frozenset[int] | None = None
        self._bars: dict[Sample, int] = {}
        """The suspects, each with the output tokens it must have to be past the point of the crash."""
        self._untried: list[list[int]] = []
        self._lone_crashes = 0

    @property
    def active(self) -> bool:
        """Whether anything is suspected."""
        return bool(self._bars)

    @property
    def suspects(self) -> frozenset[int]:
        """The requests one of which is taken to kill workers; none after a first crash alone."""
        return frozenset() if self.trial is None else self.trial.union(*self._untried)

    def crash(self, running: Mapping[Sample, int], depth: int) -> int | None:
        """The worker died with `depth` steps in flight, in which these samples ran, each with so many output tokens received.
        Returns the request that is condemned for it, if any."""
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
        """Results have come in: the output tokens of the running samples, and the samples that are over."""
        self._bars = {
            sample: bar for sample, bar in self._bars.items() if sample not in ended and generated.get(sample, 0) < bar
        }
        if self.trial is not None and not any(request in self.trial for request, _ in self._bars):
            self._try_next()

    def release(self) -> None:
        """Nothing is suspected any more."""
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
            # Those that are over by now, such as cancelled ones, would hold up all others for good.
            if group := [request for request in self._untried.pop() if request in barred]:
                self._set_trial(group)
                return
        self.release()

    def _set_trial(self, requests: list[int]) -> None:
        self.trial = frozenset(requests)
        self._lone_crashes = 0
