"""What a simulation assumes, checked without torch, before anything slow is imported."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from tokabatch.errors import UsageError
from tokabatch.forecast.assumed_lengths import Lengths, Unstopped, lognormal, observed
from tokabatch.forecast.devices import Device, known_device
from tokabatch.number_text import counted
from tokabatch.output.status import output_lengths


@dataclass(frozen=True, slots=True)
class Scenario:
    """What to assume: the device by its key in `KNOWN` (None: this machine's), a `profile` in place of the job's or the
    roofline, money an hour, and `lengths`: `max`, `MEAN`, `MEAN:SIGMA` of a log-normal distribution (sigma 0.7 by default), or
    the output folder of an earlier run."""

    device: str | None = None
    profile: Path | None = None
    price: float | None = None
    lengths: str = "max"


def check_scenario(scenario: Scenario) -> Device | None:
    """Return the device that is assumed, None for this machine's. Raises UsageError for a bad scenario."""
    read_lengths(scenario.lengths)
    if scenario.price is not None and not 0 <= scenario.price < math.inf:
        raise UsageError(f"--price {scenario.price:g}: write the price of an hour of the device, such as 3.5")
    return None if scenario.device is None else known_device(scenario.device)


def read_lengths(described: str) -> tuple[Lengths, str]:
    """Return the source of lengths that a scenario names, and its description. Raises UsageError for an unknown one."""
    if described == "max":
        return Unstopped(), "every sample runs to max_tokens"
    if Path(described).is_dir():
        found = output_lengths(Path(described))
        if not len(found):
            raise UsageError(f"{described} holds no finished samples to take lengths from")
        return observed(found), f"as the {counted(len(found), 'sample')} in {described}, mean {found.mean():,.0f}"
    mean, _, sigma = described.partition(":")
    try:
        values = float(mean), float(sigma or 0.7)
    except ValueError as error:
        raise UsageError(f"--lengths {described}: write max, MEAN, MEAN:SIGMA or the folder of an earlier run") from error
    if not (values[0] >= 1 and 0 <= values[1] <= 4):
        raise UsageError(f"--lengths {described}: MEAN is at least 1, SIGMA from 0 to 4")
    return lognormal(*values), f"log-normal, mean {values[0]:g}, sigma {values[1]:g}, cut at max_tokens"
