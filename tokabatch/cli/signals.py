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
def stop_on_signals(
    doing: str = "committing finished samples, if any", deadline: float | None = None
) -> Generator[Interruption, None, None]:
    """Yield the interruption through which Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 request a stop. The first signal only requests
    it; a second Ctrl-C ends the process. `doing` describes what happens in between. After `deadline` seconds this process sends
    itself SIGUSR1, which interrupts a wait."""
    stop, before = Interruption(), {number: signal.getsignal(number) for number in _SIGNALS}
    seen: list[int] = []
    reached: list[float] = []

    def ask(number: int, frame: object) -> None:
        if number == signal.SIGINT and number in seen:
            _say("\x1b[?25h" if os.isatty(2) else "")
            os._exit(EXIT_INTERRUPTED)
        if number not in seen:
            how = "; Ctrl-C again to stop at once" if number == signal.SIGINT else f" ({signal.Signals(number).name})"
            if number == signal.SIGUSR1 and reached:
                how = f" (--deadline {reached[0]:.15g} is reached)"
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

    def reach(seconds: float) -> None:
        reached.append(seconds)
        os.kill(os.getpid(), signal.SIGUSR1)

    timer = threading.Timer(deadline or 0.0, reach, (deadline,))
    timer.daemon = True
    if deadline is not None:
        timer.start()
    try:
        yield stop
    finally:
        timer.cancel()
        for number in ours:
            signal.signal(number, before[number])


def _say(text: str) -> None:
    """From a signal handler: not `print`, which must not be entered again where the signal may have arrived."""
    TolerantFile(2, stall_seconds=0).write(text.encode())
