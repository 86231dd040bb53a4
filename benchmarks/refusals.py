"""How long `tokabatch run` takes to refuse a job: eighteen mistakes, each in a process of its own.

    python -m benchmarks.refusals [REPEATS]

Prints a Markdown table of the whole command: seconds (the fastest and the median), the least CPU seconds, which hold less of
what else the machine does, and what the imports took by `python -X importtime`.
"""

from __future__ import annotations

import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RUN = ("output.path=run", "input.limit=2", "generation.n=2", "generation.max_tokens=8")
MISTAKES = {
    "no such job": ("nope.yaml",),
    "unknown key": ("JOB", "generation.temprature=1"),
    "wrong type": ("JOB", "generation.n=four"),
    "no such input": ("JOB", "input.path=nope.jsonl"),
    "a glob that matches nothing": ("JOB", "input.path=data/*.jsonl"),
    "CSV as input": ("JOB", "input.path=data.csv"),
    "no such model folder": ("JOB", "model.path=./models/mine"),
    "a folder without config.json": ("JOB", "model.path=."),
    "a column that is not there": ("JOB", "prompt.template={{ qestion }}"),
    "no Jinja": ("JOB", "prompt.template={{ question"),
    "output.columns of another input": ("JOB", "output.columns=[qestion]"),
    "output.path is a file": ("JOB", "output.path=data.csv"),
    "max_tokens beyond the context": ("JOB", "generation.max_tokens=4096"),
    "a token id beyond the vocabulary": ("JOB", "generation.stop_token_ids=99999"),
    "another temperature, into a finished run": ("JOB", *RUN, "generation.temperature=0.3"),
    "another seed": ("JOB", *RUN, "generation.seed=9"),
    "a smaller n": ("JOB", *RUN, "generation.n=1"),
    "another model": ("JOB", *RUN, "model.path=other"),
}


def main(repeats: int = 5) -> None:
    print("| mistake | seconds, fastest | median | CPU seconds | imports, s |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        (here / "jobs").symlink_to(ROOT / "jobs")
        (here / "data.csv").write_text("question,answer\na,1\n")
        job = str(here / "jobs" / "quickstart.yaml")
        subprocess.run([sys.executable, "-m", "tokabatch", "run", job, *RUN, "-q"], cwd=here, capture_output=True, check=True)
        other = shutil.copytree(ROOT / "jobs" / "quickstart", here / "other") / "tokenizer_config.json"
        other.write_text(other.read_text() + "\n")
        for name, arguments in MISTAKES.items():
            words = [job if word == "JOB" else word for word in arguments]
            command = ("-m", "tokabatch", "run", *words)
            seconds, used = zip(*(_time(here, command) for _ in range(repeats)), strict=True)
            said = subprocess.run(
                [sys.executable, "-X", "importtime", *command], cwd=here, capture_output=True, text=True, check=False
            ).stderr
            imports = sum(int(own) for own in re.findall(r"^import time: +(\d+) \|", said, re.MULTILINE)) / 1e6
            print(f"| {name} | {min(seconds):.2f} | {statistics.median(seconds):.2f} | {min(used):.2f} | {imports:.2f} |")


def _time(here: Path, command: tuple[str, ...]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run([sys.executable, *command], cwd=here, capture_output=True, check=False)
    assert ended.returncode == 2, ended.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - begun, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
