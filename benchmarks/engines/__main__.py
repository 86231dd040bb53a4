"""Run one engine in this process: tune its settings, or measure it once, or profile it. `compare.py` starts this.

Reads a model folder and a workload file; writes the outputs and figures as one .npz file. Peak memory is that of this
process, which is why tuning and measuring are different runs of it.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.engines import Engine, Result, load_engine
from benchmarks.workloads import Workload

CLEARLY_WORSE = 1.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine")
    parser.add_argument("mode", choices=["tune", "measure", "profile"])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--workload", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--settings", type=json.loads, default={})
    arguments = parser.parse_args()

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    engine = load_engine(arguments.engine)
    workload = Workload.load(arguments.workload)
    settings = engine.Settings(**arguments.settings)
    if arguments.mode == "tune":
        best = tune(engine, arguments.model, workload, settings, pinned=frozenset(arguments.settings))
        arguments.out.write_text(json.dumps(asdict(best)))
    elif arguments.mode == "measure":
        save(arguments.out, engine.generate(arguments.model, workload, settings))
    else:
        arguments.out.write_text(profiled(engine, arguments.model, workload, settings))


def tune(engine: Engine, folder: Path, workload: Workload, settings: Any, pinned: frozenset[str]) -> Any:
    """Coordinate descent: along each axis of the sweep in turn, keep the fastest value. Prints every trial."""
    tried: dict[Any, float] = {}
    best = settings
    for axis in engine.SWEEP:
        if axis.field in pinned:
            continue
        for value in axis.values:
            trial = replace(best, **{axis.field: value})
            if trial not in tried:
                tried[trial] = timed(engine, folder, workload, trial)
            if tried[trial] < tried.get(best, float("inf")):
                best = trial
            elif axis.ordered and tried[trial] > CLEARLY_WORSE * tried[best]:
                break
    return best


def timed(engine: Engine, folder: Path, workload: Workload, settings: Any) -> float:
    """Seconds of one trial; a setting that the engine cannot run with costs infinity and says why."""
    try:
        result = engine.generate(folder, workload, settings)
    except (RuntimeError, ValueError, MemoryError) as error:
        print(f"    {describe(settings)}: failed: {str(error).splitlines()[0]}", flush=True)
        return float("inf")
    rate = workload.num_output_tokens / result.seconds
    print(
        f"    {describe(settings)}: {result.seconds:.1f} s ({result.cpu_seconds:.1f} s CPU), {rate:,.0f} tok/s",
        flush=True,
    )
    return result.seconds


def profiled(engine: Engine, folder: Path, workload: Workload, settings: Any) -> str:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        result = engine.generate(folder, workload, settings)
    table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40)
    return f"{describe(settings)}: {result.seconds:.1f} s under the profiler (load and warm-up included below)\n{table}"


def save(file: Path, result: Result) -> None:
    unknown = -1
    np.savez(
        file,
        tokens=np.concatenate(result.outputs),
        length=np.array([len(output) for output in result.outputs]),
        seconds=result.seconds,
        cpu_seconds=result.cpu_seconds,
        load_seconds=result.load_seconds,
        computed_prefill=unknown if result.computed_prefill_tokens is None else result.computed_prefill_tokens,
        computed_decode=unknown if result.computed_decode_tokens is None else result.computed_decode_tokens,
        peak_rss=peak_rss(),
    )


def peak_rss() -> int:
    """Bytes. On Linux `ru_maxrss` starts at the parent's peak, so the kernel's own mark of this address space is read."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def describe(settings: Any) -> str:
    return " ".join(f"{name}={value}" for name, value in asdict(settings).items())


if __name__ == "__main__":
    main()
