"""Processes that judge samples beside the run. Each verdict has a deadline and each process a limit on its memory; one that
hangs or ends is killed, with all it started, and replaced. What becomes of a sample never depends on the others.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import psutil

from tokabatch.errors import JobError
from tokabatch.job import VerifyConfig, verifier_names
from tokabatch.scheduling.contracts import NOT_JUDGED
from tokabatch.scoring.judge import JudgeSpec, Verdict
from tokabatch.scoring.judge_process import Loaded, Request, unpacked

BATCH_SAMPLES, BATCH_SECONDS = 256, 0.03
"""Most samples of one request, and how long they may take where that is known."""
LOADING_SECONDS = 60.0
"""How long importing a judge may take, whatever the deadline of a verdict."""
BACKLOG_SECONDS, GROW_SECONDS = 0.25, 0.5
"""Another process is started where the waiting samples will take the existing ones so long, and the last one was started so
long ago. Each has a thread in the process that hands samples in: with eight judges of GSM8K where one keeps up, beside the
loop of steps, these took a fifth longer."""
TOGETHER_SECONDS = 0.005
"""Verdicts are received in intervals of so many seconds: to receive each by itself would cost the main process half of what a
verdict of GSM8K costs the judge."""
_LOOK_SECONDS, _READ_BYTES = 0.25, 1 << 18
_START = """import json, sys
sys.path[:] = json.loads(sys.argv[2])
from tokabatch.scoring.judge_process import main
main(int(sys.argv[1]))"""
Row = Mapping[str, Any]


class Ticket:
    """One sample that is being judged; `verdict` is None until it is."""

    __slots__ = ("row", "text", "verdict")

    def __init__(self, text: str, row: Row) -> None:
        self.text, self.row = text, row
        self.verdict: Verdict | None = None


class JudgePool:
    """Judges in the order of submission, several at once. The first processes start with the first sample, others one by one
    while those there are too few; each has a thread that waits for its answers. The caller's thread takes no lock, so that an
    exception may strike it anywhere."""

    def __init__(self, spec: JudgeSpec, processes: int, seconds: float, at_once: int = 1) -> None:
        """At most so many `processes`, `at_once` of them with the first sample; a verdict may take so many `seconds`."""
        self._spec, self._most, self._seconds = spec, processes, seconds
        self._at_once = min(at_once, processes)
        self._queue: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._news = threading.Event()
        """Verdicts have come in since the last look."""
        self._threads: list[threading.Thread] = []
        self._grown_at = 0.0
        """When the last process was started."""
        self._running: list[JudgeProcess] = []
        self._closed = False

    def load(self) -> Loaded:
        """What the judge says of itself. Raises JobError where it cannot be loaded."""
        process = JudgeProcess(self._spec)
        try:
            return process.loaded
        finally:
            process.close()

    def check(self, rows: Sequence[Row]) -> list[str | None]:
        """Why no text of a row can be judged, for each row; in one process, now."""
        answers: list[str | None] = []
        process: JudgeProcess | None = None
        try:
            while len(answers) < len(rows):
                process = process or JudgeProcess(self._spec)
                try:
                    for answer in process.ask(Request(rows[len(answers) :]), self._seconds):
                        answers += answer
                except JudgeLost as lost:
                    answers.append(str(lost))
                    process = None
        finally:
            if process is not None:
                process.close()
        return answers

    def submit(self, texts: Sequence[str], rows: Sequence[Row]) -> list[Ticket]:
        """Tickets for texts, each with the row that it is of."""
        self.grow()
        tickets = [Ticket(text, row) for text, row in zip(texts, rows, strict=True)]
        for ticket in tickets:
            if self._closed:
                ticket.verdict = Verdict.none(NOT_JUDGED)
            else:
                self._queue.put(ticket)
        return tickets

    def wait(self, tickets: Sequence[Ticket], seconds: float | None = None) -> bool:
        """Until all of these have verdicts, for so many seconds at most; whether they have."""
        deadline = None if seconds is None else time.monotonic() + seconds
        for ticket in tickets:
            while ticket.verdict is None:
                self.grow()
                left = _LOOK_SECONDS if deadline is None else min(_LOOK_SECONDS, deadline - time.monotonic())
                if left <= 0:
                    return False
                self._news.wait(left)
                self._news.clear()
        return True

    def grow(self) -> None:
        """Start the first processes where there is none, and another one where those there are fall behind."""
        now, count = time.monotonic(), len(self._threads)
        is_enough = count >= self._most or now - self._grown_at < GROW_SECONDS or self._backlog(now) < BACKLOG_SECONDS
        if self._closed or (count and is_enough):
            return
        for _ in range(1 if count else self._at_once):
            thread = threading.Thread(target=self._work, name="tokabatch-judge", daemon=True)
            thread.start()
            self._threads.append(thread)
        self._grown_at = now

    def _backlog(self, now: float) -> float:
        """Seconds that the processes will take for the samples that wait, at the pace so far; 0 while there is hardly any: the
        first verdicts of a process take longer."""
        running = list(self._running)
        seconds = sum(process.seconds_asked(now) for process in running)
        if seconds < BACKLOG_SECONDS:
            return 0.0
        pace = seconds / max(1, sum(process.answered for process in running))
        return self._queue.qsize() * pace / max(1, len(self._threads))

    def close(self) -> None:
        """End all processes, with what they started. Samples without a verdict get one that says so (`NOT_JUDGED`)."""
        self._closed = True
        for _ in self._threads:
            self._queue.put(None)
        while any(thread.is_alive() for thread in self._threads):
            for process in list(self._running):
                process.kill()
            self._threads[-1].join(0.05)

    def _work(self) -> None:
        process: JudgeProcess | None = None
        while (first := self._queue.get()) is not None:
            batch = [first]
            # Short queues are shared out: one process is not to have all of what is slow.
            fast = 0 if process is None else int(BATCH_SECONDS * process.answered / max(process.seconds_asked(), 1e-6))
            for _ in range(min(BATCH_SAMPLES - 1, max(fast, self._queue.qsize() // self._most))):
                with suppress(queue.Empty):
                    ticket = self._queue.get_nowait()
                    if ticket is None:
                        self._queue.put(None)
                        break
                    batch.append(ticket)
            alone = False
            while batch and not self._closed:
                process, judged, alone = self._judge(process, batch[:1] if alone else batch, alone)
                batch = batch[judged:]
            self._settle(batch, [Verdict.none(NOT_JUDGED)] * len(batch))
        if process is not None:
            process.close()

    def _judge(self, process: JudgeProcess | None, batch: list[Ticket], alone: bool) -> tuple[JudgeProcess | None, int, bool]:
        """The process to go on with, how many tickets at the front have verdicts now, and whether those that follow are to be
        judged one at a time, because the judge takes several and one of them is at fault."""
        settled = 0
        try:
            if process is None:
                process = JudgeProcess(self._spec, self._running)
            seconds = self._seconds * (len(batch) if process.loaded.takes_batches else 1)
            request = Request([ticket.row for ticket in batch], [ticket.text for ticket in batch])
            for verdicts in process.ask(request, seconds):
                self._settle(batch[settled:], verdicts)
                settled += len(verdicts)
            return process, settled, alone
        except JudgeLost as lost:
            if process is not None and process.loaded.takes_batches and len(batch) - settled > 1:
                process.close()
                return None, settled, True
            reason = NOT_JUDGED if self._closed else str(lost)
        except Exception as error:  # The process cannot be started, or the row not be sent.
            reason = NOT_JUDGED if self._closed else f"{type(error).__name__}: {error}"
        self._settle(batch[settled:], [Verdict.none(reason)])
        if process is not None:
            process.close()
        return None, settled + 1, alone

    def _settle(self, tickets: Sequence[Ticket], verdicts: Sequence[Verdict]) -> None:
        """The first of these tickets have these verdicts."""
        for ticket, verdict in zip(tickets, verdicts, strict=False):
            ticket.verdict = verdict
        self._news.set()


class JudgeLost(Exception):
    """The process gave no answer; it is killed."""


class JudgeProcess:
    """One process with the judge loaded. Raises JobError where the judge cannot be."""

    def __init__(self, spec: JudgeSpec, running: list[JudgeProcess] | None = None) -> None:
        """While the process runs it is in `running`, so that other threads can kill it."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, str(theirs.fileno()), json.dumps(sys.path)],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._connection = Connection(ours.detach())
        self._received = bytearray()
        self._killing = threading.Lock()
        self._running = [] if running is None else running
        self.answered = 0
        """Rows that it has answered."""
        self._seconds = 0.0
        """What these took."""
        self._asked_at: float | None = None
        self._running.append(self)
        try:
            self._connection.send(spec)
            (loaded,) = self._receive(LOADING_SECONDS)
        except (JudgeLost, OSError) as error:
            self.close()
            raise JobError(f"verify.kind: {spec.kind}: {error} while it was loaded. Correct the file.") from error
        except BaseException:
            self.close()
            raise
        if isinstance(loaded, str):
            self.close()
            raise JobError(f"verify.kind: {spec.kind}: {loaded}.")
        self.loaded: Loaded = loaded

    def ask(self, request: Request, seconds: float) -> Iterator[list[Any]]:
        """The answers to a request, some at a time. Raises JudgeLost where one does not come within so many seconds."""
        left, self._asked_at = len(request.rows), time.monotonic()
        try:
            try:
                self._connection.send(request)
            except OSError as error:
                self.kill()
                raise JudgeLost(self._end()) from error
            while left:
                time.sleep(min(TOGETHER_SECONDS, left * self._seconds / max(1, self.answered)))
                answers = self._receive(seconds)
                left -= len(answers)
                now = time.monotonic()
                self.answered, self._seconds, self._asked_at = self.answered + len(answers), self.seconds_asked(now), now
                yield answers
        finally:
            self._asked_at = None

    def seconds_asked(self, now: float = 0.0) -> float:
        """Seconds that its answers took, and that the next one has been taking until `now`."""
        asked_at = self._asked_at
        return self._seconds + (0.0 if asked_at is None else max(0.0, now - asked_at))

    def kill(self) -> None:
        """End it, and whatever it started: stopped, it starts nothing more and takes in what its children leave behind. May be
        called by any thread; one that waits for an answer has none then."""
        with self._killing:
            if self._process.returncode is None:
                with suppress(psutil.Error):
                    process = psutil.Process(self._process.pid)
                    process.suspend()
                    while children := [each for each in process.children(recursive=True) if _lives(each)]:
                        for child in children:
                            with suppress(psutil.Error):
                                child.kill()
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def close(self) -> None:
        """`kill`, and close the connection; called by the thread that uses it."""
        self.kill()
        self._running.remove(self)
        self._connection.close()

    def _receive(self, seconds: float) -> list[Any]:
        """At least one message. Raises JudgeLost where none comes within so many seconds."""
        deadline = time.monotonic() + seconds
        try:
            while not (answers := unpacked(self._received)):
                while not self._connection.poll(max(0.0, min(_LOOK_SECONDS, deadline - time.monotonic()))):
                    # A process that the judge forked may hold the socket open.
                    if self._process.poll() is not None:
                        raise JudgeLost(self._end())
                    if time.monotonic() >= deadline:
                        self.kill()
                        raise JudgeLost(f"no verdict within {seconds:g} s")
                if not (more := os.read(self._connection.fileno(), _READ_BYTES)):
                    raise EOFError
                self._received += more
            return answers
        except (EOFError, OSError) as error:
            raise JudgeLost(self._end()) from error

    def _end(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        code = self._process.poll()
        self.kill()
        if code is None:
            return "the judge's process closed its socket"
        return (
            f"the judge's process was killed by signal {-code}" if code < 0 else f"the judge's process ended with code {code}"
        )


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def judge_spec(verify: VerifyConfig) -> JudgeSpec:
    """The judge that a job names."""
    source, _, function = verify.kind.partition(":")
    if verify.kind in verifier_names():
        source, function = f"tokabatch.scoring.verifiers.{verify.kind}", "verify"
    options = dict(verify.options)
    return JudgeSpec(
        verify.kind, source, function or "verify", verify.answer, options, verify.correct_from, verify.memory_bytes
    )


def most_judges(verify: VerifyConfig) -> int:
    """How many judge processes a job may have."""
    return max(1, len(os.sched_getaffinity(0)) // 2) if verify.processes == "auto" else verify.processes


def open_pool(verify: VerifyConfig, at_once: int = 1, most: int | None = None) -> JudgePool:
    """The pool of a job, of `most` processes where it has but a part of them. `at_once` begin together; none is started yet."""
    return JudgePool(judge_spec(verify), most or most_judges(verify), verify.seconds, at_once)
