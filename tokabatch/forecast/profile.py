"""A measured cost model: the roofline's operators, each with a factor fitted to recorded steps.

    seconds = step + per_sequence * sequences + per_group * groups + sum over operators of factor * roofline seconds

with every coefficient at least 0, by non-negative least squares (Lawson and Hanson 1974). What a run did not exercise cannot be
fitted from it, nor can operators that grow together be separated; a prior therefore keeps each operator near the ratio of
measured to roofline seconds of the whole run.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from tokabatch.errors import UsageError
from tokabatch.forecast.roofline import DeviceRates, Roofline
from tokabatch.forecast.step_log import Steps
from tokabatch.forecast.step_work import Float64, Number, StepWork
from tokabatch.model.spec import ModelSpec
from tokabatch.number_text import counted

TERMS = ("step", "sequences", "groups", "dense", "logits", "elementwise", "prefix", "prefill", "decode")
"""`logits` are the head and sampling; the first three are counts, the others roofline seconds."""
_KIND = "tokabatch profile"
_REMEDY = "make one from a finished run with `tokabatch profile OUT --to profile.json`"
_COUNTED = 3
_PRIOR = 0.1
_WINDOW = 4
"""Consecutive steps whose times are summed: with several steps in flight results arrive in bursts, and the time attributed to
one step is partly its neighbour's."""
_OUTLIER = 3.0
"""Steps that take this many times the first fit's prediction, or less than its inverse, are left out of the second fit: kernels
compiled or loaded on first use, a busy host."""


STEP_SECONDS, SAMPLE_SECONDS = 0.0022, 0.9e-6
"""What a step on a GPU, and each sample in it, costs besides the operators' roofline: between kernels, in small kernels and on
the host. Fitted to an experiment with a model of 135M on an H200, at four numbers of running samples (benchmarks/LOG.md)."""


@dataclass(frozen=True, slots=True)
class Profile:
    """`coefficients[i]` belongs to `TERMS[i]`; `source` describes what was measured."""

    roofline: Roofline
    coefficients: tuple[float, ...]
    source: str = ""

    def seconds(self, work: StepWork) -> Number:
        """Return the expected time of a step; an array if `work` holds arrays."""
        terms = _terms(self.roofline, work)
        return sum((factor * term for factor, term in zip(self.coefficients, terms, strict=True)), 0.0)


def unmeasured_gpu(roofline: Roofline) -> Profile:
    """Return the roofline of a GPU plus the assumed overhead of its steps, for use until a run has been measured."""
    return Profile(roofline, (STEP_SECONDS, SAMPLE_SECONDS, 0.0, *[1.0] * (len(TERMS) - _COUNTED)))


