"""The output folder: where its parts lie, and the claim by which one run writes into it.

OUT/data/part-00000.parquet   committed shards
OUT/_tmp/                     unfinished files; cleared by the next claim
OUT/_input/                   the tokenised input, while the run is not complete
OUT/_lock                     held by the writing process, released by its death; several writers share it
OUT/_units/                   where several write: how the plan is cut into units, who computes which, each one's commits
OUT/manifest.json             what the run is, and what decides its output
OUT/commits.jsonl             which shards were committed, with their digests
OUT/row_digests.parquet       what each row and its prompt were
OUT/job.json                  the job, to run it again from the folder alone
OUT/steps-00000.parquet       what each step did and took; not a result
OUT/summary.json, _SUCCESS    how it ended; taken back by the next start that has something to add

One writer has the folder to itself by an exclusive lock; a file system that keeps no locks is refused. Several writers hold the
lock together, which keeps a single one away, but no safety among them rests on it, nor on any clock:

- Each sample is of one unit of the plan. Shards of unit u are named `part-u-k`, and a writer that publishes number k has read
  all of u's shards that it saw, of which k is the first missing number; it adds only samples that these do not hold.
- A name is given by a hard link (or a rename) that fails where the name exists, and no shard is removed while several write. So
  number k is published once, after every lower one; whoever publishes it has read every shard of the unit that is there, or
  else the number that it takes is taken. By induction the shards of a unit are disjoint. One that comes late, woken after
  others took its unit over, fails, and drops what it has of the unit.
- What is not removed cannot be missed: a listing out of date (NFS) shows fewer shards, and ends in a name that is taken.
- A crash loses what is not published. Names and contents are on the disk before anything is said of them, as with one writer.
- Each writer has its own `_tmp/WRITER` and its own journal. The manifest is published like a shard: the first one counts.
- Leases (output/leases.py) say which units are being computed. Where they are wrong, work is done twice and dropped once.
- _SUCCESS is written by whoever finds every sample there; the one that then has the lock to itself joins the small shards.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import tempfile
import time
from collections.abc import Collection, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from tokabatch.errors import BusyError, CommitError, DamageError, OutputError
from tokabatch.output.journal import Journal, Record, Shard, merged, read_record
from tokabatch.storage.atomic_files import DurableFiles, NewFile, make_folders, publish, write_whole
from tokabatch.storage.listing import NO_MARK, ListedFile, Mark, is_there, list_files, mark_of, unreadable
from tokabatch.storage.write_errors import is_full, may_pass, reason, remedy, unwritable

_NO_LOCKS = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK})
_SHARD_NAME = re.compile(r"part-\d{5,}(-\d{5,})?\.parquet")
_JOURNAL_NAME = re.compile(r"commits-.+\.jsonl")
_STEPS_NAME = re.compile(r"steps-\d{5,}\.parquet")
PLAN, LEASE = "plan-", ".lease"
"""With what the name begins of the file that says how the plan is cut, and how those of leases end."""
PROBE = ".probe"
"""Stands in data/ for an instant at the start of a run; readers of Parquet folders pass over names with a dot."""
_PROBE_BYTES = 1 << 16
"""Less than what most shards take: under a smaller limit of file sizes no run can work."""
LONG_LOOK, RARELY = 0.01, 20
"""Where a look at all committed files takes longer than this, in seconds, so many times as long passes before the next."""
LATELY_SECONDS = 300.0
"""A lease whose last change is not longer ago, by another host's clock, may be that of a writer that lives."""
_CLAIM_ATTEMPTS = 5
_CLAIM_PAUSE_SECONDS = 0.05


