"""What settings of its own for each row cost: python -m benchmarks.row_settings [--rows 20000] [--rounds 3]

Whole jobs through `tokabatch.run` on a tiny random model, the same rows with and without a column `sampling_params` that
differs from row to row, in turn: nothing, a seed, a `max_tokens`, or both and a temperature. Given are the CPU seconds of this
process for the whole run and for the steps alone (from "generating" to "writing"), medians of the rounds. Samples have 16
tokens on average. With `--scripted` no model runs: the tokens are the same whatever the settings, and what is left is the
host's work. The progress display is the plain one of a pipe; `--quiet` has none.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.scripted_engine import QUICKSTART, build_worker, quickstart_script
from tokabatch import Job
from tokabatch.engine.executor import InProcessExecutor
from tokabatch.report.progress import LineProgress, ProgressSnapshot
from tokabatch.runner import make_replica
from tokabatch.runner.run import run

LONGEST = 40_000
KINDS: dict[str, Callable[[int], dict[str, Any] | None]] = {
    "none": lambda row: None,
    "seed": lambda row: {"seed": row},
    "max_tokens": lambda row: {"max_tokens": LONGEST - row},
    "all": lambda row: {"seed": row, "max_tokens": LONGEST - row, "temperature": 1 + row / 1e6},
}
"""Settings of each row. No sample gets as far as these limits, and they fall from row to row, so that the plan order, which has
the longest first, stays the same: the work is alike."""


def make_model(folder: Path) -> Path:
    """Two small layers with a long context, under the quickstart's tokenizer."""
    shutil.copytree(QUICKSTART, folder, ignore=shutil.ignore_patterns("*.py", "*.jsonl", "model.safetensors", "config.json"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=json.loads((QUICKSTART / "config.json").read_text())["vocab_size"],
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1 << 16,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


class Phases(LineProgress):
    """Notes the CPU seconds at which each phase begins."""

    def __init__(self, shown: bool) -> None:
        super().__init__(io.StringIO())
        self.interval = 1.0 if shown else 3600.0
        self.begun: dict[str, float] = {}

    def update(self, snapshot: ProgressSnapshot) -> None:
        self.begun.setdefault(snapshot.phase, time.process_time())
        super().update(snapshot)


def measure(kind: str, rows: int, quiet: bool, folder: Path) -> tuple[float, float, float]:
    """CPU seconds of the run and of its steps, and the output tokens."""
    source = folder / f"{kind}.jsonl"
    with source.open("w") as file:
        for row in range(rows):
            own = KINDS[kind](row)
            file.write(json.dumps({"prompt": f"{row:05d} ", **({"sampling_params": own} if own else {})}) + "\n")
    job = Job.load(
        {
            "model": {"path": str(folder / "model"), "dtype": "float32"},
            "input": {"path": str(source)},
            "prompt": {"chat": False},
            "generation": {"max_tokens": LONGEST, "stop_token_ids": list(range(0, 1280, 16))},
            "engine": {"device": "cpu", "max_running": 512, "process": False, "kv_cache_tokens": 262_144},
            "output": {"path": str(folder / f"out-{kind}"), "columns": []},
        }
    )
    phases = Phases(not quiet)
    begin = time.process_time()
    summary = run(job, phases, overwrite=True)
    assert (summary.exit_code, summary.ok) == (0, rows), summary
    steps = phases.begun["writing"] - phases.begun["generating"]
    return time.process_time() - begin, steps, summary.output_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--scripted", action="store_true")
    args = parser.parse_args()
    if args.scripted:
        script = quickstart_script()
        make_replica.executor_maker = lambda job, workload, sizes, *_: partial(InProcessExecutor, (script, sizes), build_worker)
    found: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "model")
        for _ in range(args.rounds):
            for kind in KINDS:
                found[kind].append(measure(kind, args.rows, args.quiet, Path(folder)))
    print(f"{'settings':12} {'run s':>8} {'steps s':>8} {'ms per 1,000 tokens':>20}")
    for kind, rounds in found.items():
        whole, steps, tokens = np.median(np.array(rounds), axis=0)
        print(f"{kind:12} {whole:8.2f} {steps:8.2f} {steps * 1e6 / tokens:20.2f}")


if __name__ == "__main__":
    main()
