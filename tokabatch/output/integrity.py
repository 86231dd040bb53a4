"""Read a whole output folder back: every byte of every shard against its record, every page against its checksum, every key
counted.

Repairs nothing: it names what is damaged and the command that computes it again. While a run writes to the folder, one
consistent listing is read, or the check fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from tokabatch.arrays import Int64
from tokabatch.errors import DamageError, OutputError
from tokabatch.number_text import counted
from tokabatch.output.folder import OutputFolder
from tokabatch.output.inspection import Fault, inspect
from tokabatch.output.journal import Shard
from tokabatch.output.lock import is_claimed
from tokabatch.output.manifest import Books, read_manifest, without_manifest
from tokabatch.output.remedy import num_of_other_judges, repair_command
from tokabatch.output.shards import count_cancelled, count_ok, damaged, open_shard, read_groups
from tokabatch.storage.listing import ListedFile, consistently

_SAMPLES_PER_ROW = 1 << 32


@dataclass(frozen=True, slots=True)
class CheckedFolder:
    """The good shards, and the faults. `remedy` is a shell command, None if nothing is damaged."""

    rows: int
    books: Books
    shards: tuple[Shard, ...]
    complete: bool
    """Whether the folder says that the run is complete."""
    faults: tuple[Fault, ...]
    remedy: str | None
    running: bool
    """Whether a run was writing meanwhile."""
    others: int = 0
    """Shards that the job's judge has still to judge, as an interrupted `tokabatch score` leaves them."""

    @property
    def exit_code(self) -> int:
        """0: complete and intact; 75: intact so far; 4: damaged."""
        if self.faults:
            return 4
        return 0 if self.complete else 75

    @property
    def facts(self) -> dict[str, int | str]:
        """For display."""
        left = "let `tokabatch score` judge the other files" if self.others else "run the job again"
        state = "damaged" if self.faults else "complete" if self.complete else f"intact, but not complete: {left}"
        if self.running:
            state = "damaged, and a run is writing: let it end first" if self.faults else "intact so far; a run is writing"
        return {
            "result": state,
            "files": len(self.shards),
            "bytes": sum(shard.bytes for shard in self.shards),
            "rows": self.rows,
            "samples": self.books.samples,
            "ok": self.books.ok,
            "errors": self.books.errors,
            **({"cancelled": self.books.cancelled} if self.books.cancelled else {}),
            "pending": self.books.pending,
        }


def check(path: Path) -> CheckedFolder:
    """Read the output folder `path` back. Raises OutputError if there is no run, or something cannot be read, DamageError if
    its manifest is damaged."""
    folder = OutputFolder(path)
    found = consistently(lambda: _check(folder), path)
    if found.running and found.faults:
        # A run may have changed the folder between two readings; real damage remains.
        again = consistently(lambda: _check(folder), path)
        if set(again.faults) != set(found.faults) or not is_claimed(folder):
            return again
    return found


