"""Ways to break the commit path, one line of it each: applied in a forked process, where the checks must then fail."""

from __future__ import annotations

from collections.abc import Callable

from tokabatch.output import claim, shard_writer
from tokabatch.output.existing_results import nothing_committed
from tokabatch.output.manifest import mark_success
from tokabatch.runner import recorder
from tokabatch.runner import resume as resumption
from tokabatch.storage import atomic_files as durable

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
def written_under_the_final_name() -> None:
    """No temporary file: the shard grows where readers look for it."""

    write = shard_writer.write_shard
    shard_writer.write_shard = lambda claim, table, temporary, name: write(claim, table, claim.folder.path / name, name)
    shard_writer.publish = lambda files, source, target: files.sync_folder(target.parent)


@_mutant
def committed_keys_not_read_back() -> None:
    """What the folder holds is forgotten; new files are numbered behind it all the same."""
    real = resumption.read_committed

    def forget(out, num_samples, **given):
        found = real(out, num_samples, **given)
        nothing = nothing_committed(num_samples)
        return found.__class__(nothing.drawn, found.shards, found.error_counts, found.unverified)

    resumption.read_committed = forget


@_mutant
def a_failed_commit_forgets_its_rows_and_goes_on() -> None:
    real = shard_writer.ShardWriter._commit

    def commit(self, unit, num_rows):
        books = self._state.units[unit]
        try:
            real(self, unit, num_rows)
        except OSError:
            rest = shard_writer.pa.concat_tables(books.waiting).slice(num_rows)
            waiting = (rest,) if rest.num_rows else ()
            self._state = self._state.with_books(unit, shard_writer.replace(books, waiting=waiting, attempt=None))

    shard_writer.ShardWriter._commit = commit


@_mutant
def success_stays_while_the_run_goes_on() -> None:
    claim.Claim.reopen = lambda self, *, keep_summary=False: None


@_mutant
def success_is_marked_before_the_shards_are_there() -> None:
    """The mark is set on what was handed in, before it is committed."""
    finish = recorder.Recorder.finish

    def early(self, *hurry):
        waiting = self.writer._state.units[shard_writer.WHOLE].num_rows + self._preparing.num_waiting
        marked = [*self.writer.shards, shard_writer.Shard("data/part-99999.parquet", waiting, waiting, 0, 0, "none")]
        mark_success(self._claim, marked, sum(shard.rows for shard in marked))
        return finish(self, *hurry)

    recorder.Recorder.finish = early


@_mutant
def overwrite_deletes_the_manifest_first() -> None:
    """Cut short, it would leave samples of which nobody knows whose they are."""
    real = claim.Claim.discard

    def discard(self):
        self.files.remove(self.folder.manifest)
        self.files.sync_folder(self.folder.path)
        real(self)

    claim.Claim.discard = discard


@_mutant
def small_shards_are_joined_name_by_name() -> None:
    """Each joined shard takes its place by itself, and those that it holds are removed afterwards."""

    def exchange(self, one, other):
        names = self.names(other)
        for name in names:
            self.replace(other / name, one / name)
        for name in set(self.names(one)) - set(names):
            self.remove(one / name)

    durable.DurableFiles.exchange = exchange
