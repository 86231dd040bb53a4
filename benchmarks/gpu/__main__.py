"""Measure workloads on one GPU through `tokabatch.run`, each figure next to its roofline.

    python -m benchmarks.gpu a b c --model llama-3.2-1b
    python -m benchmarks.gpu a a:engine.hydragen=false --profile
    python -m benchmarks.gpu micro a-full:prompts=32 --model llama-3.1-8b --out results
    python -m benchmarks.gpu real:generation.n=16 --model-folder MODEL --gsm8k FOLDER      # see `benchmarks.gpu.real`
    python -m benchmarks.gpu a b c --model tiny --scale 0.02      # the same code on a CPU

A name may carry job keys (`a:model.dtype=float16,engine.page_size=64`) and `prompts=N`, which takes the first N prompts. Every
pass is a process of its own, ended after `--timeout` seconds; figures are printed as they come and kept in OUT/results.jsonl.
With `--keep` a pass's output stays there, too, for `tokabatch profile` and `tokabatch plan --simulate` to compare with.
With `--profile` each name runs once more, up to the recorded steps, for the device's idle time and its largest kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu import jobs
from benchmarks.gpu.floor import workload_floor
from benchmarks.gpu.models import write_model
from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.table import TABLE_HEAD, describe_pass, describe_workload, table_line
from benchmarks.gpu.trace import TraceFigures, describe_trace, read_trace
from benchmarks.gpu.whole_pass import Figures
from benchmarks.gpu.workloads import WORKLOADS, make_gpu_workload
from benchmarks.workloads import Workload
from tokabatch.forecast.roofline import H200
from tokabatch.model.families import read_spec

ROOT = Path(__file__).parent.parent.parent
SHARED_MEMORY = Path("/dev/shm")
MICRO, REAL = "micro", "real"
RUNNING = 8192
"""Samples at once that the roofline assumes: tokabatch's limit on a GPU."""
PROFILED_STEPS = 5
PROFILE_AT = {"a": 60, "a-full": 100, "b": 200, "b-full": 300, "c": 30, "d": 40}
"""The step from which a workload is in its steady state, at full size."""


@dataclass(frozen=True, slots=True)
class Part:
    """One name of the command line: a workload, how many prompts of it, and job keys to override."""

    label: str
    workload: str
    prompts: int | None
    overrides: tuple[str, ...]

    @property
    def hydragen(self) -> bool:
        return not any(text.replace(" ", "").lower() == "engine.hydragen=false" for text in self.overrides)


@dataclass(frozen=True, slots=True)
class Places:
    """`scratch` holds models and inputs (memory where there is enough), `out` what is kept."""

    scratch: Path
    out: Path
    timeout_s: float
    keep_output: bool = False


