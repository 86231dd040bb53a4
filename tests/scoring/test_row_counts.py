"""How many samples of a row are right, which rows are hardest, and what most of their samples answer."""

from __future__ import annotations

import numpy as np

from tokabatch.scoring.estimates import Judged
from tokabatch.scoring.row_counts import count_rows, most_frequent_answers

# Row 1 has no samples; of row 4 none is ok; of row 5 the last was cancelled; of row 6 none has a verdict; rows arrive mixed.
ROW = np.array([5, 0, 2, 2, 0, 5, 3, 4, 2, 3, 5, 2, 6])
RIGHT = np.array([1, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0], np.bool_)
ANSWER = np.array([7, 1, 8, 9, 1, 6, -1, -1, 1, -1, -1, 9, 3])
CANCELLED = np.arange(13) == 10
OK = (ROW != 4) & ~CANCELLED
VERDICT = OK & (ROW != 6)
JUDGED = Judged(ROW, np.arange(13), RIGHT, RIGHT.astype(np.float64), ANSWER, np.full(13, np.nan), CANCELLED)


def test_rows_by_their_share_of_right_samples() -> None:
    counts = count_rows(JUDGED, OK, VERDICT)
    found = np.stack([counts.row, counts.right, counts.samples, counts.ok, counts.judged]).T.tolist()
    assert found == [[0, 2, 2, 2, 2], [2, 1, 4, 4, 4], [3, 0, 2, 2, 2], [4, 0, 1, 0, 0], [5, 1, 2, 2, 2], [6, 0, 1, 1, 0]]
    assert counts.row[counts.hardest(9)].tolist() == [3, 2, 5] and counts.row[counts.hardest(1)].tolist() == [3]


def test_the_most_frequent_answer_of_a_row_and_of_equals_the_first() -> None:
    assert most_frequent_answers(JUDGED, OK, np.array([3, 2, 5])) == [(6, 0), (3, 2), (0, 1)]
    assert most_frequent_answers(JUDGED, OK, np.zeros(0, np.int64)) == []
