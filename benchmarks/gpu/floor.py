"""The least time of a workload: its work counted, priced by the repository's one roofline formula (`tokabatch.forecast`).

Counts are those of an ideal run: every shared prompt token computed once, then the running limit full until the last sample
ends. With Hydragen a shared prefix is read once a step for its group; without it by every sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.workloads import Workload
from tokabatch.forecast.roofline import DeviceRates, Roofline
from tokabatch.forecast.step_work import StepWork
from tokabatch.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Floor:
    """Seconds of the whole workload, and of its decode steps alone, which the steady state is compared with."""

    prefill_seconds: float
    decode_seconds: float
    output_tokens: int

    @property
    def seconds(self) -> float:
        return self.prefill_seconds + self.decode_seconds

    @property
    def rate(self) -> float:
        """Output tokens a second."""
        return self.output_tokens / self.seconds


def workload_floor(
    spec: ModelSpec, device: DeviceRates, workload: Workload, running: int, hydragen: bool = True, itemsize: int = 2
) -> Floor:
    """`running` samples at most run at once."""
    model = Roofline(spec, device, itemsize)
    steps = workload.num_output_tokens / min(running, workload.num_samples)
    return Floor(
        prefill_seconds=float(model.seconds(prefill_work(workload))),
        decode_seconds=steps * float(model.seconds(mean_decode_work(workload, steps, hydragen))),
        output_tokens=workload.num_output_tokens,
    )


def prefill_work(workload: Workload) -> StepWork:
    """All prompts in one step, the prefix common to all of them computed once."""
    common = workload.common_prefix() if len(workload.prompts) > 1 else 0
    own_P = np.array([len(prompt) for prompt in workload.prompts], np.float64) - common
    return StepWork(
        tokens=common + own_P.sum(),
        sampled=float(len(own_P)),
        sequences=float(len(own_P)),
        prefill_pairs=common * (common + 1) / 2 + (own_P * (own_P + 1) / 2).sum(),
        prefill_kv=common + own_P.sum(),
        prefix_pairs=common * own_P.sum(),
        prefix_kv=float(common),
    )


def mean_decode_work(workload: Workload, steps: float, hydragen: bool) -> StepWork:
    """The work of all samples spread evenly over this many steps."""
    common = workload.common_prefix() if len(workload.prompts) > 1 and hydragen else 0
    own_P1 = np.array([[len(prompt)] for prompt in workload.prompts], np.float64) - common
    output_PN = workload.output_length_PN.astype(np.float64)
    grouped = hydragen and workload.n > 1
    suffix = (output_PN * (output_PN + 1) / 2).sum()
    tokens = output_PN.sum()
    own = (own_P1 * output_PN).sum()
    # A prompt's own part is read once for its samples, in the steps in which any of them runs.
    live_own = own_P1.mean() * tokens / steps / workload.n
    return StepWork(
        tokens=tokens / steps,
        sampled=tokens / steps,
        sequences=tokens / steps,
        decode_kv=(suffix + (0.0 if grouped else own)) / steps,
        prefix_pairs=(common * tokens + (own if grouped else 0.0)) / steps,
        prefix_kv=common + (live_own if grouped else 0.0),
        groups=float(common > 0) + (tokens / steps / workload.n if grouped else 0.0),
    )
