"""How many samples of each row are right, and the rows of which the smallest share is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokabatch.arrays import Bool, Int64
from tokabatch.scoring.estimates import Judged


@dataclass(frozen=True, slots=True)
class RowCounts:
    """Of each row with samples, in the order of the input, arrays of shape [R]: its number, how many samples it has, those
    that ended in an error included, how many of them are right, how many are ok, and how many have a verdict."""

    row: Int64
    samples: Int64
    right: Int64
    ok: Int64
    judged: Int64

    def hardest(self, count: int) -> Int64:
        """Return the places of the `count` rows with the smallest share of right samples, those first, without rows that are
        all right, or of which no sample has a verdict."""
        places = np.flatnonzero((self.right < self.samples) & (self.judged > 0))
        return places[np.argsort(self.right[places] / self.samples[places], kind="stable")][:count]


def count_rows(judged: Judged, ok: Bool, verdict: Bool) -> RowCounts:
    """Return the counts of all rows; `verdict` is which samples have one. Samples that were cancelled, since their row had
    stopped, do not count."""
    numbers = judged.row[~judged.cancelled]
    samples = np.bincount(numbers)
    kinds = (judged.correct & ~judged.cancelled, ok, verdict)
    row = np.flatnonzero(samples)
    return RowCounts(row, samples[row], *(np.bincount(judged.row[each], minlength=len(samples))[row] for each in kinds))


def most_frequent_answers(judged: Judged, ok: Bool, rows: Int64) -> list[tuple[int, int]]:
    """Return of each of these rows the place of a sample with its most frequent answer, of equals the first, and how many
    samples have it; of a row without an answer, the place of its first good sample, and 0."""
    places = np.flatnonzero(np.isin(judged.row, rows) & ok)
    of_row, found = judged.row[places], list[tuple[int, int]]()
    for row in rows.tolist():
        own = places[of_row == row]
        answered = own[judged.answer[own] >= 0]
        if len(answered):
            _, first, counts = np.unique(judged.answer[answered], return_index=True, return_counts=True)
            most = np.flatnonzero(counts == counts.max())
            best = most[np.argmin(first[most])]
            found.append((int(answered[first[best]]), int(counts[best])))
        else:
            found.append((int(own[0]), 0))
    return found
