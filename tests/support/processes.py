"""Processes that a test looks at while they come and go."""

from __future__ import annotations

from contextlib import suppress

import psutil


def children(parent: psutil.Process) -> list[psutil.Process]:
    """None where the parent has ended."""
    with suppress(psutil.NoSuchProcess):
        return parent.children()
    return []


def started_with(words: str, processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those whose command line contains `words`; one that has ended meanwhile is passed over."""
    found: list[psutil.Process] = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if words in " ".join(process.cmdline()):
                found.append(process)
    return found
