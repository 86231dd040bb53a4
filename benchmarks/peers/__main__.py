"""Measure another engine on a workload of the GPU benchmark, in this Python.

    python -m benchmarks.peers vllm a --model MODEL_FOLDER
    python -m benchmarks.peers vllm b --model MODEL_FOLDER --set max_num_seqs=4096
    python -m benchmarks.peers openai_server workload.npz --model MODEL_FOLDER --set url=http://127.0.0.1:10210

The workload is a name (the same prompts and lengths wherever it is made) or a file that `python -m benchmarks.gpu` left. The
model's folder is one that it wrote.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from benchmarks.engines import parse_settings
from benchmarks.gpu.floor import workload_floor
from benchmarks.gpu.workloads import WORKLOADS, make_gpu_workload
from benchmarks.peers import NotInstalledError, Served, load_peer, peer_keys
from benchmarks.workloads import Workload
from tokabatch.forecast.roofline import H200
from tokabatch.model.families import read_spec

RUNNING = 8192


def main() -> None:
    arguments = parse_arguments()
    try:
        peer = load_peer(arguments.engine)
    except NotInstalledError as error:
        sys.exit(str(error))
    settings = parse_settings(arguments.engine, peer.Settings, arguments.set or [])
    spec = read_spec(arguments.model)
    workload = read_workload(arguments.workload, spec.vocab_size, arguments.scale, arguments.seed)
    served = peer.serve(arguments.model, workload, settings)
    check(served, workload)
    floor = workload_floor(spec, H200, workload, RUNNING)
    rate = served.output_tokens / served.seconds
    chosen = " ".join(f"{field.name}={getattr(settings, field.name)}" for field in fields(settings))
    print(
        f"{arguments.engine} {workload.name}: {served.seconds:.2f} s, {rate:,.0f} output tokens/s, {rate / floor.rate:.0%} of "
        f"the roofline's {floor.rate:,.0f} ({H200.name}); started in {served.load_seconds:.1f} s; {chosen}",
        flush=True,
    )
    if arguments.out:
        record: dict[str, Any] = {"engine": arguments.engine, "workload": workload.name, "settings": asdict(settings)}
        with arguments.out.open("a") as file:
            file.write(json.dumps(record | asdict(served) | {"roofline_rate": floor.rate}) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=peer_keys())
    parser.add_argument("workload", help=f"of {', '.join(WORKLOADS)}, or a .npz file")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--set", action="append", metavar="FIELD=VALUE", help="a setting of the engine; repeat")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all counts and lengths of a named workload")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON lines file to add the figures to")
    return parser.parse_args()


def read_workload(name: str, vocab: int, scale: float, seed: int) -> Workload:
    if name in WORKLOADS:
        return make_gpu_workload(name, vocab, scale, seed)
    if not Path(name).is_file():
        sys.exit(f"no workload {name!r}: it is neither a file nor one of {', '.join(WORKLOADS)}")
    return Workload.load(Path(name))


def check(served: Served, workload: Workload) -> None:
    """An engine that emits other lengths did other work."""
    if (served.samples, served.output_tokens) != (workload.num_samples, workload.num_output_tokens):
        sys.exit(
            f"void: {served.samples:,} samples of {served.output_tokens:,} tokens came out, not {workload.num_samples:,} of "
            f"{workload.num_output_tokens:,}"
        )


if __name__ == "__main__":
    main()
