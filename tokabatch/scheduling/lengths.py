"""How long samples will be, learned while they run.

A Kaplan-Meier estimate (Kaplan and Meier 1958) of the length at which a sample stops by itself: finished samples are
events, those still running and those cut at max_tokens are censored. Where little was seen the hazard leans on the pooled
one (stops per token over the whole run, beginning at one stop in half of max_tokens) with the weight of `PRIOR_WEIGHT` samples.
Lengths are output tokens.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tokabatch.messages import Int32

PRIOR_WEIGHT = 4.0


class LengthModel:
    """Expected remaining output tokens, given how many a sample has."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._stopped = np.zeros(max_tokens + 2)
        self._ended = np.zeros(max_tokens + 2)
        self._new = 0
        self._seen = 0
        self._remaining = self._estimate(np.zeros(0, np.int32))

    def observe(self, lengths: Int32, stopped: npt.NDArray[np.bool_]) -> None:
        """Samples that ended at these lengths; `stopped` is False where the limit, not the model, ended them."""
        np.add.at(self._ended, lengths, 1)
        np.add.at(self._stopped, lengths[stopped], 1)
        self._new += len(lengths)

    def refresh(self, running: Int32) -> None:
        """Re-estimate when enough new samples have ended; `running` holds the current lengths of those that have not."""
        if self._new > max(8, self._seen // 8):
            self._seen += self._new
            self._new = 0
            self._remaining = self._estimate(running)

    def remaining(self, generated: Int32, limit: Int32) -> Int32:
        """Expected tokens still to come for samples that have `generated` of at most `limit`; at least 1 where any may come."""
        expected = self._remaining[np.minimum(generated, self.max_tokens)]
        return np.minimum(np.maximum(expected, 1), limit - generated).astype(np.int32)

    def _estimate(self, running: Int32) -> Int32:
        """Mean residual life E[L - g | L > g] = sum over u >= g of S(u) / S(g), for g = 0 .. max_tokens."""
        ended = self._ended + np.bincount(running, minlength=len(self._ended))[: len(self._ended)]
        at_risk = np.cumsum(ended[::-1])[::-1]
        pooled = (1.0 + self._stopped.sum()) / (self.max_tokens / 2 + at_risk[1:].sum())
        prior = min(1.0, float(pooled))
        hazard = (self._stopped + PRIOR_WEIGHT * prior) / (at_risk + PRIOR_WEIGHT)
        survival = np.exp(np.cumsum(np.log1p(-np.minimum(hazard, 1 - 1e-9))))[: self.max_tokens + 1]
        survival[-1] = 0.0
        tail = np.cumsum(survival[::-1])[::-1]
        mean = np.where(survival > 0, tail / np.maximum(survival, 1e-300), 1.0)
        return np.ceil(mean).astype(np.int32)
