"""What an output folder holds already, read back from the shards themselves.

Only footers and the small columns are read. Memory is one byte a sample of the whole job and two counters a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokabatch.data.durable import NewFile
from tokabatch.data.folder import Claim, OutputFolder
from tokabatch.data.journal import Shard
from tokabatch.data.listing import ListedFile
from tokabatch.data.shards import count_ok, open_shard, read_groups, record_commit, write_parquet
from tokabatch.errors import OutputError
from tokabatch.messages import Bool, Drawn, Int64

_COLUMNS = ("row_index", "sample_index", "status", "error_code", "correct")


@dataclass(frozen=True, slots=True)
class Committed:
    """The committed samples of a job: which, and how they came out. `correct` has shape [rows]."""

    drawn: Drawn
    shards: tuple[Shard, ...]
    error_counts: Counter[str]
    correct: Int64
    unverified: int
    """Samples whose reference the verifier does not understand."""

    @property
    def ok(self) -> int:
        return sum(shard.ok for shard in self.shards)

    @property
    def errors(self) -> int:
        return sum(shard.errors for shard in self.shards)

    @property
    def samples(self) -> int:
        return self.ok + self.errors


def nothing_committed(num_samples: Int64) -> Committed:
    """An empty folder's, for a job of so many samples a row."""
    start = np.concatenate((np.zeros(1, np.int64), np.cumsum(num_samples, dtype=np.int64)))
    drawn = Drawn(start, np.zeros(int(start[-1]), np.bool_))
    return Committed(drawn, (), Counter(), np.zeros(len(num_samples), np.int64), 0)


def read_committed(
    folder: OutputFolder,
    num_samples: Int64,
    schema: pa.Schema | None = None,
    *,
    errors: bool = True,
    names: Collection[str] | None = None,
) -> Committed:
    """Every committed sample of a job of `num_samples` [rows] samples a row; without `errors`, every good one; of the shards
    `names` alone, where that is given.

    Raises OutputError where a shard is damaged, has another `schema`, holds a sample twice, or one that the job does not
    ask for.
    """
    empty = nothing_committed(num_samples)
    start, flags, correct, codes = empty.drawn.start, empty.drawn.flags, empty.correct, empty.error_counts
    shards: list[Shard] = []
    unverified = 0
    for file in folder.shards():
        path = file.path
        if names is not None and folder.name_of(path) not in names:
            continue
        if schema is not None:
            _check_schema(file, schema)
        rows = ok = 0
        for found in read_groups(file, _COLUMNS):
            table = found if errors else found.filter(_is_ok(found))
            keys = _places(path, table, start)
            _refuse_repeats(path, table, keys, flags, folder)
            flags[keys] = True
            rows, ok = rows + table.num_rows, ok + count_ok(table)
            codes.update(table["error_code"].drop_null().to_pylist())
            if "correct" in table.column_names:
                row_index = table["row_index"].to_numpy()
                np.add.at(correct, row_index[table["correct"].fill_null(False).to_numpy(zero_copy_only=False)], 1)
                unverified += count_ok(table.filter(pc.call_function("is_null", [table["correct"]])))
        shards.append(Shard(folder.name_of(path), rows, ok, rows - ok, file.bytes))
    return Committed(empty.drawn, tuple(shards), codes, correct, unverified)


def sampled_rows(folder: OutputFolder, rows: int) -> tuple[Bool, Bool]:
    """Of the first `rows` rows, those with a committed good sample, and those with an error sample; each of shape [rows]."""
    good, bad = np.zeros(rows, np.bool_), np.zeros(rows, np.bool_)
    for shard in folder.shards():
        for table in read_groups(shard, ("row_index", "status")):
            row = table["row_index"].to_numpy()
            ok = _is_ok(table).to_numpy()
            known = (row >= 0) & (row < rows)
            good[row[known & ok]] = True
            bad[row[known & ~ok]] = True
    return good, bad


def drop_errors(claim: Claim) -> int:
    """Take the error rows out of the committed shards, so that they are missing; how many there were.

    A shard is replaced whole by one without them: cut short anywhere, the folder holds a run that lacks some samples.
    """
    dropped = 0
    for file in claim.folder.shards():
        errors = sum(table.num_rows - count_ok(table) for table in read_groups(file, ("status",)))
        if not errors:
            continue
        dropped += errors
        with open_shard(file) as parquet:
            rows = parquet.metadata.num_rows
        if errors == rows:
            _remove(claim, file.path)
        else:
            _replace(claim, file)
    return dropped