def _check(folder: OutputFolder) -> CheckedFolder:
    running = is_claimed(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        if not running:
            raise without_manifest(folder)
        raise OutputError(f"{folder.path} holds no manifest.json yet: a run is starting there; try again later")
    inspected = inspect(folder, manifest)
    faults = list(inspected.faults)
    read: list[tuple[Shard, Int64]] = []
    unrecorded = {folder.name_of(file.path) for file in inspected.unrecorded}
    for known, file in (*inspected.good, *((None, file) for file in inspected.unrecorded)):
        name = folder.name_of(file.path)
        try:
            shard, keys = _read_whole(file, name, manifest.rows, known)
        except DamageError as error:
            faults.append(Fault(name, str(error)))
            continue
        read.append((shard, keys))
    repeats = _repeats([keys for _, keys in read])
    faults += [
        Fault(read[i][0].name, f"holds {counted(count, 'sample')} a second time", "foreign") for i, count in repeats.items()
    ]
    repeated = {read[i][0].name for i in repeats}
    where = "_SUCCESS" if inspected.success is not None and not manifest.run else folder.commits.name
    faults += [Fault(name, f"is not named in {where}", "unrecorded") for name in sorted(unrecorded - repeated)]
    good = [shard for i, (shard, _) in enumerate(read) if i not in repeats and shard.name not in unrecorded]
    books = Books.of(manifest.samples, good)
    if not faults and inspected.success is not None and not (inspected.sealed and books.closed):
        mark = inspected.success
        said = f"{mark.ok:,} ok and {counted(mark.errors, 'error')} in {counted(len(mark.files), 'file')}"
        faults.append(Fault(folder.success.name, f"says {said}, which is not what was committed", "record"))
    faults += [Fault(f"data/{name}", "was not written by a run", "foreign") for name in folder.foreign()]
    remedy = None
    if faults:
        foreign = sorted({fault.file for fault in faults if fault.kind == "foreign"})
        # Any start rewrites _SUCCESS, unless it is the only record.
        nothing = all(fault.kind == "foreign" or (fault.file == folder.success.name and manifest.run) for fault in faults)
        remedy = repair_command(folder, manifest, foreign, repair=not nothing)
    first_of_file = tuple({fault.file: fault for fault in reversed(faults)}.values())[::-1]
    running = running or is_claimed(folder)
    complete = inspected.success is not None
    others = num_of_other_judges(manifest, inspected)
    return CheckedFolder(manifest.rows, books, tuple(good), complete, first_of_file, remedy, running, others)


def _read_whole(file: ListedFile, name: str, num_rows: int, known: Shard | None) -> tuple[Shard, Int64]:
    """Return the shard as found, and the key of each of its samples. Raises DamageError if anything in it is not as it was
    written, or is of a row that the input does not have."""
    held = ok = cancelled = coded = 0
    keys = [np.zeros(0, np.int64)]
    with open_shard(file) as parquet:
        in_footer = parquet.metadata.num_rows
    for table in read_groups(file, None):
        try:
            table.validate(full=True)
        except pa.ArrowException as error:
            raise damaged(file.path, error) from error
        row, sample = table["row_index"].to_numpy(), table["sample_index"].to_numpy()
        beyond = (row < 0) | (row >= num_rows) | (sample < 0)
        if beyond.any():
            raise DamageError(f"holds samples of row {row[beyond][0]}; the input has {counted(num_rows, 'row')}")
        keys.append(row * _SAMPLES_PER_ROW + sample)
        held, ok, cancelled = held + table.num_rows, ok + count_ok(table), cancelled + count_cancelled(table)
        coded += table.num_rows - table["error_code"].null_count
    if held != in_footer or coded != held - ok - cancelled:
        raise DamageError(f"holds {counted(held, 'row')} of {in_footer:,}: {ok:,} ok and {coded:,} with an error code")
    digest, unjudged = (None, 0) if known is None else (known.sha256, known.unjudged)
    found = Shard(name, held, ok, held - ok - cancelled, file.bytes, digest, cancelled, unjudged)
    if known is not None and found != known:
        raise DamageError(
            f"holds {found.ok:,} ok and {counted(found.errors, 'error')}; {known.ok:,} and {known.errors:,} were committed"
        )
    return found, np.concatenate(keys)


def _repeats(keys: Sequence[Int64]) -> dict[int, int]:
    """Return, for each shard with any, the number of samples that an earlier shard, or itself, also holds."""
    if not keys:
        return {}
    flat = np.concatenate(keys)
    owner = np.repeat(np.arange(len(keys)), [len(each) for each in keys])
    order = np.argsort(flat, kind="stable")
    again = order[1:][flat[order][1:] == flat[order][:-1]]
    shards, counts = np.unique(owner[again], return_counts=True)
    return dict(zip(shards.tolist(), counts.tolist(), strict=True))
