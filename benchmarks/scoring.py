"""Multiple choice by likelihood, against transformers: python -m benchmarks.scoring [--rows 1000] [--model-shape llama-1m]

Rows with a context of token ids and some continuations are scored by a whole job (`mode: score`, from JSON lines to Parquet)
and, in the same process, by transformers as lm-eval does it: every context with each of its continuations, sorted by length, in
padded batches, logits of all positions. `--kept` has transformers compute the logits of the continuations alone
(`logits_to_keep`). Its batch size is the best of a few. Both compute a part of the rows before the clock runs, and load the
model while it does. The sums must agree.

Contexts share their first `--header` tokens, none by default. Times are wall and CPU seconds, on `--threads` threads.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.models import SHAPES, save_random_model, vocab_size
from benchmarks.scripted_engine import QUICKSTART
from tokabatch import Job
from tokabatch.report.progress import NullProgress
from tokabatch.runner.run import run

SIZES = (4, 16, 64)
"""Batches tried with transformers."""
TRIED = 64
"""Texts that they are tried on."""
Text = tuple[list[int], list[int]]


def make_rows(
    count: int, choices: int, context: int, header: int, longest: int, vocab: int
) -> list[tuple[list[int], list[list[int]]]]:
    """Contexts with their continuations of 1 to `longest` tokens."""
    rng = np.random.default_rng(0)

    def tokens(size: int) -> list[int]:
        return rng.integers(3, vocab, size).tolist()

    common = tokens(header)
    return [
        (common + tokens(context - header), [tokens(int(rng.integers(1, longest + 1))) for _ in range(choices)])
        for _ in range(count)
    ]


def by_tokabatch(rows: list[tuple[list[int], list[list[int]]]], model: Path, folder: Path) -> list[float]:
    """The sums in the order of rows and continuations."""
    source = folder / "rows.jsonl"
    with source.open("w") as file:
        for context, texts in rows:
            file.write(json.dumps({"prompt_token_ids": context, "continuations": texts}) + "\n")
    job = Job.load(
        {
            "mode": "score",
            "model": {"path": str(model), "dtype": "float32"},
            "input": {"path": str(source)},
            "engine": {"device": "cpu", "process": False},
            "output": {"path": str(folder / "out"), "columns": []},
        }
    )
    summary = run(job, NullProgress())
    assert summary.exit_code == 0, summary
    columns = ["row_index", "sample_index", "cumulative_logprob"]
    table = pq.read_table(folder / "out" / "data", columns=columns).sort_by(
        [("row_index", "ascending"), ("sample_index", "ascending")]
    )
    print(
        f"tokabatch computed {summary.prefilled_tokens:,} tokens in {summary.steps:,} steps, after {summary.load_seconds:.1f} s"
    )
    return table["cumulative_logprob"].to_pylist()


@torch.inference_mode()
def by_transformers(model: PreTrainedModel, texts: list[Text], size: int, kept: bool) -> list[float]:
    """The sums of texts behind their contexts, in the order given."""
    order = sorted(range(len(texts)), key=lambda place: -len(texts[place][0]) - len(texts[place][1]))
    sums = [0.0] * len(texts)
    for start in range(0, len(order), size):
        places = order[start : start + size]
        # The last token predicts nothing that is asked for.
        inputs = [(texts[place][0] + texts[place][1])[:-1] for place in places]
        width = max(map(len, inputs))
        padded = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in inputs])
        # Padding stands behind, where causal attention does not see it.
        first = min(len(texts[place][0]) for place in places) - 1
        logits = model(padded, logits_to_keep=width - first if kept else 0).logits
        for row, place in enumerate(places):
            context, text = texts[place]
            begin = len(context) - 1 - (first if kept else 0)
            logprobs = logits[row, begin : begin + len(text)].log_softmax(-1)
            sums[place] = float(logprobs.gather(1, torch.tensor(text)[:, None]).sum(dtype=torch.float64))
    return sums


def timed(work: Callable[[], list[float]]) -> tuple[list[float], float, float]:
    """What it gives, and the wall and CPU seconds that it takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--choices", type=int, default=4)
    parser.add_argument("--context", type=int, default=400)
    parser.add_argument("--header", type=int, default=0)
    parser.add_argument("--longest", type=int, default=10)
    parser.add_argument("--model-shape", choices=sorted(SHAPES), default="llama-1m")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kept", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = make_rows(args.rows, args.choices, args.context, args.header, args.longest, vocab_size(args.model_shape))
    texts = [(context, text) for context, choices in rows for text in choices]
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name), Path(name) / "model"
        shutil.copytree(QUICKSTART, model, ignore=shutil.ignore_patterns("*.py", "*.jsonl", "*.safetensors", "config.json"))
        save_random_model(args.model_shape, model, "float32")
        load = partial(AutoModelForCausalLM.from_pretrained, model, dtype=torch.float32)
        reference = load()
        (folder / "first").mkdir()
        by_tokabatch(rows[: TRIED // args.choices], model, folder / "first")
        ours, wall, cpu = timed(lambda: by_tokabatch(rows, model, folder))
        tried = {size: timed(lambda size=size: by_transformers(reference, texts[:TRIED], size, args.kept))[2] for size in SIZES}
        size = min(tried, key=lambda size: tried[size])
        theirs, wall_theirs, cpu_theirs = timed(lambda: by_transformers(load(), texts, size, args.kept))
    difference = max(abs(mine - other) for mine, other in zip(ours, theirs, strict=True))
    assert difference < 1e-2, difference
    print(f"largest difference of {len(texts):,} sums: {difference:.1e}; transformers in batches of {size} (tried: {tried})")
    print(f"{'':14} {'wall s':>8} {'CPU s':>8} {'texts/s':>9}")
    for label, seconds, used in (("tokabatch", wall, cpu), ("transformers", wall_theirs, cpu_theirs)):
        print(f"{label:14} {seconds:8.1f} {used:8.1f} {len(texts) / seconds:9.1f}")
    print(f"ratio {wall_theirs / wall:.2f} (wall), {cpu_theirs / cpu:.2f} (CPU)")


if __name__ == "__main__":
    main()
