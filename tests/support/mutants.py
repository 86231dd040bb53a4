"""Ways to break the commit path, one line of it each: applied in a forked process, where the checks must then fail."""

from __future__ import annotations

from collections.abc import Callable

from tokabatch import resumption
from tokabatch.data import durable, folder, shards
from tokabatch.data.committed import nothing_committed

MUTANTS: dict[str, Callable[[], None]] = {}


def _mutant(change: Callable[[], None]) -> Callable[[], None]:
    MUTANTS[change.__name__] = change
    return change


@_mutant
def no_fsync_of_files() -> None:
    durable.NewFile.sync = lambda self: self.flush()


@_mutant
def no_fsync_of_folders() -> None:
    durable.DurableFiles.sync_folder = lambda self, path: None


@_mutant
def published_before_it_is_synced() -> None:
    """The file gets its name first and reaches the disk afterwards."""
    real = durable.NewFile.sync
    durable.NewFile.sync = lambda self: self.flush()
    publish = shards.publish

    def late(files: durable.DurableFiles, source: object, target: object) -> None:
        publish(files, source, target)
        descriptor = files.open_folder(target.parent)
        files.fsync(descriptor)
        files.close(descriptor)

    shards.publish = late
    assert real is not durable.NewFile.sync


@_mutant
def written_under_the_final_name() -> None:
    """No temporary file: the shard grows where readers look for it."""

    def write(self, table, temporary, final):
        with durable.NewFile(self._claim.files, final) as file:
            shards.write_parquet(table, file)
            file.sync()
            size, inode, digest = file.tell(), file.inode, file.digest
        ok = shards.count_ok(table)
        name = final.relative_to(self._claim.folder.path).as_posix()
        return shards.Shard(name, table.num_rows, ok, table.num_rows - ok, size, digest), inode

    shards.ShardWriter._write = write
    shards.publish = lambda files, source, target: files.sync_folder(target.parent)


@_mutant
def committed_keys_not_read_back() -> None:
    """What the folder holds is forgotten; new files are numbered behind it all the same."""
    real = resumption.read_committed

    def forget(out, num_samples, schema=None):
        found = real(out, num_samples, schema)
        nothing = nothing_committed(num_samples)
        return found.__class__(nothing.drawn, found.shards, found.error_counts, found.correct, found.unverified)

    resumption.read_committed = forget


@_mutant
def a_failed_commit_forgets_its_rows_and_goes_on() -> None:
    real = shards.ShardWriter._commit

    def commit(self, num_rows):
        books = self._books
        try:
            real(self, num_rows)
        except OSError:
            rest = shards.pa.concat_tables(books.waiting).slice(num_rows)
            self._books = shards._Books(books.shards, (rest,) if rest.num_rows else (), books.oldest)

    shards.ShardWriter._commit = commit


@_mutant
def success_stays_while_the_run_goes_on() -> None:
    folder.Claim.reopen = lambda self: None


@_mutant
def success_before_the_last_shard() -> None:
    """The mark is set on what was handed in, not on what was committed."""
    close = shards.ShardWriter.close

    def early(self):
        waiting = self._books.num_rows
        if waiting:
            rows = shards.Shard("data/part-99999.parquet", waiting, waiting, 0, 0, "")
            return (*self.shards, rows)
        return close(self)

    shards.ShardWriter.close = early
