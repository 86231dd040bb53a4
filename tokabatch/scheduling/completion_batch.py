"""Finished samples packed as columns, for sending them to another process.

A step may finish thousands of samples. Pickling them one by one would take each process about 20 us a sample, during which the
device may be idle. The receiving process reads a few columns and passes the rest on as bytes, without creating an object for
each sample.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import chain, repeat
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from tokabatch.arrays import Bool, Int32, Int64
from tokabatch.scheduling.contracts import Completion, SampleCounts

_FIELDS = tuple(field.name for field in fields(Completion))
_COUNTS = tuple(field.name for field in fields(SampleCounts))
_ARRAYS = frozenset(("token_ids", "logprobs", "top_ids", "top_logprobs"))


@dataclass(frozen=True, slots=True)
class PackedCompletions:
    """N finished samples as received from another process: a few columns, arrays of N, and all samples as bytes. Iterating
    unpacks the samples."""

    row_index: Int64
    sample_index: Int32
    num_tokens: Int32
    stopped: Bool
    """True if a stop token or stop string ended the sample, False if the length limit or an error did."""
    failed: Bool
    contents: tuple[bytes, ...]
    """The pickled samples, in the order of the arrays."""

    @classmethod
    def of(cls, completions: Sequence[Completion]) -> PackedCompletions:
        """Return the samples packed."""
        return cls(
            np.array([completion.row_index for completion in completions], np.int64),
            np.array([completion.sample_index for completion in completions], np.int32),
            np.array([len(completion.token_ids) for completion in completions], np.int32),
            np.array([completion.finish_reason == "stop" for completion in completions], np.bool_),
            np.array([completion.error_code is not None for completion in completions], np.bool_),
            (pickle.dumps(_columns(completions), pickle.HIGHEST_PROTOCOL),) if completions else (),
        )

    @classmethod
    def joined(cls, parts: Sequence[PackedCompletions]) -> PackedCompletions:
        """Return the samples of all parts, of which there must be at least one, in order."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            np.concatenate([part.row_index for part in parts]),
            np.concatenate([part.sample_index for part in parts]),
            np.concatenate([part.num_tokens for part in parts]),
            np.concatenate([part.stopped for part in parts]),
            np.concatenate([part.failed for part in parts]),
            tuple(chain.from_iterable(part.contents for part in parts)),
        )

    def __len__(self) -> int:
        return len(self.row_index)

    def __iter__(self) -> Iterator[Completion]:
        """Yield the samples; those from the same bytes share memory."""
        return chain.from_iterable(_completions(*pickle.loads(content)) for content in self.contents)

    @property
    def num_bytes(self) -> int:
        return sum(map(len, self.contents))


class CompletionBatch(list[Completion]):
    """A list that is pickled as columns. After unpickling, the samples share memory."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _batch, tuple(_columns(self))


class PackedOnTheWay(CompletionBatch):
    """A list that is packed when it is pickled, so that another process receives it as `PackedCompletions`."""

    def __reduce__(self) -> tuple[Any, ...]:
        packed = PackedCompletions.of(self)
        return PackedCompletions, tuple(getattr(packed, field.name) for field in fields(packed))


Completions = Sequence[Completion] | PackedCompletions
"""Finished samples, of this process or another."""


def sample_keys(completions: Completions) -> tuple[Int64, Int32]:
    """Return the row and the number of each sample, shape [N] each."""
    if isinstance(completions, PackedCompletions):
        return completions.row_index, completions.sample_index
    rows = np.array([completion.row_index for completion in completions], np.int64)
    return rows, np.array([completion.sample_index for completion in completions], np.int32)


def _columns(completions: Sequence[Completion]) -> list[Any]:
    columns: list[Any] = []
    for name in _FIELDS:
        column = [getattr(completion, name) for completion in completions]
        if name in _ARRAYS:
            columns.append(_Joined.of(column))
        elif name == "counts":
            columns.append([[getattr(counts, each) for counts in column] for each in _COUNTS])
        else:
            columns.append(column if any(value is not None for value in column) else None)
    return columns


def _completions(*columns: Any) -> Iterator[Completion]:
    values: list[Iterable[Any]] = []
    for name, column in zip(_FIELDS, columns, strict=True):
        if column is None:
            values.append(repeat(None))
        elif isinstance(column, _Joined):
            values.append(column.split())
        else:
            values.append(map(SampleCounts, *column) if name == "counts" else column)
    return map(Completion, *values)


def _batch(*columns: Any) -> CompletionBatch:
    return CompletionBatch(_completions(*columns))


@dataclass(frozen=True, slots=True)
class _Joined:
    """Concatenated arrays: the shape of each (None for a missing one) and all values."""

    shapes: list[tuple[int, ...] | None]
    values: npt.NDArray[Any]

    @classmethod
    def of(cls, arrays: Sequence[npt.NDArray[Any] | None]) -> _Joined | None:
        """Return the arrays concatenated, or None if all are missing."""
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
