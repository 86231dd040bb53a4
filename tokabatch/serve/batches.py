"""The API's /v1/batches: each batch is a run, whose folder `batch-ID.run` lies beside its record, `batch-ID.json`.

A batch waits its turn, is looked through, and run; what is finished is committed as in any run, and a server that is started
again goes on with what the one before has left. One is computed at a time, in the order in which they came. Of a batch that is
over, its record and its files of results and errors are kept until a client deletes these; its run is removed.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import time
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np

from tokabatch.errors import EXIT_STOPPED, STOPS, EngineError, TokabatchError, UsageError
from tokabatch.job import Job
from tokabatch.openai.errors import ApiError
from tokabatch.openai.requests import CHAT, COMPLETIONS
from tokabatch.runner.interruption import Interruption
from tokabatch.runner.replica import scheduler_limits
from tokabatch.runner.run import run
from tokabatch.serve.background_run import BackgroundReplica
from tokabatch.serve.batch_files import Batch, BatchFiles, InputLines
from tokabatch.serve.completions import Refused
from tokabatch.serve.engine import Engine
from tokabatch.serve.settings import ServiceConfig
from tokabatch.serve.stored_files import StoredFiles, new_id

ENDED = frozenset(("completed", "failed", "expired", "cancelled"))
RETRY_SECONDS = 30.0
MOST_SECONDS = 366 * 86400
"""Of a batch's completion window."""
_WINDOW = re.compile(r"([0-9]{1,9})([smhd])")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_FIELDS = frozenset(("input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"))
_RECORD = frozenset(("id", "status", "created_at", "expires_at", "input_file_id", "endpoint", "request_counts"))
"""What is needed of a record; one without these is not a server's."""
_TIMES = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")


