"""What the kernels of a step cost by themselves: products in row chunks, fp8, element-wise passes, launches.

    python -m benchmarks.gpu.micro                 # all sections
    python -m benchmarks.gpu.micro mlp fp8         # some
    python -m benchmarks.gpu.micro --small         # tiny sizes, to try it out on a CPU

Random data; every figure is the median of 20 runs after 5 warm-ups, each run a CUDA graph over several layers with weights of
their own (so that none stay in the L2 cache), divided by their number. What is compared with one another runs in turn. A
section that fails says so and the next one runs.

Shape legend: M rows, K input features, N output features, E hidden size.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
import torch.nn.functional as F

from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.timing import Timer, Work
from tokabatch.model.layers import gate

LAUNCHES = 50
"""Launches between two waits: fewer than the driver queues, beyond which a launch waits for the device."""
GRAPH_KERNELS = 10


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes of one run of the sections."""

    shapes: tuple[str, ...]
    rows: int
    chunks: tuple[int, ...]
    fp8_rows: tuple[int, ...]
    layers: int
    launch_rounds: int


FULL = Scale(
    ("llama-3.2-1b", "llama-3.1-8b"), 8192, (512, 1024, 2048, 4096, 8192), (256, 1024, 4096, 8192), layers=4, launch_rounds=40
)
SMALL = Scale(("tiny",), 64, (16, 32, 64), (32, 64), layers=2, launch_rounds=2)


