from __future__ import annotations

import signal
import time
from multiprocessing import Pipe

from tokabatch.runner.forked import end, fork, how_it_ended, keep_only


def hang(pipe) -> None:
    """Close every open file, as a process that prepares samples does, but not end."""
    keep_only((pipe.fileno(),))
    pipe.send("here")
    time.sleep(60.0)


def test_a_process_that_does_not_end_is_killed():
    ours, theirs = Pipe()
    process = fork(hang, (theirs,), "hangs")
    theirs.close()
    assert ours.recv() == "here"
    begun = time.monotonic()
    end(process, 0.3)
    assert 0.3 <= time.monotonic() - begun < 20.0 and process.exitcode == -signal.SIGKILL
    assert how_it_ended(process) == "was killed by signal 9"
