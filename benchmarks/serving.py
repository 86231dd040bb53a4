"""A server against a run of the same samples: python -m benchmarks.serving MODEL PROMPTS.jsonl [--requests 1000] [--turns 3]

Each turn runs the prompts as a job, then sends them to a server all at once, one request each, and prints samples a second of
both: of the run from the end of loading, of the server from the first request to the last answer. PROMPTS.jsonl has a column
`question`. The client shares the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

import httpx

import tokabatch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    chosen = parser.parse_args()
    questions = [json.loads(line)["question"] for line in chosen.prompts.read_text().splitlines()]
    prompts = [f"Question {number}: {text}" for number, text in enumerate(islice(cycle(questions), chosen.requests))]
    command = [
        sys.executable,
        "-m",
        "tokabatch",
        "serve",
        chosen.model,
        "server.port=0",
        "server.name=m",
        "model.dtype=float32",
    ]
    server = subprocess.Popen([*command, "engine.kv_cache_tokens=256K"], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    url = next(found[1] for line in server.stderr if (found := re.search(r"(http://.*)/v1;", line)))
    try:
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
                summary = tokabatch.run(job)
            batch = summary.samples / (summary.seconds - summary.load_seconds)
            began = time.perf_counter()
            asyncio.run(_ask(url, prompts, chosen.max_tokens))
            served = len(prompts) / (time.perf_counter() - began)
            print(f"run {batch:.1f} samples/s, server {served:.1f}, {100 * served / batch:.0f} %", flush=True)
    finally:
        server.terminate()
        server.wait()


async def _ask(url: str, prompts: list[str], max_tokens: int) -> None:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        body = {"model": "m", "max_tokens": max_tokens, "ignore_eos": True, "temperature": 1.0}
        answers = await asyncio.gather(*(client.post("/v1/completions", json={**body, "prompt": each}) for each in prompts))
    assert all(answer.status_code == 200 for answer in answers), next(a.text for a in answers if a.status_code != 200)


if __name__ == "__main__":
    main()
