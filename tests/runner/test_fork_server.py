from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

from tokabatch.runner.fork_server import REQUEST_BYTES, ForkServer
from tokabatch.runner.forked import fork

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def server():
    server = ForkServer()
    yield server
    server.close()


def answer(steps: Connection, signs: Connection, work: bytes) -> None:
    """Send the work back with what this process is, then wait for an exit code."""
    steps.send((work, os.getpid(), os.getppid(), os.environ.get("TOKABATCH_OF_THE_CALLER")))
    code = steps.recv()
    signs.close()
    os._exit(code)


def hang(steps: Connection, signs: Connection, work: bytes) -> None:
    """Look at no pipe, as in a kernel that does not end."""
    steps.send(os.getpid())
    time.sleep(60.0)


def begin(server: ForkServer, target: Callable[..., None] = answer, work: bytes = b"work"):
    ours, steps = multiprocessing.Pipe()
    signs, pulse = multiprocessing.Pipe(duplex=False)
    worker = server.process(target=target, args=(steps, pulse, work), name="worker", daemon=True)
    worker.start()
    steps.close()
    pulse.close()
    return worker, ours, signs


def test_a_worker_is_a_child_of_the_server_and_has_the_environment_of_its_caller(server, monkeypatch):
    monkeypatch.setenv("TOKABATCH_OF_THE_CALLER", "now")
    worker, pipe, signs = begin(server)
    work, pid, parent, variable = pipe.recv()
    assert (work, pid, variable) == (b"work", worker.pid, "now") and parent != os.getpid()
    assert worker.is_alive() and worker.exitcode is None
    pipe.send(7)
    worker.join(10.0)
    assert (worker.exitcode, worker.is_alive()) == (7, False)
    with pytest.raises(EOFError):
        signs.recv()


def test_workers_do_not_hold_what_others_wait_for_the_end_of(server):
    workers = [begin(server) for _ in range(3)]
    for worker, pipe, _ in workers:
        pipe.recv()
        assert worker.is_alive()
    first, pipe, signs = workers[0]
    first.kill()
    first.join(10.0)
    assert first.exitcode == -signal.SIGKILL
    with pytest.raises(EOFError):
        signs.recv()
    with pytest.raises((EOFError, ConnectionError)):
        pipe.recv()
    assert all(worker.is_alive() for worker, *_ in workers[1:])


@pytest.mark.parametrize("stopped", [False, True])
def test_a_worker_ends_with_the_process_that_requested_it(server, stopped):
    told, theirs = multiprocessing.Pipe()

    def member() -> None:
        worker, pipe, _ = begin(server, hang)
        pipe.recv()
        theirs.send(worker.pid)
        time.sleep(60.0)

    process = fork(member, (), "member")
    worker = psutil.Process(told.recv())
    if stopped:
        worker.suspend()
    process.kill()
    process.join()
    worker.wait(10.0)


def test_without_the_server_workers_are_spawned(server):
    server.close()
    worker, pipe, _ = begin(server)
    assert pipe.recv()[2] == os.getpid()
    pipe.send(3)
    worker.join(20.0)
    assert worker.exitcode == 3


def test_a_request_too_large_for_a_message_is_spawned(server):
    worker, pipe, _ = begin(server, work=bytes(REQUEST_BYTES))
    assert pipe.recv()[2] == os.getpid()
    pipe.send(0)
    worker.join(20.0)
    assert worker.exitcode == 0


def test_where_no_process_can_be_forked_others_run_on_and_the_worker_is_spawned(server):
    first, pipe, _ = begin(server)
    pipe.recv()
    psutil.Process(server._process.pid).rlimit(psutil.RLIMIT_NOFILE, (1, 1))
    second, other, _ = begin(server)
    assert other.recv()[2] == os.getpid()
    assert first.is_alive()
    other.send(0)
    second.join(20.0)
    assert second.exitcode == 0


@pytest.mark.parametrize("signal_sent", [False, True])
def test_workers_end_with_the_server(server, signal_sent):
    worker, pipe, _ = begin(server)
    pid = pipe.recv()[1]
    if signal_sent:
        os.kill(server._process.pid, signal.SIGKILL)
    server.close()
    with suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(10.0)
    worker.join(10.0)
    assert worker.exitcode == -signal.SIGKILL


def test_importing_a_run_uses_no_gpu_and_starts_no_threads_of_torch():
    """Otherwise a fork of the process could not compute."""
    code = """if True:
        import os, torch
        torch._C._cuda_getDeviceCount = torch._C._cuda_init = lambda *_: exit("used")
        import tokabatch.runner.run, sys
        from tokabatch.runner.fork_server import ForkServer
        assert not torch.cuda.is_initialized() and ForkServer.if_possible() is not None
        before = len(os.listdir("/proc/self/task"))
        a = torch.rand(512, 512); a @ a; torch.set_num_threads(2); (a * a).sum(); a @ a
        print(len(os.listdir("/proc/self/task")) - before)
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and int(done.stdout) > 0, done.stdout + done.stderr
