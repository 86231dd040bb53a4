"""The start and the end of one of several processes that write a run together, each computing units of its plan.

The first process divides the plan and writes the manifest; while it tokenises the input, the others wait for the result and
then map it. A run that was begun by a single process is divided in the same way when no other process writes to it.
"""

from __future__ import annotations

import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np

from tokabatch.arrays import Int64
from tokabatch.errors import BusyError, DamageError, OutputError, Stopped
from tokabatch.input.store.kept_input import INDEX, can_be_kept, keep_input
from tokabatch.job import Job
from tokabatch.number_text import counted
from tokabatch.output.claim import Claim
from tokabatch.output.existing_results import nothing_committed, read_committed
from tokabatch.output.folder import OutputFolder
from tokabatch.output.inspection import recorded_shards
from tokabatch.output.joining import join_small
from tokabatch.output.journal import Shard
from tokabatch.output.leases import Holder, Leases
from tokabatch.output.manifest import Books, Manifest, mark_success, read_manifest, restore_job, write_manifest
from tokabatch.output.probe import describe_others
from tokabatch.output.remedy import begin_record
from tokabatch.output.same_job import find_run
from tokabatch.output.shards import claimed_shards, in_order
from tokabatch.output.units import Units, read_units, units_path, write_units
from tokabatch.runner.interruption import Interruption
from tokabatch.runner.ledger import Ledger
from tokabatch.runner.resume import OnRows, Start, describe_run, judge_left, start
from tokabatch.runner.reuse import Reuse
from tokabatch.storage.atomic_files import DurableFiles, NewFile, make_folders, publish
from tokabatch.storage.listing import NO_MARK, consistently, is_there, read_bytes
from tokabatch.storage.write_errors import reading_input, starting_beside_others, unwritable
from tokabatch.workload.prepare import Workload, prepare

