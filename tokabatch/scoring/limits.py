"""Limits on what a judge, or a program that it runs, may take of the machine."""

from __future__ import annotations

import resource
from contextlib import suppress


def limit_resource(kind: int, most: int) -> None:
    """Limit a resource of this process (`resource.RLIMIT_...`) to `most`. Without effect where it is limited to less already,
    as queues of clusters limit address space, and on a system that refuses a limit of this kind, as macOS does for that."""
    with suppress(ValueError, OSError):
        resource.setrlimit(kind, (most, most))
