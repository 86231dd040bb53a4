"""What share of a core each process of a run takes while samples are drawn: main, replicas, their workers, and others."""

from __future__ import annotations

import time

import psutil

LOOK_SECONDS = 1.0
KINDS = ("main", "replicas", "workers", "others")
"""Replicas are forked from main and have its command line; workers are spawned; others are judges and helpers."""


class CpuShares:
    """Looks at this process and its descendants every `LOOK_SECONDS` at most."""

    def __init__(self) -> None:
        self._own = psutil.Process()
        self._looks: list[tuple[float, dict[int, tuple[str, float]]]] = []

    def look(self) -> None:
        now = time.monotonic()
        if self._looks and now < self._looks[-1][0] + LOOK_SECONDS:
            return
        found: dict[int, tuple[str, float]] = {}
        command = self._own.cmdline()
        for process in (self._own, *self._own.children(recursive=True)):
            try:
                times, line = process.cpu_times(), process.cmdline()
            except psutil.Error:
                continue
            spawned = any("spawn_main" in word for word in line)
            kind = "main" if process == self._own else "replicas" if line == command else "workers" if spawned else "others"
            found[process.pid] = kind, times.user + times.system
        self._looks.append((now, found))

    def describe(self) -> str:
        """Shares of a core by kind, one for each process, between the first look and the last; processes that were not there at
        both are left out."""
        if len(self._looks) < 2:
            return "not measured, the run was too short"
        (begin, first), (end, last) = self._looks[0], self._looks[-1]
        parts: list[str] = []
        for kind in KINDS:
            took = [last[pid][1] - cpu for pid, (each, cpu) in first.items() if each == kind and pid in last]
            shares = [seconds / (end - begin) for seconds in took]
            if kind == "others":
                shares = [sum(shares)]
            if took:
                parts.append(f"{kind} {' '.join(f'{share:.2f}' for share in shares)}")
        return f"{', '.join(parts)} of a core over {end - begin:.0f} s"
