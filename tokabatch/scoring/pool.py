"""Processes that judge samples beside the run. Each verdict has a deadline and each process a memory limit; a process that
hangs or ends is killed, together with all that it started, and replaced. The verdict on a sample never depends on other
samples.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import psutil

from tokabatch.cores import usable_cores
from tokabatch.errors import EngineError, JobError
from tokabatch.job import VerifyConfig, verifier_names
from tokabatch.scheduling.contracts import NOT_JUDGED
from tokabatch.scoring.judge import JudgeSpec, Verdict
from tokabatch.scoring.judge_process import Loaded, Request, unpacked

BATCH_SAMPLES, BATCH_SECONDS = 256, 0.03
"""The most samples of one request, and the seconds that they may take according to the average so far."""
LOADING_SECONDS = 60.0
"""The timeout in seconds for importing a judge."""
BACKLOG_SECONDS, GROW_SECONDS = 0.25, 0.5
"""Another process is started if the existing ones need the first time in seconds for the waiting samples, and the last one was
started at least the second time ago. Processes that are not needed have a cost, as each has a thread in the process that
submits samples: beside the loop of steps, eight judges of GSM8K, where one is enough, made the steps a fifth slower."""
TOGETHER_SECONDS = 0.005
"""Seconds between the receipts of verdicts: receiving each by itself would cost the main process half as much as a verdict of
GSM8K costs the judge."""
_LOOK_SECONDS, _READ_BYTES = 0.25, 1 << 18
_START = """import json, sys
sys.path[:] = json.loads(sys.argv[2])
from tokabatch.scoring.judge_process import main
main(int(sys.argv[1]))"""
Row = Mapping[str, Any]


class Ticket:
    """A sample submitted to the judges; `verdict` is None until it has been judged."""

    __slots__ = ("row", "text", "verdict")

    def __init__(self, text: str, row: Row) -> None:
        self.text, self.row = text, row
        self.verdict: Verdict | None = None


class JudgePool:
    """Judges samples in the order of submission, several at once. The first processes are started with the first sample,
    further ones one by one while there are too few; each has a thread that receives its answers. The calling thread takes no
    lock, so that it can be interrupted by an exception at any point."""

    def __init__(self, spec: JudgeSpec, processes: int, seconds: float, at_once: int = 1) -> None:
        """Allow at most `processes` processes, of which `at_once` are started with the first sample, and `seconds` for a
        verdict."""
        self._spec, self._most, self._seconds = spec, processes, seconds
        self._at_once = min(at_once, processes)
        self._queue: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._news = threading.Event()
        """Set when verdicts have arrived."""
        self._threads: list[threading.Thread] = []
        self._grown_at = 0.0
        """When the last process was started."""
        self._running: list[JudgeProcess] = []
        self._closed = False

    def load(self) -> Loaded:
        """Load the judge in a process and return its description. Raises JobError if it cannot be loaded."""
        process = JudgeProcess(self._spec)
        try:
            return process.loaded
        finally:
            process.close()

    def check(self, rows: Sequence[Row]) -> list[str | JudgeLost | None]:
        """Return for each row why none of its texts could be judged, or None; JudgeLost if the judge did not say. Uses one
        process and blocks."""
        answers: list[str | JudgeLost | None] = []
        process: JudgeProcess | None = None
        try:
            while len(answers) < len(rows):
                process = process or JudgeProcess(self._spec)
                try:
                    for answer in process.ask(Request(rows[len(answers) :]), self._seconds):
                        answers += answer
                except JudgeLost as lost:
                    answers.append(lost)
                    process = None
        finally:
            if process is not None:
                process.close()
        return answers

    def submit(self, texts: Sequence[str], rows: Sequence[Row]) -> list[Ticket]:
        """Submit texts, each with its row, and return a ticket for each."""
        self.grow()
        tickets = [Ticket(text, row) for text, row in zip(texts, rows, strict=True)]
        for ticket in tickets:
            if self._closed:
                ticket.verdict = Verdict.none(NOT_JUDGED)
            else:
                self._queue.put(ticket)
        return tickets

    def wait(self, tickets: Sequence[Ticket], seconds: float | None = None) -> bool:
        """Block until all of these tickets have verdicts, for at most `seconds` (None: without limit), and return whether they
        have."""
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
        """Start the first processes if there is none, or another one if the existing ones fall behind."""
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
        """Return the seconds that the processes will need for the waiting samples at their pace so far. It is 0 during their
        first verdicts, which take longer."""
        running = list(self._running)
        seconds = sum(process.seconds_asked(now) for process in running)
        if seconds < BACKLOG_SECONDS:
            return 0.0
        pace = seconds / max(1, sum(process.answered for process in running))
        return self._queue.qsize() * pace / max(1, len(self._threads))

    def close(self) -> None:
        """End all processes and what they started. Samples without a verdict get the verdict `NOT_JUDGED`."""
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
            # Divide short queues between the processes, so that none gets all the slow samples.
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
        """Judge a batch. Return the process to continue with, the number of tickets at the front that now have verdicts, and
        whether the following ones must be judged one at a time: the judge takes several at once, and one of them made it
        fail."""
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
        except JudgeNotStarted as error:
            # Nor could one for the next sample: judging them all again is left to the user.
            reason = NOT_JUDGED if self._closed else f"{error}; `tokabatch score` judges the sample again"
            self._settle(batch, [Verdict.none(reason)] * len(batch))
            return None, len(batch), False
        except Exception as error:  # The row cannot be sent, or the judge cannot be loaded any more.
            reason = NOT_JUDGED if self._closed else f"{type(error).__name__}: {error}"
        self._settle(batch[settled:], [Verdict.none(reason)])
        if process is not None:
            process.close()
        return None, settled + 1, alone

    def _settle(self, tickets: Sequence[Ticket], verdicts: Sequence[Verdict]) -> None:
        """Assign the verdicts to the first of these tickets."""
        for ticket, verdict in zip(tickets, verdicts, strict=False):
            ticket.verdict = verdict
        self._news.set()


class JudgeLost(Exception):
    """The process did not answer and was killed."""


class JudgeNotStarted(EngineError):
    """The system or the installation of Python gives no process; the judge has no part in it."""


class JudgeProcess:
    """A process that has loaded the judge. Raises JobError if the judge cannot be loaded, JudgeNotStarted if no process can be
    started that would load it."""

    def __init__(self, spec: JudgeSpec, running: list[JudgeProcess] | None = None) -> None:
        """The process is in `running` as long as it runs, so that other threads can kill it."""
        try:
            ours, theirs = socket.socketpair()
            # They are not where the program has set a default timeout for sockets.
            ours.setblocking(True)
            theirs.setblocking(True)
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _START, str(theirs.fileno()), json.dumps(sys.path)],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
        except OSError as error:
            raise JudgeNotStarted(f"no process for the judge can be started: {sys.executable}: {error.strerror}") from error
        self._connection = Connection(ours.detach())
        self._received = bytearray()
        self._killing = threading.Lock()
        self._running = [] if running is None else running
        self.answered = 0
        """The number of rows that it has judged."""
        self._seconds = 0.0
        """The seconds that these took."""
        self._asked_at: float | None = None
        self._running.append(self)
        try:
            # It reports that it runs before it loads the judge.
            self._receive(LOADING_SECONDS)
        except (JudgeLost, OSError) as error:
            self.close()
            cause = f"{sys.executable} ended, or did not respond, before it loaded the judge"
            raise JudgeNotStarted(f"no process for the judge can be started: {cause}") from error
        except BaseException:
            self.close()
            raise
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
        """Send a request and yield its answers in groups. Raises JudgeLost if an answer takes longer than `seconds`."""
        left, self._asked_at = len(request.rows), time.monotonic()
        try:
            try:
                self._limit_writes(seconds)
                self._connection.send(request)
            except BlockingIOError as error:
                self.kill()
                raise JudgeLost(f"its request was not read within {seconds:g} s") from error
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
        """Return the seconds that its answers took, including the time until `now` for the one that is due."""
        asked_at = self._asked_at
        return self._seconds + (0.0 if asked_at is None else max(0.0, now - asked_at))

    def kill(self) -> None:
        """Kill the process and all that it started. It is suspended first, so that it starts nothing more while its descendants
        are killed. Any thread may call this; a thread that is receiving an answer gets none."""
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
        """Kill the process and close the connection. Only the thread that uses the connection may call this."""
        self.kill()
        self._running.remove(self)
        self._connection.close()

    def _limit_writes(self, seconds: float) -> None:
        """From now on a write that makes no progress for so many seconds raises BlockingIOError."""
        with socket.socket(fileno=os.dup(self._connection.fileno())) as ours:
            ours.setblocking(True)
            timeout = struct.pack("@ll", int(seconds), int(seconds % 1 * 1_000_000))
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)

    def _receive(self, seconds: float) -> list[Any]:
        """Return at least one message. Raises JudgeLost if none arrives within `seconds`."""
        deadline = time.monotonic() + seconds
        try:
            while not (answers := unpacked(self._received)):
                while not self._connection.poll(max(0.0, min(_LOOK_SECONDS, deadline - time.monotonic()))):
                    # A process that the judge forked may keep the socket open.
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
    """Return the judge that a job names."""
    source, _, function = verify.kind.partition(":")
    if verify.kind in verifier_names():
        source, function = f"tokabatch.scoring.verifiers.{verify.kind}", "verify"
    options = dict(verify.options)
    return JudgeSpec(
        verify.kind, source, function or "verify", verify.answer, options, verify.correct_from, verify.memory_bytes
    )


def most_judges(verify: VerifyConfig) -> int:
    """Return the most judge processes of a job."""
    return max(1, usable_cores() // 2) if verify.processes == "auto" else verify.processes


def open_pool(verify: VerifyConfig, at_once: int = 1, most: int | None = None) -> JudgePool:
    """Return the pool of a job, with no process started yet. It has at most `most` processes (default: `most_judges`), of which
    `at_once` are started together."""
    return JudgePool(judge_spec(verify), most or most_judges(verify), verify.seconds, at_once)
