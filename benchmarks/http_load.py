"""A server in a process of its own, and a client that takes little of the machine: requests that are made beforehand, sent from
several processes over plain sockets."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import urlsplit

import psutil

FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Server:
    """A running server; `roles` names its processes: HTTP, then schedulers and workers."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url

    def processes(self) -> dict[str, psutil.Process]:
        """The server's processes by role and number."""
        found = {"http": psutil.Process(self.process.pid)}
        for place, scheduler in enumerate(_spawned(found["http"])):
            found[f"scheduler {place}"] = scheduler
            found |= {f"worker {place}.{rank}": each for rank, each in enumerate(_spawned(scheduler))}
        return found

    def cpu_seconds(self) -> dict[str, float]:
        """CPU time of each process so far."""
        return {role: sum(each.cpu_times()[:2]) for role, each in self.processes().items()}

    def memory(self) -> dict[str, float]:
        """Resident megabytes of each process."""
        return {role: each.memory_info().rss / 1e6 for role, each in self.processes().items()}


def _spawned(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]


@contextmanager
def serving(model: str, *settings: str, through: Sequence[str] = ()) -> Generator[Server]:
    """`tokabatch serve` until the end of the block; what it tells goes to standard error. `through` is a module that runs it,
    with that module's arguments. Raises RuntimeError where it ends before it serves."""
    command = [
        sys.executable,
        "-m",
        *through,
        "tokabatch",
        "serve",
        model,
        "server.port=0",
        "server.name=m",
        "server.files=null",
        *settings,
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=FOLDER)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            sys.stderr.write(line)
            if found := re.search(r"(http://.*)/v1;", line):
                break
        else:
            raise RuntimeError(f"the server ended with code {process.wait()}")
        with subprocess.Popen(["cat"], stdin=process.stderr, stdout=sys.stderr):
            yield Server(process, found[1])
            process.terminate()
    finally:
        process.terminate()
        process.wait()


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def send_all(url: str, path: str, bodies: Sequence[bytes], processes: int = 4) -> tuple[float, list[bytes]]:
    """Send all requests at once, each over its own connection, which is open before: seconds from the first request to the
    last answer, and the bodies of the answers. Raises RuntimeError where one is not answered with 200."""
    context = multiprocessing.get_context("fork")
    pipes: list[Connection] = []
    children: list[Any] = []
    for number in range(processes):
        ours, theirs = context.Pipe()
        child = context.Process(target=_client, args=(theirs, url, path, bodies[number::processes]), daemon=True)
        child.start()
        pipes.append(ours)
        children.append(child)
    for pipe in pipes:
        pipe.recv()
    began = time.perf_counter()
    for pipe in pipes:
        pipe.send(None)
    answers, last = [b""] * len(bodies), began
    for number, pipe in enumerate(pipes):
        ended, part = pipe.recv()
        if isinstance(part, str):
            raise RuntimeError(part)
        last, answers[number::processes] = max(last, ended), part
    for child in children:
        child.join()
    return last - began, answers


def _client(pipe: Connection, url: str, path: str, bodies: Sequence[bytes]) -> None:
    place = urlsplit(url)
    try:
        pipe.send(asyncio.run(_exchange(pipe, str(place.hostname), int(place.port or 80), path, bodies)))
    except (OSError, RuntimeError, asyncio.IncompleteReadError) as error:
        pipe.send((0.0, f"{type(error).__name__}: {error}"))


async def _exchange(pipe: Connection, host: str, port: int, path: str, bodies: Sequence[bytes]) -> tuple[float, list[bytes]]:
    connections = [await asyncio.open_connection(host, port) for _ in bodies]
    head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\nContent-Length: "
    pipe.send(None)
    pipe.recv()

    async def ask(place: int) -> bytes:
        reader, writer = connections[place]
        writer.write(f"{head}{len(bodies[place])}\r\n\r\n".encode() + bodies[place])
        answer = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = re.search(r"content-length: (\d+)", answer, re.IGNORECASE)
        body = await reader.readexactly(int(length[1]) if length else 0)
        writer.close()
        if not answer.startswith("HTTP/1.1 200"):
            raise RuntimeError(f"{answer.splitlines()[0]}: {body[:300].decode(errors='replace')}")
        return body

    answers = await asyncio.gather(*(ask(place) for place in range(len(bodies))))
    return time.perf_counter(), answers
