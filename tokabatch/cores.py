"""How many processor cores this process may use: those that it may run on, or fewer by the quota of its container or job."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

_GROUPS, _OF_PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def usable_cores(groups: Path = _GROUPS, of_process: Path = _OF_PROCESS) -> int:
    """Return the number of cores, rounded up. Linux's control groups, version 2 and 1, limit processor time, which torch
    does not read: it uses as many threads as there are cores. Other systems have neither those nor an affinity to read."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError):
        for line in of_process.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            top = groups / "cpu" if controllers else groups
            place = top / path.lstrip("/")
            # In a container, its own group may be the top one. A group has no more than the groups around it.
            for group in {top, place, *(above for above in place.parents if above.is_relative_to(top))}:
                cores = math.ceil(min(cores, _quota(group)))
    return max(1, cores)


def _quota(group: Path) -> float:
    """Return the cores that a group's quota allows; infinity if it has none."""
    with suppress(OSError, ValueError):
        quota, period = (group / "cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    with suppress(OSError, ValueError):
        quota, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return math.inf if quota < 0 else quota / period
    return math.inf
