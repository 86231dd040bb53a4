"""Arrays and texts that grow on disk while a dataset streams by and are then read back through memory maps.

Each spool owns its file until `finish`; a finished file can be opened again. Nothing here is durable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from tokabatch.arrays import Int64

Scalar = TypeVar("Scalar", bound=np.generic)


class ArraySpool(Generic[Scalar]):
    """A one-dimensional array of one type, appended in pieces."""

    def __init__(self, path: Path, dtype: type[Scalar]) -> None:
        self._path = path
        self._dtype = np.dtype(dtype)
        self._file = path.open("wb")
        self.length = 0

    def append(self, values: Sequence[Any] | npt.NDArray[Scalar]) -> None:
        array = np.asarray(values, dtype=self._dtype)
        self._file.write(array.tobytes())
        self.length += len(array)

    def finish(self) -> npt.NDArray[Scalar]:
        """Return the whole array, memory-mapped and read-only."""
        self._file.close()
        return open_array(self._path, self._dtype.type)


def open_array(path: Path, dtype: type[Scalar]) -> npt.NDArray[Scalar]:
    """Open a finished array, memory-mapped and read-only."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)


@dataclass(frozen=True, slots=True)
class Texts:
    """Finished byte strings: number i is `data[offsets[i] : offsets[i + 1]]`."""

    data: npt.NDArray[np.uint8]
    offsets: Int64

    @classmethod
    def open(cls, path: Path) -> Texts:
        """Open the texts of a finished spool."""
        return cls(open_array(path, np.uint8), open_array(_offsets(path), np.int64))

    def get(self, row: int) -> bytes:
        return self.data[self.offsets[row] : self.offsets[row + 1]].tobytes()


class TextSpool:
    """Byte strings, one after another, and their offsets."""

    def __init__(self, path: Path) -> None:
        self._data = ArraySpool(path, np.uint8)
        self._offsets = ArraySpool(_offsets(path), np.int64)
        self._offsets.append([0])

    def append(self, texts: Sequence[bytes]) -> None:
        ends = accumulate((len(text) for text in texts), initial=self._data.length)
        next(ends)
        self._offsets.append(list(ends))
        self._data.append(np.frombuffer(b"".join(texts), dtype=np.uint8))

    def finish(self) -> Texts:
        return Texts(self._data.finish(), self._offsets.finish())


def _offsets(path: Path) -> Path:
    return path.with_suffix(".offsets")
