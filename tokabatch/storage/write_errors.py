"""What a file system's errors mean for a run's folder: what is wrong, what to do about it, and whether the same command can
succeed later.

Only in that case does a run end as one to be started again. What a size limit or a second file system forbids is forbidden the
next time, too.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from tokabatch.errors import CommitError, OutputError, UsageError
from tokabatch.number_text import counted

_REMEDIES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there, or have the quota raised",
    errno.EFBIG: "raise the limit (`ulimit -f`)",
    errno.EXDEV: "put _tmp and data on one file system: make the whole folder a link or a mount, not a part of it",
    errno.EACCES: "give permission",
    errno.EPERM: "give permission",
    errno.EROFS: "mount it writable",
    errno.EIO: "check the disk",
    errno.ESTALE: "check the file server, and mount it again",
    errno.ENOMEM: "give the job more memory",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
    errno.ENFILE: "raise the system's limit of open files",
    errno.ENOENT: "put back what was removed",
}
_NEVER = frozenset({errno.EFBIG, errno.EXDEV})
_PASSING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ENOENT})
"""What is wrong with the storage, or was removed meanwhile, rather than wrong with the job or its folder."""


def reason(error: OSError) -> str:
    """Return what is wrong, in the system's words, with the limit that was reached, if there is one."""
    said = error.strerror or str(error)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if error.errno == errno.EFBIG and limit != resource.RLIM_INFINITY:
        return f"{said}: this process may write {counted(limit, 'byte')} into a file"
    return said


def remedy(error: OSError) -> str:
    """Return what to do about it, as the beginning of a sentence."""
    return _REMEDIES.get(error.errno or 0, "fix that")


def is_full(error: OSError) -> bool:
    """Return whether there is no space left."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def may_pass(error: OSError) -> bool:
    """Return whether the same command can succeed later, unchanged."""
    return error.errno not in _NEVER


def unwritable(path: Path, error: OSError) -> OutputError:
    """Return the error of a start whose folder cannot take what a run writes."""
    if error.errno == errno.ENOENT:
        what = "If another process removed files there, run the same command again; otherwise choose another output.path"
        return OutputError(f"output.path {str(path)!r} cannot be written: {reason(error)}. {what}.")
    note = " (the tokenised input is kept there, too, while the job runs)" if is_full(error) else ""
    what = or_else(error, f"{note}, or choose another output.path", "choose another output.path")
    return OutputError(f"output.path {str(path)!r} cannot be written: {reason(error)}. {what}.")


def or_else(error: OSError, other: str, only: str) -> str:
    """Return the remedy followed by the `other` one, or the `only` one if there is nothing more to say, as a sentence without
    its full stop. For a file that is new: a path that leads nowhere is not a file that was removed."""
    known = error.errno in _REMEDIES and error.errno != errno.ENOENT
    return f"{_sentence(error)}{other}" if known else only[0].upper() + only[1:]


@contextmanager
def starting_beside_others() -> Generator[None]:
    """Wrap the start of one of several writers: raises CommitError, with the same words, in place of an OutputError whose cause
    is the state of the storage, or that files were removed. The tasks that are running end with it, too; one that starts must
    not be the one given up."""
    try:
        yield
    except OutputError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in _PASSING:
            raise CommitError(str(error)) from cause
        raise


@contextmanager
def spooling(folder: Path) -> Generator[None]:
    """Wrap what writes the tokenised input into `folder`, or maps it: raises OutputError if that fails."""
    try:
        yield
    except OSError as error:
        raise _unspooled(folder, error) from error
    except MemoryError as error:
        raise _unspooled(folder, OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))) from error


@contextmanager
def reading_input(folder: Path) -> Generator[None]:
    """Wrap the reading of the model and the input, before anything is computed: raises UsageError for files that cannot be
    read, and OutputError if the output folder `folder` is what failed."""
    try:
        yield
    except OSError as error:
        name = error.filename
        if isinstance(name, str) and Path(name).is_relative_to(folder):
            raise unwritable(folder, error) from error
        what = "a file of the model or the input" if name is None else os.fsdecode(name)
        raise UsageError(
            f"{what} cannot be read: {reason(error)}. {_sentence(error)}, then run the same command again."
        ) from error
    except MemoryError as error:
        raise UsageError("the process ran out of memory while it read the input. Give the job more memory.") from error


def _unspooled(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"the tokenised input cannot be written to {folder}: {reason(error)}. {_sentence(error)}, "
        "then run the same command again."
    )


def _sentence(error: OSError) -> str:
    what = remedy(error)
    return what[0].upper() + what[1:]
