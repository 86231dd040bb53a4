"""What breaks inside a server fails the requests that wait for it, rather than leaving them without an answer."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from support import token_device as device

from tokabatch.errors import EngineError
from tokabatch.runner.interruption import Interruption
from tokabatch.runner.member_process import Alive
from tokabatch.runner.replica import Standing
from tokabatch.scheduling.contracts import SamplingParams
from tokabatch.scheduling.scheduler import SchedulerLimits
from tokabatch.scheduling.stop_conditions import StopRules
from tokabatch.serve import engine as engines
from tokabatch.serve.app import Api
from tokabatch.serve.completions import Refused
from tokabatch.serve.dispatch import Wanted
from tokabatch.serve.engine import Engine
from tokabatch.serve.engine_process import Add, Ended, EngineProcess, EngineSpec
from tokabatch.serve.file_routes import FileRoutes
from tokabatch.serve.prompts import Prompts


class Process:
    """A stand-in for a scheduler's process."""

    def __init__(self, spec: Any, number: int, receive: Any) -> None:
        if spec.started:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        spec.started, self.number, self.spec = not spec.again, number, spec

    def send(self, order: Any) -> None:
        self.spec.sent.set()
        self.spec.orders.append(order)
        if self.spec.send_fails and isinstance(order, Add):
            raise ValueError("no such order")

    def how_it_ended(self) -> str:
        return "it ended"

    def close(self) -> None:
        pass


class Spec:
    def __init__(self, send_fails: bool = False, again: bool = False) -> None:
        self.started, self.send_fails, self.sent, self.again = False, send_fails, asyncio.Event(), again
        self.orders: list[Any] = []


class Panic(BaseException):
    """As a library in Rust raises it."""


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("restart", "another process of the scheduler cannot be started: Resource temporarily unavailable"),
        ("send", "giving prompts to the scheduler failed: ValueError: no such order"),
        ("message", "taking what the scheduler sent failed"),
        ("ended", "it is broken"),
    ],
)
def test_whatever_breaks_fails_all_requests_and_the_server(monkeypatch: pytest.MonkeyPatch, fault: str, told: str) -> None:
    monkeypatch.setattr(engines, "EngineProcess", Process)

    async def check() -> None:
        spec: Any = Spec(fault == "send")
        engine = Engine([spec], None, collect_seconds=0.0, most_samples=9, tell=lambda text: None)  # type: ignore[arg-type]
        with engine.work([Wanted(np.array([1, 2], np.int32), SamplingParams(n=2))]) as future:
            assert engine.has_room(7) and not engine.has_room(8)
            await spec.sent.wait()
            process, take = engine._processes[0], engine._take
            if fault == "restart":
                take(process, None, [])
            elif fault == "message":
                take(process, engines.Progress(None), [])  # type: ignore[arg-type]
            elif fault == "ended":
                take(process, Ended(EngineError("it is broken")), [])
            with pytest.raises(EngineError, match=told):
                await asyncio.wait_for(future, 60)
        assert engine.failed.is_set() and engine.unfinished == 0
        with pytest.raises(EngineError, match=told):
            await engine.start()
        await engine.close()

    asyncio.run(check())


def idle_spec(make: Callable[[], Any], hang_seconds: float) -> EngineSpec:
    """Of a process whose worker is started by `make`, and that gets no prompts."""
    requests = device.make_requests([[3]]).take(np.zeros(0, np.int64))
    return EngineSpec(
        nothing=requests,
        limits=SchedulerLimits(4, 64, 8, 64, 16, None),
        stops=StopRules(requests.sampling, [device.EOS], device.VOCAB, None),
        make=make,
        depth=1,
        depth_of_few=None,
        max_restarts=0,
        hang_seconds=hang_seconds,
    )


def stand_still() -> Any:
    threading.Event().wait()


def test_a_loop_that_stands_still_in_a_process_that_runs_is_found() -> None:
    """Its other threads run, and could give heartbeats for ever."""
    received: SimpleQueue[Any] = SimpleQueue()
    process = EngineProcess(idle_spec(stand_still, 1.0), 0, lambda process, message: received.put(message))
    assert received.get(timeout=60) is None
    assert "gave no sign of life" in process.how_it_ended()
    process.close()


def stop_in_a_message() -> Any:
    for number in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):
            if number > 2 and stat.S_ISSOCK(os.fstat(number).st_mode):
                os.write(number, struct.pack("!i", 1000) + bytes(10))
    os.kill(os.getpid(), signal.SIGSTOP)


def test_a_process_that_stops_in_the_middle_of_a_message_is_found() -> None:
    received: SimpleQueue[Any] = SimpleQueue()
    process = EngineProcess(idle_spec(stop_in_a_message, 1.0), 0, lambda process, message: received.put(message))
    assert received.get(timeout=60) is None
    assert "gave no sign of life" in process.how_it_ended()
    process.close()


