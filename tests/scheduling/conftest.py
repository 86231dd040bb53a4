"""Fixtures of the scheduling tests."""

from __future__ import annotations

import pytest

from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.scheduler import SchedulerLimits


@pytest.fixture
def small_limits() -> SchedulerLimits:
    return SchedulerLimits(4, 64, 8, 32, 16, GroupingLimits(2, 1))
