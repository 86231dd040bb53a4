"""How long a start takes to its first step: the first one, and those that continue the run.

    python -m benchmarks.resume --rows 1000000 --words 55 --starts 3

Each start is a process of its own, from the imports on, stopped at its first steps; the engine is scripted. Prompts have
`--words` words behind a template, and go through the quickstart's tokenizer.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from benchmarks.scripted_engine import QUICKSTART, build_worker, quickstart_script
from tokabatch import Job
from tokabatch.engine.executor import InProcessExecutor
from tokabatch.report.progress import NullProgress, ProgressSnapshot
from tokabatch.runner import make_replica
from tokabatch.runner.run import run

STEPS = 3
WORDS = "the quick brown fox jumps over a lazy dog while many other animals watch and wonder".split()


class FirstStep(NullProgress):
    """Notes when each phase begins."""

    interval = 0.0

    def __init__(self) -> None:
        self.begun: dict[str, float] = {}

    def update(self, snapshot: ProgressSnapshot) -> None:
        self.begun.setdefault(snapshot.phase, time.time())


def write_rows(path: Path, rows: int, words: int) -> None:
    draw = random.Random(1)
    with path.open("w") as file:
        for row in range(rows):
            question = " ".join(draw.choices(WORDS, k=words))
            file.write(json.dumps({"question": f"{row}: {question}?", "answer": str(row % 97), "level": row % 5}) + "\n")


def work(rows: Path, out: Path, begun: float) -> None:
    """One start, stopped after a few steps; prints the seconds since `begun` at which each phase began."""
    script = quickstart_script(slots=2048)
    make_replica.executor_maker = lambda job, workload, sizes, *_: partial(InProcessExecutor, (script, sizes), build_worker)
    job = Job.load(
        {
            "model": {"path": str(QUICKSTART), "dtype": "float32"},
            "input": {"path": str(rows)},
            "prompt": {"template": "Question: {{ question }}\nAnswer:"},
            "generation": {"max_tokens": 12},
            "engine": {"device": "cpu", "max_running": 2048, "max_step_tokens": 8192},
            "output": {"path": str(out)},
        }
    )
    phases = FirstStep()
    phases.begun["imported"] = time.time()
    run(job, phases, lambda: "generating" in phases.begun)
    print(json.dumps({name: round(at - begun, 1) for name, at in phases.begun.items()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--words", type=int, default=55)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(Path(given.work[0]), Path(given.work[1]), float(given.work[2]))
        return
    with tempfile.TemporaryDirectory(prefix="tokabatch-resume-") as folder:
        rows, out = Path(folder) / "rows.jsonl", Path(folder) / "out"
        write_rows(rows, given.rows, given.words)
        for _ in range(given.starts):
            command = [sys.executable, "-m", "benchmarks.resume", "--work", str(rows), str(out), str(time.time())]
            print(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip(), flush=True)


if __name__ == "__main__":
    main()
