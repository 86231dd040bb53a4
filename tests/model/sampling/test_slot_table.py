"""The table keeps what was opened last, on its device and on the host alike."""

from __future__ import annotations

import numpy as np
import torch
from support.sampling import rows_of, sampler_inputs

from tokabatch.model.sampling.slot_table import RECORD, SlotTable, packed
from tokabatch.scheduling.contracts import SlotInit


def inits(slot, rng):
    count = len(slot)
    return SlotInit(
        slot=np.asarray(slot, np.int32),
        row=rng.integers(-(2**62), 2**62, count),
        sample=rng.integers(0, 2**31, count).astype(np.int32),
        seed=rng.integers(-(2**62), 2**62, count),
        temperature=rng.random(count).astype(np.float32),
        top_p=rng.random(count).astype(np.float32),
        top_k=rng.integers(0, 100, count).astype(np.int32),
        min_p=rng.random(count).astype(np.float32),
        logprobs=rng.integers(-1, 20, count).astype(np.int32),
    )


def test_a_slot_keeps_what_it_was_opened_with_last():
    rng = np.random.default_rng(0)
    table = SlotTable(8, torch.device("cpu"))
    address = table.words.data_ptr()
    first, second = inits([5, 0, 3], rng), inits([3, 7], rng)
    table.open(*packed(first))
    table.open(*packed(second))
    table.open(*packed(inits([], rng)))
    wanted = {5: (first, 0), 0: (first, 1), 3: (second, 0), 7: (second, 1)}
    columns = table.columns(torch.tensor(list(wanted), dtype=torch.int32))
    for name in RECORD.names:
        expected = np.array([getattr(source, name)[at] for source, at in wanted.values()])
        found = getattr(columns, name).numpy()
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected, err_msg=name)
    assert table.words.data_ptr() == address


def test_the_packed_form_is_what_the_table_holds():
    opened = inits([2, 1], np.random.default_rng(1))
    table = SlotTable(4, torch.device("cpu"))
    table.open(*packed(opened))
    slots, words = packed(opened)
    assert torch.equal(table.words[torch.from_numpy(slots)], torch.from_numpy(words))


def test_what_a_step_has_to_know_of_its_rows():
    given = sampler_inputs(
        5, temperature=[0, 0, 1, 1, 0.5], top_k=[3, 0, 0, 0, 0], min_p=[0, 0, 0, 0.1, 0], logprobs=[-1, 4, -1, 0, -1]
    )

    def flags(*slots):
        step = rows_of(given.table, torch.tensor(slots, dtype=torch.int64))
        return step.any_random, step.any_filter, step.max_logprobs

    assert flags(0) == (False, False, -1), "a greedy row's filters change nothing"
    assert flags(0, 1) == (False, False, 4)
    assert flags(2, 4) == (True, False, -1)
    assert flags(2, 3) == (True, True, 0)
    assert flags() == (False, False, -1)
