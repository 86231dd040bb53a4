"""Processes that are forked from main: what main has read is shared with them, not copied."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Collection
from multiprocessing.process import BaseProcess
from typing import Any

from tokabatch.engine.child import PARENTS_SIGNALS
from tokabatch.engine.heartbeat import die_with_parent

_THREADS_OF_TOKENIZERS = "TOKENIZERS_PARALLELISM"


def can_fork() -> bool:
    """Whether a process of many threads may be forked here; on macOS its system libraries forbid it."""
    return sys.platform == "linux"


def fork(target: Callable[..., None], arguments: tuple[Any, ...], name: str) -> BaseProcess:
    """A process that calls `target`, and ends with the calling thread. Signals to all processes of a terminal are main's."""
    process = multiprocessing.get_context("fork").Process(target=_run, args=(target, arguments), name=name)
    # Threads of native libraries are not carried over. None of theirs is used in the fork: tokenizers' is kept from it.
    setting = os.environ.get(_THREADS_OF_TOKENIZERS)
    os.environ[_THREADS_OF_TOKENIZERS] = "false"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, PARENTS_SIGNALS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if setting is None:
            del os.environ[_THREADS_OF_TOKENIZERS]
        else:
            os.environ[_THREADS_OF_TOKENIZERS] = setting
    return process


def keep_only(descriptors: Collection[int]) -> None:
    """In a fork: let go of every open file but these and the standard ones, so that locks and pipes of main end with main.
    Their numbers stay taken, by the null device: objects that still have them close nothing else."""
    kept = {0, 1, 2, *descriptors}
    null = os.open(os.devnull, os.O_RDWR)
    for number in [int(name) for name in os.listdir("/proc/self/fd")]:
        if number not in kept and number != null:
            os.dup2(null, number)


def _run(target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    die_with_parent()
    for number in PARENTS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PARENTS_SIGNALS)
    # A display may have put itself before them, whose locks other threads held.
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    target(*arguments)
