"""What durability costs, and what a long run that is killed again and again does to memory and files.

    python -m benchmarks.durability kills --rows 1000000 --kills 10
    python -m benchmarks.durability cost --rows 200000 --rounds 3

`kills` starts the job as a process of its own, kills it (SIGKILL) each time another share of its samples is committed, starts
it again, and counts the table with plain pyarrow at the end. Memory and open files are read from /proc every second; anonymous
memory (RssAnon) is what the process holds, mapped files come and go with the page cache. `cost` runs the same job with and
without what makes it durable (fsync, publishing by link, digests, page checksums, the digests of the input's rows), in turn.

The engine is scripted: it takes hardly any time, so that every share given here is the largest it can be.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.scripted_engine import QUICKSTART, build_worker, quickstart_script
from tokabatch import Job
from tokabatch.engine.executor import InProcessExecutor
from tokabatch.input.store import row_digests
from tokabatch.output import shards
from tokabatch.report.progress import NullProgress, ProgressSnapshot
from tokabatch.runner import make_replica
from tokabatch.runner.run import run
from tokabatch.storage import atomic_files as durable
from tokabatch.storage.atomic_files import DurableFiles

SHOWN = ("RssAnon", "VmHWM")


class TimedFiles(DurableFiles):
    """Adds up the seconds spent in the calls that a run without durability would not make."""

    seconds = 0.0

    def fsync(self, descriptor: int) -> None:
        begin = time.perf_counter()
        super().fsync(descriptor)
        TimedFiles.seconds += time.perf_counter() - begin

    def link(self, source: Path, target: Path) -> None:
        begin = time.perf_counter()
        super().link(source, target)
        TimedFiles.seconds += time.perf_counter() - begin


class PlainFiles(DurableFiles):
    """Trusts the system to write some time."""

    def fsync(self, descriptor: int) -> None:
        pass

    def link(self, source: Path, target: Path) -> None:
        source.replace(target)

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)


class _NoDigest:
    def update(self, _: Any) -> None:
        pass

    def hexdigest(self) -> str:
        return "none"


class Phases(NullProgress):
    """Writes down when the phases begin."""

    interval = 0.1

    def __init__(self) -> None:
        self.begun: dict[str, float] = {}

    def update(self, snapshot: ProgressSnapshot) -> None:
        self.begun.setdefault(snapshot.phase, time.perf_counter())


def job(rows: Path, out: Path, max_tokens: int) -> Job:
    return Job.load(
        {
            "model": {"path": str(QUICKSTART), "dtype": "float32"},
            "input": {"path": str(rows)},
            "prompt": {"template": "{{ question }}"},
            "generation": {"n": 1, "temperature": 1.0, "max_tokens": max_tokens},
            "engine": {"device": "cpu", "max_running": 2048, "max_step_tokens": 8192},
            "output": {"path": str(out), "rows_per_shard": 20_000, "flush_seconds": 10},
        }
    )


def write_rows(path: Path, count: int) -> None:
    with path.open("w") as file:
        for row in range(count):
            file.write(json.dumps({"question": f"{row} and {row * 7919 % 1000}?", "answer": str(row)}) + "\n")


def work(rows: Path, out: Path, max_tokens: int, durable_run: bool) -> None:
    """The process that is killed: runs the job, and reports at the end what it took."""
    script = quickstart_script(slots=2048)
    make_replica.executor_maker = lambda job, workload, sizes, *_: partial(InProcessExecutor, (script, sizes), build_worker)
    phases = Phases()
    seam = "tokabatch.output.folder"
    sys.modules[seam].DurableFiles = TimedFiles if durable_run else PlainFiles
    if not durable_run:
        shards.PARQUET_OPTIONS = {**shards.PARQUET_OPTIONS, "write_page_checksum": False}
        row_digests.digest_each = lambda contents: np.zeros(sum(1 for _ in contents), np.uint64)
        durable.hashlib.sha256 = lambda *_: _NoDigest()
    begin = time.perf_counter()
    summary = run(job(rows, out, max_tokens), phases)
    told = {"exit_code": summary.exit_code, "ok": summary.ok, "seconds": time.perf_counter() - begin}
    told |= {"generating": summary.work_seconds, "cpu": time.process_time(), "durable_seconds": TimedFiles.seconds}
    print(json.dumps(told))


def start(rows: Path, out: Path, max_tokens: int, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.durability", "work", str(rows), str(out), str(max_tokens), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def observe(pid: int) -> Mapping[str, int]:
    """Kibibytes of memory and open files of a process, as the kernel reports them."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    values = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(SHOWN)}
    return {**{name: int(value) for name, value in values.items()}, "files": len(os.listdir(f"/proc/{pid}/fd"))}


def committed(out: Path) -> int:
    return sum(pq.read_metadata(path).num_rows for path in (out / "data").glob("part-*.parquet"))


def kills(rows: int, count: int, max_tokens: int, folder: Path) -> None:
    write_rows(folder / "rows.jsonl", rows)
    began = time.perf_counter()
    seen: list[tuple[float, int, Mapping[str, int]]] = []
    for attempt in range(count + 1):
        limit = rows * (attempt + 1) // (count + 1)
        process = start(folder / "rows.jsonl", folder / "out", max_tokens)
        while process.poll() is None:
            done = committed(folder / "out")
            if attempt < count and done >= limit:
                os.killpg(process.pid, signal.SIGKILL)
                break
            try:
                memory = observe(process.pid)
            except (FileNotFoundError, ProcessLookupError):
                break
            if "RssAnon" in memory:
                seen.append((time.perf_counter() - began, attempt, memory))
            time.sleep(1.0)
        stdout, _ = process.communicate()
        print(f"start {attempt}: {committed(folder / 'out'):,} committed, {time.perf_counter() - began:.0f} s", flush=True)
    print(stdout.strip())
    for minute in range(int(seen[-1][0] // 60) + 1):
        inside = [each for at, _, each in seen if at // 60 == minute]
        if inside:
            anon = sorted(each["RssAnon"] >> 10 for each in inside)
            files = [each["files"] for each in inside]
            memory = f"RssAnon median {anon[len(anon) // 2]} MiB, max {anon[-1]} MiB"
            print(f"minute {minute}: {memory}; files {min(files)}-{max(files)}")
    check(folder / "out", rows)


def check(out: Path, rows: int) -> None:
    """Every row once, by plain pyarrow."""
    found = np.concatenate([pq.read_table(path, columns=["row_index"])["row_index"] for path in (out / "data").iterdir()])
    assert np.array_equal(np.sort(found), np.arange(rows)), "rows are lost or doubled"
    print(f"{rows:,} rows, each once, in {len(list((out / 'data').iterdir()))} files")


def cost(rows: int, rounds: int, max_tokens: int, folder: Path) -> None:
    write_rows(folder / "rows.jsonl", rows)
    for number in range(rounds):
        for flags in ((), ("--plain",)):
            shutil.rmtree(folder / "out", ignore_errors=True)
            stdout, _ = start(folder / "rows.jsonl", folder / "out", max_tokens, *flags).communicate()
            print(number, "plain  " if flags else "durable", stdout.strip(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kills", "cost", "work"])
    parser.add_argument("places", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.what == "work":
        rows, out, max_tokens = given.places
        work(Path(rows), Path(out), int(max_tokens), not given.plain)
        return
    with tempfile.TemporaryDirectory(prefix="durability-") as folder:
        if given.what == "kills":
            kills(given.rows, given.kills, given.max_tokens, Path(folder))
        else:
            cost(given.rows, given.rounds, given.max_tokens, Path(folder))


if __name__ == "__main__":
    main()
