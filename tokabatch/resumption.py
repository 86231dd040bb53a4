"""What a run finds in its output folder, and how it goes on from there.

The folder's run is continued, at the granularity of single samples: the keys that its shards hold are done, the rest is to
do. Nothing of an earlier run changes before the job is known to be the same (or the user said to start afresh).
"""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Callable, Collection, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tokabatch import __version__
from tokabatch.data.committed import Committed, drop_errors, nothing_committed, read_committed
from tokabatch.data.earlier import EarlierRun
from tokabatch.data.folder import Claim, OutputFolder
from tokabatch.data.manifest import Manifest, Versions, read_manifest, write_manifest
from tokabatch.errors import OutputError
from tokabatch.job import Job
from tokabatch.preparation import Prepared, prepare

OnRows = Callable[[int, int], None]
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@dataclass(frozen=True, slots=True)
class Reuse:
    """What to do with the results of an earlier run: continue it (default), continue it and run its error rows again, or
    delete them."""

    overwrite: bool = False
    retry_errors: bool = False

    def __post_init__(self) -> None:
        if self.overwrite and self.retry_errors:
            raise OutputError("--overwrite deletes every row, --retry-errors runs the error rows again; give one of the two")


@dataclass(frozen=True, slots=True)
class Start:
    """`prepared` is the whole job, `committed` what is done of it, `left` what is left to do."""

    prepared: Prepared
    committed: Committed
    left: Prepared

    @classmethod
    def after(cls, committed: Committed, prepared: Prepared) -> Start:
        return cls(prepared, committed, prepared.without(committed.drawn))


def start(
    job: Job,
    claim: Claim,
    on_rows: OnRows,
    reuse: Reuse,
    tell: Callable[[str], None],
    reading: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Start:
    """Prepare the job and take up its output folder, whose manifest then says what the run is. Raises UsageError; `tell` is
    given a sentence for the user where the folder holds results; `reading` is entered while the folder is as it was."""
    folder = claim.folder
    earlier = None if reuse.overwrite else find_run(folder, retry_errors=reuse.retry_errors)
    scratch = folder.temporary / "input"
    with _refusing(folder, _FULL), reading():
        scratch.mkdir()
        prepared = prepare(job, scratch, on_rows, compare=earlier.compare if earlier else None)
    with _refusing(folder):
        if reuse.overwrite:
            _overwrite(claim, tell)
        started = _find_samples(folder, prepared, errors=not reuse.retry_errors)
        claim.reopen(keep_summary=not (len(started.left.requests) or started.left.failures or reuse.retry_errors))
        # Once its error samples are out, a repaired row is known by these alone.
        claim.write(folder.row_digests, prepared.store.digests.to_parquet())
        write_manifest(claim, _manifest(job, prepared, earlier), job.given())
        if reuse.retry_errors:
            dropped = drop_errors(claim)
            if dropped:
                tell(f"running {dropped:,} error rows again")
            started = _find_samples(folder, prepared)
        elif earlier and earlier.repaired:
            tell(f"error rows that are other rows now: {earlier.repaired:,}; --retry-errors runs them")
    for note in prepared.notes:
        tell(note)
    if started.committed.samples:
        tell(f"continuing: {started.committed.samples:,} of {prepared.samples_total:,} samples are there already")
    return started


def preview(job: Job, scratch: Path, *, absent_gpu: bool = False) -> Start:
    """The same for a plan: reads what is there, changes nothing, needs no weights. Raises the same refusals, but for those of
    the device where the plan is for a GPU that is not here."""
    folder = OutputFolder(Path(job.output.path))
    earlier = find_run(folder)
    prepared = prepare(job, scratch, weights=False, compare=earlier.compare if earlier else None, absent_gpu=absent_gpu)
    if earlier is None:
        return Start.after(nothing_committed(prepared.samples_of_row), prepared)
    return _find_samples(folder, prepared)


def _find_samples(folder: OutputFolder, prepared: Prepared, *, errors: bool = True) -> Start:
    committed = read_committed(folder, prepared.samples_of_row, schema=prepared.output_schema, errors=errors)
    return Start.after(committed, prepared)


def find_run(folder: OutputFolder, *, retry_errors: bool = False) -> EarlierRun | None:
    """The run in the folder, None where there is none. Raises OutputError where there are samples of which no manifest says
    whose they are."""
    manifest = read_manifest(folder)
    if manifest is None and (shards := folder.shard_paths()):
        raise OutputError(
            f"output.path {str(folder.path)!r} holds {len(shards)} file(s) of samples (data/{shards[0].name}) but no "
            "manifest.json, so that nobody can tell which job they are of. Choose another output.path, or start afresh with "
            "--overwrite."
        )
    return EarlierRun(folder, manifest, _versions(), retry_errors) if manifest else None


@contextmanager
def _refusing(folder: OutputFolder, codes: Collection[int] = ()) -> Generator[None]:
    """Where the folder cannot be written at the start (for one of the error numbers, if any are named), nothing has been
    computed: the job is refused."""
    try:
        yield
    except OSError as error:
        if codes and error.errno not in codes:
            raise
        raise OutputError(
            f"output.path {str(folder.path)!r} cannot be written: {error.strerror or error}. Make room there (while the job "
            "runs, the tokenised input lies there, too), or choose another output.path."
        ) from error


def _overwrite(claim: Claim, tell: Callable[[str], None]) -> None:
    shards = claim.folder.shard_paths()
    if shards:
        size = sum(path.stat().st_size for path in shards)
        tell(f"--overwrite: deleting {len(shards):,} files, {size:,} bytes, of the run in {claim.folder.path}")
    claim.discard()


def _versions() -> Versions:
    return Versions(
        tokabatch=__version__,
        torch=torch.__version__,
        transformers=version("transformers"),
        python=platform.python_version(),
        tokenizers=version("tokenizers"),
        jinja2=version("jinja2"),
    )


def _manifest(job: Job, prepared: Prepared, earlier: EarlierRun | None) -> Manifest:
    manifest = Manifest(
        started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        working_folder=os.getcwd(),
        model_path=str(prepared.folder),
        versions=_versions(),
        rows=prepared.store.num_rows,
        samples=prepared.samples_total,
        job=job.model_copy(update={"generation": prepared.generation}).to_dict(),
        fingerprint=prepared.fingerprint,
    )
    return manifest if earlier is None else replace(manifest, started=earlier.manifest.started)
