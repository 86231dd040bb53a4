"""The claim on an output folder: the right of a process to write there.

A single writer has the folder to itself by an exclusive lock; a file system without locks is refused. Several writers share the
lock, which keeps a single one away, but safety among them depends neither on it nor on any clock:

- Each sample is of one unit of the plan. Shards of unit u are named `part-u-k`, and a writer that publishes number k has read
  all of u's shards that it saw, of which k is the first missing number; it adds only samples that these do not hold.
- A name is given by a hard link (or a rename) that fails where the name exists, and no shard is removed while several write. So
  number k is published once, after every lower one; its publisher has read every shard of the unit that is there, or
  else the number that it takes is taken. By induction the shards of a unit are disjoint. One that comes late, woken after
  others took its unit over, fails, and drops what it has of the unit.
- Since no shard is removed, an outdated listing (NFS) can only lack shards, and then leads to a name that is taken.
- Samples whose writer stopped before their verdicts arrived are judged once every sample is in the folder. The shard with the
  verdicts is first published as `_units/judged-part-u-k`, and only that file replaces the shard, which so gets one content,
  however many writers judge it, and however late.
- A crash loses what is not published. As with one writer, names and contents are on the disk before any record relies on them.
- Each writer has its own `_tmp/WRITER` and its own journal. The manifest is published like a shard: the first one counts.
- Leases (output/leases.py) say which units are being computed. If they are wrong, work is done twice and dropped once.
- _SUCCESS comes from the writer that finds all samples there; the one that then has the lock to itself joins the small shards.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Collection, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from tokabatch.errors import CommitError, DamageError, OutputError
from tokabatch.output.folder import PLAN, OutputFolder
from tokabatch.output.foreign_files import refuse_foreign
from tokabatch.output.journal import Journal, Shard
from tokabatch.output.lock import FolderLock
from tokabatch.output.probe import PROBE, probe, refuse_file_name
from tokabatch.storage.atomic_files import DurableFiles, NewFile, make_folders, publish, write_whole
from tokabatch.storage.listing import NO_MARK, Mark, is_there, list_files, mark_of, read_bytes, unreadable
from tokabatch.storage.write_errors import is_full, may_pass, reason, remedy, unwritable

LONG_LOOK, RARELY = 0.01, 20
"""If a check of all committed files takes longer than the first number of seconds, the next one waits the second number of
times as long."""


class Claim:
    """The right of one process to write to an output folder, until `release` or the end of the process. With a name as
    `writer`, which no other writer may have or have had, it is the right of one among several.

    Of what an earlier run left, only unfinished files are removed. Raises OutputError if the folder cannot be written or holds
    files that no run wrote, BusyError if another run writes there. The lock belongs to the open file: a forked child holds it
    too, as long as it lives. Everything is written through handles of the folders that were claimed, wherever they move. A
    claim under which neither a manifest nor a shard was written removes what it created.
    """

    def __init__(self, path: Path, files: DurableFiles | None = None, *, writer: str = "") -> None:
        self.folder = OutputFolder(path, files, writer)
        self.files = self.folder.files
        self.files.alone, self._writer = not writer, writer
        self.clears = not writer
        """Whether `release` removes what others left unfinished, and the input of a complete run. False with several writers:
        on another host, whose locks may be separate, some may be using these files."""
        self.journal: Journal | None = None
        """The record of commits, once the run has begun; a folder without a run has none."""
        self.identity: Mapping[bytes, bytes] = {}
        """The metadata that identifies the run in every shard."""
        self._kept: dict[Path, tuple[bytes, Mark]] = {}
        self._repair = ""
        self._looked = self._look_seconds = 0.0
        """When all committed files were last checked, and how long that took."""
        self._lock: FolderLock | None = None
        self._made: list[Path] = []
        self._told_moved = False
        self._prepare()

    @property
    def committed(self) -> Collection[str]:
        """The names of the shards that are known to be in the folder."""
        return () if self.journal is None else self.journal.shards

    def write(self, target: Path, content: bytes, *, keep: bool = False) -> None:
        """Replace one of the folder's small files atomically. With `keep`, it is rewritten during the run if another process
        touches it."""
        write_whole(self.files, self.folder.temporary / target.name, target, content)
        if keep and self.files.alone:
            found = self.files.look(target)
            self._kept[target] = content, NO_MARK if found is None else mark_of(found)

    def keep(self, target: Path) -> None:
        """Write this small file again from now on if another process removes it, whichever writer wrote it. Raises OSError, and
        OutputError if it cannot be read."""
        content, found = read_bytes(self.files, target), self.files.look(target)
        if content is not None and found is not None:
            self._kept[target] = content, mark_of(found)

    def restore_kept(self) -> None:
        """Write again the kept files that another process touched, or with several writers, those that are gone. Raises
        OSError."""
        for target, (content, mark) in list(self._kept.items()):
            found = self.files.look(target)
            if self.files.alone and (found is None or mark_of(found) != mark):
                self.write(target, content, keep=True)
            elif found is None:
                mine = self.folder.temporary / target.name
                with NewFile(self.files, mine) as file:
                    file.write(content)
                    file.sync()
                # Another writer may have been faster.
                with suppress(FileExistsError):
                    publish(self.files, mine, target)

    @contextmanager
    def committing(self) -> Generator[None]:
        """Wrap what writes results: raises CommitError if the system takes no more for now, OutputError if it never will."""
        try:
            self._hold_units()
            yield
        except OSError as error:
            if is_full(error) and self.files.alone:
                # The tokenised input can be made again: remove it to make room for results.
                with suppress(OSError):
                    self.files.remove_tree(self.folder.input)
            if error.errno in (errno.ENOENT, errno.ESTALE) and not self.files.alone:
                self._refuse_moved(error)
                raise CommitError(
                    f"output.path {str(self.folder.path)!r}: another process removed unfinished files of this one, perhaps "
                    f"because the file system lost its lock ({error.strerror}). What is committed is intact. Run the same "
                    "command again to add what is missing."
                ) from error
            kind = CommitError if may_pass(error) else OutputError
            raise kind(
                f"output.path {str(self.folder.path)!r} cannot be written any more: {reason(error)}. What is committed is "
                f"intact; {remedy(error)} and run the same command again to add the rest."
            ) from error

    def begin(
        self,
        run: str,
        identity: Mapping[bytes, bytes],
        shards: Iterable[tuple[Shard, Mark]],
        repair: str,
        damaged: Iterable[Shard] = (),
    ) -> None:
        """Record commits and watch the committed files from now on. `shards` are in the folder, checked; the `damaged` ones are
        about to be removed; `repair` is the command that computes again what is damaged. Raises OSError."""
        if self.journal is not None:
            self.journal.close()
        folder, whole = self.folder, None if self.files.alone else self.folder.commits
        self.journal = Journal(self.files, folder.journal, folder.temporary / folder.commits.name, run, shards, damaged, whole)
        self.identity, self._repair = identity, repair
        if self.files.alone:
            # Files that killed writers left. The one that names the joining host is kept as long as several may write.
            kept = (PLAN, folder.joiner.name) if self._writer else (PLAN,)
            for file in list_files(self.files, folder.units, lambda name: not name.startswith(kept)):
                self.files.remove(file.path)

    def take_alone(self) -> bool:
        """Release the share of the lock; return whether no other writer is left, in which case this claim is a single writer's
        until `release`. Of several that end at once, exactly one is: each releases before it tries. The others write nothing
        from here on."""
        assert self._lock is not None and not self.files.alone
        if not self._lock.become_exclusive():
            return False
        if self.journal is not None:
            self.journal.close()
            self.journal = None
        self.files.alone = True
        self.folder.journal = self.folder.commits
        return True

    def check_lock(self) -> None:
        """Raise CommitError if this claim has lost its lock, or another host has the folder: writing might collide with another
        run."""
        if self.files.alone and not self.clears:
            raise CommitError(
                f"output.path {str(self.folder.path)!r}: a process on another host is completing the run there. What this one "
                "committed is intact."
            )
        if self._lock is None or not self._lock.is_in_place():
            self._refuse_moved()
            raise CommitError(
                f"output.path {str(self.folder.path)!r}: its lock (_lock) was removed while this run was writing, so "
                "another run may be writing there. This run stops; what is committed is intact. Stop the other one, then run "
                "the same command again."
            )

    def check_folder(self, *, sparingly: bool = False) -> None:
        """Raise CommitError if the folder was moved, DamageError if a committed file is not as it was committed, OutputError
        for a file that another process added. Each is reported once. Checking all committed files at each commit takes
        quadratic time: `sparingly` skips the check if a recent one took long."""
        self._refuse_moved()
        self.restore_kept()
        if self.journal is not None:
            self.journal.restore()
            began = time.monotonic()
            if sparingly and self._look_seconds > LONG_LOOK and began < self._looked + RARELY * self._look_seconds:
                return
            self._check_shards(self.journal)
            self._looked = time.monotonic()
            self._look_seconds = self._looked - began

    def reopen(self, *, keep_summary: bool = False) -> None:
        """Remove the marks of an earlier end, since the run continues; `keep_summary` if nothing is left to do."""
        if is_there(self.files, self.folder.success):
            probe(self.folder)
        for mark in (self.folder.success, self.folder.summary):
            if is_there(self.files, mark) and not (keep_summary and mark == self.folder.summary):
                self.files.remove(mark)
        self.files.sync_folder(self.folder.path)

    def discard(self) -> None:
        """Delete the results of an earlier run. Interrupted, it leaves a run without some of its samples. Raises OutputError
        before, if there are files among them that no run wrote."""
        refuse_foreign(self.folder, overwrite=True)
        shards = self.folder.shards()
        record = None if self.journal is not None else self.folder.record()
        if record is not None and record.problem is None:
            # Concurrent readers, and the next start after an interruption, can see what is missing on purpose.
            held = [shard for known in record.versions.values() for shard in known[-1:] if shard is not None]
            self.begin(record.run, {}, ((shard, NO_MARK) for shard in held), "")
        if self.journal is not None:
            self.journal.removes(self.folder.name_of(shard.path) for shard in shards)
        self.reopen()
        for shard in shards:
            self.files.remove(shard.path)
        self.files.sync_folder(self.folder.data)
        steps = [file.path for file in self.folder.steps()]
        # The record of commits before the manifest: samples are of the run that the manifest names, or there are none.
        for path in (*steps, self.folder.commits, self.folder.row_digests, self.folder.job, self.folder.manifest):
            if is_there(self.files, path):
                self.files.remove(path)
        self.files.remove_tree(self.folder.units)

    def release(self) -> None:
        """Give up the claim, so that others can write here; leave no unfinished file behind."""
        if self.journal is not None:
            self.journal.close()
        if self._lock is not None:
            # On NFS a folder that contains a file in use cannot be removed, and is left to the next claim.
            with suppress(OSError, OutputError):
                if self.clears and is_there(self.files, self.folder.success):
                    self.files.remove_tree(self.folder.input)
            with suppress(OSError, OutputError):
                if self.clears:
                    # Of writers that were killed at their start.
                    for left in list_files(self.files, self.folder.data, lambda name: name.startswith(PROBE)):
                        self.files.remove(left.path)
            with suppress(OSError, OutputError):
                self.files.remove_tree(self.folder.temporaries if self.clears else self.folder.temporary)
                if self.files.alone and not self.clears and not self.files.names(self.folder.temporaries):
                    self.files.remove_tree(self.folder.temporaries)
            if self.files.alone:
                self._remove_unused()
            self._lock.release()
            self._lock = None
        self.files.let_go()

    def leave(self) -> None:
        """Release the claim in a forked child: it stays the parent's, and ends with the parent."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        self.files.let_go()

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def _prepare(self) -> None:
        folder = self.folder
        try:
            refuse_file_name(folder)
            # Before there is a lock of this claim, beside which unfinished files count as a run's.
            refuse_foreign(folder)
            self._absolute = folder.path.absolute()
            for place in (folder.data, folder.path, *folder.path.parents):
                if self.files.look(place, follow=False) is None:
                    self._made.append(place)
            make_folders(self.files, folder.data)
            self._hold(folder.path)
            self._hold(folder.data)
            self._lock = FolderLock(folder, shared=not self.files.alone)
            self._clear()
        except BaseException as error:
            self.release()
            if isinstance(error, OSError):
                raise unwritable(folder.path, error) from error
            raise

    def _hold_units(self) -> None:
        """Create the folder of several writers again if another process removed it. Each of them then writes its journal and
        its kept files again."""
        files, units = self.files, self.folder.units
        found = None if files.alone else files.look(units)
        if not files.alone and (found is None or not os.path.samestat(found, files.held(units))):
            make_folders(files, units)
            files.hold(units)

    def _hold(self, path: Path) -> None:
        try:
            self.files.hold(path)
        except OSError as error:
            raise OutputError(f"output.path {str(self.folder.path)!r}: {unreadable(path, error)}") from error

    def _remove_unused(self) -> None:
        """Remove what this claim made in a folder without a manifest or a shard. Needs the lock."""
        folder = self.folder
        with suppress(OSError, OutputError):
            if is_there(self.files, folder.manifest) or self.files.names(folder.data):
                return
            if any(is_there(self.files, left) for left in (folder.temporaries, folder.units, folder.input)):
                # Beside a lock, the next claim takes them for a run's.
                return
            for leftover in (folder.commits, folder.lock):
                with suppress(FileNotFoundError):
                    self.files.remove(leftover)
            if not self._moved():
                for made in self._made:
                    made.rmdir()

    def _clear(self) -> None:
        folder = self.folder
        if self.files.alone:
            self.files.remove_tree(folder.temporaries)
            self.files.make_folder(folder.temporaries)
        else:
            for place in (folder.units, folder.temporaries):
                make_folders(self.files, place)
            self.files.hold(folder.units)
            self.files.make_folder(folder.temporary)
        self.files.hold(folder.temporary)
        if not is_there(self.files, folder.success):
            probe(self.folder)
        self.files.sync_folder(folder.path)

    def _refuse_moved(self, cause: OSError | None = None) -> None:
        moved = None if self._told_moved else self._moved()
        if moved:
            self._told_moved = True
            raise CommitError(
                f"output.path {str(self.folder.path)!r}: {moved} was moved, replaced or removed while this run wrote. The "
                "run stops; what is finished is committed where the folder is now. Move it back, or name its new place as "
                "output.path, and run the same command again."
            ) from cause

    def _moved(self) -> Path | None:
        """Return the path of a claimed folder at which it is no longer found; None if all are in place."""
        for path, name in ((self.folder.path, ""), (self.folder.data, self.folder.data.name)):
            try:
                if os.path.samestat(os.stat(self._absolute / name), self.files.held(path)):
                    continue
            except (FileNotFoundError, NotADirectoryError):
                pass
            return self._absolute / name
        return None

    def _check_shards(self, journal: Journal) -> None:
        listed = {self.folder.name_of(file.path): file for file in self.folder.shards()}
        damage, strangers = journal.compare(listed) if self.files.alone else journal.compare(listed, self.folder.record)
        if damage:
            raise DamageError(
                f"{'; '.join(f'{self.folder.path / name} {problem}' for name, problem in damage)}. The run stops; what it "
                f"finished is committed. To compute again what is damaged, and nothing else: {self._repair}"
            )
        if strangers and self.files.alone:
            raise OutputError(
                f"{self.folder.path / strangers[0]} was put there by another process while this run wrote. The run stops; what "
                "it finished is committed. Move the file away, then run the same command again."
            )
