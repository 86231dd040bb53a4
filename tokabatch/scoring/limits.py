"""Limits on what a judge, or a program that it runs, may take of the machine."""

from __future__ import annotations

import resource
from contextlib import suppress


def limit_resource(kind: int, most: int) -> None:
    """Limit a resource of this process (`resource.RLIMIT_...`) to `most`, or to what it is limited to already, if that is less:
    queues of clusters limit address space, for example. Without effect on a system that refuses a limit of this kind, as macOS
    does for address space."""
    hard = resource.getrlimit(kind)[1]
    limit = most if hard == resource.RLIM_INFINITY else min(most, hard)
    with suppress(ValueError, OSError):
        resource.setrlimit(kind, (limit, limit))
