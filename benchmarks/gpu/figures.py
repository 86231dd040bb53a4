"""The figures of the README and of this folder's README on GPUs, one command after another.

    python -m benchmarks.gpu.figures one --model-folder MODEL --gsm8k FOLDER     # one GPU, about 30 minutes
    python -m benchmarks.gpu.figures two                                         # GPUs of one host
    python -m benchmarks.gpu.figures four --model-folder MODEL --gsm8k FOLDER
    python -m benchmarks.gpu.figures one real fp8 --seconds 560                  # some, as far as they fit in 560 s

Each command has its own time limit, after which it is killed with all its processes; the following commands still run.
--seconds limits the total: the command that runs at that moment is killed, and the rest are skipped. At the end there is a line
with the outcome of each command. --list only prints the commands.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
LEAST_SECONDS, GRACE_SECONDS = 20.0, 10.0


@dataclass(frozen=True, slots=True)
class Figure:
    """A command, of which `{real}` stands for the trained model and its data, and the seconds it takes at most."""

    name: str
    seconds: int
    command: str


GPU = "-m benchmarks.gpu"
FIGURES = {
    "one": (
        Figure("real", 150, f"{GPU} real {{real}} --timeout 140"),
        Figure("1b", 150, f"{GPU} a b c a-full:prompts=48 --profile --timeout 100"),
        Figure("fp8", 90, f"{GPU} a:model.quantization=fp8 a:model.quantization=fp8,engine.kv_cache_dtype=fp8 --timeout 60"),
        Figure("qwen3", 80, f"{GPU} a b --model qwen3-0.6b --profile --timeout 60"),
        Figure("8b", 240, f"{GPU} c b --model llama-3.1-8b --profile --timeout 120"),
        Figure("tests", 400, "-m pytest -q -m gpu -n 12"),
        Figure("server", 240, "-m benchmarks.gpu.server --turns 2"),
        Figure("faults", 540, "-m benchmarks.gpu_faults"),
    ),
    "two": (
        Figure("8b", 300, f"{GPU} b:engine.replicas=1 b:engine.replicas=2 --model llama-3.1-8b --timeout 140"),
        Figure("1b", 240, f"{GPU} a-full:prompts=64,engine.replicas=1 a-full:prompts=64,engine.replicas=2 --timeout 120"),
        Figure("ranks", 240, f"{GPU} b:engine.tensor=2 b:engine.pipeline=2 --model llama-3.1-8b"),
        Figure("exchange", 200, "-m benchmarks.gpu.ranks sums overlap sampling"),
    ),
    "four": (
        Figure("real", 240, f"{GPU} real:engine.replicas=1 real:engine.replicas=4 {{real}} --timeout 110"),
        Figure("1b", 300, f"{GPU} a-full:prompts=64,engine.replicas=1 a-full:engine.replicas=4 --timeout 150"),
        Figure("8b", 240, f"{GPU} b:engine.replicas=4 b:engine.replicas=1,engine.tensor=4 --model llama-3.1-8b --timeout 100"),
        Figure("70b", 560, f"{GPU} d:engine.tensor=4 d:engine.tensor=4,engine.async_tp=false b:prompts=1000,engine.tensor=4 "
               "b:prompts=1000,engine.pipeline=4 --model llama-3.1-70b --timeout 120"),
        Figure("exchange", 200, "-m benchmarks.gpu.ranks sums overlap sampling --ranks 4"),
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("devices", choices=list(FIGURES))
    parser.add_argument("names", nargs="*", metavar="NAME", help="some of that list; all without names")
    parser.add_argument("--model-folder", default="MODEL", help="the trained model of `real`")
    parser.add_argument("--gsm8k", default="FOLDER", help="the data of `real`: a folder with test.jsonl and train*.jsonl")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="all of it together")
    parser.add_argument("--list", action="store_true", help="print the commands")
    chosen = parser.parse_args()
    unknown = set(chosen.names) - {figure.name for figure in FIGURES[chosen.devices]}
    if unknown:
        parser.error(
            f"no figure {', '.join(sorted(unknown))}; there are {', '.join(each.name for each in FIGURES[chosen.devices])}"
        )
    real = ["--model-folder", chosen.model_folder, "--gsm8k", chosen.gsm8k]
    # As an exception, so that a command with all its processes is ended first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    ends, results = time.monotonic() + chosen.seconds, list[str]()
    for figure in FIGURES[chosen.devices]:
        if chosen.names and figure.name not in chosen.names:
            continue
        command = [part for word in figure.command.split() for part in (real if word == "{real}" else [word])]
        print(f"\n=== {figure.name}: python {' '.join(command)}", flush=True)
        if not chosen.list:
            results.append(f"{figure.name}: {measure(command, min(figure.seconds, ends - time.monotonic()))}")
            print(f"=== {results[-1]}", flush=True)
    print("\n" + "\n".join(results), flush=True)
    sys.exit(any("exit code 0" not in result for result in results))


def measure(command: list[str], seconds: float) -> str:
    """Run it with a time limit and return how it ended, in words. Its processes end with it."""
    if seconds < LEAST_SECONDS:
        return "left out, no time"
    began = time.monotonic()
    child = subprocess.Popen([sys.executable, *command], cwd=ROOT, start_new_session=True)
    try:
        return f"exit code {child.wait(seconds)}, {time.monotonic() - began:.0f} s"
    except subprocess.TimeoutExpired:
        return f"ended after {seconds:.0f} s"
    finally:
        if child.poll() is None:
            # Its children have groups of their own: the signal lets it end them.
            os.killpg(child.pid, signal.SIGTERM)
            try:
                child.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


if __name__ == "__main__":
    main()
