"""Finished samples on their way to another process, as columns.

A step may finish thousands. Pickled one by one, each takes either process some 20 us, during which the device may wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import repeat
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from tokabatch.scheduling.contracts import Completion, SampleCounts

_FIELDS = tuple(field.name for field in fields(Completion))
_COUNTS = tuple(field.name for field in fields(SampleCounts))
_ARRAYS = frozenset(("token_ids", "logprobs", "top_ids", "top_logprobs"))


class CompletionBatch(list[Completion]):
    """A list that is pickled as columns. Where it arrives, samples of a batch share memory."""

    def __reduce__(self) -> tuple[Any, ...]:
        columns: list[Any] = []
        for name in _FIELDS:
            column = [getattr(completion, name) for completion in self]
            if name in _ARRAYS:
                columns.append(_Joined.of(column))
            elif name == "counts":
                columns.append([[getattr(counts, each) for counts in column] for each in _COUNTS])
            else:
                columns.append(column if any(value is not None for value in column) else None)
        return _batch, tuple(columns)


def _batch(*columns: Any) -> CompletionBatch:
    values: list[Iterable[Any]] = []
    for name, column in zip(_FIELDS, columns, strict=True):
        if column is None:
            values.append(repeat(None))
        elif isinstance(column, _Joined):
            values.append(column.split())
        else:
            values.append(map(SampleCounts, *column) if name == "counts" else column)
    return CompletionBatch(map(Completion, *values))


@dataclass(frozen=True, slots=True)
class _Joined:
    """Arrays end to end: the shape of each, None where there is none, and their values."""

    shapes: list[tuple[int, ...] | None]
    values: npt.NDArray[Any]

    @classmethod
    def of(cls, arrays: Sequence[npt.NDArray[Any] | None]) -> _Joined | None:
        """None where there is none of them."""
        kept = [array.reshape(-1) for array in arrays if array is not None]
        return cls([None if array is None else array.shape for array in arrays], np.concatenate(kept)) if kept else None

    def split(self) -> list[npt.NDArray[Any] | None]:
        split, begin = list[npt.NDArray[Any] | None](), 0
        for shape in self.shapes:
            if shape is None:
                split.append(None)
                continue
            end = begin + prod(shape)
            split.append(self.values[begin:end] if len(shape) == 1 else self.values[begin:end].reshape(shape))
            begin = end
        return split
