"""Processes forked from main, which share the memory of what main has read."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Collection
from multiprocessing.process import BaseProcess
from typing import Any

from tokabatch.engine.child import PARENTS_SIGNALS
from tokabatch.engine.heartbeat import die_with_parent, show_name

END_SECONDS = 10.0
LOOK_SECONDS = 0.005
_THREADS_OF_TOKENIZERS = "TOKENIZERS_PARALLELISM"


def can_fork() -> bool:
    """Return whether a process with several threads can be forked on this system; the system libraries of macOS forbid it."""
    return sys.platform == "linux"


def fork(target: Callable[..., None], arguments: tuple[Any, ...], name: str) -> BaseProcess:
    """Fork a process that calls `target` and ends with the calling thread. It ignores a terminal's signals, which main
    handles."""
    process = multiprocessing.get_context("fork").Process(target=_run, args=(target, arguments), name=name)
    # Threads of native libraries do not exist in the fork, so it must not use them: those of tokenizers are turned off.
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


def how_it_ended(process: BaseProcess) -> str:
    """Return how a process that has closed its pipe ended; wait for its end for at most END_SECONDS."""
    _join(process, END_SECONDS)
    code = process.exitcode or 0
    return f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"


def end(process: BaseProcess, seconds: float) -> None:
    """Wait so many seconds for the end of a process, then kill it."""
    _join(process, seconds)
    process.kill()
    process.join()


def _join(process: BaseProcess, seconds: float) -> None:
    """Wait at most so many seconds for the end of a process. Its own `join` waits for the end of a pipe, which `keep_only` has
    closed, and then for the process without a limit."""
    limit = time.monotonic() + seconds
    while process.is_alive() and time.monotonic() < limit:
        time.sleep(LOOK_SECONDS)


def keep_only(descriptors: Collection[int]) -> None:
    """Close every open file of a forked process except these and the standard ones, so that main's locks and pipes end with
    main. The file numbers are redirected to the null device, so that objects that still hold them cannot close other files."""
    kept = {0, 1, 2, *descriptors}
    null = os.open(os.devnull, os.O_RDWR)
    for number in [int(name) for name in os.listdir("/proc/self/fd")]:
        if number not in kept and number != null:
            try:
                os.dup2(null, number)
            except OSError:
                # Beyond the limit on open files, which was lowered since it was opened.
                os.close(number)


def _run(target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    die_with_parent()
    show_name()
    # The collector would visit what main has read, and so copy its pages.
    gc.freeze()
    for number in PARENTS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PARENTS_SIGNALS)
    # A display may have put itself before them, whose locks other threads held.
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    target(*arguments)