@dataclass(frozen=True, slots=True)
class Bench:
    """The device, how to time on it, and the sizes."""

    timer: Timer
    scale: Scale

    @property
    def device(self) -> torch.device:
        return self.timer.device

    def random(self, *size: int) -> torch.Tensor:
        return torch.randn(size, device=self.device, dtype=torch.bfloat16)

    def weights(self, inputs: int, outputs: int) -> list[torch.Tensor]:
        """One matrix [N, K] a layer."""
        return [self.random(outputs, inputs).div_(inputs**0.5) for _ in range(self.scale.layers)]

    def medians(self, works: list[Work], layers: int) -> list[float]:
        """Milliseconds a layer of each."""
        captured = [self.timer.captured(work) for work in works]
        return [ms / layers for ms in self.timer.medians(captured)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; all of them if none is named")
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    if run_sections(arguments.sections or list(SECTIONS), small=arguments.small):
        sys.exit(1)


def run_sections(names: list[str], small: bool) -> list[str]:
    """Run each section; returns those that failed. A device may have no memory, product or Triton for one of them, and its time
    is too dear to give up the others for that."""
    failed: list[str] = []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(Timer(device, repeats=3 if small else 20), SMALL if small else FULL)
    for name in names:
        began = time.perf_counter()
        print(f"== {name}", flush=True)
        try:
            SECTIONS[name](bench)
        except (RuntimeError, ImportError):
            failed.append(name)
            print(f"FAILED\n{traceback.format_exc(limit=4)}", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"-- {name} took {time.perf_counter() - began:.1f} s", flush=True)
    return failed


def mlp(bench: Bench) -> None:
    """gate_up, SiLU-multiply, down added to the residual, all rows in chunks of so many."""
    for name in bench.scale.shapes:
        shape = SHAPES[name]
        gate_up, down = bench.weights(shape.hidden, 2 * shape.intermediate), bench.weights(shape.intermediate, shape.hidden)
        for rows in (bench.scale.rows, bench.scale.rows // 2):
            x_ME, residual_ME = bench.random(rows, shape.hidden), bench.random(rows, shape.hidden)
            chunks = [chunk for chunk in bench.scale.chunks if chunk <= rows]
            works = [_mlp_work(x_ME, residual_ME, gate_up, down, chunk) for chunk in chunks]
            flops = 2 * rows * 3 * shape.hidden * shape.intermediate
            for chunk, ms in zip(chunks, bench.medians(works, bench.scale.layers), strict=True):
                _print_ms(f"mlp {name} M={rows} chunks of {chunk}", ms, flops)


def _mlp_work(
    x_ME: torch.Tensor, residual_ME: torch.Tensor, gate_up: list[torch.Tensor], down: list[torch.Tensor], chunk: int
) -> Work:
    hidden = x_ME.new_empty(chunk, gate_up[0].shape[0])

    def work() -> None:
        for gate_up_NK, down_NK in zip(gate_up, down, strict=True):
            for x, residual in zip(x_ME.split(chunk), residual_ME.split(chunk), strict=True):
                torch.mm(x, gate_up_NK.t(), out=hidden)
                residual.addmm_(gate(hidden), down_NK.t())

    return work


def head(bench: Bench) -> None:
    """The LM head in chunks, each chunk's logits over those of the one before."""
    shape = SHAPES[bench.scale.shapes[0]]
    weight_NK = bench.random(shape.vocab, shape.hidden).div_(shape.hidden**0.5)
    x_ME = bench.random(bench.scale.rows, shape.hidden)
    chunks = bench.scale.chunks[1:]
    works = [_chunked_product(x_ME, [weight_NK], chunk) for chunk in chunks]
    for chunk, ms in zip(chunks, bench.medians(works, 1), strict=True):
        _print_ms(f"head M={len(x_ME)} chunks of {chunk}", ms, 2 * x_ME.numel() * shape.vocab)


def attention_products(bench: Bench) -> None:
    """qkv and o in chunks."""
    for name in bench.scale.shapes:
        for product, inputs, outputs in SHAPES[name].products[:2]:
            x_MK, weights = bench.random(bench.scale.rows, inputs), bench.weights(inputs, outputs)
            works = [_chunked_product(x_MK, weights, chunk) for chunk in bench.scale.chunks]
            for chunk, ms in zip(bench.scale.chunks, bench.medians(works, len(weights)), strict=True):
                _print_ms(f"{product} {name} M={len(x_MK)} chunks of {chunk}", ms, 2 * x_MK.numel() * outputs)


def _chunked_product(x_MK: torch.Tensor, weights: list[torch.Tensor], chunk: int) -> Work:
    out = x_MK.new_empty(chunk, weights[0].shape[0])

    def work() -> None:
        for weight_NK in weights:
            for x in x_MK.split(chunk):
                torch.mm(x, weight_NK.t(), out=out)

    return work


def fp8(bench: Bench) -> None:
    """bf16 beside fp8 with a scale a row and column, exact and fast accumulation, and with one scale a matrix."""
    for name in bench.scale.shapes:
        for product, inputs, outputs in SHAPES[name].products:
            _fp8_product(bench, f"{product} {name}", inputs, outputs)


def _fp8_product(bench: Bench, label: str, inputs: int, outputs: int) -> None:
    weights = bench.weights(inputs, outputs)
    weights_8 = [weight.to(torch.float8_e4m3fn).t() for weight in weights]
    one = torch.ones((), device=bench.device)
    column_1N = torch.rand(1, outputs, device=bench.device) + 0.5
    for rows in bench.scale.fp8_rows:
        x_MK = bench.random(rows, inputs)
        x_8, row_M1 = x_MK.to(torch.float8_e4m3fn), torch.rand(rows, 1, device=bench.device) + 0.5
        ways = {
            "bf16": _each(lambda weight, x=x_MK: torch.mm(x, weight.t()), weights),
            "fp8 rows fast": _scaled(x_8, weights_8, row_M1, column_1N, fast=True),
            "fp8 rows exact": _scaled(x_8, weights_8, row_M1, column_1N, fast=False),
            "fp8 tensor fast": _scaled(x_8, weights_8, one, one, fast=True),
            "fp8 tensor exact": _scaled(x_8, weights_8, one, one, fast=False),
        }
        works: dict[str, Work] = {}
        for way, work in ways.items():
            try:
                work()
                works[way] = bench.timer.captured(work)
            except RuntimeError as error:
                # What torch raises for a scaled product that this device or build has not.
                print(f"{label} M={rows} {way}: not here: {str(error).splitlines()[0][:160]}", flush=True)
        for way, ms in zip(works, bench.timer.medians(list(works.values())), strict=True):
            _print_ms(f"{label} M={rows} {way}", ms / len(weights), 2 * rows * inputs * outputs)


def _scaled(
    x_MK: torch.Tensor, weights_KN: list[torch.Tensor], scale_x: torch.Tensor, scale_weight: torch.Tensor, fast: bool
) -> Work:
    return _each(
        lambda weight: torch._scaled_mm(
            x_MK, weight, scale_a=scale_x, scale_b=scale_weight, out_dtype=torch.bfloat16, use_fast_accum=fast
        ),
        weights_KN,
    )


def _each(apply: Callable[[torch.Tensor], object], weights: list[torch.Tensor]) -> Work:
    def work() -> None:
        for weight in weights:
            apply(weight)

    return work


def elementwise(bench: Bench) -> None:
    """Passes that are bound by memory: bytes read and written a second."""
    for name in bench.scale.shapes:
        size = SHAPES[name].hidden
        layers = [bench.random(bench.scale.rows, size) for _ in range(bench.scale.layers)]
        weight_E, other_ME = bench.random(size), bench.random(bench.scale.rows, size)
        inner_M2F = bench.random(bench.scale.rows, 2 * SHAPES[name].intermediate)
        ways: list[tuple[str, Work, int]] = [
            ("rms_norm", _each(lambda x, w=weight_E: F.rms_norm(x, w.shape, w, 1e-5), layers), 2),
            ("add_", _each(lambda x, y=other_ME: x.add_(y), layers), 3),
            ("add_ then rms_norm", _each(lambda x, y=other_ME, w=weight_E: F.rms_norm(x.add_(y), w.shape, w, 1e-5), layers), 5),
        ]
        times = bench.medians([work for _, work, _ in ways], len(layers))
        for (way, _, passes), ms in zip(ways, times, strict=True):
            _print_bandwidth(f"{way} {name} M={bench.scale.rows}", ms, passes * layers[0].nbytes)
        (ms,) = bench.medians([lambda inner=inner_M2F: gate(inner)], 1)
        _print_bandwidth(f"SiLU-multiply {name} M={bench.scale.rows}", ms, inner_M2F.nbytes * 3 // 2)


def launch(bench: Bench) -> None:
    """The host's CPU time for one launch, by the thread's own clock."""
    x, out = bench.random(64, 64), bench.random(64, 64)

    def product() -> None:
        torch.mm(x, x, out=out)

    works: dict[str, Work] = {
        "torch.mm": product,
        "torch add_": lambda: out.add_(x),
        "torch.empty": lambda: torch.empty_like(x),
    }
    if bench.timer.is_cuda:
        kernels = import_module("benchmarks.gpu.launch_kernels")
        works["Triton kernel"] = lambda: kernels.scale(x, out, 2.0)
        works["SiLU-multiply as the engine calls it"] = lambda: gate(x)
        event = torch.cuda.Event()
        works["event record"] = event.record
    works[f"graph replay of {GRAPH_KERNELS} kernels"] = bench.timer.captured(lambda: [product() for _ in range(GRAPH_KERNELS)])
    for way, work in works.items():
        cpu, wall = _launch_cost(bench.timer, work, bench.scale.launch_rounds)
        print(f"{way}: {cpu * 1e6:.2f} us of CPU a call, {wall * 1e6:.2f} us by the clock", flush=True)


def _launch_cost(timer: Timer, work: Work, rounds: int) -> tuple[float, float]:
    """Seconds of the calling thread, and of the clock."""
    for _ in range(20):
        work()
    cpu = wall = 0.0
    for _ in range(rounds):
        timer.wait()
        cpu_begin, begin = time.thread_time(), time.perf_counter()
        for _ in range(LAUNCHES):
            work()
        cpu, wall = cpu + time.thread_time() - cpu_begin, wall + time.perf_counter() - begin
    calls = LAUNCHES * rounds
    return cpu / calls, wall / calls


def _print_ms(label: str, ms: float, flops: float) -> None:
    print(f"{label}: {ms:.4f} ms, {flops / ms / 1e9:,.0f} TF/s", flush=True)


def _print_bandwidth(label: str, ms: float, nbytes: float) -> None:
    print(f"{label}: {ms:.4f} ms, {nbytes / ms / 1e9:.2f} TB/s", flush=True)


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "launch": launch,
    "mlp": mlp,
    "head": head,
    "qkv-o": attention_products,
    "elementwise": elementwise,
    "fp8": fp8,
}

if __name__ == "__main__":
    main()
