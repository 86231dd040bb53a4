"""One run whose worker is killed and stopped again and again: python -m benchmarks.gpu_faults [--kills 20] [--stops 10]

A whole job goes through `tokabatch.run` with random weights, and a thread sends SIGKILL and SIGSTOP to the worker process in
random order at random moments: half of the kills whenever they come, loading included, the other faults once the worker has
given results. Workers are forked as those of `tokabatch run`, but those of several schedulers are spawned. The check afterwards
reads the shards with plain pyarrow: every (row, sample) once, every sample ok and of full length, the faults counted in the
summary. Exit 1 where it fails. With --compare an undisturbed run of one rank follows, and the share of samples with the same
tokens is told: all of them on a CPU in float64, fewer in other types, whose sums depend on the company. With --tensor and
--pipeline the worker has several ranks, any of which is struck; with --replicas so many schedulers, each with its worker, and
any of these processes is struck. --kills 0 --stops 0 only compares.

    python -m benchmarks.gpu_faults                                              Llama-3.2-1B shapes, bfloat16, on a GPU
    python -m benchmarks.gpu_faults --shape tiny --device cpu --dtype float64 --rows 256 --kills 2 --stops 1 --compare
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.gpu.models import write_model
from benchmarks.gpu.shapes import SHAPES
from tokabatch import Job
from tokabatch.engine.executor import WORKER_NAME
from tokabatch.report.progress import NullProgress, ProgressSnapshot
from tokabatch.report.summary import RunSummary
from tokabatch.runner.run import run

PROMPT_TOKENS, HEADER_TOKENS = 200, 120
USED_IDS = 600
"""Ids that every shape's vocabulary has."""


class Faults(NullProgress):
    """Strikes the worker, or with several `replicas` any of their processes. Each is stopped once at most; a fault has been
    used up when it was sent."""

    interval = 0.1

    def __init__(self, kills: int, stops: int, longest: float, seed: int, ranks: int, replicas: int) -> None:
        self._ranks, self._replicas = ranks, replicas
        self._random = random.Random(seed)
        self._due = [signal.SIGKILL] * kills + [signal.SIGSTOP] * stops
        self._random.shuffle(self._due)
        self._longest = longest
        self._tokens = 0
        self._over = threading.Event()
        self._struck: set[int] = set()
        self.sent: list[signal.Signals] = []
        self.told: list[str] = []
        self.thread = threading.Thread(target=self._strike, daemon=True)

    def update(self, snapshot: ProgressSnapshot) -> None:
        self._tokens = snapshot.tokens_out

    def message(self, text: str) -> None:
        self.told.append(text.splitlines()[0])
        print(text.splitlines()[0], file=sys.stderr)

    def close(self) -> None:
        self._over.set()
        self.thread.join()

    def _strike(self) -> None:
        while self._due and not self._over.is_set():
            victim = self._next_victim()
            if victim is None:
                return
            number = self._due.pop()
            if number == signal.SIGSTOP or self._random.random() < 0.5:
                before = self._tokens
                while self._tokens == before and not self._over.is_set():
                    time.sleep(0.02)
            self._over.wait(self._random.uniform(0.0, self._longest))
            if self._over.is_set():
                return
            with suppress(psutil.NoSuchProcess):
                # What ends with it: the other ranks, or the worker of a scheduler.
                scheduler = victim if victim.children() else victim.parent()
                ended = scheduler.children() if self._replicas > 1 else self._workers()
                self._struck |= {victim.pid, *(each.pid for each in ended)}
                victim.send_signal(number)
                self.sent.append(number)

    def _next_victim(self) -> psutil.Process | None:
        """A worker, a rank of one, or one of several schedulers, once others are in the place of those struck before."""
        while not self._over.is_set():
            with suppress(psutil.NoSuchProcess):
                fresh = [child for child in self._workers() if child.pid not in self._struck]
                schedulers = {worker.ppid() for worker in fresh} - self._struck if self._replicas > 1 else set[int]()
                whole = len(fresh) == self._ranks * self._replicas
                if whole and (self._replicas == 1 or len(schedulers) == self._replicas):
                    return self._random.choice([*fresh, *map(psutil.Process, sorted(schedulers))])
            time.sleep(0.02)
        return None

    def _workers(self) -> list[psutil.Process]:
        found: list[psutil.Process] = []
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if child.name() == WORKER_NAME:
                    found.append(child)
        return found


