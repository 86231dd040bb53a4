"""The record of commits after a disk that has lost what it was given."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pyarrow as pa
import pytest
from support.shards import write_rows

from tokabatch.output.claim import Claim
from tokabatch.output.folder import OutputFolder
from tokabatch.output.shard_writer import ShardWriter
from tokabatch.storage.atomic_files import DurableFiles

SCHEMA = pa.schema([("row_index", pa.int64()), ("status", pa.string())])


class Dropping(DurableFiles):
    """The first fsync of a grown file named `name` fails, and the system drops what it was to write: the pages count as written
    from then on, and no later fsync of that file brings them back. That is how Linux treats EIO, and NFS an exceeded quota."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.synced: dict[int, int] = {}
        self.dropped: tuple[int, int, int] | None = None
        """Inode, and the bytes from and to which it has none on the disk."""

    def fsync(self, descriptor: int) -> None:
        found, name = os.fstat(descriptor), os.readlink(f"/proc/self/fd/{descriptor}")
        before = self.synced.get(found.st_ino, 0)
        if self.dropped is None and before and found.st_size > before and Path(name).name == self.name:
            self.dropped = found.st_ino, before, found.st_size
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        super().fsync(descriptor)
        self.synced[found.st_ino] = found.st_size

    def cut_power(self, path: Path) -> None:
        assert self.dropped is not None
        inode, begin, end = self.dropped
        if path.stat().st_ino == inode:
            content = bytearray(path.read_bytes())
            content[begin:end] = bytes(end - begin)
            path.write_bytes(content)


def test_what_an_fsync_has_failed_to_write_is_written_anew(tmp_path: Path) -> None:
    out, files = tmp_path / "out", Dropping("commits.jsonl")
    with Claim(out, files) as claim:
        claim.begin("run", {}, (), "")
        writer = ShardWriter(claim, SCHEMA, rows_per_shard=2, flush_seconds=30)
        with pytest.raises(OSError, match="quota"):
            write_rows(writer, pa.table([[0, 1], ["ok"] * 2], schema=SCHEMA))
        write_rows(writer, pa.table([[2, 3], ["ok"] * 2], schema=SCHEMA))
    files.cut_power(out / "commits.jsonl")
    record = OutputFolder(out).record()
    assert record is not None and record.problem is None and not record.torn
    assert [name for name in record.versions] == ["data/part-00000.parquet", "data/part-00001.parquet"]
