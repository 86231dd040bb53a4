"""The work of a step as counts, which any cost model can price.

The counts say what has to be computed and read, however it is done: tokens through the dense layers, rows of logits, pairs of
query and key, cache positions read. One `StepWork` describes one step or, with arrays in its fields, many at once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from tokabatch.arrays import Float64
from tokabatch.scheduling.contracts import StepBatch

Number = float | Float64
"""The value of one step, or of each of several steps."""


@dataclass(frozen=True, slots=True)
class StepWork:
    """Counts of one step (numbers) or of S steps (arrays of shape [S]). A pair is one query position attending to one key
    position, for all heads of a layer; `*_kv` are cache positions read, once for each run, or once for each group if a shared
    prefix is read for all of its runs."""

    tokens: Number
    """Positions that go through the dense layers."""
    sampled: Number
    """Positions whose logits are computed and sampled."""
    sequences: Number
    """Runs of the step: slots that compute anything."""
    decoded: Number = 0.0
    """Those among them that compute only the token that they sampled last."""
    prefill_pairs: Number = 0.0
    prefill_kv: Number = 0.0
    decode_kv: Number = 0.0
    """Positions read by one-token runs, which are also their pairs."""
    prefix_pairs: Number = 0.0
    prefix_kv: Number = 0.0
    groups: Number = 0.0
    """Shared prefixes read for a whole group, over all levels."""


WORK_FIELDS = tuple(field.name for field in fields(StepWork))


def measure_work(step: StepBatch, page_size: int) -> StepWork:
    """Count the work of a decided step, in a few passes over its runs."""
    length = step.run_length.astype(np.int64)
    end = step.run_start + length
    read = end - step.run_skip * page_size
    num_prefill = step.num_prefill_runs
    own, first = read[:num_prefill], length[:num_prefill]
    # Query i of a run of length n attends to all positions before the run and to i + 1 of its own.
    pairs = own * first - first * (first - 1) // 2
    prefix_pairs = prefix_kv = groups = 0
    for level in step.prefix_levels:
        depth = (level.page_stop - level.page_start).astype(np.int64) * page_size
        prefix_pairs += int((depth * (level.token_stop - level.token_start)).sum())
        prefix_kv += int(depth.sum())
        groups += len(depth)
    return StepWork(
        tokens=float(length.sum()),
        sampled=float(np.count_nonzero(step.run_samples)),
        sequences=float(len(length)),
        decoded=float(len(length) - num_prefill),
        prefill_pairs=float(pairs.sum()),
        prefill_kv=float(own.sum()),
        decode_kv=float(read[num_prefill:].sum()),
        prefix_pairs=float(prefix_pairs),
        prefix_kv=float(prefix_kv),
        groups=float(groups),
    )
