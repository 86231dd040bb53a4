"""What signals do to a command."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager

from tokabatch.errors import EXIT_INTERRUPTED, EXIT_STOPPED
from tokabatch.report.streams import TolerantFile
from tokabatch.runner.interruption import Interruption

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@contextmanager
def stop_on_signals(doing: str = "committing finished samples, if any") -> Generator[Interruption, None, None]:
    """Yield the interruption through which Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 request a stop. The first signal only requests
    it; a second Ctrl-C ends the process. `doing` describes what happens in between."""
    stop, before = Interruption(), {number: signal.getsignal(number) for number in _SIGNALS}
    seen: list[int] = []

    def ask(number: int, frame: object) -> None:
        if number == signal.SIGINT and number in seen:
            _say("\x1b[?25h" if os.isatty(2) else "")
            os._exit(EXIT_INTERRUPTED)
        if number not in seen:
            how = "; Ctrl-C again to stop at once" if number == signal.SIGINT else f" ({signal.Signals(number).name})"
            # On a terminal behind a display's last line, and with lines below for what the display will draw over.
            before, after = ("\n", "\n\n") if os.isatty(2) else ("", "")
            _say(f"{before}stopping: {doing}{how}\n{after}")
        seen.append(number)
        stop.request(EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_STOPPED)

    # Only the main thread may set handlers; and another program's, or one that ignores the signal, stays.
    ours = [number for number, handler in before.items() if handler in (signal.default_int_handler, signal.SIG_DFL)]
    if threading.current_thread() is not threading.main_thread():
        ours = []
    for number in ours:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number in ours:
            signal.signal(number, before[number])


@contextmanager
def stop_after(seconds: float | None) -> Generator[None]:
    """Request a stop after this many seconds, by a signal, which interrupts a wait."""
    if seconds is None:
        yield
        return
    timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say(text: str) -> None:
    """From a signal handler: not `print`, which must not be entered again where the signal may have arrived."""
    TolerantFile(2, stall_seconds=0).write(text.encode())