class OutputFolder:
    """Paths of an output folder, and its listings. Reading is free to anyone at any time; a listing that cannot be had raises
    OutputError. One of several writers has unfinished files and a journal of its own, by its name."""

    def __init__(self, path: Path, files: DurableFiles | None = None, writer: str = "") -> None:
        self.files = files or DurableFiles()
        self.path = path
        self.data = path / "data"
        self.temporaries = path / "_tmp"
        self.temporary = self.temporaries / writer
        self.units = path / "_units"
        self.joiner = self.units / "joiner"
        self.input = path / "_input"
        self.lock = path / "_lock"
        self.manifest = path / "manifest.json"
        self.commits = path / "commits.jsonl"
        self.journal = self.units / f"commits-{writer}.jsonl" if writer else self.commits
        self.row_digests = path / "row_digests.parquet"
        self.job = path / "job.json"
        self.summary = path / "summary.json"
        self.success = path / "_SUCCESS"

    def shards(self, but: Collection[str] = ()) -> tuple[ListedFile, ...]:
        """What stands under the names of shards, by number; not under names that are known already, as `name_of` has them."""

        def wanted(name: str) -> bool:
            return f"{self.data.name}/{name}" not in but and _SHARD_NAME.fullmatch(name) is not None

        found = list_files(self.files, self.data, wanted)
        return tuple(sorted(found, key=lambda file: (len(file.path.name), file.path.name)))

    def foreign(self) -> list[str]:
        """Names under data/ that no run writes, hidden ones apart."""
        return [
            file.path.name
            for file in list_files(self.files, self.data)
            if file.path.name[:1] != "." and not (file.is_file and _SHARD_NAME.fullmatch(file.path.name))
        ]

    def steps(self) -> tuple[ListedFile, ...]:
        """The records of steps, in the order of the starts."""
        return tuple(file for file in list_files(self.files, self.path) if _STEPS_NAME.fullmatch(file.path.name))

    def journals(self) -> list[Path]:
        """Those of several writers."""
        return [file.path for file in list_files(self.files, self.units) if _JOURNAL_NAME.fullmatch(file.path.name)]

    def record(self) -> Record | None:
        """What the journals say; None where there is none. Raises OutputError where one cannot be read."""
        # A single writer puts all that they say into its own before it removes the others.
        others = [read_record(self.files, path) for path in self.journals()]
        return merged((read_record(self.files, self.commits), *others))

    def name_of(self, path: Path) -> str:
        """A shard's name as the records have it: relative to the folder."""
        return f"{self.data.name}/{path.name}"

    def is_claimed(self) -> bool:
        """Whether a living process writes here, or several. False where the file system keeps no locks."""
        # Another reader may look at the same instant.
        for _ in range(_CLAIM_ATTEMPTS):
            try:
                with self.files.open_old(self.lock) as file:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    if not is_there(self.files, self.units):
                        return False
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return False
            except BlockingIOError:
                if not is_there(self.files, self.units):
                    return True
                time.sleep(_CLAIM_PAUSE_SECONDS)
            except (FileNotFoundError, NotADirectoryError):
                return False
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    return False
                if error.errno == errno.EBADF:
                    # NFS gives an exclusive lock to those alone who open to write.
                    return self._is_leased()
                raise unreadable(self.lock, error) from error
        return True

    def _is_leased(self) -> bool:
        """Whether one of several writers has renewed a lease lately, by the clocks of two hosts."""
        now = time.time()
        leases = list_files(self.files, self.units, lambda name: name.endswith(LEASE))
        return any(now - lease.changed < LATELY_SECONDS for lease in leases)


