"""Rows to sample, each with a slot of its own, and the distributions that they must follow."""

from __future__ import annotations

import math

import numpy as np
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tokabatch.model.sampling.slot_table import SamplerInputs, SlotTable, packed
from tokabatch.scheduling.contracts import SlotInit


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
    table.open(*packed(inits))
    return rows_of(table, torch.arange(num_rows))


def rows_of(table: SlotTable, slots: torch.Tensor) -> SamplerInputs:
    """The inputs of a step that samples these slots; a slot's position is a function of the slot."""
    on_device = slots.to(table.words.device)
    return table.inputs(slots.numpy(), on_device, (on_device + 11).int())


def reference(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """transformers' own processors in its order, on float64."""
    scores = logits.double()[None] / temperature
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p > 0:
        scores = MinPLogitsWarper(min_p)(None, scores)
    return scores.softmax(-1)[0]


def chi_square_is_plausible(counts, expected):
    """Pools rare tokens; accepts up to 4.5 standard deviations (Wilson-Hilferty)."""
    assert counts[expected == 0].sum() == 0, "drew a token of no probability"
    total = counts.sum()
    common = expected * total >= 8
    observed = torch.cat((counts[common], counts[~common].sum()[None]))
    wanted = torch.cat((expected[common], expected[~common].sum()[None])) * total
    observed, wanted = observed[wanted > 5], wanted[wanted > 5]
    degrees = len(wanted) - 1
    if degrees == 0:
        return True
    statistic = ((observed - wanted) ** 2 / wanted).sum().item()
    z = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    return abs(z) < 4.5
