"""The worker process from its first instruction on. It imports no large module, so that the heartbeat starts before anything
else can take time or fail: the parts of the worker arrive pickled, and unpickling imports their modules."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from multiprocessing.connection import Connection

from tokabatch.engine.heartbeat import Pulse
from tokabatch.report.streams import make_tolerant

PARENTS_SIGNALS = frozenset([signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
"""Signals that reach the whole process group or job; the child ignores them, and the parent stops it."""


def main(steps: Connection, signs: Connection, work: bytes) -> None:
    """Call the pickled pair (function, argument) with `steps`, the argument and this process's pulse."""
    for number in PARENTS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PARENTS_SIGNALS)
    make_tolerant()
    pulse = Pulse(signs)
    pulse.start()
    function, argument = pickle.loads(work)
    function(steps, argument, pulse)
    sys.stdout.flush()
    sys.stderr.flush()
    # Skips the clean-up of libraries, which may block on other ranks; the system releases the resources.
    os._exit(0)
