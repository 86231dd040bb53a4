"""How far a run is, read from its output folder by anyone at any time.

The shards are the journal: what they hold is what is done. Only footers and two or three small columns are read. This
module does not know pass@k.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokabatch.arrays import Int32
from tokabatch.output.folder import OutputFolder
from tokabatch.output.inspection import recorded_shards
from tokabatch.output.leases import Lease, read_leases
from tokabatch.output.lock import is_claimed
from tokabatch.output.manifest import Books, read_manifest
from tokabatch.output.shards import count_cancelled, count_ok, count_unjudged, open_shard, read_groups
from tokabatch.output.units import unit_of_shard, unit_sizes
from tokabatch.storage.listing import ListedFile, consistently, is_there, list_files

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
    unjudged: int | None
    """Samples whose verdicts are still to come; None where the job does not verify."""
    started: str | None = None
    """When the run was first started, in the local time of then."""
    model: str | None = None
    input: str | None = None
    """Of the job, as it says them."""

    @property
    def committed(self) -> int:
        """Samples in the shards."""
        return self.ok + self.errors + self.cancelled

    @property
    def pending(self) -> int | None:
        """Samples still to come; None where their number is not known."""
        if self.samples is None:
            return None
        return Books(self.samples, self.ok, self.errors, self.cancelled).pending


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a running job is, by its commits: seconds since this start began and since the last commit; samples and output
    tokens a second between the first commit of this start and the last. None before the first commit, `seconds_left` before
    the third."""

    running_seconds: float
    commit_seconds: float | None = None
    samples_per_second: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None


@dataclass(frozen=True, slots=True)
class Details:
    """The status with what a report shows beside it, of one listing. `lengths` are the output tokens of every finished sample,
    in no particular order."""

    status: Status
    lengths: Int32


@dataclass(frozen=True, slots=True)
class Task:
    """One of several processes that write, by its leases: the units that it holds, and the seconds since it renewed one of
    them, by the clocks of two hosts."""

    name: str
    host: str
    units: tuple[int, ...]
    renewed: float


@dataclass(frozen=True, slots=True)
class Shares:
    """Of a run that is cut into units: how many there are, how many of them are complete, and who is at work."""

    units: int
    complete: int
    tasks: tuple[Task, ...]


def read_shares(path: Path, now: float) -> Shares | None:
    """How several processes share the run at `now` (seconds since 1970); None of one that is not cut into units. Samples that a
    process computed before the run was cut are in no unit's files: units that need them count as complete at the end."""
    folder = OutputFolder(path)

    def read() -> Shares | None:
        manifest = read_manifest(folder)
        if manifest is None or not manifest.units:
            return None
        sizes, held = unit_sizes(folder, manifest.units_sha256), dict[tuple[str, str], list[Lease]]()
        for lease in read_leases(folder, now):
            held.setdefault((lease.holder.task, lease.holder.host), []).append(lease)
        tasks = tuple(
            Task(
                task, host, tuple(sorted(int(lease.name) for lease in leases if lease.name.isdigit())),
                min(lease.age for lease in leases),
            )
            for (task, host), leases in sorted(held.items())
        )  # fmt: skip
        complete = manifest.units
        if not is_there(folder.files, folder.success):
            there = np.zeros(manifest.units, np.int64)
            for shard in recorded_shards(folder, manifest):
                unit = unit_of_shard(shard.path.name)
                if unit is not None:
                    with open_shard(shard) as file:
                        there[unit] += file.metadata.num_rows
            complete = int((there >= sizes).sum())
        return Shares(manifest.units, complete, tasks)

    return consistently(read, path)


def read_status(path: Path) -> Status:
    """The state of the output folder `path`. Raises DamageError where one of its files is damaged, OutputError where one cannot
    be read or is not of the run."""
    folder = OutputFolder(path)
    return consistently(lambda: _status(folder)[0], path)


