"""A request to stop a run, made by a signal handler or another thread and honoured by the run at a safe point.

The run checks for it between steps. While it waits or loads and has nothing to lose, the request may interrupt it in `at_once`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import NoReturn

from tokabatch.errors import EXIT_INTERRUPTED, Stopped

_WORDS = "stopped; run the same command again to continue"


class Interruption:
    """`asked`, if given, is a further source of requests, called at every check."""

    def __init__(self, asked: Callable[[], bool] | None = None) -> None:
        self._asked = asked
        self._exit_code = 0
        self._words = _WORDS
        self._breaks_into: int | None = None
        """The thread that lets a request break in."""

    def poll(self) -> int:
        """Return the exit code of the requested stop; 0 until one is requested."""
        if not self._exit_code and self._asked is not None and self._asked():
            self._exit_code = EXIT_INTERRUPTED
        return self._exit_code

    @property
    def waits(self) -> bool:
        """Whether a thread is in `at_once`, waiting for others."""
        return self._breaks_into is not None

    def request(self, exit_code: int) -> None:
        """Request the stop; only the first request counts. Raises Stopped if the calling thread is in `at_once`, as the main
        thread may be when a signal handler calls this."""
        if self._exit_code:
            return
        self._exit_code = exit_code
        if self._breaks_into == threading.get_ident():
            self._raise()

    def check(self) -> None:
        """Raise Stopped if a stop was requested."""
        if self.poll():
            self._raise()

    @contextmanager
    def at_once(self, words: str = _WORDS) -> Generator[None]:
        """Inside, a request raises Stopped with these words wherever the thread happens to be; so does entering after one."""
        self._words = words
        self._breaks_into = threading.get_ident()
        try:
            if self._exit_code:
                self._raise()
            yield
        finally:
            self._breaks_into, self._words = None, _WORDS

    def _raise(self) -> NoReturn:
        raise Stopped(self._words, self._exit_code)
