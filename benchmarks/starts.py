"""Whether the starts of one run get slower: python -m benchmarks.starts [--starts 301] [--rows 12000]

A run is started again and again in this process, each time stopped after some steps, so that each start leaves one more small
shard; they are joined only when the run completes. Given are the seconds to the first step, wall and CPU: of the first start,
which reads the rows, of the second, which finds them read, and the median of the last ten. The imports of a process come on
top of each. The engine is scripted.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

from benchmarks.resume import write_rows
from benchmarks.scripted_engine import QUICKSTART, build_worker, quickstart_script
from tokabatch import Job
from tokabatch.engine.executor import InProcessExecutor
from tokabatch.report.progress import NullProgress, ProgressSnapshot
from tokabatch.runner import make_replica
from tokabatch.runner.run import run

SLOTS, STEPS = 8, 3


class Steps(NullProgress):
    """Notes the wall and CPU seconds at each step."""

    interval = 0.0

    def __init__(self) -> None:
        self.at: list[tuple[float, float]] = []

    def update(self, snapshot: ProgressSnapshot) -> None:
        if snapshot.phase == "generating":
            self.at.append((time.perf_counter(), time.process_time()))


def start(rows: Path, out: Path) -> tuple[float, float]:
    """One start, stopped after some steps: wall and CPU seconds to the first."""
    job = Job.load(
        {
            "model": {"path": str(QUICKSTART), "dtype": "float32"},
            "input": {"path": str(rows)},
            "prompt": {"template": "Question: {{ question }}\nAnswer:"},
            "generation": {"max_tokens": 2},
            "engine": {"device": "cpu", "max_running": SLOTS},
            "output": {"path": str(out)},
        }
    )
    steps, wall, cpu = Steps(), time.perf_counter(), time.process_time()
    run(job, steps, lambda: len(steps.at) > STEPS)
    return steps.at[0][0] - wall, steps.at[0][1] - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=301)
    parser.add_argument("--rows", type=int, default=12_000)
    given = parser.parse_args()
    script = quickstart_script(slots=SLOTS)
    make_replica.executor_maker = lambda job, workload, sizes, *_: partial(InProcessExecutor, (script, sizes), build_worker)
    with tempfile.TemporaryDirectory(prefix="tokabatch-starts-") as folder:
        rows, out = Path(folder) / "rows.jsonl", Path(folder) / "out"
        write_rows(rows, given.rows, 20)
        times = [start(rows, out) for _ in range(given.starts)]
        shards = len(list((out / "data").iterdir()))
    last = [statistics.median(values) for values in zip(*times[-10:], strict=True)]
    print(f"{'start':>10} {'wall s':>8} {'CPU s':>8}")
    for name, (wall, cpu) in (("first", times[0]), ("second", times[1]), ("last ten", last)):
        print(f"{name:>10} {wall:8.2f} {cpu:8.2f}")
    print(f"{shards} shards")


if __name__ == "__main__":
    main()
