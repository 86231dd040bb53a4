"""One server from its start to its end: the model is opened, processes are started, HTTP is served until a signal comes."""

from __future__ import annotations

import asyncio
import gc
import math
import os
import resource
import select
import selectors
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

import numpy as np
import uvicorn

from tokabatch.engine.replica_sizes import MOST_STEPS
from tokabatch.errors import EngineError, UsageError
from tokabatch.forecast.cost_model import read_profile, size_replica
from tokabatch.input.prompts.builder import Limits
from tokabatch.number_text import counted
from tokabatch.runner.make_replica import executor_maker
from tokabatch.runner.replica import scheduler_limits
from tokabatch.scheduling.contracts import Requests, SamplingParams
from tokabatch.scheduling.stop_conditions import StopRules, TokenText
from tokabatch.serve.app import Api
from tokabatch.serve.batches import Batches
from tokabatch.serve.engine import Engine
from tokabatch.serve.engine_process import EngineSpec
from tokabatch.serve.prompts import Prompts
from tokabatch.serve.settings import ServiceConfig
from tokabatch.serve.stored_files import StoredFiles
from tokabatch.workload.open_model import OpenModel, open_model
from tokabatch.workload.prepare import Demand

EXPECTED_PROMPTS = 1 << 16
"""Of a workload that the engine is sized for: longer than any queue."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)
SEND_SECONDS = 2.0
"""For the last answers to be sent before the server ends."""
MOST_EVENTS = 8
"""Sockets that are read in one turn of the event loop."""
GC_OBJECTS = 50_000
"""New objects after which Python searches for cycles among them. With its default, 700, that search takes a third of the CPU
time while thousands of requests are open."""


def serve(config: ServiceConfig, tell: Callable[[str], None]) -> int:
    """Serve until a signal requests the stop; return the exit status. `tell` receives messages for people. Raises UsageError
    for whatever cannot work, EngineError if the engine fails."""
    job = config.job().model_copy(update={"engine": config.engine.model_copy(update={"process": True})})
    model = open_model(job)
    context = min(config.server.context or model.spec.context_length, model.spec.context_length)
    prompts = Prompts(job.prompt, model.generation, model.tokenizer, Limits(context, model.spec.vocab_size))
    demand = _expected(model, context)
    sizes = size_replica(job, demand, read_profile(job))
    tokenizer = model.tokenizer
    text = TokenText(tokenizer.piece_texts(), tokenizer.decode_batch, tokenizer.special_ids(), tokenizer.lone_bytes())
    nothing = demand.requests.take(np.zeros(0, np.int64))
    on_gpu, stages, depth = model.device == "cuda", model.layout.pipeline, job.engine.queue_depth
    spec = EngineSpec(
        nothing=nothing,
        limits=scheduler_limits(sizes, stages),
        stops=StopRules(nothing.sampling, model.eos_token_ids, model.spec.vocab_size, text),
        make=executor_maker(job, demand, sizes, tell),
        depth=min(MOST_STEPS, max(2 if on_gpu else 1, stages + (stages > 1))) if depth == "auto" else depth,
        depth_of_few=3 if on_gpu and stages == 1 and depth == "auto" else None,
        max_restarts=job.engine.max_restarts,
        hang_seconds=job.engine.hang_seconds,
    )
    # Each connection is a file, and the soft limit is often 1,024.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(ValueError, OSError):
        # macOS calls its limit infinite and accepts no more than OPEN_MAX.
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard if sys.platform == "linux" else 10_240, hard))
    listener = _listen(config.server.host, config.server.port)
    files = _open_files(config, tell)
    return _run(_serve(config, model, [spec] * model.layout.replicas, prompts, context, files, listener, tell))


async def _serve(
    config: ServiceConfig,
    model: OpenModel,
    specs: list[EngineSpec],
    prompts: Prompts,
    context: int,
    files: StoredFiles | None,
    listener: socket.socket,
    tell: Callable[[str], None],
) -> int:
    server = config.server
    engine = Engine(
        specs, model.tokenizer, collect_seconds=server.collect_ms / 1000, most_samples=server.max_waiting, tell=tell
    )
    batches = None if files is None else Batches(files, config, engine)
    api = Api(server, config.name, model, engine, prompts, context, files, batches)
    http = _Server(
        uvicorn.Config(
            api.app,
            log_level="error",
            access_log=False,
            lifespan="off",
            proxy_headers=False,
            timeout_graceful_shutdown=None,
        )
    )
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            # The processes end with this one.
            os._exit(128 + number)
        loop.call_soon_threadsafe(stop.set)

    before = {number: signal.signal(number, on_signal) for number in SIGNALS}
    serving = asyncio.create_task(http.serve([listener]))
    watching = [asyncio.create_task(stop.wait()), asyncio.create_task(engine.failed.wait())]
    try:
        starting = asyncio.create_task(engine.start())
        await asyncio.wait((starting, *watching, serving), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            host, port = listener.getsockname()[:2]
            if engine.capacity < context:
                context = api.context = engine.capacity
                prompts.limit(context)
                tell(
                    f"warning: a prompt and its output together may have {counted(context, 'token')}, because the KV cache "
                    "holds no more (engine.kv_cache_tokens); the model's context is longer"
                )
            if batches is not None:
                batches.begin(context, tell)
            # The modules and the model's tables are not gone through again.
            gc.collect()
            gc.freeze()
            gc.set_threshold(GC_OBJECTS, *gc.get_threshold()[1:])
            url = f"http://{host if ':' not in host else f'[{host}]'}:{port}"
            tell(f"{config.name} is served at {url}/v1; Ctrl-C stops it")
            key = "" if server.api_key is None else " --api-key KEY"
            example = "--chat 'What is 3 + 4?'" if prompts.has_chat_template else r"$'Question: What is 3 + 4?\nAnswer:'"
            tell(f"a prompt from another terminal: tokabatch ping --url {url}{key} {example}")
            await asyncio.wait((*watching, serving), return_when=asyncio.FIRST_COMPLETED)
        api.draining = True
        closing = asyncio.gather(*([] if batches is None else [batches.close()]))
        if stop.is_set() and engine.unfinished:
            left = counted(engine.unfinished, "sample is", "samples are")
            tell(f"stopping: {left} finished first, for at most {server.grace_seconds:g} s")
            end = loop.time() + server.grace_seconds
            while engine.unfinished and engine.failure is None and loop.time() < end:
                await asyncio.sleep(0.05)
        await closing
        engine.fail_all(EngineError("the server was stopped before this request was finished; send it again"))
        http.should_exit = True
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(serving), SEND_SECONDS)
        # What is left are clients that do not send or read on: their requests end as if they were gone.
        for connection in list(http.server_state.connections):
            connection.transport.abort()
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(serving), SEND_SECONDS)
        http.force_exit = True
        await serving
    finally:
        for task in watching:
            task.cancel()
        await engine.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    if engine.failed.is_set() and engine.failure is not None:
        raise engine.failure
    tell("stopped")
    return 0


class BoundedSelector(selectors.DefaultSelector):
    """Reports a few sockets at a time. Of thousands of requests that come at once the first are given to the engine before the
    last are read; otherwise all would be read, then all parsed, then all tokenised. Each socket has its turn, also beside
    others that are never read to their end: epoll reports those first that it has not reported for longest."""

    def __init__(self) -> None:
        super().__init__()
        self._few = select.epoll.fromfd(os.dup(self.fileno()))

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        # Rounded up, because epoll counts milliseconds: a shorter timer would be polled again and again.
        seconds = -1.0 if timeout is None else math.ceil(max(0.0, timeout) * 1e3) * 1e-3
        keys, ready = self.get_map(), list[tuple[selectors.SelectorKey, int]]()
        try:
            events = self._few.poll(seconds, MOST_EVENTS)
        except InterruptedError:
            return ready
        for file, event in events:
            key = keys.get(file)
            if key is None:
                # Closed since, while a duplicate keeps the socket open.
                continue
            reads = selectors.EVENT_READ if event & ~select.EPOLLOUT else 0
            writes = selectors.EVENT_WRITE if event & ~select.EPOLLIN else 0
            ready.append((key, (reads | writes) & key.events))
        return ready

    def close(self) -> None:
        self._few.close()
        super().close()


def _run(main: Coroutine[None, None, int]) -> int:
    """As `asyncio.run`, which takes no selector."""
    loop = asyncio.SelectorEventLoop(BoundedSelector() if sys.platform == "linux" else None)
    try:
        return loop.run_until_complete(main)
    finally:
        for task in (left := asyncio.all_tasks(loop)):
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


class _Server(uvicorn.Server):
    """Leaves signals to its caller."""

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


def _open_files(config: ServiceConfig, tell: Callable[[str], None]) -> StoredFiles | None:
    """The folder of files and batches. Where the settings do not name it, a server does without rather than not at all."""
    try:
        if config.server.files is None:
            return None
        if find_spec("python_multipart") is None:
            raise UsageError("server.files needs python-multipart; install it with: pip install 'tokabatch[serve]'")
        return StoredFiles(Path(config.server.files).absolute())
    except UsageError as error:
        if "files" in config.server.model_fields_set:
            raise
        tell(f"warning: /v1/files and /v1/batches are not served: {error}")
        return None


def _listen(host: str, port: int) -> socket.socket:
    """Raises UsageError where that is taken or not of this machine."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = f"choose another port, such as server.port={port + 1 if port < 65535 else 8000}, or another server.host"
        raise UsageError(f"server.port: {host}:{port} cannot be listened on: {reason}; {remedy}") from error
    return listener


