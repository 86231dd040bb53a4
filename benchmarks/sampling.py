"""Milliseconds that sampling takes on a GPU: python -m benchmarks.sampling [--vocab 128256] [--rows 8192] [--kernels]

Logits are bfloat16, of two kinds: `peaked` falls off like a power of the rank, as a language model's do (top-p 0.95 keeps some
hundred tokens), `flat` is normal with a deviation of 3 (top-p 0.95 keeps a tenth of the vocabulary: every pass of the search
reads everything). Every row of a case has the parameters that the case names; `half top-p` has them on every second row.
Figures are means of a number of calls queued together, timed by events on the device; where a call is shorter than what the
host takes to launch it, that is what shows: `host` is the host's time per call. `bound` is the time in which the device would
read the logits once at the bandwidth that it copies with.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from tokabatch.model.sampling import triton_filters
from tokabatch.model.sampling.sampler import sample
from tokabatch.model.sampling.slot_table import SamplerInputs, SlotTable, packed
from tokabatch.scheduling.contracts import SlotInit

CASES: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "logprobs 0": {"logprobs": 0},
    "logprobs 5": {"logprobs": 5},
    "logprobs 20": {"logprobs": 20},
    "top-k 50": {"top_k": 50},
    "top-p 0.95": {"top_p": 0.95},
    "half top-p": {"top_p": 0.95, "every": 2},
    "min-p 0.05": {"min_p": 0.05},
    "all": {"top_k": 50, "top_p": 0.95, "min_p": 0.05, "logprobs": 5},
}


def inputs_of(rows: int, case: dict[str, float], device: torch.device) -> SamplerInputs:
    """A step that samples every slot of a table, all by the case's parameters (or every so many)."""
    chosen = np.arange(rows) % int(case.get("every", 1)) == 0

    def column(name: str, off: float, dtype: type) -> np.ndarray:
        return np.where(chosen, case.get(name, off), off).astype(dtype)

    slots = np.arange(rows, dtype=np.int32)
    table = SlotTable(rows, device)
    inits = SlotInit(
        slot=slots,
        row=np.arange(rows),
        sample=slots,
        seed=np.zeros(rows, np.int64),
        temperature=column("temperature", 0.8, np.float32),
        top_p=column("top_p", 1.0, np.float32),
        top_k=column("top_k", 0, np.int32),
        min_p=column("min_p", 0.0, np.float32),
        logprobs=column("logprobs", -1, np.int32),
    )
    table.open(*packed(inits))
    on_device = torch.from_numpy(slots).to(device)
    return table.inputs(slots, on_device, on_device + 100)


def logits_of(kind: str, rows: int, vocab: int, device: torch.device) -> torch.Tensor:
    torch.manual_seed(0)
    logits_SV = torch.empty(rows, vocab, dtype=torch.bfloat16, device=device)
    return logits_SV.normal_(0.0, 3.0) if kind == "flat" else logits_SV.exponential_(1 / 1.6)


def timed(logits_SV: torch.Tensor, inputs: SamplerInputs, last_token: torch.Tensor, calls: int) -> tuple[float, float]:
    """Milliseconds per call on the device, and on the host."""
    for _ in range(3):
        sample(logits_SV, inputs, last_token)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began = time.perf_counter()
    start.record()
    for _ in range(calls):
        sample(logits_SV, inputs, last_token)
    end.record()
    host = time.perf_counter() - began
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls, host * 1e3 / calls


def print_kernels(logits_SV: torch.Tensor, inputs: SamplerInputs, last_token: torch.Tensor) -> None:
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(5):
            sample(logits_SV, inputs, last_token)
        torch.cuda.synchronize()
    for event in trace.key_averages():
        if event.device_time_total:
            print(f"    {event.key[:60]:<60} {event.count // 5:>3} x {event.device_time_total / event.count / 1e3:8.4f} ms")


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    target.copy_(source)
    start.record()
    for _ in range(10):
        target.copy_(source)
    end.record()
    torch.cuda.synchronize()
    return 20 * source.numel() / (start.elapsed_time(end) / 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[128_256, 151_936])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 256, 8192])
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--kernels", action="store_true", help="name each kernel of a call and its time")
    parser.add_argument("--stages", type=int, nargs="+", default=[triton_filters.STAGES], help="of the filters' loops")
    arguments = parser.parse_args()
    device = torch.device("cuda")
    bandwidth = copy_bandwidth(device)
    print(f"{torch.cuda.get_device_name()}, copies at {bandwidth / 1e12:.2f} TB/s; ms per call")
    for vocab in arguments.vocab:
        for rows in arguments.rows:
            for kind in ("peaked", "flat"):
                logits_SV = logits_of(kind, rows, vocab, device)
                last_token = torch.zeros(rows, dtype=torch.int64, device=device)
                print(f"\n{rows} x {vocab} {kind}, bound {logits_SV.nbytes / bandwidth * 1e3:.3f} ms")
                for name in arguments.case:
                    inputs = inputs_of(rows, CASES[name], device)
                    for stages in arguments.stages if inputs.any_filter else arguments.stages[:1]:
                        triton_filters.STAGES = stages
                        device_ms, host_ms = timed(logits_SV, inputs, last_token, 10 if rows > 1000 else 50)
                        print(f"  {name:<12} {device_ms:8.3f}  host {host_ms:6.3f}  stages {stages}", flush=True)
                    if arguments.kernels:
                        print_kernels(logits_SV, inputs, last_token)


if __name__ == "__main__":
    main()