def fit_profile(spec: ModelSpec, device: DeviceRates, steps: Steps, itemsize: int = 2, source: str = "") -> Profile:
    """Fit the profile of a recorded run. Raises UsageError if there are too few steps to fit."""
    if len(steps) < len(TERMS):
        raise UsageError(f"a profile needs at least {counted(len(TERMS), 'recorded step')}, this run has {len(steps)}")
    roofline = Roofline(spec, device, itemsize)
    table = np.stack([np.broadcast_to(term, len(steps)).astype(np.float64) for term in _terms(roofline, steps.work)], axis=1)
    width = min(_WINDOW, len(steps) // len(TERMS))
    table, seconds = _in_windows(table, width), _in_windows(steps["seconds"], width)
    coefficients = _fit(table, seconds)
    ratio = seconds / np.maximum(table @ coefficients, 1e-12)
    usual = (ratio < _OUTLIER) & (ratio > 1 / _OUTLIER)
    if usual.sum() >= len(TERMS):
        coefficients = _fit(table[usual], seconds[usual])
    return Profile(roofline, tuple(coefficients.tolist()), source)


def _in_windows(values: Float64, width: int) -> Float64:
    """Sum `width` consecutive rows; an incomplete last window is left out."""
    count = len(values) // width
    return values[: count * width].reshape(count, width, *values.shape[1:]).sum(axis=1)


def profile_document(profile: Profile) -> str:
    """Return JSON for `load_profile`."""
    spec = {name: value for name, value in asdict(profile.roofline.spec).items() if name in _SPEC_FIELDS}
    document = {
        "kind": _KIND,
        "source": profile.source,
        "device": asdict(profile.roofline.device),
        "itemsize": profile.roofline.itemsize,
        "model": spec,
        "coefficients": dict(zip(TERMS, profile.coefficients, strict=True)),
    }
    return json.dumps(document, indent=2) + "\n"


@dataclass(frozen=True, slots=True)
class SavedProfile:
    """A profile's file. The operators' factors carry over to another model, less exactly."""

    device: DeviceRates
    itemsize: int
    coefficients: tuple[float, ...]
    source: str

    def of_model(self, spec: ModelSpec) -> Profile:
        return Profile(Roofline(spec, self.device, self.itemsize), self.coefficients, self.source)


def load_profile(path: Path) -> SavedProfile:
    """Read a profile's file. Raises UsageError if it is not one."""
    try:
        document = cast("dict[str, Any]", json.loads(path.read_bytes()))
        rates = document["device"]
        device = DeviceRates(str(rates["name"]), float(rates["flops"]), float(rates["bytes_per_second"]))
        coefficients = tuple(float(document["coefficients"][name]) for name in TERMS)
        profile = SavedProfile(device, int(document["itemsize"]), coefficients, str(document["source"]))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; {_REMEDY}") from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UsageError(f"{path} is not a profile; {_REMEDY}") from error
    rates = (device.flops, device.bytes_per_second, profile.itemsize)
    if document.get("kind") != _KIND or not (all(map(_is_cost, coefficients)) and all(map(_is_cost, rates)) and all(rates)):
        raise UsageError(f"{path} is not a profile, or holds impossible values; {_REMEDY}")
    return profile


def _is_cost(value: float) -> bool:
    return math.isfinite(value) and value >= 0


_SPEC_FIELDS = (
    "family",
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
)


def _terms(roofline: Roofline, work: StepWork) -> list[Number]:
    apart = roofline.by_operator(work)
    operators = [apart.dense, apart.head + apart.sampling, apart.elementwise, apart.prefix, apart.prefill, apart.decode]
    return [1.0, work.sequences, work.groups, *operators]


def _fit(table: Float64, seconds: Float64) -> Float64:
    """Fit coefficients to relative and absolute error alike: each step is weighted by the inverse root of its time."""
    weight = 1.0 / np.sqrt(np.maximum(seconds, 1e-9))
    rows, target = table * weight[:, None], seconds * weight
    norm = np.linalg.norm(rows, axis=0)
    # A term that the run did not exercise keeps its prior.
    scale = np.where(norm > 0, norm, 1.0)
    ratio = seconds.sum() / max(float(table[:, _COUNTED:].sum()), 1e-30)
    centre = np.where(np.arange(len(TERMS)) < _COUNTED, 0.0, ratio)
    prior = _PRIOR * scale
    rows = np.concatenate((rows, np.diag(prior)))
    return solve_nonnegative(rows / scale, np.concatenate((target, prior * centre))) / scale


def solve_nonnegative(matrix: Float64, target: Float64) -> Float64:
    """Return the x >= 0 that minimises |matrix @ x - target|: the active-set method of Lawson and Hanson (1974, chapter 23)."""
    count = matrix.shape[1]
    free = np.zeros(count, np.bool_)
    x = np.zeros(count)
    tolerance = 1e-10 * float(np.abs(matrix.T @ target).max(initial=0.0))
    for _ in range(3 * count):
        gradient = matrix.T @ (target - matrix @ x)
        if free.all() or gradient[~free].max() <= tolerance:
            break
        free[np.flatnonzero(~free)[np.argmax(gradient[~free])]] = True
        while True:
            trial = np.zeros(count)
            trial[free] = np.linalg.lstsq(matrix[:, free], target, rcond=None)[0]
            below = free & (trial <= 0)
            if not below.any():
                break
            step = float((x[below] / np.maximum(x[below] - trial[below], 1e-300)).min())
            x = x + step * (trial - x)
            free &= x > 1e-15
            x[~free] = 0.0
        x = trial
    return x
