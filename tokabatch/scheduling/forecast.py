"""Page use at every future step, from expected remaining lengths, and how much more fits under the capacity.

Time is counted in decode steps from now; while the horizon has at most `MAX_BINS` steps the curve is exact for the given
lengths, beyond that a bin spans several steps and counts each sequence at the bin's last step. A sequence with `computed`
positions occupies ceil((computed + t + 1) / page_size) pages at step t while it runs; prompt pages that it does not own
are counted once, for as long as the last sequence behind them runs.

Source of the idea: the Tokasaurus scheduler's simulation of the future (Juravsky et al. 2025).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tokabatch.messages import Int32

MAX_BINS = 512

Curve = npt.NDArray[np.int64]


class Forecast:
    """The page-use curve of what runs, and admission against it.

    All arguments are arrays over running sequences: `computed` positions, own-page columns start at `shared` pages,
    `remaining` steps (at least 1). `held_pages[i]` pages stay for `held_steps[i]` steps beside them (prompts).
    """

    def __init__(
        self,
        page_size: int,
        computed: Int32,
        shared: Int32,
        remaining: Int32,
        held_pages: Int32,
        held_steps: Int32,
        horizon: int,
    ) -> None:
        self.page_size = page_size
        longest = max(horizon, int(remaining.max(initial=1)))
        self.stride = -(-longest // MAX_BINS)
        self.num_bins = -(-longest // self.stride)
        self._last_step = (np.arange(self.num_bins, dtype=np.int64) + 1) * self.stride - 1
        self.curve = self._private(computed, shared, remaining) + self._held(held_pages, held_steps)

    def admit(
        self, capacity: int, computed: Int32, shared: Int32, remaining: Int32, prompt_pages: Int32, counts: Int32
    ) -> Int32:
        """How many of each candidate, taken in order and whole until one does not fit, stay under `capacity` at every step.

        Candidate i is `counts[i]` alike sequences at `computed[i]` positions, of which `shared[i]` pages are not their own;
        the first of them brings `prompt_pages[i]` new shared pages along.
        """
        step = self._last_step[None, :]
        own = -(-(computed[:, None] + step + 1) // self.page_size) - shared[:, None]
        alive = np.arange(self.num_bins)[None, :] * self.stride < remaining[:, None]
        own, prompt = np.where(alive, own, 0), np.where(alive, prompt_pages[:, None], 0)
        after = self.curve + np.cumsum(own * counts[:, None] + prompt, axis=0)
        fits = (after <= capacity).all(axis=1)
        if fits.all():
            return counts
        last = int(np.argmin(fits))
        before = after[last] - own[last] * counts[last]
        spare = capacity - before
        room = np.where(own[last] > 0, spare // np.maximum(own[last], 1), np.where(spare >= 0, counts[last], 0))
        admitted = np.where(np.arange(len(counts)) < last, counts, 0)
        admitted[last] = max(0, int(room.min()))
        return admitted

    def _private(self, computed: Int32, shared: Int32, remaining: Int32) -> Curve:
        """Sum over sequences of ceil((computed + t + 1) / page_size) - shared while t < remaining, by page-offset classes:
        sequences that share computed % page_size gain their pages at the same steps."""
        size, bins = self.page_size, self.num_bins
        last_bin = (remaining.astype(np.int64) - 1) // self.stride
        offset = computed % size
        counts = np.bincount(last_bin * size + offset, minlength=bins * size).reshape(bins, size)
        full = np.bincount(last_bin, weights=computed // size - shared, minlength=bins).astype(np.int64)
        alive = np.cumsum(counts[::-1], axis=0)[::-1]
        base = np.cumsum(full[::-1])[::-1]
        growth = -(-(np.arange(size)[None, :] + self._last_step[:, None] + 1) // size)
        return base + (alive * growth).sum(axis=1)

    def _held(self, pages: Int32, steps: Int32) -> Curve:
        last_bin = np.minimum((np.maximum(steps, 1).astype(np.int64) - 1) // self.stride, self.num_bins - 1)
        ending = np.bincount(last_bin, weights=pages, minlength=self.num_bins).astype(np.int64)
        return np.cumsum(ending[::-1])[::-1]
