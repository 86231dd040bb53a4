"""What requests are answered by: their prompts are collected, ordered, and given to the processes that decide steps.

Runs in the event loop of the HTTP server. While samples run, arrivals are collected for a moment, so that prompts that share
a prefix stand side by side in the plan; where nothing runs they start at once. A process that is lost is replaced, and what it
had is computed again: with the same seeds it comes to the same.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

from tokabatch.arrays import Int32
from tokabatch.errors import EngineError, TokabatchError
from tokabatch.input.tokenizer.tokenizer import Tokenizer
from tokabatch.number_text import counted
from tokabatch.output.schema import sample_texts
from tokabatch.runner.replica import Standing
from tokabatch.scheduling.contracts import Completion
from tokabatch.scheduling.generated import Generated
from tokabatch.serve.dispatch import Wanted, as_requests, divided, ordered
from tokabatch.serve.engine_process import (
    Add,
    Cancel,
    Done,
    Ended,
    EngineProcess,
    EngineSpec,
    Message,
    Progress,
    Told,
    failure_of,
)

RESERVED = 1 / 8
"""Of the running and of the waiting samples, this share is reserved for requests, and not for background work."""
MOST_LOST = 3
"""Processes lost in a row, without a finished sample in between, after which no other is started."""
FIRST_KEY = 1 << 40
"""Random numbers of prompts without a seed of their own are drawn for rows from here on: apart from those of prompts that have
one, which are drawn for their places in their requests."""


@dataclass(frozen=True, slots=True)
class Finished:
    """One finished sample and its text."""

    completion: Completion
    text: str


@dataclass(frozen=True, slots=True)
class News:
    """What a sample under way has drawn behind its first `begin` tokens."""

    begin: int
    output: Generated


Watch = Callable[[int, News | Finished], None]
Texts = Mapping[tuple[int, int], str]
"""By row and sample."""


@dataclass(slots=True)
class _Live:
    wanted: Wanted
    samples: dict[int, Finished]
    done: asyncio.Future[list[Finished]]
    watch: Watch | None
    background: bool = False
    process: int = -1
    """Which has it; -1 while it is collected."""

    @property
    def missing(self) -> int:
        return self.wanted.params.n - len(self.samples)


@dataclass(slots=True)
class EngineCounts:
    """What has happened so far, in requests' prompts, samples and tokens."""

    prompts: int = 0
    samples: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cancelled: int = 0
    """Samples whose client was gone."""
    errors: dict[str, int] = field(default_factory=dict[str, int])
    restarts: int = 0
    """Processes that were replaced."""