def _expected(model: OpenModel, context: int) -> Demand:
    """What the engine is sized for: more prompts than any queue holds, with all kinds of samples, each half as long as the
    context allows; one is as long as can be, and one as short."""
    length = np.full(EXPECTED_PROMPTS, max(1, context // 2), np.int32)
    length[0], half = 1, max(1, context - context // 2)
    kinds = [
        SamplingParams(temperature=temperature, top_p=top_p, max_tokens=half, logprobs=logprobs, repetition_penalty=penalty)
        for temperature, top_p in ((0.0, 1.0), (1.0, 1.0), (1.0, 0.9))
        for logprobs in (None, 0, 20)
        for penalty in (1.0, 1.1)
    ]
    kinds = [SamplingParams(max_tokens=1), *kinds]
    zeros = np.zeros(EXPECTED_PROMPTS, np.int32)
    params = (1 + np.arange(EXPECTED_PROMPTS) % (len(kinds) - 1)).astype(np.int32)
    params[0] = 0
    requests = Requests(
        row_index=np.arange(EXPECTED_PROMPTS),
        tokens=zeros[:0],
        start=zeros.astype(np.int64),
        length=length,
        lcp=zeros,
        params=params,
        sampling=tuple(kinds),
    )
    return Demand(**vars(model), requests=requests, num_samples=requests.num_samples())
