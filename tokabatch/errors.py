"""The errors a user can meet, as a tree.

    TokabatchError
    ├── UsageError          exit 2: the job, its files or the command line; names the key or file and the remedy
    │   ├── JobError        the job file or an override
    │   ├── InputError      the input dataset as a whole
    │   ├── ModelError      weights, config or tokenizer
    │   └── OutputError     the output folder
    ├── CommitError         exit 75: the output folder takes no more; what is committed stays, run again
    └── EngineError         exit 1: the run itself broke

A fault of a single row is not raised: it is a `RowError`, a value that becomes that row's error row.
"""

from __future__ import annotations

from dataclasses import dataclass


class TokabatchError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 1


class UsageError(TokabatchError):
    """The user can mend it; the message names what and how."""

    exit_code = 2


class JobError(UsageError):
    """The job file or an override is wrong."""


class InputError(UsageError):
    """The input dataset cannot be read as the job describes it."""


class ModelError(UsageError):
    """The model's files are missing, damaged or of a kind that is not supported."""


class OutputError(UsageError):
    """The output folder cannot be used."""


class CommitError(TokabatchError):
    """Results cannot be written any more: the disk is full, say. What is committed is whole; a later run adds the rest."""

    exit_code = 75


class EngineError(TokabatchError):
    """The engine broke while running; nothing the job says would have prevented it."""


@dataclass(frozen=True, slots=True)
class RowError:
    """Why one row has no completion. `code` is stable and machine-readable; `message` is for a person."""

    code: str
    message: str
