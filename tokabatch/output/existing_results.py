"""What an output folder holds already, read back from the shards themselves.

Only footers and the small columns are read. Memory is one byte per sample of the whole job and two counters per row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokabatch.arrays import Bool, Int64
from tokabatch.errors import OutputError
from tokabatch.input.store.json_types import json_texts, place_name
from tokabatch.number_text import counted
from tokabatch.output.claim import Claim
from tokabatch.output.folder import JUDGED, OutputFolder
from tokabatch.output.journal import Shard
from tokabatch.output.manifest import read_manifest
from tokabatch.output.schema import SAMPLE_SCHEMA, input_names, verdict_names
from tokabatch.output.shards import (
    count_cancelled,
    count_ok,
    count_unjudged,
    count_without_verdict,
    open_shard,
    read_groups,
    record_commit,
    write_shard,
)
from tokabatch.scheduling.contracts import Drawn
from tokabatch.storage.atomic_files import NewFile, publish
from tokabatch.storage.listing import ListedFile, read_bytes

_COLUMNS = ("row_index", "sample_index", "status", "error_code", "correct", "verify_error")


@dataclass(frozen=True, slots=True)
class Committed:
    """The committed samples of a job: which, and how they ended."""

    drawn: Drawn
    shards: tuple[Shard, ...]
    error_counts: Counter[str]
    unverified: int
    """Number of good samples that the judge could not judge."""

    @property
    def ok(self) -> int:
        return sum(shard.ok for shard in self.shards)

    @property
    def errors(self) -> int:
        return sum(shard.errors for shard in self.shards)

    @property
    def cancelled(self) -> int:
        return sum(shard.cancelled for shard in self.shards)

    @property
    def samples(self) -> int:
        return self.ok + self.errors + self.cancelled


def nothing_committed(num_samples: Int64) -> Committed:
    """Return the results of an empty folder, for a job with these numbers of samples per row."""
    start = np.concatenate((np.zeros(1, np.int64), np.cumsum(num_samples, dtype=np.int64)))
    drawn = Drawn(start, np.zeros(int(start[-1]), np.bool_))
    return Committed(drawn, (), Counter(), 0)


def read_committed(
    folder: OutputFolder,
    num_samples: Int64,
    schema: pa.Schema | None = None,
    *,
    errors: bool = True,
    names: Collection[str] | None = None,
) -> Committed:
    """Return the committed samples of a job of `num_samples` [rows] samples a row: those of the shards `names`, or of all;
    without `errors`, only the good ones.

    Raises OutputError if a shard is damaged, has columns of ours other than those of `schema`, or holds a sample twice or one
    that is not part of the job. The input's columns may differ: see `fit_columns`.
    """
    empty = nothing_committed(num_samples)
    start, flags, codes = empty.drawn.start, empty.drawn.flags, empty.error_counts
    shards: list[Shard] = []
    unverified = 0
    for file in folder.shards():
        path = file.path
        if names is not None and folder.name_of(path) not in names:
            continue
        rows = ok = cancelled = unjudged = 0
        for found in read_groups(file, _COLUMNS, partial(_check_own_columns, path, schema)):
            table = found if errors else found.filter(_is_no_error(found))
            keys = _places(path, table, start)
            _refuse_repeats(path, table, keys, flags, folder)
            flags[keys] = True
            rows, ok, cancelled = rows + table.num_rows, ok + count_ok(table), cancelled + count_cancelled(table)
            unjudged += count_unjudged(table)
            codes.update(table["error_code"].drop_null().to_pylist())
            unverified += count_without_verdict(table)
        errors_there = rows - ok - cancelled
        shards.append(Shard(folder.name_of(path), rows, ok, errors_there, file.bytes, None, cancelled, unjudged))
    return Committed(empty.drawn, tuple(shards), codes, unverified)


def read_outcomes(folder: OutputFolder, rows: Bool) -> Iterator[tuple[int, int, str, bool | None, str | None]]:
    """Yield of every committed sample of the marked `rows` (there may be more in the folder): its row, its number, its status,
    whether it was found correct, and the answer that the judge extracted (None if it extracts none)."""
    marked = np.flatnonzero(rows)
    for file in folder.shards():
        for table in read_groups(file, ("row_index", "sample_index", "status", "correct", "extracted")):
            wanted = table.filter(pa.array(np.isin(table["row_index"].to_numpy(), marked)))
            judged = verdict_names(wanted.schema)
            columns = [wanted[name].to_pylist() for name in ("row_index", "sample_index", "status")]
            columns += [
                wanted[name].to_pylist() if name in judged else [None] * wanted.num_rows for name in ("correct", "extracted")
            ]
            yield from zip(*columns, strict=True)


def sampled_rows(folder: OutputFolder, rows: int) -> tuple[Bool, Bool]:
    """Return which of the first `rows` rows have a committed good sample, and which an error sample; each of shape [rows]."""
    good, bad = np.zeros(rows, np.bool_), np.zeros(rows, np.bool_)
    for shard in folder.shards():
        for table in read_groups(shard, ("row_index", "status")):
            row = table["row_index"].to_numpy()
            ok = pc.call_function("equal", [table["status"], "ok"]).to_numpy()
            known = (row >= 0) & (row < rows)
            good[row[known & ok]] = True
            bad[row[known & ~ok]] = True
    return good, bad


def drop_errors(claim: Claim, *, reopen: bool = False) -> int:
    """Remove the error rows from the committed shards, so that they are missing; return how many there were. With `reopen` each
    row continues from its first error: the samples after it, cancelled or not, may follow from it and are removed first.

    Each shard is replaced as a whole: interrupted anywhere, the folder holds a run without some of its samples.
    """
    if reopen:
        keys: list[Int64] = [np.zeros((2, 0), np.int64)]
        for file in claim.folder.shards():
            for table in read_groups(file, ("row_index", "sample_index", "status")):
                failed = table.filter(pc.call_function("invert", [_is_no_error(table)]))
                keys.append(np.stack((failed["row_index"].to_numpy(), failed["sample_index"].to_numpy())))
        row, sample = np.concatenate(keys, axis=1)
        order = np.lexsort((sample, row))
        reopened, first = np.unique(row[order], return_index=True)
        number = sample[order][first]

        def is_in_front(table: pa.Table) -> pa.ChunkedArray[Any]:
            row, sample = table["row_index"].to_numpy(), table["sample_index"].to_numpy()
            place = np.minimum(np.searchsorted(reopened, row), len(reopened) - 1)
            return pa.chunked_array([pa.array((reopened[place] != row) | (sample <= number[place]))])

        if len(reopened):
            _keep(claim, is_in_front)
    return _keep(claim, _is_no_error)


def _keep(claim: Claim, wanted: Callable[[pa.Table], pa.ChunkedArray[Any]]) -> int:
    """Remove unwanted samples from the shards; return how many there were."""
    dropped = 0
    for file in claim.folder.shards():
        keys = ("row_index", "sample_index", "status")
        rows = kept = 0
        for table in read_groups(file, keys):
            rows, kept = rows + table.num_rows, kept + table.filter(wanted(table)).num_rows
        if kept == rows:
            continue
        dropped += rows - kept
        if not kept:
            _remove(claim, file.path)
        else:
            tables = (table.filter(wanted(table)) for table in read_groups(file, None))
            replace_shard(claim, file, (table for table in tables if table.num_rows))
    return dropped


def list_misfits(folder: OutputFolder, schema: pa.Schema) -> tuple[list[ListedFile], list[str]]:
    """Return the shards whose columns differ from `schema`, and the names of these columns. A column whose strings were values
    and are JSON text now, or the other way round, differs too."""
    files: list[ListedFile] = []
    names: dict[str, None] = {}
    for file in folder.shards():
        with open_shard(file) as parquet:
            found = parquet.schema_arrow
        texts = set(json_texts(found, input_names(found))) ^ set(json_texts(schema))
        if texts or not found.equals(schema):
            files.append(file)
            names.update(dict.fromkeys(name for name, before, now in _types(found, schema) if not _same(before, now)))
            names.update(dict.fromkeys(sorted(map(place_name, texts))))
    return files, list(names)


def fit_columns(claim: Claim, files: Sequence[ListedFile], schema: pa.Schema, columns: Callable[[Int64], pa.Table]) -> None:
    """Give these shards the columns of `schema`: ours stay, those of the input are read again by `columns`, for the rows of the
    samples. All shards then have the same columns, as readers of the dataset assume.

    Each is replaced as a whole: interrupted anywhere, the folder holds the same samples, and the next start does the rest.
    """
    for file in files:
        replace_shard(claim, file, _fitted(file, schema, columns))


def _fitted(file: ListedFile, schema: pa.Schema, columns: Callable[[Int64], pa.Table]) -> Iterator[pa.Table]:
    for table in read_groups(file, None):
        inputs = columns(table["row_index"].to_numpy())
        sources = input_names(schema)
        arrays = [inputs[sources[field.name]] if field.name in sources else table[field.name] for field in schema]
        yield pa.Table.from_arrays([array.cast(field.type) for array, field in zip(arrays, schema, strict=True)], schema=schema)


def remove_shards(claim: Claim, names: Collection[str]) -> None:
    """Remove shards, if they exist, so that their samples are computed again. Raises OSError."""
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


def replace_shard(claim: Claim, file: ListedFile, tables: Iterable[pa.Table]) -> None:
    """Replace a shard by one of these rows, in one step. If several writers do so, the first one's rows replace it and those of
    the others are dropped. Raises OSError."""
    temporary = claim.folder.temporary / file.path.name
    shard, written = write_shard(claim, pa.concat_tables(tables), temporary, claim.folder.name_of(file.path))
    if claim.journal is not None:
        claim.journal.begins(shard)
    if not claim.files.alone:
        decided = claim.folder.units / f"{JUDGED}{file.path.name}"
        with suppress(FileExistsError):
            publish(claim.files, temporary, decided)
        content = read_bytes(claim.files, decided)
        assert content is not None, "it is removed by a run alone, which no other writes beside"
        with NewFile(claim.files, temporary) as copy:
            copy.write(content)
            copy.sync()
    claim.files.replace(temporary, file.path)
    claim.files.sync_folder(file.path.parent)
    record_commit(claim, shard, written)


def _is_no_error(table: pa.Table) -> pa.ChunkedArray[Any]:
    return pc.call_function("not_equal", [table["status"], "error"])


def _places(path: Path, table: pa.Table, start: Int64) -> Int64:
    """Return the place of each sample of `table` among all samples of the job."""
    row, sample = table["row_index"].to_numpy(), table["sample_index"].to_numpy()
    known = (row >= 0) & (row < len(start) - 1) & (sample >= 0)
    clipped = np.where(known, row, 0)
    known &= sample < start[clipped + 1] - start[clipped]
    if not known.all():
        odd = int(np.flatnonzero(~known)[0])
        if table["status"][odd].as_py() == "error":
            raise OutputError(
                f"{path} holds an error sample (number {sample[odd]}) of row {row[odd]}, which is no longer part of the "
                "job. Run with --retry-errors, which removes the error rows and runs those that still belong to the job again."
            )
        rows = len(start) - 1
        why = f"the input has {counted(rows, 'row')} now; rows may be added but not removed"
        if 0 <= row[odd] < rows:
            manifest = read_manifest(OutputFolder(path.parent.parent))
            earlier = 0 if manifest is None else manifest.job.get("generation", {}).get("n", 0)
            why = (
                f"this row has n = {start[row[odd] + 1] - start[row[odd]]:,} now; generation.n may be raised but not lowered: "
                f"write generation.n={max(earlier, int(sample[odd]) + 1)}"
            )
            raise OutputError(f"{path} holds sample {sample[odd]} of row {row[odd]}, but {why}, or choose another output.path")
        raise OutputError(
            f"{path} holds sample {sample[odd]} of row {row[odd]}, but {why}. Choose another output.path, change it back, or "
            "start over with --overwrite."
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


def _check_own_columns(path: Path, schema: pa.Schema | None, found: pa.Schema) -> None:
    if schema is None or found.equals(schema):
        return
    types = [(name, before, now) for name, before, now in _types(found, schema) if not _same(before, now)]
    changed = [f"{name} ({before or 'absent'} there, {now} now)" for name, before, now in types if name in SAMPLE_SCHEMA.names]
    if changed:
        raise OutputError(
            f"{path} has columns that this version writes differently: {', '.join(changed)}. Use the version that wrote it, "
            "choose another output.path, or start over with --overwrite."
        )


def _types(found: pa.Schema, schema: pa.Schema) -> Iterator[tuple[str, pa.DataType | None, pa.DataType | None]]:
    """Return each column of the two, with its type in the first and in the second."""
    for name in dict.fromkeys((*schema.names, *found.names)):
        before, now = (each.field(name).type if name in each.names else None for each in (found, schema))
        yield name, before, now


def _same(before: pa.DataType | None, now: pa.DataType | None) -> bool:
    return before is not None and now is not None and before.equals(now)
