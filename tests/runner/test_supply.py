"""What a writer does with a unit costs what the unit holds, not what the job does."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tokabatch.output.units import Units
from tokabatch.runner.supply import Supply

ROWS, UNITS = 1000, 10


class ErrorRow:
    """See `UnsampledRow`; counts how often any is looked at."""

    looks = 0

    def __init__(self, row_index: int, samples: list[int]) -> None:
        self.row_index, self._samples = row_index, np.array(samples, np.int32)

    @property
    def samples(self) -> Any:
        ErrorRow.looks += 1
        return self._samples


def test_opening_a_unit_looks_at_its_own_error_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two samples a row, of which those of row 99 are in two units.
    unit = np.repeat(np.arange(ROWS) // (ROWS // UNITS), 2).astype(np.int32)
    unit[2 * 99 + 1] = 1
    units = Units(np.arange(0, 2 * ROWS + 1, 2), unit, UNITS)
    failures = [ErrorRow(row, [0, 1]) for row in range(ROWS)]
    failed: list[Any] = []
    recorder = SimpleNamespace(fail=failed.extend, writer=SimpleNamespace(open=lambda *_: None))
    claim = SimpleNamespace(committing=nullcontext, folder=SimpleNamespace(shards=lambda seen: (), path="out"))
    committed = SimpleNamespace(drawn=SimpleNamespace(flags=np.zeros(2 * ROWS, np.bool_)), shards=())
    started = SimpleNamespace(committed=committed, left=SimpleNamespace(failures=failures))
    leases = SimpleNamespace(take=lambda name: True)
    monkeypatch.setattr("tokabatch.runner.supply.replace", lambda row, samples: (row.row_index, samples.tolist()))
    parts: list[Any] = [claim, started, units, leases, recorder, 0, print]
    supply, ledger = Supply(*parts), SimpleNamespace(offer=lambda wanted: None)
    given: list[Any] = [ledger]
    for number in range(2):
        ErrorRow.looks = 0
        assert supply.more(*given)
        assert ErrorRow.looks <= 3 * (ROWS // UNITS + 1)
        assert len(failed) == ROWS // UNITS + number * (ROWS // UNITS + 1)
    assert failed[99] == (99, [0]) and failed[100] == (99, [1]) and failed[-1] == (199, [0, 1])
