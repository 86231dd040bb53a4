"""The output of the running samples: token ids and, where requested, log-probabilities.

Memory is proportional to what is stored: each slot has its own rows, which grow by half when they are full, and are freed with
its sample. A step's results are written to a staging area, a ring buffer of rows for each slot, in one vectorised write; a
slot's ring is moved to its rows each time it is full. The rings wrap at different steps, so that no step moves much.

A row is W int32, and each sample has its own W: the token alone, or the token, its log-probability, K ids and K
log-probabilities (the bits of float32).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokabatch.arrays import Float32, Int32, Int64
from tokabatch.scheduling.contracts import NO_COUNTS, SampleCounts

STAGED_VALUES = 1024
"""The least size of a slot's ring, in int32: as many tokens, or fewer with log-probabilities."""
GROWTH = 1.5


@dataclass(slots=True)
class Generated:
    """The output of one sample, T tokens; a preempted sample continues from it."""

    tokens: Int32
    """Shape [T]."""
    logprobs: Float32 | None = None
    """Shape [T]."""
    top_ids: Int32 | None = None
    """Shape [T, K]."""
    top_logprobs: Float32 | None = None
    """Shape [T, K]."""
    counts: SampleCounts[int] = NO_COUNTS


def unscored(tokens: Int32, alternatives: int) -> Generated:
    """Return given tokens as the output of a sample that reports `alternatives`; the scores are zero, to be replaced later."""
    count = len(tokens)
    if alternatives < 0:
        return Generated(tokens)
    top = (
        (np.zeros((count, alternatives), np.int32), np.zeros((count, alternatives), np.float32))
        if alternatives
        else (None, None)
    )
    return Generated(tokens, np.zeros(count, np.float32), *top)


def row_width(alternatives: Int32) -> Int32:
    """Return the int32 values stored for each token of samples that report so many alternatives; -1 reports no
    log-probabilities."""
    return np.where(alternatives < 0, 1, 2 + 2 * alternatives).astype(np.int32)