class Batches:
    """All methods are for the event loop."""

    def __init__(self, files: StoredFiles, config: ServiceConfig, engine: Engine) -> None:
        self._files = files
        self._batch_files = BatchFiles(files, config)
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._known: dict[str, Batch] = {}
        self._waiting: asyncio.Queue[Batch] = asyncio.Queue()
        self._stop = Interruption()
        self._current: Batch | None = None
        self._finishing = asyncio.Lock()
        """Held while a batch comes to its end: one that waits may be cancelled at the moment when its turn comes."""
        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()
        records = (record for record in files.records("batch") if record.keys() >= _RECORD)
        for batch in sorted(records, key=lambda batch: (batch["created_at"], batch["id"])):
            self._known[batch["id"]] = batch
            if batch["status"] not in ENDED:
                self._enqueue(batch)
            else:
                self._remove_run(batch)

    def begin(self, most: int, tell: Any) -> None:
        """Compute what waits. `most` tokens may a prompt and its sample have; `tell` takes what a person should know."""
        self._most, self._tell = most, tell
        self._worker = self._spawn(self._work())

    async def close(self) -> None:
        """Break off what is computed; what is finished of it is committed."""
        self._closing = True
        self._stop.request(EXIT_STOPPED)
        # The one that computes ends by itself.
        if self._current is None:
            for task in self._tasks:
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def create(self, body: dict[str, Any]) -> Batch:
        """Raises Refused."""
        if unknown := next((name for name, value in body.items() if name not in _FIELDS and value is not None), None):
            raise _refused(f"{unknown} is not a field of this request", unknown, "unknown_parameter")
        if body.get("output_expires_after") is not None:
            raise _refused("output_expires_after is not supported; delete the files", "output_expires_after")
        endpoint, window = body.get("endpoint"), body.get("completion_window", "24h")
        if endpoint not in (CHAT, COMPLETIONS):
            raise _refused(f"endpoint must be {CHAT} or {COMPLETIONS}", "endpoint")
        found = _WINDOW.fullmatch(window) if isinstance(window, str) else None
        seconds = int(found[1]) * _UNITS[found[2]] if found is not None else MOST_SECONDS + 1
        if seconds > MOST_SECONDS:
            raise _refused("completion_window must be a time such as 24h, 90m or 30s, of a year at most", "completion_window")
        metadata = body.get("metadata")
        if metadata is not None and not isinstance(metadata, dict):
            raise _refused("metadata must be an object", "metadata")
        name = body.get("input_file_id")
        stored = self._files.get(name) if isinstance(name, str) else None
        if stored is None:
            raise _refused(f"there is no file {name!r}", "input_file_id", "not_found")
        if stored.purpose != "batch":
            raise _refused(f"the purpose of {name} is {stored.purpose!r}, not 'batch'", "input_file_id")
        now = int(time.time())
        batch: Batch = {
            "id": new_id("batch"),
            "object": "batch",
            "endpoint": endpoint,
            "errors": None,
            "input_file_id": name,
            "completion_window": window,
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": now,
            "expires_at": now + seconds,
            **{f"{state}_at": None for state in _TIMES},
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": metadata,
        }
        self._files.write_record(batch["id"], batch)
        self._known[batch["id"]] = batch
        self._enqueue(batch)
        return batch

    def get(self, name: str) -> Batch:
        """Raises Refused."""
        if name not in self._known:
            raise Refused(ApiError(f"there is no batch {name!r}", "batch_id", "not_found", 404))
        return self._known[name]

    def all(self) -> list[Batch]:
        """The newest one last."""
        return list(self._known.values())

    def uses(self, file: str) -> str | None:
        """A batch that is not over and has this file as its input."""
        return next((b["id"] for b in self._known.values() if b["input_file_id"] == file and b["status"] not in ENDED), None)

    def cancel(self, name: str) -> Batch:
        """Raises Refused where it is over."""
        batch = self.get(name)
        if batch["status"] in ENDED:
            raise _refused(f"{name} is {batch['status']} and cannot be cancelled", "batch_id")
        if batch["status"] not in ("cancelling", "finalizing"):
            self._set(batch, "cancelling")
            self._break_off(batch)
        return batch

    def _enqueue(self, batch: Batch) -> None:
        self._waiting.put_nowait(batch)
        delay = min(max(0, batch["expires_at"] - int(time.time())), MOST_SECONDS)
        self._loop.call_later(delay, self._break_off, batch)

    def _break_off(self, batch: Batch) -> None:
        """It is cancelled, or its time is over."""
        if batch is self._current:
            self._stop.request(EXIT_STOPPED)
        elif batch["status"] not in ENDED and not self._closing:
            self._spawn(self._finish(batch, _end_of(batch)))

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _set(self, batch: Batch, status: str, **more: Any) -> None:
        """Raises OSError where it cannot be kept; nothing has changed then."""
        name = f"{status}_at"
        changed = {**batch, "status": status, name: batch[name] or int(time.time()), **more}
        self._files.write_record(batch["id"], changed)
        batch |= changed
        if status in ENDED:
            self._remove_run(batch)

    def _remove_run(self, batch: Batch) -> None:
        """Of a batch that is over: what it has come to are its files of results and errors."""
        self._loop.run_in_executor(None, partial(shutil.rmtree, self._files.path(batch["id"], ".run"), ignore_errors=True))

    async def _work(self) -> None:
        while not self._closing:
            batch = await self._waiting.get()
            if batch["status"] in ENDED:
                continue
            self._current, self._stop = batch, Interruption()
            try:
                await self._complete(batch)
            except Exception as error:
                if self._closing or self._engine.failure is not None:
                    continue
                if not isinstance(error, (TokabatchError, OSError)):
                    message = f"{type(error).__name__}: {error}"
                    self._tell(f"error: {batch['id']} has failed: {message}; please report this")
                    with suppress(OSError):
                        await self._fail(batch, [{"code": "internal_error", "message": message}])
                if batch["status"] not in ENDED:
                    self._tell(f"warning: {batch['id']} was interrupted and is tried again in {RETRY_SECONDS:g} s: {error}")
                    self._loop.call_later(RETRY_SECONDS, self._waiting.put_nowait, batch)
            finally:
                self._current = None

    async def _complete(self, batch: Batch) -> None:
        """Raises TokabatchError or OSError where it cannot go on for now."""
        lines = await asyncio.to_thread(self._batch_files.look_through, batch)
        if batch["status"] in ENDED:
            return  # Cancelled or expired meanwhile.
        summary, target = None, self._files.path(batch["id"], ".run")
        begun = target.exists()
        if begun and lines.errors and all(error["code"] == "model_not_found" for error in lines.errors):
            if await self._end_if_over(batch):
                return
            # The results so far are those of another model, under whose name a later server may go on.
            raise EngineError(f"it was begun by another server: {lines.errors[0]['message']}")
        if lines.errors:
            await self._fail(batch, lines.errors)
            return
        batch["request_counts"]["total"] = len(lines.faulty)
        if batch["status"] != "cancelling" and batch["expires_at"] > time.time():
            self._set(batch, "in_progress")
            job = self._batch_files.job(batch, str(target))
            try:
                summary = await asyncio.to_thread(self._run, job, lines, batch)
            except UsageError as error:
                if begun:
                    raise
                await self._fail(
                    batch, [{"code": "invalid_request", "message": self._batch_files.client_message(batch, error)}]
                )
                return
            except STOPS:
                pass  # It was still being read.
        if self._closing:
            return
        if summary is not None and not summary.pending:
            self._set(batch, "finalizing")
            await self._finish(batch, "completed")
        elif not await self._end_if_over(batch):
            raise EngineError("its run could not be finished")

    async def _end_if_over(self, batch: Batch) -> bool:
        """End a batch that is being cancelled or whose time is over, with the results that it has; return whether it is one."""
        if batch["status"] != "cancelling" and batch["expires_at"] > time.time():
            return False
        await self._finish(batch, _end_of(batch))
        return True

    def _run(self, job: Job, lines: InputLines, batch: Batch) -> Any:
        """In a thread."""
        return run(job, should_stop=self._stop, make=partial(self._replica, lines, batch["request_counts"]))

    def _replica(
        self, lines: InputLines, counts: dict[str, int], job: Job, started: Any, sizes: Any, *_: Any
    ) -> BackgroundReplica:
        requests, left = started.left.requests, np.zeros(len(lines.faulty), np.int64)
        np.add.at(left, lines.request_of_row[requests.row_index], 1)
        failed = np.array(lines.faulty, np.bool_)

        def count() -> None:
            done = left == 0
            counts["failed"] = int((done & failed).sum())
            counts["completed"] = int((done & ~failed).sum())

        def on_prompt(row: int, bad: bool) -> None:
            request = int(lines.request_of_row[row])
            left[request] -= 1
            failed[request] |= bad
            if not left[request]:
                counts["failed" if failed[request] else "completed"] += 1

        self._loop.call_soon_threadsafe(count)
        lengths = self._most, started.left.spec.context_length
        return BackgroundReplica(self._engine, self._loop, requests, scheduler_limits(sizes), lengths, on_prompt)

    async def _fail(self, batch: Batch, errors: list[dict[str, Any]]) -> None:
        """Say what is wrong with it, unless it is over."""
        async with self._finishing:
            if batch["status"] not in ENDED:
                self._set(batch, "failed", errors={"object": "list", "data": errors})

    async def _finish(self, batch: Batch, status: str) -> None:
        """Keep the files of results and errors, and say how it ended."""
        code = None if status == "completed" else f"batch_{status}"
        async with self._finishing:
            if batch["status"] in ENDED:
                return
            results, errors, counts = await asyncio.to_thread(self._batch_files.write_results, batch, code)
            counted = {**batch["request_counts"], **counts}
            self._set(batch, status, output_file_id=results, error_file_id=errors, request_counts=counted)


def _end_of(batch: Batch) -> str:
    """How a batch ends that is being cancelled or whose time is over; one that is finalizing has all its answers."""
    return {"cancelling": "cancelled", "finalizing": "completed"}.get(batch["status"], "expired")


def _refused(message: str, param: str | None, code: str = "invalid_value") -> Refused:
    return Refused(ApiError(message, param, code))
