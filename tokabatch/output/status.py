"""The progress of a run, read from its output folder by any process at any time.

What the shards hold is what is done. Only footers and two or three small columns are read.
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
from tokabatch.output.schema import verdict_names
from tokabatch.output.shard_names import unit_of_shard
from tokabatch.output.shards import (
    count_cancelled,
    count_ok,
    count_unjudged,
    count_without_verdict,
    open_shard,
    read_groups,
)
from tokabatch.output.units import unit_sizes
from tokabatch.storage.listing import ListedFile, consistently, is_there, list_files

State = Literal["running", "complete", "incomplete", "absent"]


@dataclass(frozen=True, slots=True)
class Status:
    """`rows` and `samples` are the run's totals, None without a manifest; everything else is what is committed."""

    state: State
    rows: int | None
    samples: int | None
    ok: int
    errors: int
    cancelled: int
    shards: int
    bytes: int
    correct: int | None
    """Samples found correct; None if the job does not verify."""
    unjudged: int | None
    """Samples that are still to be judged; None if the job does not verify."""
    without_verdict: int | None
    """Good samples that the judge could not judge, which count as wrong; None if the job does not verify."""
    of_another_judge: int | None
    """Good samples in files that the job's judge has still to judge, as an interrupted `tokabatch score` leaves them, whose
    verdicts count nowhere; None if there are none."""
    started: str | None
    """The time of the first start, in its local time."""
    model: str | None
    input: str | None
    """The job's own values."""

    @property
    def committed(self) -> int:
        """Number of samples in the shards."""
        return self.ok + self.errors + self.cancelled

    @property
    def pending(self) -> int | None:
        """Number of samples still to come; None if the total is not known."""
        if self.samples is None:
            return None
        return Books(self.samples, self.ok, self.errors, self.cancelled).pending


@dataclass(frozen=True, slots=True)
class Pace:
    """The speed of a running job, from its commits: seconds since this start began and since the last commit; samples and
    output tokens per second between the first commit of this start and the last, for the model was loaded before the first.
    None before the second commit (`commit_seconds` the first), `seconds_left` before the third."""

    running_seconds: float
    commit_seconds: float | None = None
    samples_per_second: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None


@dataclass(frozen=True, slots=True)
class Details:
    """The status and further details for a report, from one listing. `lengths` are the output tokens of every finished sample,
    in no particular order."""

    status: Status
    lengths: Int32


@dataclass(frozen=True, slots=True)
class Task:
    """One of several writers, from its leases: the units that it holds, and the seconds since it renewed one of them, by the
    clocks of two hosts."""

    name: str
    host: str
    units: tuple[int, ...]
    renewed: float


@dataclass(frozen=True, slots=True)
class Shares:
    """A run that is cut into units: how many there are, how many are complete, and which writers are active."""

    units: int
    complete: int
    tasks: tuple[Task, ...]


def read_shares(path: Path, now: float) -> Shares | None:
    """Return how several processes share the run at `now` (seconds since 1970); None for a run that is not cut into units.
    Samples that a process computed before the run was cut are in no unit's files: units that need them count as complete at the
    end."""
    folder = OutputFolder(path)

    def read() -> Shares | None:
        manifest = read_manifest(folder)
        if manifest is None or not manifest.units:
            return None
        held: dict[tuple[str, str], list[Lease]] = {}
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
            sizes, there = unit_sizes(folder, manifest.units_sha256), np.zeros(manifest.units, np.int64)
            for shard in recorded_shards(folder, manifest):
                unit = unit_of_shard(shard.path.name)
                if unit is not None:
                    with open_shard(shard) as file:
                        there[unit] += file.metadata.num_rows
            complete = int((there >= sizes).sum())
        return Shares(manifest.units, complete, tasks)

    return consistently(read, path)


def read_status(path: Path) -> Status:
    """Return the state of the output folder `path`. Raises DamageError if one of its files is damaged, OutputError if one
    cannot be read or is not of the run."""
    folder = OutputFolder(path)
    return consistently(lambda: _status(folder)[0], path)


def read_pace(path: Path, now: float) -> Pace | None:
    """Return the speed of the job that writes to `path` at `now` (seconds since 1970); None if none is running, or nothing is
    left to compute. A start writes the manifest before its first shard, and each shard carries the time of its commit."""
    folder = OutputFolder(path)

    def read() -> Pace | None:
        status, shards = _status(folder)
        manifest = next((file for file in list_files(folder.files, path) if file.path == folder.manifest), None)
        # Where nothing is pending, files change for other reasons, such as new verdicts.
        if status.state != "running" or manifest is None or not status.pending:
            return None
        begun = manifest.changed
        # Of this start; one that continues a run may find old shards, or join them.
        commits = sorted(((shard.changed, shard) for shard in shards if shard.changed > begun), key=lambda each: each[0])
        if len(commits) < 2:
            return Pace(now - begun, *(now - at for at, _ in commits))
        samples = tokens = 0
        for table in _groups([shard for _, shard in commits[1:]], ("status", "num_output_tokens")):
            samples += table.num_rows
            tokens += pc.call_function("sum", [table["num_output_tokens"]]).as_py() or 0
        last = commits[-1][0]
        spent = max(last - commits[0][0], 1e-9)
        speed = samples / spent
        left = status.pending / speed if len(commits) > 2 else None
        return Pace(now - begun, now - last, speed, tokens / spent, left and max(0.0, left - (now - last)))

    return consistently(read, path)


def read_details(path: Path) -> Details:
    """Return the status and further details, which takes longer."""
    folder = OutputFolder(path)

    def read() -> Details:
        status, shards = _status(folder)
        return Details(status, _lengths(shards))

    return consistently(read, path)


def output_lengths(path: Path) -> Int32:
    """Return the output tokens of every finished sample in a folder, in no particular order."""
    folder = OutputFolder(path)
    return consistently(lambda: _lengths(recorded_shards(folder, read_manifest(folder))), path)


def _status(folder: OutputFolder) -> tuple[Status, tuple[ListedFile, ...]]:
    # Read first: a run that ends meanwhile must not look incomplete.
    running = is_claimed(folder)
    manifest = read_manifest(folder)
    shards = recorded_shards(folder, manifest)
    ok = errors = cancelled = 0
    correct: int | None = None
    unjudged: int | None = None
    failed: int | None = None
    others: int | None = None
    for table in _groups(shards, ("status", "correct", "verify_error")):
        finished, dropped = count_ok(table), count_cancelled(table)
        ok, errors, cancelled = ok + finished, errors + table.num_rows - finished - dropped, cancelled + dropped
        if manifest is not None and not manifest.is_judge_of(table.schema.metadata):
            others = (others or 0) + finished
        elif "correct" in verdict_names(table.schema):
            correct = (correct or 0) + int(table["correct"].fill_null(False).to_numpy().astype(np.bool_).sum())
            unjudged = (unjudged or 0) + count_unjudged(table)
            failed = (failed or 0) + count_without_verdict(table)
    state: State = "incomplete"
    if manifest is not None and is_there(folder.files, folder.success):
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
        without_verdict=failed,
        of_another_judge=others,
        started=manifest and manifest.started.replace("T", " ").replace("+00:00", " UTC"),
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
