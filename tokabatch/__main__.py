"""The command `tokabatch`, also as `python -m tokabatch`."""

from __future__ import annotations

import signal
from importlib import import_module


def start() -> None:
    """Run the command. Ctrl-C while it is imported ends the process as a signal does, without a traceback."""
    handled = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if handled:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    cli = import_module("tokabatch.cli")
    if handled:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.program()


if __name__ == "__main__":
    start()
