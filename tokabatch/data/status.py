"""How far a run is, read from its output folder by anyone at any time.

The shards are the journal: what they hold is what is done. Only footers and two or three small columns are read. This
module does not know pass@k; it hands out the counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from tokabatch.data.folder import OutputFolder
from tokabatch.data.manifest import Books, read_manifest, read_summary
from tokabatch.data.shards import count_ok, read_groups
from tokabatch.messages import Bool, Int32, Int64

State = Literal["running", "complete", "incomplete", "absent"]


@dataclass(frozen=True, slots=True)
class Status:
    """`rows` and `samples` are what the run will have, None where no manifest says; the rest is what is committed."""

    state: State
    rows: int | None
    samples: int | None
    ok: int
    errors: int
    cancelled: int
    shards: int
    bytes: int
    correct: int | None
    """Samples found correct; None where the job does not verify."""

    @property
    def committed(self) -> int:
        """Samples in the shards."""
        return self.ok + self.errors

    @property
    def pending(self) -> int | None:
        """Samples still to come; None where their number is not known."""
        if self.samples is None:
            return None
        return Books(self.samples, self.ok, self.errors, self.cancelled).pending

    @property
    def accuracy(self) -> float | None:
        """Correct samples over committed ones, error rows counted as wrong."""
        if self.correct is None or not self.committed:
            return None
        return self.correct / self.committed


def read_status(path: Path) -> Status:
    """The state of the output folder `path`. Raises OutputError where one of its files is damaged."""
    folder = OutputFolder(path)
    # Asked first: a run that ends in between must not look incomplete.
    running = folder.is_claimed()
    manifest = read_manifest(folder)
    paths = folder.shard_paths()
    ok = errors = 0
    correct: int | None = None
    for table in chain.from_iterable(read_groups(path, ("status", "correct")) for path in paths):
        shard_ok = count_ok(table)
        ok += shard_ok
        errors += table.num_rows - shard_ok
        if "correct" in table.column_names:
            correct = (correct or 0) + int(_flags(table).sum())
    state: State = "incomplete"
    if folder.success.exists():
        state = "complete"
    elif running:
        state = "running"
    elif manifest is None and not paths:
        state = "absent"
    cancelled = read_summary(folder).get("cancelled", 0)
    return Status(
        state=state,
        rows=manifest.rows if manifest else None,
        samples=manifest.samples if manifest else None,
        ok=ok,
        errors=errors,
        cancelled=cancelled if isinstance(cancelled, int) else 0,
        shards=len(paths),
        bytes=sum(path.stat().st_size for path in paths),
        correct=correct,
    )


def output_lengths(path: Path) -> Int32:
    """Output tokens of every finished sample in a folder, in no particular order."""
    parts = [
        table["num_output_tokens"].to_numpy()[table["status"].to_numpy() == "ok"]
        for table in _groups(path, ("status", "num_output_tokens"))
    ]
    return np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)


def correct_counts(path: Path) -> tuple[Int64, Int64]:
    """Samples of each row, and those of them found correct, over rows that have any; errors count as samples."""
    samples, correct = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for table in _groups(path, ("row_index", "correct")):
        rows = table["row_index"].to_numpy()
        size = max(len(samples), int(rows.max(initial=-1)) + 1)
        samples = np.pad(samples, (0, size - len(samples))) + np.bincount(rows, minlength=size)
        correct = np.pad(correct, (0, size - len(correct))) + np.bincount(rows[_flags(table)], minlength=size)
    seen = samples > 0
    return samples[seen], correct[seen]


def _groups(path: Path, columns: tuple[str, ...]) -> Iterator[pa.Table]:
    return chain.from_iterable(read_groups(shard, columns) for shard in OutputFolder(path).shard_paths())


def _flags(table: pa.Table) -> Bool:
    return table["correct"].fill_null(False).to_numpy().astype(np.bool_)
