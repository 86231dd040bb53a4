"""Packing many arrays into one copy; without a GPU the buffer is taken apart where it lies."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tokabatch.attention import upload as transfer

ARRAYS = [
    np.arange(3, dtype=np.int32),
    np.array([True, False, True]),
    np.empty((0, 4), np.int64),
    np.arange(6, dtype=np.int64).reshape(2, 3) - 2**40,
    np.linspace(0, 1, 5, dtype=np.float32)[::2],
    np.array([7], np.uint8),
]


def check(tensors):
    for values, tensor in zip(ARRAYS, tensors, strict=True):
        assert tensor.cpu().numpy().dtype == values.dtype
        np.testing.assert_array_equal(tensor.cpu().numpy(), values)


def test_a_buffer_holds_every_array_aligned():
    starts = transfer._starts(ARRAYS)
    assert all(start % 16 == 0 for start in starts)
    buffer = np.full(starts[-1], 255, np.uint8)
    transfer._lay_out(ARRAYS, starts, buffer)
    check(transfer._views(ARRAYS, starts, torch.from_numpy(buffer)))


def test_work_that_needs_the_arrays_is_done_once_in_order_when_they_are_sent():
    outbox, done = transfer.Outbox(torch.device("cpu")), []
    first = outbox.add(np.array([3, 4]))
    outbox.once_sent(lambda: done.append(first.tensor.tolist()))
    second = outbox.add(np.array([5]))
    outbox.once_sent(lambda: done.append(second.tensor.tolist()))
    assert not done
    outbox.send()
    outbox.send()
    assert done == [[3, 4], [5]]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_arrays_arrive_on_the_device(device):
    check(transfer.to_device_all(ARRAYS, torch.device(device)))
    assert transfer.to_device_all([], torch.device(device)) == []
