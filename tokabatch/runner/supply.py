"""Units of the plan, taken by one of several writers of a folder whenever its replicas need work.

A writer takes a unit by its lease, and then reads which of its samples exist: the others become free in the ledger, and new
shards are numbered from there. If another writer publishes a shard of the unit first (because it took the lease for abandoned),
the samples that have not begun are withdrawn, and the results of the others are dropped. Units that another writer holds are
waited for until that writer has been seen alive.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from tokabatch.output.claim import Claim
from tokabatch.output.leases import Leases
from tokabatch.output.schema import UnsampledRow
from tokabatch.output.shard_names import shard_number, unit_of_shard
from tokabatch.output.shards import read_groups
from tokabatch.output.units import Units
from tokabatch.runner.ledger import Ledger
from tokabatch.runner.recorder import Recorder
from tokabatch.runner.resume import Start
from tokabatch.storage.listing import consistently

LOOK_SECONDS = 0.5
"""Seconds between attempts to take a unit while none is available."""


class Supply:
    """The units of one writer. `first` is the unit with which it begins; it continues with the following ones."""

    def __init__(
        self,
        claim: Claim,
        started: Start,
        units: Units,
        leases: Leases,
        recorder: Recorder,
        first: int,
        tell: Callable[[str], None],
    ) -> None:
        self._claim, self._units, self._leases, self._recorder, self._tell = claim, units, leases, recorder, tell
        self._drawn = started.committed.drawn.flags.copy()
        """The contents of the folder when it was last read."""
        self._seen = {shard.name for shard in started.committed.shards}
        self._numbers: dict[int, set[int]] = {}
        """The shards of each unit that have been read."""
        for name in self._seen:
            self._note(name)
        self._failures = _by_unit(started.left.failures, units)
        self._order = [(first + i) % units.count for i in range(units.count)]
        self._left = np.bincount(units.unit[~self._drawn], minlength=units.count)
        self._held: set[int] = set()
        self._lost: set[int] = set()
        self._next_look = 0.0
        self.ended = False
        """True if no unit is left that this writer may take or wait for."""
        self.abandoned = False
        """True if units are left that others took over from this writer and have not completed."""

    def more(self, ledger: Ledger) -> bool:
        """Take another unit, whose samples become free in the ledger, and return whether there was one. Raises the errors of
        `committing` and `read_groups`."""
        if time.monotonic() < self._next_look:
            return False
        with self._claim.committing():
            return self._take(ledger)

    def _take(self, ledger: Ledger) -> bool:
        self._look()
        alive = True
        self.abandoned = False
        for unit in self._order:
            if not self._left[unit] or unit in self._held:
                continue
            if unit not in self._lost and self._leases.take(str(unit)):
                if self._open(unit, ledger):
                    return True
                self._leases.drop(str(unit))
                # What was published of it since is read at the next look.
                alive = alive and not self._left[unit]
            elif unit in self._lost:
                self.abandoned = True
            else:
                alive = alive and self._leases.is_alive(str(unit))
        self.ended = alive
        self._next_look = time.monotonic() + LOOK_SECONDS
        return False

    def tick(self, ledger: Ledger) -> None:
        """Release the units that are committed and those that belong to another writer. Call this repeatedly."""
        self._leases.sign()
        for unit in list(self._held):
            lost = self._recorder.writer.is_lost(unit)
            if lost:
                ledger.withhold(self._units.unit == unit)
                self._lost.add(unit)
                self._tell(f"unit {unit} was published first by another task; what this task computed of it is discarded")
            if lost or self._recorder.writer.is_complete(unit):
                self._held.discard(unit)
                self._leases.drop(str(unit))

    def sign(self) -> None:
        """Renew this writer's leases while it is waiting."""
        self._leases.sign()

    def leave(self) -> None:
        """Release the folder in a forked child."""
        self._leases.leave()
        self._claim.leave()

    def _open(self, unit: int, ledger: Ledger) -> bool:
        self._look()
        wanted = (self._units.unit == unit) & ~self._drawn
        count = self._left[unit] = int(wanted.sum())
        if not count:
            return False
        if any(unit_of_shard(file.path.name) == unit for file in self._claim.folder.shards(self._seen)):
            # Published since; its lease was not seen by the one that did.
            return False
        self._recorder.writer.open(unit, self._numbers.get(unit, ()), count)
        self._held.add(unit)
        ledger.offer(wanted)
        mine = []
        for failure in self._failures.get(unit, ()):
            samples = failure.samples[wanted[self._units.start[failure.row_index] + failure.samples]]
            mine += [replace(failure, samples=samples)] if len(samples) else []
        if mine:
            self._recorder.fail(mine)
        return True

    def _look(self) -> None:
        """Read which samples have been committed since the last call."""
        folder = self._claim.folder

        def read() -> None:
            for file in folder.shards(self._seen):
                name = folder.name_of(file.path)
                for table in read_groups(file, ("row_index", "sample_index")):
                    place = self._units.start[table["row_index"].to_numpy()] + table["sample_index"].to_numpy()
                    fresh = place[~self._drawn[place]]
                    self._drawn[place] = True
                    np.subtract.at(self._left, self._units.unit[fresh], 1)
                self._seen.add(name)
                self._note(name)

        consistently(read, folder.path)

    def _note(self, name: str) -> None:
        unit = unit_of_shard(name)
        if unit is not None:
            self._numbers.setdefault(unit, set()).add(shard_number(name))


def _by_unit(failures: Sequence[UnsampledRow], units: Units) -> dict[int, list[UnsampledRow]]:
    """Return the error rows that have samples in each unit."""
    found: dict[int, list[UnsampledRow]] = {}
    if failures:
        number = np.repeat(np.arange(len(failures)), [len(failure.samples) for failure in failures])
        row = np.array([failure.row_index for failure in failures], np.int64)[number]
        unit = units.of(row, np.concatenate([failure.samples for failure in failures]).astype(np.int64))
        for each, place in np.unique(np.stack((unit, number)), axis=1).T.tolist():
            found.setdefault(each, []).append(failures[place])
    return found
