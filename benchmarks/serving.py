"""A server against a run of the same samples: python -m benchmarks.serving MODEL PROMPTS.jsonl [--requests 1000] [--turns 3]

Each turn runs the prompts as a job, then sends them to a server all at once, one request each, and prints samples a second of
both: of the run from the end of loading, of the server from the first request to the last answer; and the CPU seconds that
either took in all its processes. PROMPTS.jsonl has a column `question`. The client shares the machine; its CPU time is told,
too.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import cycle, islice
from pathlib import Path

import tokabatch
from benchmarks.http_load import cpu_seconds, send_all, serving


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--clients", type=int, default=1, help="processes of the client")
    chosen = parser.parse_args()
    questions = [json.loads(line)["question"] for line in chosen.prompts.read_text().splitlines()]
    prompts = [f"Question {number}: {text}" for number, text in enumerate(islice(cycle(questions), chosen.requests))]
    body = {"model": "m", "max_tokens": chosen.max_tokens, "ignore_eos": True, "temperature": 1.0}
    bodies = [json.dumps({**body, "prompt": prompt}).encode() for prompt in prompts]
    with serving(chosen.model, "model.dtype=float32", "engine.kv_cache_tokens=256K") as server:
        for _ in range(chosen.turns):
            with tempfile.TemporaryDirectory() as folder:
                rows = Path(folder) / "rows.jsonl"
                rows.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
                job = {
                    "model": {"path": chosen.model, "dtype": "float32"},
                    "input": {"path": str(rows)},
                    "generation": {"max_tokens": chosen.max_tokens, "ignore_eos": True, "temperature": 1.0},
                    "engine": {"kv_cache_tokens": 256 << 10},
                    "output": {"path": f"{folder}/out", "columns": []},
                }
                before = cpu_seconds()
                summary = tokabatch.run(job)
                run_cpu = cpu_seconds() - before
            batch = summary.samples / (summary.seconds - summary.load_seconds)
            before, client = server.cpu_seconds(), cpu_seconds()
            seconds, _ = send_all(server.url, "/v1/completions", bodies, chosen.clients)
            client = cpu_seconds() - client
            took = {role: seconds - before[role] for role, seconds in server.cpu_seconds().items()}
            served = len(prompts) / seconds
            print(f"run {batch:.1f} samples/s, server {served:.1f}, {100 * served / batch:.0f} %", flush=True)
            told = ", ".join(f"{role} {value:.1f}" for role, value in took.items())
            print(
                f"  CPU s: run {run_cpu:.1f} (loading too); server {sum(took.values()):.1f} ({told}); client {client:.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
