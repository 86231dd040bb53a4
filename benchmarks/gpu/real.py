"""A real experiment as a benchmark: GSM8K by repeated sampling, end of sequence and stop strings decide how long samples are.

    python -m benchmarks.gpu real --model-folder MODEL --gsm8k FOLDER
    python -m benchmarks.gpu.real MODEL FOLDER generation.n=4 input.limit=50      # the same, any key of the job overridden

The model is any trained one without a chat format (SmolLM2-135M, for example): eight worked examples, 64 samples a question,
`stop` before the next question. FOLDER holds test.jsonl, and train*.jsonl for the examples, as the hub has them. Unlike in the
other workloads, no lengths are drawn beforehand: steps hold prompts and samples of all lengths side by side, up to the tail.

What is printed of it: output tokens a second of the steps' time (from result to result, the first steps included), the least
that the roofline of the device allows for these very steps, the tail's share, what launching and scheduling took the host, and
how long steps of so many samples took.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.cpu_shares import CpuShares
from tokabatch import Job
from tokabatch.forecast.step_log import Steps
from tokabatch.output.folder import OutputFolder
from tokabatch.output.steps import read_steps
from tokabatch.report.progress import NullProgress, ProgressSnapshot
from tokabatch.report.render import plain
from tokabatch.report.summary import RunSummary, run_sections
from tokabatch.runner.run import run

SHOTS, SAMPLES = 8, 64
BUCKETS = (0, 64, 512, 2048, 4096, 8192, 16384, 32768, 1 << 30)
"""Samples running, for the table of step times."""


class CpuWatch(NullProgress):
    """A display that shows nothing and looks at the processes' CPU time."""

    interval = 0.1

    def __init__(self) -> None:
        self.shares = CpuShares()

    def update(self, snapshot: ProgressSnapshot) -> None:
        if snapshot.phase == "generating":
            self.shares.look()


def job(model: Path, gsm8k: Path, output: Path) -> dict[str, Any]:
    """The experiment; engine settings are tokabatch's own."""
    examples = sorted(gsm8k.glob("train*.jsonl"))
    if not examples:
        raise SystemExit(f"{gsm8k} holds no train*.jsonl; put GSM8K's training rows there, eight are enough")
    return {
        "model": {"path": str(model), "dtype": "bfloat16"},
        "input": {"path": str(gsm8k / "test.jsonl")},
        "prompt": {
            "template": "Question: {{ question }}\nAnswer:",
            "few_shot": {
                "path": str(examples[0]),
                "k": SHOTS,
                "template": "Question: {{ question }}\nAnswer: {{ answer }}\n\n",
            },
            "chat": False,
        },
        "generation": {
            "n": SAMPLES, "temperature": 0.6, "top_p": 1.0, "top_k": None, "max_tokens": 320, "stop": ["\nQuestion:"],
        },
        "output": {"path": str(output)},
        "verify": {"kind": "gsm8k", "answer": "answer"},
    }  # fmt: skip


def describe(summary: RunSummary, steps: Steps) -> Iterator[str]:
    """Lines to print."""
    taken, floor = summary.step_seconds, summary.predicted_seconds
    yield f"output tokens   {summary.output_tokens:,} of {summary.samples:,} samples ({summary.exit_code=})"
    yield f"steps           {len(steps):,} in {taken:.2f} s: {summary.output_tokens / taken:,.0f} output tokens/s"
    if floor is not None:
        rate = summary.output_tokens / floor
        yield f"predicted       {floor:.2f} s by {summary.predicted_by}: {rate:,.0f} output tokens/s ({floor / taken:.0%})"
    yield f"whole pass      {summary.work_seconds:.2f} s from the first step on, {summary.load_seconds:.1f} s before it"
    yield f"tail            {summary.tail_seconds:.2f} s, {summary.tail_seconds / taken:.1%}"
    per_step = 1e3 / max(len(steps), 1)
    yield (
        f"host            launching {summary.launch_seconds:.2f} s ({per_step * summary.launch_seconds:.2f} ms a step), "
        f"deciding and applying {summary.host_seconds:.2f} s ({per_step * summary.host_seconds:.2f} ms a step)"
    )
    yield f"cache           {summary.kv_use:.1%} in use on average, at most {int(steps['running'].max()):,} samples running"
    if summary.pass_at_k:
        yield f"pass@1          {summary.pass_at_k.get(1, float('nan')):.4f}"
    yield "running         steps   seconds  ms a step (10 %, median, 90 %)   tokens a step  of prompts"
    running, seconds = steps["running"], steps["seconds"]
    for low, high in pairwise(BUCKETS):
        chosen = (running > low) & (running <= high)
        if chosen.any():
            spread = " ".join(f"{1e3 * value:7.2f}" for value in np.quantile(seconds[chosen], (0.1, 0.5, 0.9)))
            tokens, decoded = steps["tokens"][chosen].mean(), steps["decoded"][chosen].mean()
            yield (
                f"{low + 1:6,}..{high:<10,} {chosen.sum():5}  {seconds[chosen].sum():7.2f}  {spread}          "
                f"{tokens:8,.0f}  {tokens - decoded:8,.0f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("gsm8k", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="job keys to change")
    parser.add_argument("--out", type=Path, help="folder of the results, kept (default: a temporary one)")
    # Keys may stand behind the option, too.
    arguments = parser.parse_intermixed_args()
    scratch = Path(tempfile.mkdtemp(prefix="tokabatch-real-"))
    output, watch = arguments.out or scratch / "out", CpuWatch()
    try:
        summary = run(Job.load(job(arguments.model, arguments.gsm8k, output), *arguments.overrides), watch, overwrite=True)
        print(plain([section for section in run_sections(summary) if section.title == "Replicas"]), flush=True)
        print(f"CPU             {watch.shares.describe()}")
        print("\n".join(describe(summary, Steps(read_steps(OutputFolder(output)) or {}))), flush=True)
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