def make_job(arguments: argparse.Namespace, folder: Path, out: str, ranks: dict[str, int]) -> Job:
    rng = random.Random(1)
    header = [rng.randrange(3, USED_IDS) for _ in range(HEADER_TOKENS)]
    rows = [
        {"prompt_token_ids": header + [rng.randrange(3, USED_IDS) for _ in range(PROMPT_TOKENS - HEADER_TOKENS)]}
        for _ in range(arguments.rows)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict[str, Any] = {
        "model": {"path": str(folder / "model"), "dtype": arguments.dtype},
        "input": {"path": str(folder / "rows.jsonl")},
        "prompt": {"token_ids": "prompt_token_ids"},
        "generation": {"n": arguments.n, "temperature": 0.8, "max_tokens": arguments.max_tokens, "ignore_eos": True, "seed": 7},
        "engine": {
            "device": arguments.device,
            "process": True,
            "hang_seconds": arguments.hang_seconds,
            "max_restarts": arguments.kills + arguments.stops + 2,
            "replicas": 1,
            **ranks,
        },
        "output": {"path": str(folder / out), "columns": []},
    }
    return Job.load(values)


def read(out: Path) -> dict[tuple[int, int], list[int]]:
    """Every sample's tokens. Raises AssertionError for one that is there twice, failed, or cut."""
    columns = ["row_index", "sample_index", "status", "token_ids"]
    table = pa.concat_tables([pq.read_table(shard, columns=columns) for shard in (out / "data").glob("*.parquet")])
    samples: dict[tuple[int, int], list[int]] = {}
    for sample in table.to_pylist():
        key = (sample["row_index"], sample["sample_index"])
        assert key not in samples, f"{key} is there twice"
        assert sample["status"] == "ok", f"{key} failed"
        samples[key] = sample["token_ids"]
    return samples


def check(arguments: argparse.Namespace, summary: RunSummary, faults: Faults, out: Path) -> dict[tuple[int, int], list[int]]:
    samples = read(out)
    assert set(samples) == {(row, sample) for row in range(arguments.rows) for sample in range(arguments.n)}, "samples are lost"
    assert {len(tokens) for tokens in samples.values()} == {arguments.max_tokens}, "samples are cut"
    assert (summary.exit_code, summary.ok, summary.pending) == (0, len(samples), 0), "the books do not close"
    restarts = dict(summary.restarts)
    kills, stops = faults.sent.count(signal.SIGKILL), faults.sent.count(signal.SIGSTOP)
    assert (kills, stops) == (arguments.kills, arguments.stops), (
        f"the run ended after {kills} kills and {stops} stops: more rows"
    )
    if arguments.replicas > 1:
        # A scheduler that is killed may not have reported a worker that was.
        assert set(restarts) <= {"killed", "hung", "scheduler"} and sum(restarts.values()) <= kills + stops, restarts
        assert len(faults.told) >= sum(restarts.values()) > 0 or not kills + stops
    else:
        assert restarts == {cause: count for cause, count in (("killed", kills), ("hung", stops)) if count}, restarts
        assert (summary.recomputed_tokens > 0 or not restarts) and len(faults.told) >= kills + stops
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.2-1b", choices=list(SHAPES))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stops", type=int, default=10)
    parser.add_argument("--longest", type=float, default=1.0, help="Seconds that a fault waits at most.")
    parser.add_argument("--hang-seconds", type=float, default=1.5)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", action="store_true", help="Compare with an undisturbed run.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        # In a process of its own: workers are forked from one that has not used torch.
        writer = multiprocessing.get_context("spawn").Process(target=write_model, args=(arguments.shape, folder / "model"))
        writer.start()
        writer.join()
        faults = Faults(
            arguments.kills,
            arguments.stops,
            arguments.longest,
            arguments.seed,
            arguments.tensor * arguments.pipeline,
            arguments.replicas,
        )
        faults.thread.start()
        began = time.perf_counter()
        ranks = {name: getattr(arguments, name) for name in ("replicas", "tensor", "pipeline")}
        summary = run(make_job(arguments, folder, "faults", ranks), faults, fresh=arguments.replicas == 1)
        seconds = time.perf_counter() - began
        faults.close()
        samples = check(arguments, summary, faults, folder / "faults")
        print(
            f"{len(samples):,} samples of {arguments.max_tokens} tokens, each once; restarts {dict(summary.restarts)}; "
            f"{summary.requeued:,} running samples taken back, {summary.recomputed_tokens:,} tokens recomputed; {seconds:.0f} s"
        )
        if arguments.compare:
            run(make_job(arguments, folder, "calm", {}))
            calm = read(folder / "calm")
            same = sum(calm[key] == tokens for key, tokens in samples.items())
            print(f"{same:,} of {len(samples):,} samples as in an undisturbed run")
            assert (arguments.device, arguments.dtype) != ("cpu", "float64") or same == len(samples), "a fault changed a sample"


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
