"""The replica of a run that shares a server's engine: its samples are drawn behind those of the requests that clients wait for.

The run has a thread of its own and records what is finished, as any run does; its prompts are given to the engine from the
event loop, as many at a time as leave room for others.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from tokabatch.errors import TokabatchError
from tokabatch.forecast.step_log import StepLog, Steps
from tokabatch.number_text import counted
from tokabatch.runner.replica import Standing
from tokabatch.scheduling.contracts import Completion, Requests, SamplingParams
from tokabatch.scheduling.counts import SchedulerCounts
from tokabatch.scheduling.generated import Generated
from tokabatch.scheduling.sample_ends import completion
from tokabatch.scheduling.scheduler import SchedulerLimits
from tokabatch.serve.dispatch import Wanted, beyond_limits
from tokabatch.serve.engine import Engine, Finished, News
from tokabatch.serve.engine_process import failure_of

TICK_SECONDS = 0.2
"""How often the run gets its turn while nothing is finished."""
FEED_SECONDS = 0.02
MOST_UNRECORDED = 16384
"""Finished samples that may wait for the run."""


class BackgroundReplica:
    """See `Replica`, whose methods these are, for the run's thread."""

    def __init__(
        self,
        engine: Engine,
        loop: asyncio.AbstractEventLoop,
        requests: Requests,
        limits: SchedulerLimits,
        lengths: tuple[int, int],
        on_prompt: Callable[[int, bool], None],
    ) -> None:
        """`loop` is the engine's. `lengths` are the most tokens of a prompt and its sample that the engine is made for, and
        that the run was planned for. `on_prompt` is called in the loop, with a row all of whose samples are finished, and
        whether one has failed."""
        self._engine = engine
        self._loop = loop
        self._requests = requests
        self._limits = limits
        self._most, self._planned = lengths
        self._on_prompt = on_prompt
        self._finished: queue.Queue[Completion | TokabatchError] = queue.Queue()
        self._counts = SchedulerCounts()
        self._left = int(requests.num_samples().sum())

    def run(self) -> Iterator[list[Completion]]:
        """As `Replica.run`; an empty list while nothing is finished."""
        yield []
        feeding = asyncio.run_coroutine_threadsafe(self._feed(), self._loop)
        try:
            while self._left:
                completions = self._take()
                self._left -= len(completions)
                self._counts.finished += len(completions)
                yield completions
        finally:
            feeding.cancel()

    def stop(self) -> list[Completion]:
        return []

    def standing(self, *, foresee: bool = False) -> Standing:
        """Samples of this run alone; how many of them run is not told."""
        standing = Standing.before(self._limits)
        return replace(standing, scheduled=replace(self._counts), waiting=self._left)

    def steps(self) -> Steps:
        """None: steps are the engine's."""
        return StepLog().steps()

    def close(self) -> None:
        pass

    def _take(self) -> list[Completion]:
        """In the run's thread: what has finished."""
        taken: list[Completion] = []
        with suppress(queue.Empty):
            item = self._finished.get(timeout=TICK_SECONDS)
            while True:
                if isinstance(item, TokabatchError):
                    raise item
                taken.append(item)
                item = self._finished.get_nowait()
        return taken

    async def _feed(self) -> None:
        """In the event loop: give the prompts in their order, and cancel what is not finished when this is cancelled."""
        tasks: set[asyncio.Task[None]] = set()
        try:
            place = 0
            while place < len(self._requests) and self._engine.failure is None:
                spare = self._engine.spare if self._finished.qsize() < MOST_UNRECORDED else 0
                if spare <= 0:
                    self._engine.eased.clear()
                    with suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(self._engine.eased.wait(), TICK_SECONDS)
                    continue
                prompts: list[int] = []
                while place < len(self._requests) and spare > 0:
                    prompts.append(place)
                    spare -= self._params(place).n
                    place += 1
                if known := [prompt for prompt in prompts if not self._refuse(prompt)]:
                    task = asyncio.create_task(self._draw(known))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                    task.add_done_callback(self._note_failure)
                await asyncio.sleep(FEED_SECONDS)
            await asyncio.gather(*tasks)
            if self._engine.failure is not None:
                raise self._engine.failure
        except TokabatchError as error:
            self._finished.put(error)
        except Exception as error:
            self._finished.put(failure_of("giving prompts of the run to the engine failed", error))
        finally:
            for task in tasks:
                task.cancel()

    def _note_failure(self, task: asyncio.Task[None]) -> None:
        """The run ends with what a task has failed with."""
        if task.cancelled() or (error := task.exception()) is None:
            return
        known = isinstance(error, TokabatchError)
        self._finished.put(error if known else failure_of("having samples of the run drawn by the engine failed", error))

    async def _draw(self, prompts: Sequence[int]) -> None:
        """Have the samples of these prompts drawn. Of a prompt some of whose samples are there already all are: a start after a
        crash has few of these."""
        requests, wanted = self._requests, list[Wanted]()
        missing = [set(requests.samples(prompt).tolist()) for prompt in prompts]
        failed: set[int] = set()
        for prompt in prompts:
            key = requests.row_index if requests.key is None else requests.key
            wanted.append(Wanted(requests.prompt(prompt).copy(), self._params(prompt), int(key[prompt])))

        def watch(place: int, number: int, output: News | Finished) -> None:
            if number not in missing[place] or not isinstance(output, Finished):
                return
            missing[place].discard(number)
            row = int(requests.row_index[prompts[place]])
            if output.completion.error_code is not None:
                failed.add(place)
            self._finished.put(replace(output.completion, row_index=row))
            if not missing[place]:
                self._on_prompt(row, place in failed)

        with self._engine.work(wanted, watch, background=True) as future:
            await future

    def _params(self, prompt: int) -> SamplingParams:
        """What the prompt leaves of the context is that of the engine."""
        params, length = self._requests.sampling[int(self._requests.params[prompt])], int(self._requests.length[prompt])
        if self._most < length + params.max_tokens == self._planned and length < self._most:
            return replace(params, max_tokens=self._most - length, min_tokens=min(params.min_tokens, self._most - length))
        return params

    def _refuse(self, prompt: int) -> bool:
        """Whether a prompt asks for more than what the engine is made for: its samples end as errors then."""
        length, params = int(self._requests.length[prompt]), self._params(prompt)
        row, error = int(self._requests.row_index[prompt]), None
        if length + params.max_tokens > self._most:
            long = f"the prompt has {counted(length, 'token')}, and {length + params.max_tokens:,} with max_tokens"
            error = "prompt_too_long", f"{long}; the server takes {self._most:,} (server.context, engine.kv_cache_tokens)"
        elif (excess := beyond_limits(params)) is not None:
            error = "bad_sampling", f"{excess[0]} may hold {excess[1]} in a request"
        if error is None:
            return False
        for number in self._requests.samples(prompt).tolist():
            self._finished.put(completion(Generated(self._requests.tokens[:0].copy()), row, number, length, error=error))
        self._on_prompt(row, True)
        return True