def remove_shards(claim: Claim, names: Collection[str]) -> None:
    """Take shards away, where they are there, for their samples to be computed again. Raises OSError."""
    for file in claim.folder.shards():
        if claim.folder.name_of(file.path) in names:
            _remove(claim, file.path)


def _remove(claim: Claim, path: Path) -> None:
    name = claim.folder.name_of(path)
    if claim.journal is not None:
        claim.journal.removes([name])
    claim.files.remove(path)
    claim.files.sync_folder(path.parent)
    if claim.journal is not None:
        claim.journal.done(name)


def _replace(claim: Claim, file: ListedFile) -> None:
    """By a shard without its error rows."""
    temporary = claim.folder.temporary / file.path.name
    table = pa.concat_tables(_without_errors(file))
    with NewFile(claim.files, temporary) as new:
        write_parquet(table, new, claim.identity)
        new.sync()
        size, digest = new.tell(), new.digest
    shard = Shard(claim.folder.name_of(file.path), table.num_rows, table.num_rows, 0, size, digest)
    if claim.journal is not None:
        claim.journal.begins(shard)
    claim.files.replace(temporary, file.path)
    claim.files.sync_folder(file.path.parent)
    record_commit(claim, shard)


def _without_errors(file: ListedFile) -> Iterator[pa.Table]:
    for table in read_groups(file, None):
        kept = table.filter(_is_ok(table))
        if kept.num_rows:
            yield kept


def _is_ok(table: pa.Table) -> pa.ChunkedArray[Any]:
    return pc.call_function("equal", [table["status"], "ok"])


def _places(path: Path, table: pa.Table, start: Int64) -> Int64:
    """Where the samples of `table` stand among all samples of the job."""
    row, sample = table["row_index"].to_numpy(), table["sample_index"].to_numpy()
    known = (row >= 0) & (row < len(start) - 1) & (sample >= 0)
    clipped = np.where(known, row, 0)
    known &= sample < start[clipped + 1] - start[clipped]
    if not known.all():
        odd = int(np.flatnonzero(~known)[0])
        if table["status"][odd].as_py() != "ok":
            raise OutputError(
                f"{path} holds an error sample (number {sample[odd]}) of row {row[odd]}, which the job does not ask for any "
                "more. Run with --retry-errors, which takes the error rows out and runs again those that there are."
            )
        raise OutputError(
            f"{path} holds sample {sample[odd]} of row {row[odd]}, which the job does not ask for: its input has "
            f"{len(start) - 1:,} rows, and generation.n may be raised but not lowered. Choose another output.path, or "
            "start afresh with --overwrite."
        )
    return start[row] + sample


def _refuse_repeats(path: Path, table: pa.Table, keys: Int64, seen: Bool, folder: OutputFolder) -> None:
    again = np.ones(len(keys), np.bool_)
    again[np.unique(keys, return_index=True)[1]] = False
    again |= seen[keys]
    if not again.any():
        return
    odd = int(np.flatnonzero(again)[0])
    raise OutputError(
        f"{path} holds sample {table['sample_index'][odd]} of row {table['row_index'][odd]} a second time: a file was copied "
        f"into {folder.data}. Move the copy away."
    )


def _check_schema(file: ListedFile, schema: pa.Schema) -> None:
    with open_shard(file) as parquet:
        found = parquet.schema_arrow
    if found.equals(schema):
        return
    names = [*schema.names, *(name for name in found.names if name not in schema.names)]
    types = [(name, _type(found, name), _type(schema, name)) for name in names]
    told = [f"{name} ({before} there, {now} now)" for name, before, now in types if before != now]
    raise OutputError(
        f"{file.path} has other columns than the job's output would have: {', '.join(told[:5]) or 'in another order'}. Choose "
        "another output.path, or start afresh with --overwrite; output.columns names the input columns to carry."
    )


def _type(schema: pa.Schema, name: str) -> str:
    return str(schema.field(name).type) if name in schema.names else "absent"
