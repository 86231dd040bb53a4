"""Which samples of each row may be begun, which are kept and which are cancelled, as verdicts come in (`verify.stop`).

A row is decided on the prefix of its samples that is judged (`scoring/early_stopping.py`). Until then a finished sample is held
here: it is recorded once the prefix has reached it, and dropped where the row stops in front of it, whatever it had come to. So
a cancelled sample is the same everywhere, and what a crash loses of a row is at most what lies behind its prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from tokabatch.arrays import Int64
from tokabatch.output.existing_results import read_outcomes
from tokabatch.output.folder import OutputFolder
from tokabatch.output.schema import UnsampledRow
from tokabatch.scheduling.contracts import Drawn
from tokabatch.scoring.early_stopping import Outcome, RowTally, StopRule, opened

_Sample = TypeVar("_Sample")


@dataclass(frozen=True, slots=True)
class RowLimits:
    """Of a row, samples before number `begin` may be begun, and those from number `end` on are not to be drawn."""

    row: int
    begin: int
    end: int


@dataclass(slots=True)
class _Row(Generic[_Sample]):
    tally: RowTally
    begun: int
    held: dict[int, _Sample] = field(default_factory=dict[int, _Sample])


class RowStops(Generic[_Sample]):
    """Of a job of `num_samples` [rows] samples a row, of which those that `drawn` flags need not be drawn."""

    def __init__(self, rule: StopRule, num_samples: Int64, drawn: Drawn) -> None:
        self.rule = rule
        self._num_samples, self._drawn = num_samples, drawn
        self._rows: dict[int, _Row[_Sample]] = {}
        """Those that go on, as far as anything is known of them."""
        self._end: Int64 = num_samples.copy()
        self._kept: list[_Sample] = []
        self._cancelled: list[UnsampledRow] = []
        self._changes: list[RowLimits] = []

    @classmethod
    def of_folder(cls, rule: StopRule, num_samples: Int64, drawn: Drawn, folder: OutputFolder) -> RowStops[_Sample]:
        """With the verdicts of what is committed, as far as rows go on. `take_cancelled` has the samples that these cancel."""
        stops = cls(rule, num_samples, drawn)
        left = drawn.counts() < num_samples
        for row, sample, status, correct, answer in read_outcomes(folder, left):
            outcome = None if status == "cancelled" else Outcome(bool(correct), answer)
            stops._row(row).tally.add(sample, outcome)
        for row in list(stops._rows):
            stops._settle(row)
        stops._changes.clear()
        return stops

    def begun(self) -> Int64:
        """How many samples of each row may be begun, shape [rows]."""
        begun = np.minimum(opened(int(self._num_samples.max(initial=0)), 0), self._num_samples)
        for row, state in self._rows.items():
            begun[row] = state.begun
        return begun

    def wants(self, row: int, sample: int) -> bool:
        """Whether the row has not stopped in front of a sample."""
        return sample < self._end[row]

    def hold(self, row: int, sample: int, finished: _Sample) -> None:
        """A sample is finished, and not judged yet."""
        if self.wants(row, sample):
            self._row(row).held[sample] = finished

    def judge(self, row: int, sample: int, outcome: Outcome) -> None:
        """The verdict of a sample that is held."""
        if not self.wants(row, sample):
            return
        self._row(row).tally.add(sample, outcome)
        self._settle(row)

    def give_up(self, row: int, make: Callable[[int], _Sample]) -> None:
        """None of a row's samples can be had that have not been begun: `make` makes an error of each."""
        if row not in self._rows:
            return
        state, end = self._rows[row], int(self._num_samples[row])
        begun, state.begun = state.begun, end
        place = int(self._drawn.start[row])
        for sample in range(begun, end):
            if not self._drawn.flags[place + sample]:
                state.held[sample] = make(sample)
                state.tally.add(sample, Outcome(False))
        self._changes.append(RowLimits(row, begun, begun))
        self._settle(row)

    def take_kept(self) -> list[_Sample]:
        """The samples that the prefix of their row has reached since the last call."""
        kept, self._kept = self._kept, []
        return kept

    def take_cancelled(self) -> list[UnsampledRow]:
        """The samples that have been cancelled since."""
        cancelled, self._cancelled = self._cancelled, []
        return cancelled

    def take_changes(self) -> list[RowLimits]:
        """The rows whose limits have changed since."""
        changes, self._changes = self._changes, []
        return changes

    @property
    def num_held(self) -> int:
        """Samples that are neither kept nor cancelled."""
        return sum(len(state.held) for state in self._rows.values())

    def held(self) -> Iterable[_Sample]:
        """These samples."""
        return (sample for state in self._rows.values() for sample in state.held.values())

    def _row(self, row: int) -> _Row[_Sample]:
        if row not in self._rows:
            self._rows[row] = _Row(RowTally(self.rule), opened(int(self._num_samples[row]), 0))
        return self._rows[row]

    def _settle(self, row: int) -> None:
        """Keep what the row's prefix has reached, and stop the row or open its next samples."""
        state = self._rows[row]
        judged, stop, end = state.tally.judged, state.tally.stop, int(self._num_samples[row])
        self._kept += [state.held.pop(sample) for sample in sorted(state.held) if sample < judged]
        if stop is not None:
            self._end[row] = stop
            begin = int(self._drawn.start[row])
            missing = np.flatnonzero(~self._drawn.flags[begin + stop : begin + end]) + stop
            if len(missing):
                self._cancelled.append(UnsampledRow(row, missing.astype(np.int32), None))
                self._changes.append(RowLimits(row, stop, stop))
        elif judged < end:
            begun = max(state.begun, opened(end, judged))
            if begun > state.begun:
                state.begun = begun
                self._changes.append(RowLimits(row, begun, end))
            return
        del self._rows[row]
