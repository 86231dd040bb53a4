from __future__ import annotations

import fcntl
import os
import resource
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


def close_all(pipe) -> None:
    """Close a file whose number is beyond the limit, which was lowered after it had been opened, by `ulimit -n` perhaps."""
    high = fcntl.fcntl(0, fcntl.F_DUPFD, 200)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    keep_only((pipe.fileno(),))
    pipe.send(os.path.exists(f"/proc/self/fd/{high}"))


def test_a_file_beyond_the_limit_on_their_number_is_closed():
    ours, theirs = Pipe()
    process = fork(close_all, (theirs,), "closes")
    theirs.close()
    assert ours.recv() is False
    process.join()
    assert process.exitcode == 0