class Claim:
    """The right of one process to write into an output folder, until `release` or the process's end; of one among several where
    it is given a name as a `writer`, which no other may have or have had.

    Changes nothing of what an earlier run left, but for its unfinished files. Raises OutputError where the folder cannot be
    written or holds what no run wrote, BusyError where another run writes there. The lock belongs to the open file: a forked
    child holds it too, for as long as it lives. Everything is written through handles of the folders that were claimed,
    wherever they move. A claim that wrote neither a manifest nor a shard takes away what it made.
    """

    def __init__(self, path: Path, files: DurableFiles | None = None, *, writer: str = "") -> None:
        self.files = files or DurableFiles()
        self.files.alone, self._writer = not writer, writer
        self.folder = OutputFolder(path, self.files, writer)
        self.clears = not writer
        """Whether what others left unfinished, and the input of a complete run, go with `release`. Not one of several writers':
        on another host, whose locks may be apart, they may be in use."""
        self.journal: Journal | None = None
        """The record of commits, once the run has begun; a folder without a run has none."""
        self.identity: Mapping[bytes, bytes] = {}
        """What every shard says of its run, in its metadata."""
        self._kept: dict[Path, tuple[bytes, Mark]] = {}
        self._repair = ""
        self._looked = self._look_seconds = 0.0
        """When all committed files were looked at last, and how long that took."""
        self._descriptor: int | None = None
        self._made: list[Path] = []
        self._told_moved = False
        self._prepare()

    @property
    def committed(self) -> Collection[str]:
        """The names of the shards that are known to stand in the folder."""
        return () if self.journal is None else self.journal.shards

    def write(self, target: Path, content: bytes, *, keep: bool = False) -> None:
        """Replace one of the folder's small files atomically. One that is to `keep` is rewritten where others touch it while
        the run goes on."""
        write_whole(self.files, self.folder.temporary / target.name, target, content)
        if keep and self.files.alone:
            found = self.files.look(target)
            self._kept[target] = content, NO_MARK if found is None else mark_of(found)

    @contextmanager
    def committing(self) -> Generator[None]:
        """Around what writes results: raises CommitError where the system takes no more, OutputError where it never will."""
        try:
            yield
        except OSError as error:
            if is_full(error) and self.files.alone:
                # What can be made again leaves its room to what cannot.
                with suppress(OSError):
                    self.files.remove_tree(self.folder.input)
            kind = CommitError if may_pass(error) else OutputError
            raise kind(
                f"output.path {str(self.folder.path)!r} takes no more: {reason(error)}. What is committed is intact; "
                f"{remedy(error)} and run the same command again to add the rest."
            ) from error

    def begin(self, run: str, identity: Mapping[bytes, bytes], shards: Iterable[tuple[Shard, Mark]], repair: str) -> None:
        """From here on commits are recorded, and the committed files watched. `shards` stand in the folder, checked; `repair`
        is the command that computes again what is damaged. Raises OSError."""
        if self.journal is not None:
            self.journal.close()
        folder = self.folder
        self.journal = Journal(self.files, folder.journal, folder.temporary / folder.commits.name, run, shards)
        self.identity, self._repair = identity, repair
        if self.files.alone:
            # What killed writers left. Which host joins is for all hosts' last ones, until a run has the folder to itself.
            kept = (PLAN, folder.joiner.name) if self._writer else (PLAN,)
            for file in list_files(self.files, folder.units, lambda name: not name.startswith(kept)):
                self.files.remove(file.path)

    def take_alone(self) -> bool:
        """Let go of the share of the lock; whether no other writer is left, and this claim is that of a single one until
        `release`. Of several that end at once, one is: each lets go before it tries. The others write nothing from here on."""
        assert self._descriptor is not None and not self.files.alone
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        if self.journal is not None:
            self.journal.close()
            self.journal = None
        self.files.alone = True
        self.folder.journal = self.folder.commits
        return True

    def check_lock(self) -> None:
        """Raises CommitError where the lock is not this claim's any more: whatever were written now might meet another run."""
        found = self.files.look(self.folder.lock)
        if self._descriptor is None or found is None or not os.path.samestat(found, os.fstat(self._descriptor)):
            raise CommitError(
                f"output.path {str(self.folder.path)!r}: its lock (_lock) was removed while this run was writing, so "
                "another run may be writing there. This run stops; what is committed is intact. Stop the other one, then run "
                "the same command again."
            )

    def check_folder(self, *, sparingly: bool = False) -> None:
        """Raises CommitError where the folder was moved, DamageError where a committed file is not there as it was committed,
        OutputError for one that another process put beside them. Tells each of them once. A look at all committed files at each
        commit comes to the square of their number: `sparingly` leaves it out where it took long, and that not long ago."""
        moved = None if self._told_moved else self._moved()
        if moved:
            self._told_moved = True
            raise CommitError(
                f"output.path {str(self.folder.path)!r}: {moved} was moved or replaced while this run wrote. The run stops; "
                "what is finished is committed where the folder is now. Move it back, or name its new place as output.path, "
                "and run the same command again."
            )
        # What tells of the run is rewritten where others touched it.
        for target, (content, mark) in list(self._kept.items()):
            found = self.files.look(target)
            if found is None or mark_of(found) != mark:
                self.write(target, content, keep=True)
        if self.journal is not None:
            self.journal.restore()
            began = time.monotonic()
            if sparingly and self._look_seconds > LONG_LOOK and began < self._looked + RARELY * self._look_seconds:
                return
            self._check_shards(self.journal)
            self._looked = time.monotonic()
            self._look_seconds = self._looked - began

    def reopen(self, *, keep_summary: bool = False) -> None:
        """Take back the marks of an earlier end: from here on the run goes on; `keep_summary` where nothing is left to do."""
        if is_there(self.files, self.folder.success):
            self._probe()
        for mark in (self.folder.success, self.folder.summary):
            if is_there(self.files, mark) and not (keep_summary and mark == self.folder.summary):
                self.files.remove(mark)
        self.files.sync_folder(self.folder.path)

    def discard(self) -> None:
        """Delete the results of an earlier run. Cut short, it leaves a run without some of its samples."""
        shards = self.folder.shards()
        record = None if self.journal is not None else self.folder.record()
        if record is not None and record.problem is None:
            # Readers beside this, and the next start if it is cut short, know what is missing on purpose.
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
        for path in (*steps, self.folder.commits, self.folder.row_digests, self.folder.manifest, self.folder.job):
            if is_there(self.files, path):
                self.files.remove(path)
        self.files.remove_tree(self.folder.units)

    def release(self) -> None:
        """Let others write here; leaves no unfinished file behind."""
        if self.journal is not None:
            self.journal.close()
        if self._descriptor is not None:
            with suppress(OSError):
                self.files.remove_tree(self.folder.temporaries if self.clears else self.folder.temporary)
                if self.clears and is_there(self.files, self.folder.success):
                    self.files.remove_tree(self.folder.input)
                if self.files.alone and not self.clears and not self.files.names(self.folder.temporaries):
                    self.files.remove_tree(self.folder.temporaries)
            if self.files.alone:
                self._remove_unused()
            os.close(self._descriptor)
            self._descriptor = None
        self.files.let_go()

    def leave(self) -> None:
        """Let go of the claim in a forked child: it stays the parent's, and ends with the parent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        self.files.let_go()

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def _prepare(self) -> None:
        folder = self.folder
        try:
            self._absolute = folder.path.absolute()
            for place in (folder.data, folder.path, *folder.path.parents):
                if self.files.look(place, follow=False) is None:
                    self._made.append(place)
            make_folders(self.files, folder.data)
            self._hold(folder.path)
            self._hold(folder.data)
            self._descriptor = _lock(folder, shared=not self.files.alone)
            self._clear()
        except BaseException as error:
            self.release()
            if isinstance(error, OSError):
                raise unwritable(folder.path, error) from error
            raise

    def _hold(self, path: Path) -> None:
        try:
            self.files.hold(path)
        except OSError as error:
            raise OutputError(f"output.path {str(self.folder.path)!r}: {unreadable(path, error)}") from error

    def _remove_unused(self) -> None:
        """Needs the lock. A folder that is not empty stays."""
        folder = self.folder
        with suppress(OSError, OutputError):
            if is_there(self.files, folder.manifest) or self.files.names(folder.data):
                return
            for leftover in (folder.commits, folder.lock):
                with suppress(FileNotFoundError):
                    self.files.remove(leftover)
            if not self._moved():
                for made in self._made:
                    made.rmdir()

    def _clear(self) -> None:
        folder = self.folder
        _refuse_foreign(folder)
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
            self._probe()
        self.files.sync_folder(folder.path)

    def _probe(self) -> None:
        """Write a file and commit it the way shards are: what can never work is known before anything is computed. A complete
        run is left as it is until there is something to add."""
        probe, published = self.folder.temporary / "probe", self.folder.data / PROBE
        if not self.files.alone:
            published = self.folder.data / f"{PROBE}-{self.folder.temporary.name}"
        # A start that was killed here has left it.
        with suppress(FileNotFoundError):
            self.files.remove(published)
        for attempt in range(1 if self.files.alone else 2):
            with NewFile(self.files, probe) as file:
                file.write(bytes(_PROBE_BYTES))
                file.sync()
            try:
                publish(self.files, probe, published)
            except FileExistsError:
                if not attempt:
                    raise
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP or self.files.alone:
                    raise
                raise OutputError(
                    f"output.path {str(self.folder.path)!r} cannot be shared: {reason(error)}, which keep several writers "
                    "from publishing a sample twice. Choose a folder on another file system."
                ) from error
            else:
                if attempt:
                    raise OutputError(
                        f"output.path {str(self.folder.path)!r} cannot be shared: a hard link there replaces an existing "
                        "file. Choose a folder on another file system."
                    )
        self.files.remove(published)

    def _moved(self) -> Path | None:
        """What is reached by its path no more, or stands there no more."""
        for path, name in ((self.folder.path, ""), (self.folder.data, self.folder.data.name)):
            try:
                if os.path.samestat(os.stat(self._absolute / name), self.files.held(path)):
                    continue
            except (FileNotFoundError, NotADirectoryError):
                pass
            return self._absolute / name
        return None

    def _check_shards(self, journal: Journal) -> None:
        damage, strangers = journal.compare({self.folder.name_of(file.path): file for file in self.folder.shards()})
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


def check_output(path: Path, *, shared: bool = False) -> None:
    """Raises the OutputError that a claim of this folder would end in now; leaves nothing behind. One of several writers,
    `shared`, may find others there."""
    folder = OutputFolder(path)
    _refuse_foreign(folder)
    if not shared and folder.is_claimed():
        raise _busy(folder)
    try:
        # A link to nowhere is in the way, too.
        seen = ((place, folder.files.look(place, follow=False)) for place in (folder.data, path, *path.absolute().parents))
        nearest = next(place for place, found in seen if found is not None)
        found = folder.files.look(nearest)
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error)) from error
    if found is None or not stat.S_ISDIR(found.st_mode):
        raise _unwritable(path, f"{nearest} is not a folder")
    for place in (nearest, path) if nearest == folder.data else (nearest,):
        if not os.access(place, os.W_OK | os.X_OK):
            raise _unwritable(path, f"no permission to write in {place.absolute()}")
    if nearest not in (folder.data, path):
        try:
            # Some file systems take no folder from anyone, whatever the permissions say: /proc, a network's root.
            os.rmdir(tempfile.mkdtemp(prefix=".tokabatch-", dir=nearest))
        except OSError as error:
            raise _unwritable(path, f"no folder can be created in {nearest} ({error.strerror})") from error


def _refuse_foreign(folder: OutputFolder) -> None:
    foreign = folder.foreign()
    if foreign:
        raise OutputError(
            f"output.path {str(folder.path)!r} holds {len(foreign)} file(s) that no run wrote (data/{foreign[0]}). "
            "Choose another output.path, or move them away."
        )


def _unwritable(path: Path, reason: str) -> OutputError:
    return OutputError(f"output.path {str(path)!r} cannot be written: {reason}. Choose another output.path.")


def _busy(folder: OutputFolder) -> BusyError:
    return BusyError(
        f"another run is writing to output.path {str(folder.path)!r}. Wait for it, stop it, or choose another output.path."
    )


def _lock(folder: OutputFolder, *, shared: bool) -> int:
    # `tokabatch status` holds the lock for an instant, hence more than one attempt.
    for _ in range(_CLAIM_ATTEMPTS):
        descriptor = folder.files.open_lock(folder.lock)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS and shared:
                return descriptor
            os.close(descriptor)
            if error.errno in _NO_LOCKS:
                raise OutputError(
                    f"output.path {str(folder.path)!r}: its file system has no locks ({error.strerror}), so a second run "
                    "could not be kept out. Choose another output.path; a new run may also be written there with --shared, "
                    "unless its job has verify.stop or errors.policy: stop."
                ) from error
            if not isinstance(error, BlockingIOError):
                raise
            time.sleep(_CLAIM_PAUSE_SECONDS)
            continue
        # The holder before may have removed the file that is locked now.
        found = folder.files.look(folder.lock)
        if found is not None and os.path.samestat(os.fstat(descriptor), found):
            return descriptor
        os.close(descriptor)
    raise _busy(folder)