def main() -> None:
    # As an exception, so that a child with all its processes is ended first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    arguments = parse_arguments()
    parts = [parse_part(text) for text in arguments.names if text.partition(":")[0] not in (MICRO, REAL)]
    out: Path = arguments.out or Path(tempfile.mkdtemp(prefix="tokabatch-gpu-"))
    out.mkdir(parents=True, exist_ok=True)
    places = Places(arguments.scratch or default_scratch(arguments.model), out, arguments.timeout, arguments.keep)
    if MICRO in arguments.names:
        command = ["benchmarks.gpu.micro", *(["--small"] if arguments.model.startswith("tiny") else [])]
        run_child(command, places.timeout_s)
    for text in arguments.names:
        if text.partition(":")[0] == REAL:
            run_child(real_command(text, arguments.model_folder, arguments.gsm8k), places.timeout_s)
    if not parts:
        return
    model = ensure_model(arguments.model, places.scratch)
    lines: list[str] = []
    for part in parts:
        try:
            lines.append(measure(part, model, places, arguments.scale, arguments.seed, arguments.profile))
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            lines.append(f"| {arguments.model} | {part.label} | FAILED: {' '.join(str(error).split())[:160]} |")
            print(lines[-1], flush=True)
    print("\n" + "\n".join((TABLE_HEAD, *lines)), flush=True)
    if any("FAILED" in line for line in lines):
        sys.exit(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = f"{MICRO}, {REAL}, or of {', '.join(WORKLOADS)}, with :KEY=VALUE,..."
    parser.add_argument("names", nargs="+", metavar="NAME", help=names)
    parser.add_argument("--model", choices=list(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--model-folder", type=Path, help=f"the trained model of {REAL}")
    parser.add_argument("--gsm8k", type=Path, help=f"the data of {REAL}: a folder with test.jsonl and train*.jsonl")
    parser.add_argument("--profile", action="store_true", help="also record a few steps of each")
    parser.add_argument("--keep", action="store_true", help="keep each pass's job and output in OUT, by its name")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all counts and lengths")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=400.0, help="seconds that one pass may take")
    parser.add_argument("--out", type=Path, help="folder for results and traces (default: a new temporary one)")
    parser.add_argument("--scratch", type=Path, help="folder for models and inputs (default: memory, or a temporary one)")
    return parser.parse_args()


def real_command(text: str, model: Path | None, gsm8k: Path | None) -> list[str]:
    """The arguments of `benchmarks.gpu.real` for one name. Raises SystemExit where the model or the data are not said."""
    if model is None or gsm8k is None:
        raise SystemExit(f"{REAL} runs a trained model on GSM8K; write --model-folder MODEL and --gsm8k FOLDER")
    keys = [key for key in text.partition(":")[2].split(",") if key]
    return ["benchmarks.gpu.real", str(model.resolve()), str(gsm8k.resolve()), *keys]


def parse_part(text: str) -> Part:
    name, _, rest = text.partition(":")
    if name not in WORKLOADS:
        raise SystemExit(f"no workload {name!r}; there are {', '.join(WORKLOADS)}, {REAL} and {MICRO}")
    keys = [key for key in rest.split(",") if key]
    prompts = [int(key.partition("=")[2]) for key in keys if key.startswith("prompts=")]
    return Part(text, name, prompts[0] if prompts else None, tuple(key for key in keys if not key.startswith("prompts=")))


def default_scratch(model: str) -> Path:
    """Memory where the model fits twice, so that loading is not the disk's time."""
    shape = SHAPES[model]
    layer = sum(num_in * num_out for _, num_in, num_out in shape.products)
    needed = 2 * (shape.layers * layer + 2 * shape.vocab * shape.hidden)
    in_memory = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 2 * needed
    return (SHARED_MEMORY if in_memory else Path(tempfile.gettempdir())) / "tokabatch-gpu-models"


def ensure_model(name: str, scratch: Path) -> Path:
    """The model's folder, written where it is not there yet."""
    folder, mark = scratch / name, scratch / name / "complete"
    if not mark.exists():
        began = time.perf_counter()
        size = write_model(name, folder)
        mark.touch()
        print(f"{name}: {size / 1e9:.2f} GB of random weights in {folder}, {time.perf_counter() - began:.1f} s", flush=True)
    return folder


def measure(part: Part, model: Path, places: Places, scale: float, seed: int, profile: bool) -> str:
    """Run one part; returns its line of the table. Raises CalledProcessError, TimeoutExpired or ValueError."""
    spec = read_spec(model)
    workload = make_gpu_workload(part.workload, spec.vocab_size, scale, seed)
    workload = workload if part.prompts is None else workload.take(part.prompts)
    print(f"\n== {model.name} {part.label}: {describe_workload(workload)}", flush=True)
    source = places.scratch / f"{model.name}-{part.workload}.parquet"
    workload.save(source.with_suffix(".npz"))
    jobs.write_input(workload, source)
    job = jobs.job(model, source, places.out / "completions", workload)
    figures = run_pass(part, job, places, workload)
    floor = workload_floor(spec, H200, workload, RUNNING, part.hydragen)
    print("\n".join(describe_pass(figures, floor, H200.name)), flush=True)
    keep(places, model.name, part, figures=asdict(figures), roofline_rate=floor.rate)
    idle = None
    if profile:
        found = profile_pass(part, job, places, model.name, figures.steps)
        idle = found.idle_share if found and found.on_device else None
        keep(places, model.name, part, profile=found and asdict(found))
    return table_line(model.name, part.label, figures, floor, idle)


def keep(places: Places, model: str, part: Part, **values: object) -> None:
    with (places.out / "results.jsonl").open("a") as file:
        file.write(json.dumps({"model": model, "part": part.label, **values}) + "\n")


def run_pass(part: Part, job: dict[str, Any], places: Places, workload: Workload) -> Figures:
    """The measured pass, its output checked and removed, unless it is to be kept."""
    figures = run_job(part, job, places, [])
    jobs.check_output(places.out / "completions", workload)
    if places.keep_output:
        kept = places.out / re.sub("[^a-z0-9]+", "-", part.label.lower())
        shutil.rmtree(kept, ignore_errors=True)
        (places.out / "completions").rename(kept)
        kept.with_suffix(".json").write_text(json.dumps(job, indent=2))
    else:
        shutil.rmtree(places.out / "completions")
    if figures.exit_code:
        raise ValueError(f"the run ended with exit code {figures.exit_code}")
    return figures


def profile_pass(part: Part, job: dict[str, Any], places: Places, model: str, steps: int) -> TraceFigures | None:
    """Another pass, of `steps` steps if it ran to its end, up to the recorded ones; prints what the device did."""
    file = places.out / f"trace-{model}-{re.sub('[^a-z0-9]+', '-', part.label.lower())}.json.gz"
    file.unlink(missing_ok=True)
    start = max(1, min(PROFILE_AT[part.workload], steps // 2))
    section = {"trace": {"path": str(file), "start": start, "steps": PROFILED_STEPS}}
    run_job(part, job | section, places, ["--stop-file", str(file)])
    shutil.rmtree(places.out / "completions")
    if not file.exists():
        print("  no trace was written", flush=True)
        return None
    found = read_trace(file)
    print(f"  trace {file}, {file.stat().st_size / 1e6:.1f} MB")
    print("\n".join(f"  {line}" for line in describe_trace(found, PROFILED_STEPS)), flush=True)
    return found


def run_job(part: Part, job: dict[str, Any], places: Places, options: list[str]) -> Figures:
    job_file, figures_file = places.out / "job.json", places.out / "figures.json"
    job_file.write_text(json.dumps(job, indent=2))
    figures_file.unlink(missing_ok=True)
    shutil.rmtree(places.out / "completions", ignore_errors=True)
    command = ["benchmarks.gpu.whole_pass", str(job_file), str(figures_file), *part.overrides, *options]
    run_child(command, places.timeout_s)
    return Figures.load(figures_file)


def run_child(command: list[str], timeout_s: float) -> None:
    """A module in a process group of its own, all of it ended after `timeout_s`. Raises SubprocessError where it fails."""
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    child = subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, env=os.environ | quiet, start_new_session=True)
    try:
        code = child.wait(timeout_s)
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        raise
    if code:
        raise subprocess.CalledProcessError(code, command)


if __name__ == "__main__":
    main()
