"""How busy the device was in a Chrome trace of torch's profiler, and with what.

Busy is the union of all kernels, copies and fills over all streams, idle the rest between the first and the last of them. A
trace without any (a run on a CPU) is read for its host operators instead.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

DEVICE_KINDS = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
HOST_KINDS = frozenset({"cpu_op"})
NAME_LENGTH = 90


@dataclass(frozen=True, slots=True)
class KernelTime:
    """All calls of one kernel together."""

    name: str
    ms: float
    calls: int


@dataclass(frozen=True, slots=True)
class TraceFigures:
    """`kernels` come by falling time; times of kernels that overlap add up to more than `busy_ms`."""

    on_device: bool
    span_ms: float
    busy_ms: float
    kernels: tuple[KernelTime, ...]

    @property
    def idle_share(self) -> float:
        return 1.0 - self.busy_ms / self.span_ms if self.span_ms else 0.0


def read_trace(file: Path) -> TraceFigures:
    """Raises ValueError where the trace holds neither device nor host work."""
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    events = [event for event in json.loads(content)["traceEvents"] if event.get("ph") == "X"]
    device = [event for event in events if event.get("cat") in DEVICE_KINDS]
    chosen = device or [event for event in events if event.get("cat") in HOST_KINDS]
    if not chosen:
        raise ValueError(f"{file} holds no kernel and no operator")
    spans = sorted((float(event["ts"]), float(event["ts"]) + float(event["dur"])) for event in chosen)
    return TraceFigures(
        on_device=bool(device),
        span_ms=(max(end for _, end in spans) - spans[0][0]) / 1e3,
        busy_ms=_covered(spans) / 1e3,
        kernels=_by_name(chosen),
    )


def describe_trace(figures: TraceFigures, steps: int, shown: int = 14) -> list[str]:
    """Lines to print."""
    what = "GPU" if figures.on_device else "no GPU work recorded; host operators"
    lines = [
        f"{what}: busy {figures.busy_ms:.1f} ms, idle {figures.span_ms - figures.busy_ms:.1f} ms "
        f"({figures.idle_share:.1%}) of {figures.span_ms:.1f} ms in {steps} steps"
    ]
    for kernel in figures.kernels[:shown]:
        lines.append(f"  {kernel.ms / steps:8.3f} ms a step, {kernel.calls / steps:6.1f} calls  {kernel.name}")
    rest = figures.kernels[shown:]
    if rest:
        lines.append(f"  {sum(kernel.ms for kernel in rest) / steps:8.3f} ms a step in {len(rest)} others")
    return lines


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of spans that are sorted by their beginning."""
    covered, reached = 0.0, float("-inf")
    for begin, end in spans:
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered


def _by_name(events: list[dict[str, Any]]) -> tuple[KernelTime, ...]:
    times: defaultdict[str, list[float]] = defaultdict(list)
    for event in events:
        times[_short(cast("str", event["name"]))].append(float(event["dur"]) / 1e3)
    kernels = [KernelTime(name, sum(own), len(own)) for name, own in times.items()]
    return tuple(sorted(kernels, key=lambda kernel: -kernel.ms))


def _short(name: str) -> str:
    """Without its return type, cut to `NAME_LENGTH`."""
    name = re.sub(r"^(void|static void)\s+", "", name)
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"
