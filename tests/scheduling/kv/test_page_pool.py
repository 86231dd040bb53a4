"""References of pages: dropped by thousands as by ones."""

from __future__ import annotations

import numpy as np
import pytest

from tokabatch.scheduling.kv import page_pool
from tokabatch.scheduling.kv.page_pool import PagePool


@pytest.mark.parametrize("many", [1, page_pool.MANY, 1 << 30])
def test_released_pages_come_free_in_the_same_order_however_many_go_at_once(monkeypatch, many):
    monkeypatch.setattr(page_pool, "MANY", many)
    pool = PagePool(64)
    shared, own = pool.allocate(5), pool.allocate(4)
    for _ in range(3):
        pool.retain(shared)
    pool.release(np.concatenate((shared, own[:2], shared)))
    pool.check_integrity(np.concatenate((shared, shared, own[2:])))
    pool.release(np.concatenate((shared[::-1], shared, own[2:])))
    pool.check_integrity(np.zeros(0, np.int32))
    assert pool.allocate(11).tolist() == [0, 1, 2, 3, 4, 7, 8, 5, 6, 9, 10]