def test_heartbeats_are_those_of_the_loop() -> None:
    stop = Interruption()
    alive = Alive(stop)
    assert alive() and alive()  # It has not begun.
    alive.idle = False
    assert not alive()
    alive.turns += 1
    assert alive() and not alive()
    with stop.at_once():
        assert alive() and alive()
    assert not alive()


@pytest.mark.parametrize("error", [Panic("index out of bounds"), RuntimeError("index out of bounds")])
def test_an_error_while_messages_are_read_is_reported_as_the_end(error: BaseException) -> None:
    received: list[Any] = []

    class Pipe:
        def poll(self, seconds: float) -> bool:
            return True

        def receive(self) -> str:
            return "message"

    def receive(process: EngineProcess, message: Any) -> None:
        received.append(message)
        if message == "message":
            raise error

    process: Any = object.__new__(EngineProcess)
    process._pipe = process._reader = Pipe()
    process._receive, process._process, process._orders = receive, Mock(), SimpleQueue()
    process._silent, process._hang_seconds = 0.0, 9.0
    process._process.is_alive.return_value = False
    process._listen()
    assert received[0] == "message" and isinstance(received[1], Ended) and len(received) == 2
    assert "reading what the scheduler sent failed" in str(received[1].error) and "index out of bounds" in str(
        received[1].error
    )


def test_a_panic_of_the_tokenizer_fails_its_requests_and_no_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(self: Prompts, rows: Any) -> list[Any]:
        if "bad" in rows:
            raise Panic("byte index 1 is not a char boundary")
        return list(rows)

    monkeypatch.setattr(Prompts, "_renew", lambda self: None)
    monkeypatch.setattr(Prompts, "_build", build)

    async def check() -> None:
        prompts: Any = Prompts(None, None, None, None)  # type: ignore[arg-type]
        with pytest.raises(EngineError, match="the tokenizer failed: byte index 1"):
            await asyncio.wait_for(prompts.build(["bad"]), 5)
        assert await asyncio.wait_for(prompts.build(["good"]), 5) == ["good"]

    asyncio.run(check())


def test_a_server_is_healthy_from_the_loaded_model_to_its_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "EngineProcess", Process)

    async def check() -> None:
        api: Any = object.__new__(Api)
        spec: Any = Spec(again=True)
        engine = Engine([spec], None, collect_seconds=0.0, most_samples=9, tell=lambda text: None)  # type: ignore[arg-type]
        api.draining, api._engine = False, engine
        assert (await api._health(None)).status_code == 503
        engine._take(engine._processes[0], Standing.before(None), [])  # type: ignore[arg-type]
        answer = await api._health(None)
        assert answer.status_code == 200 and json.loads(answer.body) == {"replicas": 1, "loaded": 1}
        # Its only process is lost, and another one loads the model.
        engine._take(engine._processes[0], None, {})
        assert (await api._health(None)).status_code == 503
        engine._take(engine._processes[0], Standing.before(None), [])  # type: ignore[arg-type]
        assert (await api._health(None)).status_code == 200
        engine.fail_all(EngineError("gone"))
        assert (await api._health(None)).status_code == 503
        await engine.close()

    asyncio.run(check())


def test_what_a_lost_process_had_goes_to_one_that_has_loaded_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "EngineProcess", Process)

    async def check() -> None:
        first, second = specs = Spec(again=True), Spec(again=True)
        engine = Engine(specs, None, collect_seconds=0.0, most_samples=9, tell=lambda text: None)  # type: ignore[arg-type]
        limits = SchedulerLimits(16, 9, 8, 8, 9, None)
        for process in engine._processes:
            engine._take(process, Standing.before(limits), {})
        await engine.start()
        assert engine.capacity == 8 * 16 and engine.spare == 2 * 8 - 2
        prompts = [Wanted(np.array([number, 2], np.int32), SamplingParams()) for number in range(4)]
        with engine.work(prompts):
            await first.sent.wait()
            assert [len(each.orders[0].requests) for each in specs] == [2, 2]
            engine._take(engine._processes[0], None, {})
            first.sent.clear(), second.sent.clear()
            await second.sent.wait()
            assert len(second.orders[1].requests) == 2 and not first.sent.is_set() and list(engine.standings) == [1]
        await engine.close()

    asyncio.run(check())


def test_a_full_disk_refuses_what_is_of_files_for_now() -> None:
    """A client that is gone is an OSError, too, and none of the disk's."""
    batches = Mock()
    routes = {(path, method): handler for path, handler, method in FileRoutes(Mock(), batches, Mock(), 9).routes}
    cancel, http = routes["/v1/batches/{name}/cancel", "POST"], Mock(path_params={"name": "batch-1"})
    batches.cancel.side_effect = OSError(28, "No space left on device")
    with pytest.raises(Refused, match="No space left") as refused:
        asyncio.run(cancel(http))  # type: ignore[arg-type]
    assert (refused.value.error.status, refused.value.error.code, refused.value.retry_after) == (503, "storage", 60)
    batches.cancel.side_effect = ConnectionResetError(104, "Connection reset by peer")
    with pytest.raises(ConnectionResetError):
        asyncio.run(cancel(http))  # type: ignore[arg-type]
