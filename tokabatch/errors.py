"""The errors a user can meet, as a tree.

    TokabatchError
    ├── UsageError          exit 2: the job, its files or the command line; names the key or file and the remedy
    │   ├── JobError        the job file or an override
    │   ├── InputError      the input dataset as a whole
    │   ├── ModelError      weights, config or tokenizer
    │   └── OutputError     the output folder
    │       ├── DamageError exit 4: what was committed is not there as it was committed
    │       └── ForeignFileError  a file among the shards that no run wrote
    ├── CommitError         exit 75: the output folder takes no more; what is committed stays, run again
    └── EngineError         exit 1: the run itself broke
        ├── ReplicaLost     the scheduler's process died; another can go on
        ├── WorkerLost      the worker process died or hung; another can go on
        └── StepDropped     the worker had no memory for a step; it can go on with smaller ones

Stopped is none of them: like KeyboardInterrupt it is not caught as an error.
A fault of a single row is not raised: it is a `RowError`, a value that becomes that row's error row.
"""

from __future__ import annotations

from dataclasses import dataclass

EXIT_COMPLETE, EXIT_STALLED, EXIT_ERRORS, EXIT_BOOKS, EXIT_STOPPED, EXIT_INTERRUPTED = 0, 2, 3, 4, 75, 130
"""How a run ends: all samples are there; two starts in a row committed nothing; more error rows than allowed, or no verdict
at all; sample counts do not add up; stopped by a signal, by a folder that takes no more or by an error row; interrupted by
Ctrl-C. 1 is an error."""
STOPS = (KeyboardInterrupt, SystemExit, GeneratorExit)
"""What ends a program rather than telling of a fault. Anything else may be one, though it be no Exception: a panic in a library
written in Rust, such as tokenizers, is a bare BaseException."""


class TokabatchError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 1


class UsageError(TokabatchError):
    """The user can correct it; the message names what and how."""

    exit_code = 2


class JobError(UsageError):
    """The job file or an override is wrong."""


class InputError(UsageError):
    """The input dataset cannot be read as the job describes it."""


class ModelError(UsageError):
    """The model's files are missing, damaged or of a kind that is not supported."""


class OutputError(UsageError):
    """The output folder cannot be used."""


class BusyError(OutputError):
    """Another run writes to the output folder."""


class DamageError(OutputError):
    """A file of the output folder is not what the run committed, or is gone; names it and the command that repairs that."""

    exit_code = 4


class ForeignFileError(OutputError):
    """A file under a shard's name was not written by the run; names it. It is to be moved away, not deleted."""


class CommitError(TokabatchError):
    """Results cannot be written any more: the disk is full, say. What is committed is whole; a later run adds the rest."""

    exit_code = 75


class EngineError(TokabatchError):
    """The engine broke while running; nothing the job says would have prevented it."""


class ReplicaLost(EngineError):
    """The process of a scheduler is gone, and with it every sample that is not finished."""


class WorkerLost(EngineError):
    """The worker process is gone, and with it every step in flight and the whole cache."""

    def __init__(self, message: str, cause: str = "failed") -> None:
        super().__init__(message)
        self.cause = cause
        """In a few words, without what differs from case to case: `killed`, `hung`, `failed`, `out of memory`."""


class StepDropped(EngineError):
    """The device had no memory for a step. It and the steps behind it were not computed; the worker waits to be resumed."""


class Stopped(KeyboardInterrupt):
    """The run was asked to stop where it waited, read or loaded. `exit_code` is 75, or 130 for Ctrl-C."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class RowError:
    """Why one row has no completion. `code` is stable and machine-readable; `message` is for a person."""

    code: str
    message: str
