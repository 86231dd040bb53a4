"""What this machine's processor reaches, by a short measurement."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import torch

from tokabatch.cores import usable_cores
from tokabatch.forecast.devices import PROCESSOR, Device
from tokabatch.forecast.roofline import DeviceRates

_PROBE_SECONDS = 0.15
_PRODUCT = 512
"""Rows and columns of the matrices that are multiplied."""


def measure_processor(memory: float) -> Device:
    """Measure this machine's processor in float32, for some 0.3 s: the fastest of several trials. Products are measured on one
    thread and multiplied by torch's number of threads, as far as there are cores for them; they would hold each other up on a
    busy machine."""
    a = torch.ones((_PRODUCT, _PRODUCT), dtype=torch.float32)
    b = np.ones(16 << 20, np.float32)
    out = np.empty_like(b)
    threads = torch.get_num_threads()
    used = min(threads, usable_cores())
    torch.set_num_threads(1)
    try:
        product = _best_time(lambda: a @ a) / used
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