class Engine:
    """Holds one process for each replica. All methods are for the event loop."""

    def __init__(
        self,
        specs: Sequence[EngineSpec],
        tokenizer: Tokenizer,
        *,
        collect_seconds: float,
        most_samples: int,
        tell: Callable[[str], None],
    ) -> None:
        """At most `most_samples` run and wait at a time; `tell` receives messages for people."""
        self.counts = EngineCounts()
        self.failure: TokabatchError | None = None
        """Why no sample will be drawn any more."""
        self.failed = asyncio.Event()
        self._specs = specs
        self._tokenizer = tokenizer
        self._collect_seconds = collect_seconds
        self.most_samples = most_samples
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._live: dict[int, _Live] = {}
        self._arrived: list[int] = []
        self._wake = asyncio.Event()
        self._next_row = FIRST_KEY + (time.time_ns() >> 10)
        self._load = [0] * len(specs)
        """Unfinished samples of each process."""
        self._lost = [0] * len(specs)
        self._standing: list[Standing | None] = [None] * len(specs)
        self._ready = asyncio.Event()
        self._closing = self._backwards = False
        self.unfinished = 0
        """Samples that run or wait, those in the background apart."""
        self.eased = asyncio.Event()
        """Set whenever samples have ended."""
        self._processes = [EngineProcess(spec, number, self._receive) for number, spec in enumerate(specs)]
        self._collector = asyncio.create_task(self._collect())

    async def start(self) -> None:
        """Return when every process has loaded the model. Raises what the first one to fail says."""
        await self._ready.wait()
        if self.failure is not None:
            raise self.failure

    @property
    def ready(self) -> bool:
        """Whether every process has loaded the model, and none has failed."""
        return self._ready.is_set() and self.failure is None

    @property
    def replicas(self) -> int:
        """How many processes there are, or are being started."""
        return len(self._processes)

    @property
    def standings(self) -> dict[int, Standing]:
        """The latest report of each process that has loaded the model, by its number."""
        return {number: standing for number, standing in enumerate(self._standing) if standing is not None}

    @property
    def capacity(self) -> int:
        """How many tokens a prompt and its sample may have for the KV cache of any process to hold them."""
        limits = [standing.limits for standing in self.standings.values()]
        return min((each.num_pages - 1) * each.page_size for each in limits)

    def has_room(self, samples: int) -> bool:
        """Return whether this many more samples may wait."""
        return self.unfinished + samples <= self.most_samples

    @property
    def spare(self) -> int:
        """How many more samples may be given in the background, so that others which come find slots and pages."""
        standings = self.standings.values()
        most = sum(standing.limits.max_running for standing in standings)
        reserved = max(1, int(most * RESERVED))
        if sum(standing.waiting for standing in standings) > reserved:
            return 0
        return most - reserved - sum(self._load) - len(self._arrived)

    @contextmanager
    def work(
        self,
        prompts: Sequence[Wanted],
        watch: Callable[[int, int, News | Finished], None] | None = None,
        *,
        background: bool = False,
    ) -> Generator[asyncio.Future[list[list[Finished]]]]:
        """Have samples of these prompts drawn: a future of those of each prompt, in the order of their numbers, which raises
        EngineError where no sample can be drawn any more. What is not finished at the end of the block is cancelled. `watch`
        gets the place of a prompt, the number of a sample and what it has drawn since, again and again, and once it is finished
        the whole. In the `background` samples are not decoded and are watched as they finish alone; give as many as `spare`
        says."""
        rows, futures = list[int](), list[asyncio.Future[list[Finished]]]()
        for place, wanted in enumerate(prompts):
            watched = None if watch is None else partial(watch, place)
            live = _Live(wanted, {}, self._loop.create_future(), watched, background)
            self._live[self._next_row] = live
            rows.append(self._next_row)
            futures.append(live.done)
            self.unfinished += 0 if background else live.missing
            self._next_row += 1
        self.counts.prompts += len(rows)
        self._arrived += rows
        self._wake.set()
        if self.failure is not None:
            self._fail_all(self.failure)
        whole = asyncio.gather(*futures)
        # The request may have been cancelled before it ends.
        whole.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        try:
            yield whole
        finally:
            self._cancel([row for row in rows if row in self._live])

    def fail_all(self, error: TokabatchError) -> None:
        """No sample is drawn any more: requests that wait end in this."""
        self.failure = self.failure or error
        self._fail_all(error)

    async def close(self) -> None:
        """End the processes."""
        self._closing = True
        self._collector.cancel()
        self._fail_all(EngineError("the server has ended"))
        await asyncio.gather(*(asyncio.to_thread(process.close) for process in self._processes))

    async def _collect(self) -> None:
        while True:
            await self._wake.wait()
            if sum(self._load):
                await asyncio.sleep(self._collect_seconds)
            self._wake.clear()
            rows, self._arrived = [row for row in self._arrived if row in self._live], []
            if rows:
                try:
                    self._send(rows)
                except Exception as error:
                    self._break(failure_of("giving prompts to the scheduler failed", error))

    def _send(self, rows: list[int]) -> None:
        """Give prompts to the processes that have loaded the model, or to all."""
        lives = [self._live[row] for row in rows]
        load = {number: self._load[number] for number in sorted(self.standings) or range(len(self._load))}
        self._backwards = not self._backwards
        order = ordered([live.wanted.token_ids for live in lives], self._backwards)
        for number, places, lcp in divided(order, [live.missing for live in lives], load):
            self._give(number, [rows[place] for place in places], lcp)

    def _give(self, number: int, rows: list[int], lcp: Int32) -> None:
        lives = [self._live[row] for row in rows]
        for live in lives:
            live.process = number
            self._load[number] += live.missing
        pairs = zip(rows, lives, strict=True)
        streamed = tuple(row for row, live in pairs if live.watch is not None and not live.background)
        self._processes[number].send(Add(as_requests(rows, [live.wanted for live in lives], lcp), streamed))

    def _cancel(self, rows: list[int]) -> None:
        by_process: dict[int, list[int]] = {}
        for row in rows:
            live = self._live.pop(row)
            self.counts.cancelled += live.missing
            self.unfinished -= 0 if live.background else live.missing
            live.done.cancel()
            if live.process >= 0:
                self._load[live.process] -= live.missing
                by_process.setdefault(live.process, []).append(row)
        for number, cancelled in by_process.items():
            self._processes[number].send(Cancel(tuple(cancelled)))
        self.eased.set()

    def _receive(self, process: EngineProcess, message: Message | None) -> None:
        """In the thread that listens: texts are decoded here, beside the event loop."""
        texts: dict[tuple[int, int], str] = {}
        if isinstance(message, Done):
            lives = ((each, self._live.get(each.row_index)) for each in message.completions)
            told = [(each, live.wanted.params.min_tokens) for each, live in lives if live is not None and not live.background]
            decoded = sample_texts([each for each, _ in told], [least for _, least in told], self._tokenizer.decode_batch)
            texts = {(each.row_index, each.sample_index): text for (each, _), text in zip(told, decoded, strict=True)}
        with suppress(RuntimeError):  # The loop is closed.
            self._loop.call_soon_threadsafe(self._take, process, message, texts)

    def _take(self, process: EngineProcess, message: Message | None, texts: Texts) -> None:
        # The event loop would log the error, and requests would never end.
        try:
            self._handle(process, message, texts)
        except Exception as error:
            self._break(failure_of("taking what the scheduler sent failed", error))

    def _handle(self, process: EngineProcess, message: Message | None, texts: Texts) -> None:
        if process is not self._processes[process.number]:
            return
        if isinstance(message, Done):
            self._lost[process.number] = 0
            for completion in message.completions:
                self._finish(completion, texts.get((completion.row_index, completion.sample_index), ""))
            self.eased.set()
        elif isinstance(message, Progress):
            for row, number, begin, output in message.samples:
                live = self._live.get(row)
                if live is not None and live.watch is not None and number not in live.samples:
                    live.watch(number, News(begin, output))
        elif isinstance(message, Standing):
            self._standing[process.number] = message
            if all(self._standing):
                self._ready.set()
        elif isinstance(message, Told):
            self._tell(message.text)
        elif not self._closing:
            self._replace(process, message)

    def _finish(self, completion: Completion, text: str) -> None:
        row, live = completion.row_index, self._live.get(completion.row_index)
        if live is None or completion.sample_index in live.samples:
            return
        counts = self.counts
        live.samples[completion.sample_index] = finished = Finished(completion, text)
        if live.watch is not None:
            live.watch(completion.sample_index, finished)
        self._load[live.process] -= 1
        self.unfinished -= 0 if live.background else 1
        counts.samples += 1
        counts.output_tokens += len(completion.token_ids)
        if completion.error_code is not None:
            counts.errors[completion.error_code] = counts.errors.get(completion.error_code, 0) + 1
        if not live.missing:
            counts.prompt_tokens += completion.num_prompt_tokens
            del self._live[row]
            if not live.done.done():
                live.done.set_result([live.samples[number] for number in sorted(live.samples)])

    def _replace(self, process: EngineProcess, ended: Ended | None) -> None:
        """A process is gone, or says why it goes."""
        number = process.number
        error = self.failure
        if isinstance(ended, Ended) and ended.error is not None:
            error = ended.error
        elif error is None and self._lost[number] >= MOST_LOST:
            error = EngineError(f"{process.how_it_ended()}, {MOST_LOST + 1} times without a finished sample in between")
        if error is not None:
            self._break(error)
            return
        self._lost[number] += 1
        self.counts.restarts += 1
        rows = [row for row, live in self._live.items() if live.process == number]
        self._tell(
            f"warning: {process.how_it_ended()}. Starting another; {counted(len(rows), 'request is', 'requests are')} "
            "computed again"
        )
        self._load[number] = 0
        self._standing[number] = None
        try:
            self._processes[number] = EngineProcess(self._specs[number], number, self._receive)
        except OSError as error:
            self._break(EngineError(f"another process of the scheduler cannot be started: {error.strerror or error}"))
            return
        for row in rows:
            self._live[row].process = -1
        self._arrived += rows
        self._wake.set()

    def _break(self, error: TokabatchError) -> None:
        """The engine has failed: the server ends, too."""
        self._ready.set()
        self.failed.set()
        self.fail_all(error)

    def _fail_all(self, error: TokabatchError) -> None:
        rows = list(self._live)
        for row in rows:
            live = self._live[row]
            if not live.done.done():
                live.done.set_exception(error)
                # The request may have been cancelled.
                live.done.exception()
        self._cancel(rows)
