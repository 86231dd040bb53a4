"""Whole runs in processes that can be killed, started in milliseconds: a server imports everything once and forks one for each
request. The engine is scripted; all else is the real thing. The server is started by `ForkServer` in the tests' process.

Requests and answers are JSON lines. A request names the job, and what shall be wrong: `fault` (see `forked_child._files`),
`mutant` (a name in `support.mutants`), `powerless` (files' modes count, for root, too).
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_SECONDS = 180
ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Ended:
    """How a run ended: `code` is its exit code, None if a signal ended it; `calls` are its commit path's system calls, if it
    survived to report them."""

    code: int | None
    signal: int | None
    calls: tuple[str, ...]
    message: str


class ForkServer:
    """One run at a time."""

    def __init__(self, log: Path) -> None:
        self._log = log.open("w")
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.forked_runs"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            text=True, env=environment, cwd=ROOT,
        )  # fmt: skip
        self._group = 0
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._answer()

    def start(self, job: Mapping[str, Any], **wrong: Any) -> int:
        """The process id, and process group, of a run that has just begun."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"job": job, **wrong}) + "\n")
        self._process.stdin.flush()
        self._group = self._answer()["pid"]
        return self._group

    def wait(self) -> Ended:
        """How it ended: it and every process that it left behind. What has not ended by itself is killed, and told of."""
        left = None
        try:
            answer = self._answer(MAX_SECONDS)
        except queue.Empty:
            left = _processes_of(self._group)
            os.killpg(self._group, signal.SIGKILL)
            answer = self._answer()
        assert left is None, f"not ended after {MAX_SECONDS} s, or left processes behind: {left}; {answer}"
        return Ended(answer["code"], answer["signal"], tuple(answer["calls"]), answer["message"])

    def run(self, job: Mapping[str, Any], **wrong: Any) -> Ended:
        self.start(job, **wrong)
        return self.wait()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._reader.join()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def _answer(self, seconds: float | None = None) -> dict[str, Any]:
        """The next one. Raises queue.Empty where none comes in that time."""
        line = self._answers.get(timeout=seconds)
        assert line, f"the fork server is gone: {Path(self._log.name).read_text()}"
        return json.loads(line)

    def _read(self) -> None:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            self._answers.put(line)
        self._answers.put("")


def _processes_of(group: int) -> str:
    """List the living processes of the group, and the kernel function that each of their threads is in."""
    told: list[str] = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            name, rest = stat.read_text().rsplit(")", 1)
            state, parent, of = rest.split()[:3]
            if int(of) == group:
                threads = [(task / "wchan").read_text() for task in (stat.parent / "task").iterdir()]
                told.append(f"{name}) {state}, parent {parent}, threads in {threads}")
    return "; ".join(told)


def serve() -> None:
    # Heavy, and needed in the server alone.
    from support.forked_child import Child  # noqa: PLC0415

    child = Child()
    answers = os.fdopen(os.dup(1), "w")
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setsid()
            try:
                code = child.run(request, writer)
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stderr.flush()
            os._exit(code)
        os.close(writer)
        print(json.dumps({"pid": pid}), file=answers, flush=True)
        with os.fdopen(reader) as told:
            text = told.read()
        _, status = os.waitpid(pid, 0)
        answer: dict[str, Any] = {"calls": [], "message": "", **(json.loads(text) if text.endswith("}") else {})}
        answer["code"] = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
        answer["signal"] = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
