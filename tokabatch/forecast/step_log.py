"""The steps of a run as a table: what each computed, how long it took, and what ran and waited meanwhile.

A run records it, a simulation predicts it; profiles are fitted to it and plots drawn from it. About 60 bytes per step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from tokabatch.forecast.step_work import WORK_FIELDS, StepWork

TAIL_SHARE = 0.5
"""The tail begins after the last admission, once fewer than this share of the largest number run."""


@dataclass(frozen=True, slots=True)
class StepState:
    """One step: the `seconds` it took, samples `running` and `waiting` once it was decided, `pages` then in use of `capacity`,
    and samples that it `finished`; `replica` is the number of its replica."""

    seconds: float
    running: int
    waiting: int
    pages: int
    capacity: int
    finished: int
    replica: int = 0


STATE_FIELDS = tuple(field.name for field in fields(StepState))
COLUMNS = (*WORK_FIELDS, *STATE_FIELDS)


@dataclass(frozen=True, slots=True)
class Steps:
    """Recorded steps, one array of shape [S] for each column of `COLUMNS`."""

    columns: Mapping[str, npt.NDArray[np.float32]]

    def __getitem__(self, name: str) -> npt.NDArray[np.float64]:
        return self.columns[name].astype(np.float64)

    def __len__(self) -> int:
        return len(self.columns["seconds"])

    @property
    def work(self) -> StepWork:
        """The counts of all steps, as arrays."""
        return StepWork(**{name: self[name] for name in WORK_FIELDS})

    @property
    def seconds(self) -> float:
        return float(self["seconds"].sum())

    def mean(self, name: str) -> float:
        """Return the mean of a column, weighted by time."""
        return float((self[name] * self["seconds"]).sum()) / max(self.seconds, 1e-12)


def tail_seconds(steps: Steps) -> float:
    """Return the time at the end of a run in which nothing waited and fewer samples ran than `TAIL_SHARE` of the most."""
    running = steps["running"]
    tail = (steps["waiting"] == 0) & (running < TAIL_SHARE * running.max(initial=0.0))
    return float(steps["seconds"][tail].sum())


def by_time(replicas: Sequence[Steps]) -> Steps:
    """Merge the steps of several replicas into one table in order of time; the column `replica` distinguishes them."""
    order = np.argsort(np.concatenate([np.cumsum(steps["seconds"]) for steps in replicas]), kind="stable")
    columns = {name: np.concatenate([steps.columns[name] for steps in replicas])[order] for name in COLUMNS}
    number = np.repeat(np.arange(len(replicas), dtype=np.float32), [len(steps) for steps in replicas])
    return Steps({**columns, "replica": number[order]})


class StepLog:
    """Collects the steps of a run one by one; `steps` are those so far."""

    def __init__(self) -> None:
        self._table = np.zeros((1024, len(COLUMNS)), np.float32)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, work: StepWork, state: StepState) -> None:
        if self._count == len(self._table):
            self._table = np.concatenate((self._table, np.zeros_like(self._table)))
        row = [getattr(work, name) for name in WORK_FIELDS] + [getattr(state, name) for name in STATE_FIELDS]
        self._table[self._count] = row
        self._count += 1

    def steps(self) -> Steps:
        """Copy what was collected so far."""
        return Steps({name: self._table[: self._count, column].copy() for column, name in enumerate(COLUMNS)})
