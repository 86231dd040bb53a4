"""A server against a run of workload `b`: python -m benchmarks.gpu.server [--model llama-3.2-1b] [--turns 2] [--exact 64]

The workload is run as a job, then its prompts are sent to a server all at once, one request each, over connections that are
open already; each `--turns` times. Output tokens a second of both: of the run from the first step to the last output on disk,
of the server from the first request to the last answer; the CPU seconds of each process of the server and of the client show
which is the bottleneck. `--exact N` sends N of the prompts in float64 with one seed, alone and in company, and compares texts
and log-probabilities with those of a run. On a CPU: --model tiny --scale 0.02. `--absent h200` measures what the host does
beside steps at the pace of a GPU that is not here (`benchmarks.absent_gpu`); nothing is compared then.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.gpu import jobs
from benchmarks.gpu.__main__ import default_scratch, ensure_model, run_child
from benchmarks.gpu.models import write_model
from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.whole_pass import Figures
from benchmarks.gpu.workloads import make_gpu_workload
from benchmarks.http_load import Server, cpu_seconds, send_all, serving
from benchmarks.workloads import Workload
from tokabatch.model.families import read_spec

URL = "/v1/completions"
CLOSE = 1e-9
"""By which log-probabilities in float64, told as float32, may differ at most."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="keys of model and engine, for run and server")
    parser.add_argument("--model", choices=list(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all counts and lengths")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--clients", type=int, default=6, help="processes of the client")
    parser.add_argument("--exact", type=int, default=64, metavar="N", help="prompts that are compared in float64; 0 for none")
    parser.add_argument("--timeout", type=float, default=200.0, help="seconds that one run may take")
    parser.add_argument("--scratch", type=Path, help="folder for the model (default: memory, or a temporary one)")
    parser.add_argument("--absent", metavar="GPU", help="a GPU that is not here, such as h200")
    chosen = parser.parse_args()
    scratch = chosen.scratch or default_scratch(chosen.model)
    through: list[str] = []
    if chosen.absent:
        model, through, chosen.exact = scratch / f"{chosen.model}-sparse", ["benchmarks.absent_gpu", chosen.absent], 0
        write_model(chosen.model, model, sparse=True)
    else:
        model = ensure_model(chosen.model, scratch)
    workload = make_gpu_workload("b", read_spec(model).vocab_size, chosen.scale)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ran = [run(model, workload, folder, chosen.settings, chosen.timeout, through).rate for _ in range(chosen.turns)]
        if ran:
            with serving(str(model), *chosen.settings, through=through) as server:
                send_all(server.url, URL, bodies(workload.take(8)), 1)
                for _ in ran:
                    serve(server, workload, chosen.clients, max(ran))
        if chosen.exact:
            few = workload.take(chosen.exact)
            settings = ["model.dtype=float64", *chosen.settings]
            run(model, few, folder, [*settings, "generation.logprobs=0"], chosen.timeout)
            with serving(str(model), *settings) as server:
                compare(server, few, folder)


def run(
    model: Path, workload: Workload, folder: Path, settings: Sequence[str], timeout_s: float, through: Sequence[str] = ()
) -> Figures:
    """The workload as a job, in a process of its own; its output stays in `folder`. `through` as `serving` has it."""
    source, output, job, figures = (folder / each for each in ("rows.parquet", "completions", "job.json", "figures.json"))
    shutil.rmtree(output, ignore_errors=True)
    jobs.write_input(workload, source)
    job.write_text(json.dumps(jobs.job(model, source, output, workload)))
    run_child([*through, "benchmarks.gpu.whole_pass", str(job), str(figures), *settings], timeout_s)
    jobs.check_output(output, workload)
    found = Figures.load(figures)
    print(f"run on {found.device}: {found.rate:,.0f} output tokens/s, {found.whole_seconds:.2f} s", flush=True)
    return found


def serve(server: Server, workload: Workload, clients: int, best: float) -> None:
    """Send the workload, and say how that compares with a run of `best` output tokens a second."""
    before, own = server.cpu_seconds(), cpu_seconds()
    seconds, answers = send_all(server.url, URL, bodies(workload), clients)
    took = {role: used - before[role] for role, used in server.cpu_seconds().items()}
    tokens = sum(json.loads(answer)["usage"]["completion_tokens"] for answer in answers)
    if tokens != workload.num_output_tokens:
        raise SystemExit(f"the server drew {tokens:,} tokens, not {workload.num_output_tokens:,}")
    rate = tokens / seconds
    print(f"server: {rate:,.0f} output tokens/s, {seconds:.2f} s: {100 * rate / best:.1f} % of the best run", flush=True)
    told = ", ".join(f"{role} {used:.1f}" for role, used in took.items())
    print(f"  CPU s: {told}; {clients} clients {cpu_seconds() - own:.1f}", flush=True)


def compare(server: Server, workload: Workload, folder: Path) -> None:
    """Ends the program where the server's answers are not those of the run in `folder`."""
    files = sorted((folder / "completions" / "data").glob("part-*.parquet"))
    rows = pa.concat_tables([pq.read_table(file) for file in files]).sort_by("row_index").to_pylist()
    wanted = [(row["text"], [token["logprob"] for token in row["logprobs"]]) for row in rows]
    asked = {"seed": workload.seed, "logprobs": 0, **settings_of(workload, 0)}
    together = json.dumps({**asked, "prompt": [prompt.tolist() for prompt in workload.prompts]}).encode()
    for name, company in (("alone", []), ("in company", bodies(workload))):
        _, answers = send_all(server.url, URL, [together, *company], 1)
        choices = sorted(json.loads(answers[0])["choices"], key=lambda choice: choice["index"])
        found = [(choice["text"], choice["logprobs"]["token_logprobs"]) for choice in choices]
        texts = sum(one[0] == other[0] for one, other in zip(wanted, found, strict=True))
        pairs = [pair for one, other in zip(wanted, found, strict=True) for pair in zip(one[1], other[1], strict=True)]
        worst = max(abs(one - other) for one, other in pairs)
        print(f"float64, {name}: {texts} of {len(wanted)} texts are the run's, log-probabilities differ by {worst:.2g} at most")
        if texts < len(wanted) or worst > CLOSE:
            sys.exit(1)


def bodies(workload: Workload) -> list[bytes]:
    """A request for each prompt."""
    prompts = enumerate(workload.prompts)
    return [json.dumps({**settings_of(workload, at), "prompt": prompt.tolist()}).encode() for at, prompt in prompts]


def settings_of(workload: Workload, prompt: int) -> dict[str, Any]:
    """What a request for one prompt says beside it."""
    most = int(workload.output_length_PN[prompt, 0])
    return {"model": "m", "max_tokens": most, "temperature": workload.temperature, "ignore_eos": True}


if __name__ == "__main__":
    main()