def read_pace(path: Path, now: float) -> Pace | None:
    """How fast the job that writes to `path` is at `now` (seconds since 1970); None where none is running. A start writes the
    manifest before its first shard, and each shard carries the time of its commit."""
    folder = OutputFolder(path)

    def read() -> Pace | None:
        status, shards = _status(folder)
        manifest = next((file for file in list_files(folder.files, path) if file.path == folder.manifest), None)
        if status.state != "running" or manifest is None:
            return None
        begun = manifest.changed
        # Of this start; one that continues a run may find old shards, or join them.
        commits = sorted(((shard.changed, shard) for shard in shards if shard.changed > begun), key=lambda each: each[0])
        if not commits:
            return Pace(now - begun)
        # The first commit is only where counting begins, if there are more: loading the model came before it.
        since, counted = (commits[0][0], commits[1:]) if len(commits) > 1 else (begun, commits)
        samples = tokens = 0
        for table in _groups([shard for _, shard in counted], ("status", "num_output_tokens")):
            samples += table.num_rows
            tokens += pc.call_function("sum", [table["num_output_tokens"]]).as_py() or 0
        last = commits[-1][0]
        spent = max(last - since, 1e-9)
        speed = samples / spent
        left = status.pending / speed if len(commits) > 2 and status.pending is not None else None
        return Pace(now - begun, now - last, speed, tokens / spent, left and max(0.0, left - (now - last)))

    return consistently(read, path)


def read_details(path: Path) -> Details:
    """The same and more, which takes longer."""
    folder = OutputFolder(path)

    def read() -> Details:
        status, shards = _status(folder)
        return Details(status, _lengths(shards))

    return consistently(read, path)


def output_lengths(path: Path) -> Int32:
    """Output tokens of every finished sample in a folder, in no particular order."""
    folder = OutputFolder(path)
    return consistently(lambda: _lengths(recorded_shards(folder, read_manifest(folder))), path)


def _status(folder: OutputFolder) -> tuple[Status, tuple[ListedFile, ...]]:
    # Asked first: a run that ends in between must not look incomplete.
    running = is_claimed(folder)
    manifest = read_manifest(folder)
    shards = recorded_shards(folder, manifest)
    ok = errors = cancelled = 0
    correct: int | None = None
    unjudged: int | None = None
    for table in _groups(shards, ("status", "correct", "verify_error")):
        finished, dropped = count_ok(table), count_cancelled(table)
        ok, errors, cancelled = ok + finished, errors + table.num_rows - finished - dropped, cancelled + dropped
        if "correct" in table.column_names:
            correct = (correct or 0) + int(table["correct"].fill_null(False).to_numpy().astype(np.bool_).sum())
            unjudged = (unjudged or 0) + count_unjudged(table)
    state: State = "incomplete"
    if is_there(folder.files, folder.success):
        state = "complete"
    elif running:
        state = "running"
    elif manifest is None and not shards:
        state = "absent"
    status = Status(
        state=state,
        rows=manifest.rows if manifest else None,
        samples=manifest.samples if manifest else None,
        ok=ok,
        errors=errors,
        cancelled=cancelled,
        shards=len(shards),
        bytes=sum(shard.bytes for shard in shards),
        correct=correct,
        unjudged=unjudged,
        started=manifest and manifest.started.replace("T", " "),
        model=manifest and manifest.job.get("model", {}).get("path"),
        input=manifest and manifest.job.get("input", {}).get("path"),
    )
    return status, shards


def _lengths(shards: Sequence[ListedFile]) -> Int32:
    parts = [
        table["num_output_tokens"].to_numpy()[table["status"].to_numpy() == "ok"]
        for table in _groups(shards, ("status", "num_output_tokens"))
    ]
    return np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)


def _groups(shards: Sequence[ListedFile], columns: tuple[str, ...]) -> Iterator[pa.Table]:
    return chain.from_iterable(read_groups(shard, columns) for shard in shards)
