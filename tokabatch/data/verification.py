"""Reading a whole output folder back: every page of every shard against its checksum, every key counted, every file against
what `_SUCCESS` says of it.

Trusts nothing that the run kept in memory, and repairs nothing: it names what is damaged and the command that computes that
again. That command removes the damaged files and runs the job, which finds their samples missing.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from tokabatch.data.durable import file_digest
from tokabatch.data.folder import OutputFolder
from tokabatch.data.manifest import Books, Manifest, Success, read_manifest, read_success
from tokabatch.data.shards import Shard, count_ok, damaged, open_shard, read_groups
from tokabatch.errors import OutputError
from tokabatch.messages import Int64

_SAMPLES_PER_ROW = 1 << 32


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one file of the folder."""

    file: str
    problem: str


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found: the shards that are good, and the faults. `remedy` is a shell command, None where nothing is damaged."""

    rows: int
    books: Books
    shards: tuple[Shard, ...]
    complete: bool
    """Whether the folder says that it is."""
    faults: tuple[Fault, ...]
    remedy: str | None

    @property
    def exit_code(self) -> int:
        """0 complete and whole, 75 whole so far, 4 damaged."""
        if self.faults:
            return 4
        return 0 if self.complete else 75

    @property
    def facts(self) -> dict[str, int | str]:
        """For display."""
        state = "damaged" if self.faults else "complete" if self.complete else "intact, but not complete: run the job again"
        return {
            "result": state,
            "files": len(self.shards),
            "bytes": sum(shard.bytes for shard in self.shards),
            "rows": self.rows,
            "samples": self.books.samples,
            "ok": self.books.ok,
            "errors": self.books.errors,
            "pending": self.books.pending,
        }


def verify(path: Path) -> Verification:
    """Read the output folder `path` back. Raises OutputError where there is no run, or its manifest cannot be read."""
    folder = OutputFolder(path)
    manifest = read_manifest(folder)
    if manifest is None:
        raise OutputError(f"{path} holds no manifest.json, so no run has written here; give the folder named as output.path")
    success = read_success(folder)
    stated = {file.name: file for file in success.files} if success else {}
    faults: list[Fault] = []
    read: list[tuple[Shard, Int64]] = []
    for shard_path in folder.shard_paths():
        name = f"{folder.data.name}/{shard_path.name}"
        try:
            shard, keys = _read_whole(shard_path, name, manifest.rows)
        except OutputError as error:
            faults.append(Fault(name, str(error)))
            continue
        if success and (problem := _unlike(shard, stated.get(name))):
            faults.append(Fault(name, problem))
            continue
        read.append((shard, keys))
    repeats = _repeats([keys for _, keys in read])
    faults += [Fault(read[i][0].name, f"holds {count:,} samples a second time") for i, count in repeats.items()]
    good = [shard for i, (shard, _) in enumerate(read) if i not in repeats]
    present = {f"{folder.data.name}/{each.name}" for each in folder.shard_paths()}
    faults += [Fault(name, "is missing") for name in stated if name not in present]
    books = Books(manifest.samples, sum(shard.ok for shard in good), sum(shard.errors for shard in good))
    if not faults and success is not None and not _agree(books, success):
        problem = f"says {success.ok:,} ok and {success.errors:,} errors, which is not what the files hold"
        faults.append(Fault(folder.success.name, problem))
    remedy = _remedy(folder, manifest, faults, present) if faults else None
    return Verification(manifest.rows, books, tuple(good), success is not None, tuple(faults), remedy)


def _read_whole(path: Path, name: str, num_rows: int) -> tuple[Shard, Int64]:
    """The shard as found, and the key of each of its samples. Raises OutputError where anything in it is not as it was
    written, or of a row that the input does not have."""
    counted = ok = coded = 0
    keys = [np.zeros(0, np.int64)]
    with open_shard(path) as file:
        in_footer = file.metadata.num_rows
    for table in read_groups(path, None):
        try:
            table.validate(full=True)
        except pa.ArrowException as error:
            raise damaged(path, error) from error
        row, sample = table["row_index"].to_numpy(), table["sample_index"].to_numpy()
        beyond = (row < 0) | (row >= num_rows) | (sample < 0)
        if beyond.any():
            raise OutputError(f"holds samples of row {row[beyond][0]}; the input has {num_rows:,} rows")
        keys.append(row * _SAMPLES_PER_ROW + sample)
        counted, ok = counted + table.num_rows, ok + count_ok(table)
        coded += table.num_rows - table["error_code"].null_count
    if counted != in_footer or coded != counted - ok:
        raise OutputError(f"holds {counted:,} rows of {in_footer:,}: {ok:,} ok and {coded:,} with an error code")
    return Shard(name, counted, ok, counted - ok, path.stat().st_size, file_digest(path)), np.concatenate(keys)


def _repeats(keys: Sequence[Int64]) -> dict[int, int]:
    """How many samples each shard holds that an earlier one (or itself) holds, for those that hold any."""
    if not keys:
        return {}
    flat = np.concatenate(keys)
    owner = np.repeat(np.arange(len(keys)), [len(each) for each in keys])
    order = np.argsort(flat, kind="stable")
    again = order[1:][flat[order][1:] == flat[order][:-1]]
    shards, counts = np.unique(owner[again], return_counts=True)
    return dict(zip(shards.tolist(), counts.tolist(), strict=True))


def _unlike(found: Shard, stated: Shard | None) -> str | None:
    if stated is None:
        return "is not named in _SUCCESS"
    if found.sha256 != stated.sha256:
        return f"has the digest {found.sha256}, _SUCCESS says {stated.sha256}"
    return None if found == stated else f"holds {found.ok:,} ok and {found.errors:,} errors, not what _SUCCESS says"


def _agree(books: Books, success: Success) -> bool:
    return books.closed and (books.samples, books.ok, books.errors) == (success.samples, success.ok, success.errors)


def _remedy(folder: OutputFolder, manifest: Manifest, faults: Sequence[Fault], present: set[str]) -> str:
    """Relative paths of the job count from the folder that it was started in."""
    damaged_files = [folder.path.absolute() / fault.file for fault in faults if fault.file in present]
    commands: list[str] = []
    if Path(manifest.working_folder) != Path.cwd():
        commands.append(shlex.join(["cd", manifest.working_folder]))
    if damaged_files:
        commands.append(shlex.join(["rm", *map(str, damaged_files)]))
    commands.append(shlex.join(["tokabatch", "run", str(folder.job.absolute()), f"output.path={folder.path.absolute()}"]))
    return " && ".join(commands)
