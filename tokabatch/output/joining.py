"""Joining the small shards that many starts leave, once a run is complete.

The folder of the shards is swapped as a whole, so that data/ holds every row once at each moment, for any reader:

1. `_tmp/data/` is filled: joined shards are written and fsynced, the others get a second name there by a hard link, and the
   folder is fsynced.
2. The journal says durably which names are about to come and to go: both states count from here on. Joined shards have names of
   their own, so no reader that listed the old ones meets a new one.
3. One rename swaps data/ and `_tmp/data/`, and both folders above them are fsynced.
4. The old shards are removed, and the journal says that the change has happened.

Cut short before 3 the folder is as it was, after it as it was to be; the next claim clears what lies under `_tmp/`. On a file
system that cannot swap two folders in one step (NFS, for one), or has no hard links, the small shards stay.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pyarrow as pa

from tokabatch.errors import DamageError, OutputError
from tokabatch.number_text import counted
from tokabatch.output.claim import Claim
from tokabatch.output.journal import Shard
from tokabatch.output.shard_names import shard_name, shard_number
from tokabatch.output.shard_writer import SHARD_BYTES
from tokabatch.output.shards import ARROW_BYTES_KEY, open_shard, read_groups, record_commit, write_shard
from tokabatch.storage.listing import Changed, ListedFile, Mark, is_there

FEW_ROWS, FEW_BYTES = 4096, 32 << 20
"""Shards that hold as much as either of these are kept: joining reads and writes everything again after the last result, which
gains nothing for a few large files."""


def join_small(claim: Claim, rows_per_shard: int, stop: Callable[[], object], tell: Callable[[str], None]) -> None:
    """Join the small shards of a complete run: below half the usual size, FEW_ROWS and FEW_BYTES. `stop`, called between files,
    ends it without a change, and so does a file system that cannot do it. Raises OSError if it is unknown what is on the disk,
    CommitError if the lock is lost, DamageError for a shard that is not as it was committed."""
    journal, files, folder = claim.journal, claim.files, claim.folder
    assert journal is not None, "a run that writes has a journal"
    claim.check_folder()
    new = folder.temporary / folder.data.name
    small: list[ListedFile] = []
    try:
        small = _small(claim, rows_per_shard)
        names = [folder.name_of(file.path) for file in small]
        if len(small) < 2:
            return
        kept = [known for name, known in journal.shards.items() if name not in names]
        made = _fill(claim, new, small, kept, rows_per_shard, stop)
        if made and is_there(files, folder.success):
            # _SUCCESS names the shards that are about to go.
            claim.reopen(keep_summary=True)
        swapped = bool(made) and _swap(claim, new, made, names)
    except DamageError:
        raise
    except (OSError, OutputError, Changed) as error:
        tell(f"{counted(len(small), 'small file is', 'small files are')} not joined: {error}")
        names, kept, made, swapped = [], list(journal.shards.values()), [], False
    if swapped:
        for path in (folder.path, folder.temporary):
            files.sync_folder(path)
    with suppress(OSError):
        files.remove_tree(new)
    for name in names if swapped else ():
        journal.done(name)
    # Adding or removing a link changes a file's times.
    for shard, written in (*kept, *made) if swapped else kept:
        record_commit(claim, shard, written)


def _small(claim: Claim, rows_per_shard: int) -> list[ListedFile]:
    """Return the small shards; none if their folder is a link, which a swap would replace."""
    found = claim.files.look(claim.folder.data, follow=False)
    if found is None or not stat.S_ISDIR(found.st_mode):
        return []
    small: list[ListedFile] = []
    for shard in claim.folder.shards():
        with open_shard(shard) as file:
            rows, size = file.metadata.num_rows, int((file.schema_arrow.metadata or {}).get(ARROW_BYTES_KEY, b"0"))
        if 2 * rows <= rows_per_shard and rows < FEW_ROWS and size < FEW_BYTES:
            small.append(shard)
    return small


def _fill(
    claim: Claim,
    new: Path,
    small: Sequence[ListedFile],
    kept: Sequence[tuple[Shard, Mark]],
    rows_per_shard: int,
    stop: Callable[[], object],
) -> list[tuple[Shard, Mark]]:
    """Make the new folder; return the joined shards with the marks of their files, none if it was stopped. Raises OSError, and
    as `read_groups` does."""
    claim.files.make_folder(new)
    claim.files.hold(new)
    made: list[tuple[Shard, Mark]] = []
    first = 1 + max(shard_number(shard.path.name) for shard in claim.folder.shards())
    for number, table in enumerate(_joined(small, rows_per_shard), first):
        if stop():
            return []
        path = new / shard_name(number)
        made.append(write_shard(claim, table, path, claim.folder.name_of(path)))
    for shard, _ in kept:
        claim.files.link(claim.folder.path / shard.name, new / Path(shard.name).name)
    claim.files.sync_folder(new)
    return made


def _joined(files: Sequence[ListedFile], rows_per_shard: int) -> Iterator[pa.Table]:
    """Iterate over the rows of these files, in order, in tables of the usual size."""
    held: list[pa.Table] = []
    for file in files:
        for table in read_groups(file, None):
            held.append(table)
            if sum(each.num_rows for each in held) >= rows_per_shard or sum(each.nbytes for each in held) >= SHARD_BYTES:
                whole = pa.concat_tables(held)
                yield whole.slice(0, rows_per_shard)
                held = [whole.slice(rows_per_shard)] if whole.num_rows > rows_per_shard else []
    if held:
        yield pa.concat_tables(held)


def _swap(claim: Claim, new: Path, made: Sequence[tuple[Shard, Mark]], names: Sequence[str]) -> bool:
    """Swap the folders. On OSError the folder is as it was, and the journal says so."""
    journal = claim.journal
    assert journal is not None
    before = [journal.shards[name][0] for name in names]
    try:
        for shard, _ in made:
            journal.begins(shard)
        journal.removes(names)
        claim.check_lock()
        claim.files.exchange(claim.folder.data, new)
    except OSError:
        journal.holds(before)
        raise
    return True
