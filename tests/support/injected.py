"""Exceptions at the k-th call that a run's recorder makes, and faults that stay.

A call is what any function of the package calls while the recorder is at work: Python functions and C functions, each method of
PyArrow and each system call among them. They are counted by the interpreter's profiler, which can raise in place of one.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import tokabatch
from tokabatch.input.store import columns
from tokabatch.input.store import tokenized_input as store
from tokabatch.input.tokenizer.tokenizer import Tokenizer
from tokabatch.output import schema as output
from tokabatch.output import shard_writer, shards
from tokabatch.runner import sample_tables
from tokabatch.runner.preparation import Preparation
from tokabatch.runner.recorder import Recorder
from tokabatch.storage import atomic_files as durable

PACKAGE = str(Path(tokabatch.__file__).parent)
ENTRIES = ("fail", "add", "finish")


class Injection:
    """Counts calls, and raises `error` in place of call number `at`; `place` says where that was."""

    def __init__(self, at: int | None = None, error: BaseException | None = None) -> None:
        self.at, self.error, self.calls, self.place = at, error, 0, ""
        self.accepted = 0
        """Samples that the recorder had accepted by the end."""

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        caller = frame if event == "c_call" else frame.f_back if event == "call" else None
        if caller is None or not caller.f_code.co_filename.startswith(PACKAGE):
            return
        if "_verdict" in (frame.f_code.co_name, caller.f_code.co_name) or "verifiers" in caller.f_code.co_filename:
            return  # What a verifier raises costs a verdict, once and for all.
        self.calls += 1
        if self.calls - 1 == self.at and self.error is not None:
            name = getattr(argument, "__qualname__", argument) if event == "c_call" else frame.f_code.co_name
            self.place = f"{Path(caller.f_code.co_filename).name}:{caller.f_lineno} {name}"
            sys.setprofile(None)
            raise self.error


@contextmanager
def injected(injection: Injection) -> Generator[Injection]:
    """Inside, runs suffer the injection while their recorder works."""

    def watched(entry: str) -> Callable[..., Any]:
        real = getattr(Recorder, entry)

        @functools.wraps(real)
        def call(self: Recorder, *arguments: Any) -> Any:
            if injection.place:
                return real(self, *arguments)
            sys.setprofile(injection)
            try:
                return real(self, *arguments)
            finally:
                sys.setprofile(None)

        return call

    accept, prepare = Recorder._accept, Preparation._accept

    # Without a call into the package, which would count.
    def accepting(self: Recorder, unsampled: Any, *more: Any) -> None:
        accept(self, unsampled, *more)
        injection.accepted += sum(len(each.samples) for each in unsampled)

    def preparing(self: Preparation, finished: Any) -> None:
        prepare(self, finished)
        injection.accepted += len(finished)

    with ExitStack() as patches:
        for entry in ENTRIES:
            patches.enter_context(mock.patch.object(Recorder, entry, watched(entry)))
        patches.enter_context(mock.patch.object(Recorder, "_accept", accepting))
        patches.enter_context(mock.patch.object(Preparation, "_accept", preparing))
        yield injection


LASTING: dict[str, tuple[Any, str]] = {
    "decoding": (Tokenizer, "decode_batch"),
    "taking columns": (columns.JsonColumns, "take"),
    "sizes of rows": (columns.JsonColumns, "row_bytes"),
    "ids": (store.InputStore, "ids"),
    "lists of tokens": (output, "_nullable_list"),
    "a table": (sample_tables, "build_table"),
    "taking a table over": (shard_writer.ShardWriter, "take"),
    "what is due": (shard_writer.ShardWriter, "commit_due"),
    "encoding": (shards, "write_parquet"),
    "counting": (shards, "count_ok"),
    "publishing": (shard_writer, "publish"),
    "syncing": (durable.NewFile, "sync"),
}
"""Functions on the way of a sample to the disk."""


@contextmanager
def lasting(fault: str, after: int, error: BaseException) -> Iterator[None]:
    """Inside, the function raises at each call, once it was called `after` times."""
    owner, name = LASTING[fault]
    real, calls = getattr(owner, name), 0

    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise error
        return real(*arguments, **named)

    with mock.patch.object(owner, name, call):
        yield
