"""The units of a run that several writers share, and which of them each sample is in. They are cut once, and named in the
manifest.

OUT/_units/plan-DIGEST.npy: int32, shape [2, R]: lengths of stretches of samples in the order of rows, and the unit of each. Its
name is derived from its content, so that two writers that begin a run at once do not collide.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokabatch.arrays import Int32, Int64
from tokabatch.errors import DamageError
from tokabatch.output.claim import Claim
from tokabatch.output.folder import PLAN, OutputFolder
from tokabatch.storage.atomic_files import write_whole
from tokabatch.storage.listing import read_bytes


@dataclass(frozen=True, slots=True)
class Units:
    """Sample s of row r is number `start[r] + s` of all samples (as in `Drawn`), and of the unit `unit[start[r] + s]`."""

    start: Int64
    unit: Int32
    count: int

    def of(self, row: Int64, sample: Int64) -> Int32:
        """Return the unit of each of these samples, shape [N]."""
        return self.unit[self.start[row] + sample]

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        edges = np.flatnonzero(np.diff(self.unit)) + 1
        begins = np.concatenate((np.zeros(min(1, len(self.unit)), np.int64), edges))
        lengths = np.diff(np.append(begins, len(self.unit)))
        sink = io.BytesIO()
        np.save(sink, np.stack((lengths, self.unit[begins])).astype(np.int32), allow_pickle=False)
        return sink.getvalue()


def write_units(claim: Claim, units: Units) -> str:
    """Write the units durably; return the digest by which the manifest names them."""
    content = units.to_bytes()
    digest = hashlib.sha256(content).hexdigest()
    path = units_path(claim.folder, digest)
    write_whole(claim.files, claim.folder.temporary / path.name, path, content)
    return digest


def read_units(folder: OutputFolder, count: int, digest: str, start: Int64) -> Units:
    """Read the units that the manifest names, for samples that begin at `start` [rows + 1]. Raises DamageError if they are not
    as they were written."""
    lengths, numbers = _read(folder, digest)
    return Units(start, np.repeat(numbers, lengths), count)


def unit_sizes(folder: OutputFolder, digest: str) -> Int64:
    """Return the number of samples of each unit. Raises DamageError as `read_units` does."""
    lengths, numbers = _read(folder, digest)
    return np.bincount(numbers, lengths).astype(np.int64)


def _read(folder: OutputFolder, digest: str) -> Int32:
    path = units_path(folder, digest)
    content = read_bytes(folder.files, path)
    if content is None or hashlib.sha256(content).hexdigest() != digest:
        raise DamageError(
            f"{path}, which says how the run is cut into units, is missing or damaged. Run the same command again with the "
            "--units of the first start, which writes it, or without --shared."
        )
    return np.load(io.BytesIO(content), allow_pickle=False)


def units_path(folder: OutputFolder, digest: str) -> Path:
    """Return the file of the units with this digest."""
    return folder.units / f"{PLAN}{digest[:16]}.npy"
