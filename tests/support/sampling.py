"""Rows to sample, each with a slot of its own."""

from __future__ import annotations

import numpy as np
import torch

from tokabatch.messages import SlotInit
from tokabatch.model.slot_table import SamplerInputs, SlotTable


def sampler_inputs(
    num_rows: int,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    logprobs=-1,
    seed=5,
    row=None,
    device: str | torch.device = "cpu",
) -> SamplerInputs:
    """Every parameter is one value, or a list of num_rows."""

    def column(value, dtype):
        return np.broadcast_to(np.asarray(value, dtype), (num_rows,)).copy()

    places = np.arange(num_rows)
    inits = SlotInit(
        slot=places.astype(np.int32),
        row=column(places * 3 if row is None else row, np.int64),
        sample=(places % 7).astype(np.int32),
        seed=column(seed, np.int64),
        temperature=column(temperature, np.float32),
        top_p=column(top_p, np.float32),
        top_k=column(top_k, np.int32),
        min_p=column(min_p, np.float32),
        logprobs=column(logprobs, np.int32),
    )
    table = SlotTable(num_rows, torch.device(device))
    table.open(inits)
    return rows_of(table, torch.arange(num_rows))


def rows_of(table: SlotTable, slots: torch.Tensor) -> SamplerInputs:
    """The inputs of a step that samples these slots; a slot's position is a function of the slot."""
    on_device = slots.to(table.words.device)
    return table.inputs(slots.numpy(), on_device, (on_device + 11).int())
