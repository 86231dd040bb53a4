"""A small job whose engine is scripted, and the servers that run it in processes of their own.

`pytest tests/crash` takes a sample of the faults; `pytest tests/crash --all-faults` takes every one.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
from support.forked_runs import ForkServer
from support.output_checker import Checker, table

from benchmarks.scripted_engine import QUICKSTART, quickstart_script

MAX_TOKENS = 12
Task = TypeVar("Task")


class Scene:
    """One job and its input. `job(out)` is what a fork server takes."""

    def __init__(self, folder: Path, questions: list[str | None], n: int, rows_per_shard: int, flush_seconds: float) -> None:
        self.rows, self.n = folder / "rows.jsonl", n
        self.rows_per_shard, self.flush_seconds = rows_per_shard, flush_seconds
        with self.rows.open("w") as file:
            for question in questions:
                file.write(json.dumps({"question": question, "number": 1.5}) + "\n")
        self.checker = Checker(questions, n, MAX_TOKENS, quickstart_script())

    def job(self, out: Path, **sections: Any) -> dict[str, Any]:
        job: dict[str, Any] = {
            "model": {"path": str(QUICKSTART), "dtype": "float32"},
            "input": {"path": str(self.rows)},
            "prompt": {"template": "{{ question }}"},
            "generation": {"n": self.n, "max_tokens": MAX_TOKENS, "temperature": 1.0},
            "engine": {"device": "cpu", "max_running": 16},
            "output": {"path": str(out), "rows_per_shard": self.rows_per_shard, "flush_seconds": self.flush_seconds},
            "errors": {"max_fraction": 1.0},
        }
        return {**job, **{name: {**job.get(name, {}), **values} for name, values in sections.items()}}


@pytest.fixture(scope="session")
def all_faults(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--all-faults"))


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ForkServer]]:
    """Two: one a core."""
    folder = tmp_path_factory.mktemp("servers")
    started = [ForkServer(folder / f"{number}.log") for number in range(2)]
    yield started
    for server in started:
        server.close()


@pytest.fixture(scope="session")
def server(servers: list[ForkServer]) -> ForkServer:
    return servers[0]


@pytest.fixture(scope="session")
def long_scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """A run of a second, which commits all the while."""
    questions: list[str | None] = [f"What is {row} and {row * 7 % 40}, été?" for row in range(120)]
    questions[17] = questions[90] = None
    return Scene(tmp_path_factory.mktemp("long"), questions, n=4, rows_per_shard=8, flush_seconds=0.05)


@pytest.fixture(scope="session")
def short_scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """A run of a few shards, small enough to be repeated for each of its system calls."""
    questions: list[str | None] = [f"What is {row}?" for row in range(5)]
    questions[3] = None
    return Scene(tmp_path_factory.mktemp("short"), questions, n=2, rows_per_shard=4, flush_seconds=3600)


def share(servers: list[ForkServer], tasks: Sequence[Task], work: Callable[[ForkServer, Task], None]) -> None:
    """Do all tasks, as many at a time as there are servers; the first failure is raised."""
    left, failures = list(reversed(tasks)), list[BaseException]()

    def serve(server: ForkServer) -> None:
        while left and not failures:
            try:
                work(server, left.pop())
            except IndexError:
                return
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=serve, args=(server,)) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


Reference = Callable[[Scene], list[dict[str, Any]]]


@pytest.fixture(scope="session")
def undisturbed(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The table of a run that nothing went wrong with."""
    known: dict[Path, list[dict[str, Any]]] = {}

    def of(scene: Scene) -> list[dict[str, Any]]:
        if scene.rows not in known:
            out = tmp_path_factory.mktemp("undisturbed") / "out"
            ended = server.run(scene.job(out))
            assert ended.code == 0, ended.message
            scene.checker.check_complete(out)
            known[scene.rows] = table(out)
        return known[scene.rows]

    return of
