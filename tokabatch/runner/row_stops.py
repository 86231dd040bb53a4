"""Which samples of each row may begin, are kept or are cancelled, according to the verdicts so far (`verify.stop`).

Whether a row stops is decided by its longest prefix of judged samples (`scoring/early_stopping.py`). A finished sample is held
here until the prefix has reached it, and is recorded then; if the row stops before it, it is dropped. The cancelled samples are
therefore the same on any hardware, and a crash loses only samples of a row that are after its prefix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from tokabatch.arrays import Int64
from tokabatch.output.existing_results import read_outcomes
from tokabatch.output.folder import OutputFolder
from tokabatch.output.schema import UnsampledRow
from tokabatch.scheduling.contracts import Drawn
from tokabatch.scoring.early_stopping import GOES_ON, Outcome, StopRule, Tallies, opened

_Sample = TypeVar("_Sample")


@dataclass(frozen=True, slots=True)
class RowLimits:
    """The limits of a row: samples before number `begin` may begin; samples from number `end` on are not drawn."""

    row: int
    begin: int
    end: int


class RowStops(Generic[_Sample]):
    """The rows of a job with `num_samples` samples of each row, shape [rows]; those flagged in `drawn` exist already."""

    def __init__(self, rule: StopRule, num_samples: Int64, drawn: Drawn) -> None:
        self.rule = rule
        self._num_samples, self._drawn = num_samples, drawn
        self._tallies = Tallies(rule, len(num_samples))
        self._begun: Int64 = np.minimum(opened(int(num_samples.max(initial=0)), 0), num_samples)
        self._end: Int64 = num_samples.copy()
        self._held: dict[int, dict[int, _Sample]] = {}
        """Samples by row and number."""
        self._reached: Int64 = np.zeros(len(num_samples), np.int64)
        """For each row, the number of the sample up to which held samples have been kept."""
        self._kept: list[_Sample] = []
        self._cancelled: list[UnsampledRow] = []
        self._changes: list[RowLimits] = []

    @classmethod
    def of_folder(cls, rule: StopRule, num_samples: Int64, drawn: Drawn, folder: OutputFolder) -> RowStops[_Sample]:
        """Start with the verdicts of the committed samples of rows that continue. `take_cancelled` is called with the samples
        that they cancel."""
        stops = cls(rule, num_samples, drawn)
        left = drawn.counts() < num_samples
        for row, sample, status, correct, answer in read_outcomes(folder, left):
            stops._tallies.add(row, sample, None if status == "cancelled" else Outcome(bool(correct), answer))
        for row in np.flatnonzero((stops._tallies.judged > 0) | (stops._tallies.stop != GOES_ON)).tolist():
            stops._settle(row)
        stops._changes.clear()
        return stops

    def begun(self) -> Int64:
        """Return how many samples of each row may begin, shape [rows]."""
        return self._begun.copy()

    def wants(self, row: int, sample: int) -> bool:
        """Return whether the row has not stopped before this sample."""
        return sample < self._end[row]

    def hold(self, row: int, sample: int, finished: _Sample) -> None:
        """Hold a sample that is finished and not judged yet."""
        if self.wants(row, sample):
            self._held.setdefault(row, {})[sample] = finished

    def holds(self, row: int, sample: int) -> bool:
        """Return whether a sample is held: neither kept nor dropped."""
        return sample in self._held.get(row, ())

    def judge(self, row: int, sample: int, outcome: Outcome) -> None:
        """Record the verdict of a sample that is held."""
        if not self.wants(row, sample):
            return
        self._tallies.add(row, sample, outcome)
        self._settle(row)

    def give_up(self, row: int, make: Callable[[int], _Sample]) -> None:
        """Replace all samples of a row that have not begun by errors, which `make` creates."""
        begun, end, place = int(self._begun[row]), int(self._num_samples[row]), int(self._drawn.start[row])
        if self._end[row] < end or self._tallies.judged[row] == end:
            return
        self._begun[row] = end
        for sample in range(begun, end):
            if not self._drawn.flags[place + sample]:
                self.hold(row, sample, make(sample))
                self._tallies.add(row, sample, Outcome(False))
        self._changes.append(RowLimits(row, begun, begun))
        self._settle(row)

    def take_kept(self) -> list[_Sample]:
        """Return the samples that the prefix of their row has reached since the last call."""
        kept, self._kept = self._kept, []
        return kept

    def take_cancelled(self) -> list[UnsampledRow]:
        """Return the samples that have been cancelled since the last call."""
        cancelled, self._cancelled = self._cancelled, []
        return cancelled

    def take_changes(self) -> list[RowLimits]:
        """Return the rows whose limits have changed since the last call."""
        changes, self._changes = self._changes, []
        return changes

    @property
    def num_held(self) -> int:
        """Return the number of samples that are neither kept nor cancelled."""
        return sum(map(len, self._held.values()))

    def _settle(self, row: int) -> None:
        """Keep the samples that the row's prefix has reached, and stop the row or let its next samples begin."""
        judged, stop, end = int(self._tallies.judged[row]), int(self._tallies.stop[row]), int(self._num_samples[row])
        held = self._held.get(row, {})
        self._kept += [held.pop(sample) for sample in range(int(self._reached[row]), judged) if sample in held]
        self._reached[row] = judged
        if stop != GOES_ON:
            held.clear()
            self._end[row] = stop
            begin = int(self._drawn.start[row])
            missing = np.flatnonzero(~self._drawn.flags[begin + stop : begin + end]) + stop
            if len(missing):
                self._cancelled.append(UnsampledRow(row, missing.astype(np.int32), None))
                self._changes.append(RowLimits(row, stop, stop))
        elif (begun := opened(end, judged)) > self._begun[row]:
            self._begun[row] = begun
            self._changes.append(RowLimits(row, begun, end))
        if not held:
            self._held.pop(row, None)
