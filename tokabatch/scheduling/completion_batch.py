"""Finished samples on their way to another process, as columns.

A step may finish thousands. Pickled one by one, each takes either process some 20 us, during which the device may wait.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from tokabatch.scheduling.contracts import Completion

_FIELDS = tuple(field.name for field in fields(Completion))
_ARRAYS = frozenset(("token_ids", "logprobs", "top_ids", "top_logprobs"))


class CompletionBatch(list[Completion]):
    """A list that is pickled as columns. Where it arrives, samples of a batch share memory."""

    def __reduce__(self) -> tuple[Any, ...]:
        columns = ([getattr(completion, name) for completion in self] for name in _FIELDS)
        return _batch, tuple(
            _Joined.of(column) if name in _ARRAYS else column for name, column in zip(_FIELDS, columns, strict=True)
        )


def _batch(*columns: list[Any] | _Joined) -> CompletionBatch:
    return CompletionBatch(map(Completion, *(each.split() if isinstance(each, _Joined) else each for each in columns)))


@dataclass(frozen=True, slots=True)
class _Joined:
    """Arrays end to end: the shape of each, None where there is none, and their values where there are any."""

    shapes: list[tuple[int, ...] | None]
    values: npt.NDArray[Any] | None

    @classmethod
    def of(cls, arrays: Sequence[npt.NDArray[Any] | None]) -> _Joined:
        kept = [array.reshape(-1) for array in arrays if array is not None]
        return cls([None if array is None else array.shape for array in arrays], np.concatenate(kept) if kept else None)

    def split(self) -> Iterator[npt.NDArray[Any] | None]:
        begin = 0
        for shape in self.shapes:
            if shape is None or self.values is None:
                yield None
            else:
                end = begin + prod(shape)
                yield self.values[begin:end] if len(shape) == 1 else self.values[begin:end].reshape(shape)
                begin = end
