"""A device that computes nothing: it answers a step with tokens that end each sample where its length says."""

from __future__ import annotations

import numpy as np

from tokabatch.forecast.assumed_lengths import Lengths
from tokabatch.scheduling.contracts import Requests, StepBatch, StepResult

STOP, GO_ON = 1, 0
"""The two tokens of this device."""


class SimulatedDevice:
    """Answers steps in order. A sample ends with `STOP` at its length, which its row and number alone decide."""

    def __init__(self, requests: Requests, lengths: Lengths, num_slots: int) -> None:
        self._lengths = lengths
        self._prompt_length = np.zeros(int(requests.row_index.max(initial=0)) + 1, np.int32)
        self._prompt_length[requests.row_index] = requests.length
        self._end = np.zeros(num_slots, np.int64)
        """For each slot the computed positions at which its sample draws its last token."""

    def run(self, step: StepBatch) -> StepResult:
        inits = step.inits
        if len(inits.slot):
            length = self._lengths(inits.row, inits.sample).astype(np.int64)
            self._end[inits.slot] = self._prompt_length[inits.row] + length - 1
        sampled = np.flatnonzero(step.run_samples)
        ended = step.run_start[sampled] + step.run_length[sampled] >= self._end[step.run_slot[sampled]]
        return StepResult.of_tokens(step.index, np.where(ended, STOP, GO_ON).astype(np.int32))