ONE_WRITER = "on a Ray cluster (--on ray) one process writes, and --shared is for several; give one of the two"
"""Why a run has a cluster or shares its folder, but not both."""
WAIT_SECONDS = 0.2
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Differs between any two hosts, whatever their names, and is the same in all containers of one, as the locks of files are."""
_INPUT, _VERDICTS = "input", "verdicts"
"""Leases: of the one that tokenises the input and writes the manifest, and of the one that gives verdicts that are missing."""


@dataclass(frozen=True, slots=True)
class Shared:
    """The settings of a shared run: its name in messages, the number of units that the first process divides the plan into, the
    seconds without a heartbeat after which the units of another process are taken over, and the position in the plan at which
    it begins, as a share from 0 to 1."""

    task: str = ""
    units: int = 256
    lease_seconds: float = 60.0
    begin: float | None = None

    @property
    def holder(self) -> Holder:
        host = socket.gethostname()
        return Holder(self.task or f"{host}-{os.getpid()}", host, os.getpid())

    @starting_beside_others()
    def claim(self, path: Path, tell: Callable[[str], None], stop: Interruption) -> Claim:
        """Claim the folder for one of several writers, under a new name, once no run holds it exclusively. Raises the errors of
        `Claim`."""
        name, told = re.sub(r"[^A-Za-z0-9]+", "-", self.holder.task)[:40], False
        while True:
            try:
                return Claim(path, writer=f"{name}-{uuid.uuid4().hex[:12]}")
            except BusyError:
                told = _wait(path, told, tell, stop)

    def first(self, units: Units) -> int:
        """Return the unit to begin with, far from where others begin."""
        begin = uuid.uuid4().int / 2**128 if self.begin is None else self.begin % 1.0
        return int(begin * units.count)


@starting_beside_others()
def cut_earlier_run(job: Job, shared: Shared, on_rows: OnRows, tell: Callable[[str], None], stop: Interruption) -> None:
    """Divide a run that was begun without units into units, once no other process writes to its folder. Raises UsageError."""
    path, told = Path(job.output.path), False
    while _lacks_units(read_manifest(OutputFolder(path))):
        try:
            claim = Claim(path)
        except BusyError:
            if is_there(DurableFiles(), OutputFolder(path).success):
                # Others look at a complete run, as this one is to do.
                return
            told = _wait(path, told, tell, stop)
            continue
        with claim:
            # Another may have cut it between the look above and the claim.
            if _lacks_units(read_manifest(claim.folder)):
                _cut_run(job, claim, shared, on_rows, tell)
        return


def _cut_run(job: Job, claim: Claim, shared: Shared, on_rows: OnRows, tell: Callable[[str], None]) -> None:
    """Divide the run into units, if anything is left to do, and name them in the manifest. When it returns, no file of the
    folder is mapped."""
    started = start(job, claim, on_rows, Reuse(), tell, replaceable=False)
    found = read_manifest(claim.folder)
    if found is not None and started.has_more:
        units = _cut(started.workload, shared.units)
        with claim.committing():
            make_folders(claim.files, claim.folder.units)
            named = replace(found, units=units.count, units_sha256=write_units(claim, units))
            write_manifest(claim, named, job.given())
    started.workload.store.close()


def _lacks_units(manifest: Manifest | None) -> bool:
    return manifest is not None and not manifest.units


def _wait(path: Path, told: bool, tell: Callable[[str], None], stop: Interruption) -> bool:
    """Sleep until the next check whether another run still holds the folder exclusively; show a message the first time."""
    if not told:
        tell(
            f"waiting, as another process holds output.path {str(path)!r} exclusively: a run without --shared, or "
            "one that divides it into units or joins files"
        )
    _pause(stop)
    return True


def _pause(stop: Interruption) -> None:
    stop.check()
    with stop.at_once():
        time.sleep(WAIT_SECONDS)


@starting_beside_others()
def start_shared(
    job: Job, claim: Claim, leases: Leases, shared: Shared, on_rows: OnRows, tell: Callable[[str], None], stop: Interruption
) -> tuple[Start, Units]:
    """As `start`, beside other writers. Raises UsageError, and CommitError if the storage fails."""

    while True:
        try:
            makes = _wait_for_input(job, claim, leases, stop)
            begun = _start(job, claim, shared, leases.signing(on_rows), stop, makes=makes)
        except OSError as error:
            raise unwritable(claim.folder.path, error) from error
        finally:
            leases.drop(_INPUT)
        if begun is not None:
            break
    started, units = begun
    started.introduce(tell)
    return started, units


def _wait_for_input(job: Job, claim: Claim, leases: Leases, stop: Interruption) -> bool:
    """Wait while another process tokenises the input. Return whether this process must do it, and keep the result for the
    others."""
    folder = claim.folder
    while True:
        made = (folder.success, folder.input / INDEX)
        there = not can_be_kept(job) or any(is_there(claim.files, path) for path in made)
        if there and is_there(claim.files, folder.manifest):
            return False
        if leases.take(_INPUT):
            return True
        _pause(stop)


def _start(
    job: Job, claim: Claim, shared: Shared, on_rows: OnRows, stop: Interruption, *, makes: bool
) -> tuple[Start, Units] | None:
    """Return None if another process has written the manifest meanwhile."""
    folder, scratch = claim.folder, claim.folder.temporary / "input"
    earlier = find_run(folder)
    clock = earlier.manifest.started if earlier else datetime.now().astimezone().isoformat(timespec="seconds")
    with reading_input(folder.path), stop.at_once():
        claim.files.remove_tree(scratch)
        scratch.mkdir()
        compare, begun = (earlier.compare, bool(folder.shards())) if earlier else (None, False)
        workload = prepare(job, scratch, on_rows, compare=compare, kept=folder.input, clock=lambda: clock, begun=begun)
    start_of = _start_of(workload)
    # Those of a complete run, from which none is taken.
    units = Units(start_of, np.zeros(int(start_of[-1]), np.int32), 1)
    if earlier is None:
        workload = workload.with_notes(describe_others(folder))
        units = _cut(workload, shared.units)
        manifest = describe_run(job, workload, clock)
        manifest = replace(manifest, units=units.count, units_sha256=write_units(claim, units))
        try:
            write_manifest(claim, manifest, job.given())
        except FileExistsError:
            workload.store.close()
            return None
        claim.write(folder.row_digests, workload.store.digests.to_parquet())
    else:
        manifest = earlier.manifest
        _refuse_other_extent(folder, manifest, workload)
        # The one that wrote the manifest may have been killed before it wrote these.
        restore_job(claim, manifest, job.given())
        mine, theirs = workload.fingerprint, manifest.fingerprint
        same = (mine.rows_sha256, mine.prompts_sha256) == (theirs.rows_sha256, theirs.prompts_sha256)
        if same and not is_there(claim.files, folder.row_digests):
            claim.write(folder.row_digests, workload.store.digests.to_parquet())
    if makes and not workload.taken_over and not is_there(claim.files, folder.success):
        keep_input(workload.store, workload.origin, claim.files, scratch, folder.input)
    consistently(lambda: recorded_shards(folder, manifest), folder.path)
    committed = consistently(
        lambda: read_committed(folder, workload.samples_of_row, schema=workload.output_schema), folder.path
    )
    started = Start.after(committed, workload, job, folder)
    if earlier is not None:
        if started.has_more and not manifest.units:
            raise OutputError(
                f"output.path {str(folder.path)!r} holds a run that was started without --shared, and another process is "
                "writing there. Run the same command again when it has ended."
            )
        if started.has_more:
            units = _read_or_write_units(claim, manifest, workload, shared.units)
    claim.keep(folder.manifest)
    if started.has_more:
        claim.keep(units_path(folder, manifest.units_sha256))
        begin_record(claim, manifest, ())
    return started, units


def _read_or_write_units(claim: Claim, manifest: Manifest, workload: Workload, count: int) -> Units:
    """Return the units that the manifest names. If their file is missing or damaged, cut the plan again, and write the file if
    that makes the same units. Raises DamageError if it does not."""
    try:
        return read_units(claim.folder, manifest.units, manifest.units_sha256, _start_of(workload))
    except DamageError:
        units = _cut(workload, count)
        if units.digest != manifest.units_sha256:
            raise
        write_units(claim, units)
        return units


def close_shared(
    job: Job,
    claim: Claim,
    leases: Leases,
    workload: Workload,
    stop: Interruption,
    tell: Callable[[str], None],
    on_rows: OnRows,
) -> Books:
    """Mark the run as complete if every sample is there, whichever process wrote it. Samples that other writers left unjudged
    are judged here, unless another writer does so. Raises OSError, and DamageError if the
    manifest is gone."""
    claim.restore_kept()
    manifest = read_manifest(claim.folder)
    if manifest is None:
        raise DamageError(
            f"{claim.folder.manifest} was removed while this task ran. Restore it from a copy, or choose another output.path."
        )
    shards = _recorded(claim, manifest)
    books = Books.of(workload.samples_total, shards)
    if books.unjudged and not books.pending and job.verify is not None and not stop.poll():
        if claim.journal is None:
            begin_record(claim, manifest, ())
        with suppress(Stopped), _lease_on_verdicts(leases, stop) as mine:
            if mine:
                verify, signed = job.verify, leases.signing(on_rows)
                consistently(lambda: judge_left(claim, verify, workload, tell, signed), claim.folder.path)
        shards = _recorded(claim, manifest)
        books = Books.of(workload.samples_total, shards)
    if books.closed:
        # Another may have published a shard whose name it has not brought to the disk yet.
        claim.files.sync_folder(claim.folder.data)
    return mark_success(claim, in_order(shards), workload.samples_total) if books.closed else books


@contextmanager
def _lease_on_verdicts(leases: Leases, stop: Interruption) -> Generator[bool]:
    """Yield whether this writer is to compute the missing verdicts; False if another live writer does. Raises Stopped."""
    while not (mine := leases.take(_VERDICTS)) and not leases.is_alive(_VERDICTS):
        _pause(stop)
    try:
        yield mine
    finally:
        leases.drop(_VERDICTS)


def join_as_last(job: Job, claim: Claim, workload: Workload, stop: Interruption, tell: Callable[[str], None]) -> None:
    """Merge the journals and join the small shards if no other writer is left and every sample exists. Raises OSError and the
    errors of `join_small`."""
    folder, manifest = claim.folder, read_manifest(claim.folder)
    # Whichever ends last finds the folder complete, whatever it found when it closed its books.
    if manifest is None or not claim.take_alone() or not is_there(claim.files, folder.success):
        return
    if not manifest.units or not _may_join(claim):
        return
    shards = _recorded(claim, manifest)
    if sum(shard.rows for shard in shards) != workload.samples_total or not folder.journals():
        return
    begin_record(claim, manifest, ((shard, NO_MARK) for shard in shards))
    join_small(claim, job.output.rows_per_shard, stop.poll, tell)
    mark_success(claim, claimed_shards(claim), workload.samples_total)


def _may_join(claim: Claim) -> bool:
    """Return whether this writer, which holds the lock, has the folder to itself. If locks are separate on each host, only the
    first host to come may have it. Raises OSError."""
    folder, host = claim.folder, socket.gethostname().encode()
    with suppress(OSError):
        host = BOOT_ID.read_bytes().strip()
    mine = folder.temporary / folder.joiner.name
    with NewFile(claim.files, mine) as file:
        file.write(host)
        file.sync()
    with suppress(FileExistsError):
        publish(claim.files, mine, folder.joiner)
    claim.clears = read_bytes(claim.files, folder.joiner) == host
    return claim.clears


def _recorded(claim: Claim, manifest: Manifest) -> list[Shard]:
    """Return the shards that are there, as their writers recorded them."""

    def read() -> list[Shard]:
        listed = recorded_shards(claim.folder, manifest)
        record = claim.folder.record()
        versions = {} if record is None else record.versions
        found: list[Shard] = []
        for file in listed:
            known = [shard for shard in versions.get(claim.folder.name_of(file.path), ()) if shard is not None]
            # If two writers began it, its content says which one published it.
            digest = file.digest() if len(known) > 1 else None
            found += [shard for shard in known if digest in (None, shard.sha256)][:1]
        return found

    return consistently(read, claim.folder.path)


def _start_of(workload: Workload) -> Int64:
    return nothing_committed(workload.samples_of_row).drawn.start


def _cut(workload: Workload, count: int) -> Units:
    """Divide the plan into about `count` units; rows that never became prompts are spread over them."""
    start = _start_of(workload)
    ledger = Ledger(workload.requests)
    parts = ledger.stretches(max(1, count)) if len(workload.requests) else []
    number = max(1, len(parts))
    unit = (np.arange(int(start[-1]), dtype=np.int64) * number // max(1, int(start[-1]))).astype(np.int32)
    for place, part in enumerate(parts):
        row, sample = ledger.samples(part)
        unit[start[row] + sample] = place
    return Units(start, unit, number)


def _refuse_other_extent(folder: OutputFolder, manifest: Manifest, workload: Workload) -> None:
    if (manifest.rows, manifest.samples) != (workload.store.num_rows, workload.samples_total):
        raise OutputError(
            f"output.path {str(folder.path)!r} is shared by writers of {counted(manifest.samples, 'sample')} of "
            f"{counted(manifest.rows, 'row')}; this job has {workload.samples_total:,} of {workload.store.num_rows:,}. End "
            "the others, then run the job once without --shared, which may add rows and samples; or choose another "
            "output.path."
        )
