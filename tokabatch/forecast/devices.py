"""What devices reach: the rates that a roofline needs, of those that are known by name and of this machine's processor."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from tokabatch.errors import UsageError
from tokabatch.forecast.roofline import H200, DeviceRates

PROCESSOR = "this processor"
_PROBE_SECONDS = 0.15
_PRODUCT = 512
"""Rows and columns of the matrices that are multiplied."""
_FLOPS_SHARE, _BYTES_SHARE = 790 / 989, 4.3 / 4.8
"""What an H200 was measured to reach of its published dense bf16 and memory rates; taken for devices not measured."""


@dataclass(frozen=True, slots=True)
class Device:
    """A device whose rates are known. `memory` in bytes; `names` is what CUDA calls it; `measured` where the rates are not
    derived from published ones."""

    rates: DeviceRates
    memory: float
    names: tuple[str, ...] = ()
    measured: bool = False


def _published(name: str, flops: float, bytes_per_second: float, memory: float, *names: str) -> Device:
    return Device(DeviceRates(name, flops * _FLOPS_SHARE, bytes_per_second * _BYTES_SHARE), memory, names)


KNOWN = {
    "h200": Device(H200, 141e9, ("NVIDIA H200",), measured=True),
    "h200-nvl": _published("NVIDIA H200 NVL", 835e12, 4.8e12, 141e9, "NVIDIA H200 NVL"),
    "h100": _published("NVIDIA H100 SXM", 989e12, 3.35e12, 80e9, "NVIDIA H100 80GB HBM3"),
    "h100-nvl": _published("NVIDIA H100 NVL", 835e12, 3.9e12, 94e9, "NVIDIA H100 NVL"),
    "h100-pcie": _published("NVIDIA H100 PCIe", 756e12, 2.0e12, 80e9, "NVIDIA H100 PCIe"),
    "gh200": _published("NVIDIA GH200 96 GB", 989e12, 4.0e12, 96e9, "NVIDIA GH200 480GB"),
    "a100": _published("NVIDIA A100 80 GB", 312e12, 2.04e12, 80e9, "NVIDIA A100-SXM4-80GB"),
    "a100-pcie": _published("NVIDIA A100 80 GB PCIe", 312e12, 1.94e12, 80e9, "NVIDIA A100 80GB PCIe"),
    "a100-40gb": _published("NVIDIA A100 40 GB", 312e12, 1.56e12, 40e9, "NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
    "l40s": _published("NVIDIA L40S", 362e12, 0.864e12, 48e9, "NVIDIA L40S"),
}
"""By the key that the command line takes. Rates and memory are those of NVIDIA's data sheets (dense bf16)."""


def find_device(name: str) -> Device | None:
    """Return the known device that has exactly this `name` in CUDA or in a summary: variants of a name differ in memory and
    rates, and so do slices of a GPU."""
    return next((device for device in KNOWN.values() if name in (*device.names, device.rates.name)), None)


def known_device(key: str) -> Device:
    """Return the device of this key. Raises UsageError for one whose rates are not known."""
    key = key.lower()
    if key not in KNOWN:
        raise UsageError(f"there is no device `{key}` to simulate; write one of {', '.join(KNOWN)}")
    return KNOWN[key]


def measure_processor(memory: float) -> Device:
    """Measure this machine's processor in float32, for some 0.3 s: the fastest of several trials. Products are measured on one
    thread and multiplied by torch's number of threads, which would hold each other up on a busy machine."""
    a = torch.ones((_PRODUCT, _PRODUCT), dtype=torch.float32)
    b = np.ones(16 << 20, np.float32)
    out = np.empty_like(b)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        product = _best_time(lambda: a @ a) / threads
    finally:
        torch.set_num_threads(threads)
    copy = _best_time(lambda: np.copyto(out, b))
    return Device(DeviceRates(PROCESSOR, 2 * _PRODUCT**3 / product, 2 * b.nbytes / copy), memory, measured=True)


def _best_time(work: Callable[[], object]) -> float:
    """Return the shortest time of the repetitions that fit into `_PROBE_SECONDS`, of at least five."""
    best, begun, count = math.inf, time.perf_counter(), 0
    while count < 5 or time.perf_counter() - begun < _PROBE_SECONDS:
        begin = time.perf_counter()
        work()
        best, count = min(best, time.perf_counter() - begin), count + 1
    return best