class Outputs:
    """The outputs of the samples in `num_slots` slots. `alternatives` is the most that any sample reports for each token, -1 if
    none reports log-probabilities."""

    def __init__(self, num_slots: int, alternatives: int) -> None:
        self.count = np.zeros(num_slots, np.int32)
        """Tokens received of each slot's sample, shape [slots]."""
        self._stored = np.zeros(num_slots, np.int32)
        """The number of tokens, of `count`, in the slot's rows; the later ones are staged."""
        self._uniform = alternatives < 0
        self._width = np.ones(num_slots, np.int32)
        self._room = max(STAGED_VALUES, int(row_width(np.array(alternatives))))
        self._mask = np.full(num_slots, STAGED_VALUES - 1, np.int32)
        """The capacity of each slot's ring in rows, less one: the capacity is a power of two, as a mask is several times faster
        than a division."""
        self._staged = np.zeros(num_slots * self._room, np.int32)
        self._rows: list[Int32 | None] = [None] * num_slots

    @property
    def num_bytes(self) -> int:
        """Bytes of memory held, including the staging area."""
        return self._staged.nbytes + sum(rows.nbytes for rows in self._rows if rows is not None)

    def widen(self, alternatives: int) -> None:
        """Enlarge the rings for samples that report so many alternatives, if necessary."""
        room = max(STAGED_VALUES, int(row_width(np.array(alternatives))))
        if room > self._room or (self._uniform and alternatives >= 0):
            self._store(np.flatnonzero(self.count > self._stored))
            self._uniform, self._room = False, room
            self._staged = np.zeros(len(self.count) * room, np.int32)

    def open(self, slots: Int64, alternatives: Int32) -> None:
        """Start over in these slots; `alternatives` as in `SlotInit.logprobs`, shape [slots]."""
        self.count[slots] = self._stored[slots] = 0
        if not self._uniform:
            width = self._width[slots] = row_width(alternatives)
            self._mask[slots] = 2 ** np.floor(np.log2(self._room // width)).astype(np.int32) - 1

    def close(self, slots: Int64) -> None:
        """Free the rows of these slots."""
        for slot in slots[self._stored[slots] > 0].tolist():
            self._rows[slot] = None

    def append(self, slots: Int64, token: Int32, logprob: Float32, top_ids: Int32, top_logprobs: Float32) -> None:
        """Store one received token for each of S slots. `top_ids` and `top_logprobs` have shape [S, K] with at least as
        many alternatives as any of these slots reports."""
        at = self.count[slots]
        # Rings wrap at different places, or samples that began together would all be moved in one step.
        if self._uniform:
            mask = STAGED_VALUES - 1
            place = (at + slots) & mask
            self._staged[slots * STAGED_VALUES + place] = token
        else:
            mask, width = self._mask[slots], self._width[slots]
            place = (at + slots) & mask
            cell = slots * self._room + place * width
            self._staged[cell] = token
            reports = np.flatnonzero(width > 1)
            self._staged[cell[reports] + 1] = logprob[reports].view(np.int32)
            for size in np.unique(width[reports]).tolist():
                alike, known = np.flatnonzero(width == size), (size - 2) // 2
                top = np.concatenate((top_ids[alike, :known], top_logprobs[alike, :known].view(np.int32)), axis=1)
                self._staged[cell[alike, None] + np.arange(2, size)] = top
        self.count[slots] = at + 1
        if len(full := slots[place == mask]):
            self._store(full)

    def tokens(self, slots: Int64) -> list[Int32]:
        """Return the token ids of each slot's sample, shape [T]: read-only, and valid until the next call of another method."""
        return [rows[:, 0] for rows in self._read(slots)]

    def read(self, slots: Int64) -> list[Generated]:
        """Return copies of the outputs of these slots."""
        if not self._uniform:
            return [_generated(rows) for rows in self._read(slots)]
        # As by `_read`, in two thirds of the time: thousands of samples may end in one step.
        stored = self._stored[slots]
        first = slots * self._room + ((stored + slots) & self._mask[slots])
        spans = zip(first.tolist(), (first + self.count[slots] - stored).tolist(), strict=True)
        read = [Generated(self._staged[begin:end].copy()) for begin, end in spans]
        for place in np.flatnonzero(stored).tolist():
            rows = self._rows[int(slots[place])]
            assert rows is not None
            read[place].tokens = np.concatenate((rows[: stored[place], 0], read[place].tokens))
        return read

    def restore(self, slot: int, output: Generated) -> None:
        """Restore the output of a preempted sample into a slot just opened for it."""
        columns = [output.tokens[:, None]]
        if output.logprobs is not None:
            columns.append(output.logprobs[:, None].view(np.int32))
        if output.top_ids is not None and output.top_logprobs is not None:
            columns += [output.top_ids, output.top_logprobs.view(np.int32)]
        # Rows without a token would outlive the sample: `close` gives back those of slots that have stored something.
        self._rows[slot] = np.concatenate(columns, axis=1) if len(output.tokens) else None
        self.count[slot] = self._stored[slot] = len(output.tokens)

    def _staged_rows(self, slots: Int64) -> list[Int32]:
        """Return the staged rows of each of these slots, a view of shape [rows, W]. They never wrap: a ring is moved at its
        end."""
        width, stored = self._width[slots], self._stored[slots]
        first = slots * self._room + ((stored + slots) & self._mask[slots]) * width
        stop = first + (self.count[slots] - stored) * width
        spans = zip(first.tolist(), stop.tolist(), width.tolist(), strict=True)
        return [self._staged[begin:end].reshape(-1, size) for begin, end, size in spans]

    def _read(self, slots: Int64) -> list[Int32]:
        """Return the rows of each of these slots, shape [T, W]: a view if all of them are staged."""
        staged = self._staged_rows(slots)
        for place in np.flatnonzero(self._stored[slots]).tolist():
            slot = int(slots[place])
            rows = self._rows[slot]
            assert rows is not None
            staged[place] = np.concatenate((rows[: self._stored[slot]], staged[place]))
        return staged

    def _store(self, slots: Int64) -> None:
        """Move the staged rows of these slots to their own rows."""
        counts = zip(slots.tolist(), self._stored[slots].tolist(), self.count[slots].tolist(), strict=True)
        for (slot, stored, count), staged in zip(counts, self._staged_rows(slots), strict=True):
            rows = self._rows[slot]
            if rows is None or count > len(rows):
                longer = np.empty((max(count, int(stored * GROWTH)), staged.shape[1]), np.int32)
                if rows is not None:
                    longer[:stored] = rows[:stored]
                rows = self._rows[slot] = longer
            rows[stored:count] = staged
        self._stored[slots] = self.count[slots]


def _generated(rows: Int32) -> Generated:
    """Return copies of all parts of a sample's rows, shape [T, W]."""
    known = (rows.shape[1] - 2) // 2
    return Generated(
        tokens=rows[:, 0].copy(),
        logprobs=rows[:, 1].copy().view(np.float32) if known >= 0 else None,
        top_ids=rows[:, 2 : 2 + known].copy() if known > 0 else None,
        top_logprobs=rows[:, 2 + known :].copy().view(np.float32) if known > 0 else None,
    )
