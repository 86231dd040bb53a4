"""Sampling parameters by slot: a table on the device that a step indexes, and the same on the host.

Opening slots sends their records in one transfer and scatters them. What is needed of a step's rows before it is launched
(`SamplerInputs`) is read from the host's copy, so nothing waits for the device. On a CPU both are one memory.

Shape legend: S rows of a step, A slots opened, W words of a record.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tokabatch.arrays import Int32, Int64
from tokabatch.attention.upload import to_device_all
from tokabatch.scheduling.contracts import SlotInit

# Wide fields first, so that every field is aligned.
RECORD = np.dtype(
    [
        ("seed", np.int64),
        ("row", np.int64),
        ("sample", np.int32),
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("top_k", np.int32),
        ("logprobs", np.int32),
    ]
)
WORDS = RECORD.itemsize // 4


@dataclass(frozen=True, slots=True)
class SlotColumns:
    """The fields of some records, views of `words_SW`: seed and row int64, sample, top_k and logprobs int32, else float32.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 are off; `logprobs` is -1 for none, else how many
    alternatives.
    """

    words_SW: torch.Tensor

    def _wide(self, word: int) -> torch.Tensor:
        return self.words_SW[:, word : word + 2].view(torch.int64)[:, 0]

    def _float(self, word: int) -> torch.Tensor:
        return self.words_SW[:, word].view(torch.float32)

    @property
    def seed(self) -> torch.Tensor:
        return self._wide(0)

    @property
    def row(self) -> torch.Tensor:
        return self._wide(2)

    @property
    def sample(self) -> torch.Tensor:
        return self.words_SW[:, 4]

    @property
    def temperature(self) -> torch.Tensor:
        return self._float(5)

    @property
    def top_p(self) -> torch.Tensor:
        return self._float(6)

    @property
    def min_p(self) -> torch.Tensor:
        return self._float(7)

    @property
    def top_k(self) -> torch.Tensor:
        return self.words_SW[:, 8]

    @property
    def logprobs(self) -> torch.Tensor:
        return self.words_SW[:, 9]


@dataclass(frozen=True, slots=True)
class SamplerInputs:
    """How each row of a step is drawn, and the facts about all of them that choose kernels."""

    table: SlotTable
    slot_S: torch.Tensor
    """Integers on the table's device, as are the positions: the place of the token that is drawn."""
    position_S: torch.Tensor
    any_random: bool
    """Some temperature is above 0."""
    any_filter: bool
    """Some row that is not greedy uses top_p, top_k or min_p."""
    max_logprobs: int
    """The maximum of `logprobs`: -1 where all rows have them off."""


class SlotTable:
    """The records of `num_slots` slots. A slot keeps its record until it is opened again."""

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self._records = np.zeros(num_slots, RECORD)
        self._records["temperature"] = self._records["top_p"] = 1.0
        self._records["logprobs"] = -1
        # What `inputs` returns for each slot: it changes only when the slot is opened.
        self._random = np.ones(num_slots, np.bool_)
        self._filtered = np.zeros(num_slots, np.bool_)
        self._logprobs = np.full(num_slots, -1, np.int32)
        words = torch.from_numpy(_as_words(self._records))
        self._on_host = device.type == "cpu"
        self.words = words if self._on_host else words.to(device)
        """int32 [num_slots, W] on the device, at one address for life."""

    def open(self, slot_A: Int64, words_AW: Int32) -> None:
        """Set the records of the slots that a step opens, as `packed` makes them, here and on the device."""
        self.note(slot_A, words_AW)
        if len(slot_A) and not self._on_host:
            self.store(*to_device_all((slot_A, words_AW), self.words.device))

    def note(self, slot_A: Int64, words_AW: Int32) -> None:
        """Do the host's part of `open`: `inputs` is up to date afterwards, the records on the device are not."""
        if not len(slot_A):
            return
        records = words_AW.view(RECORD)[:, 0]
        self._records[slot_A] = records
        random = records["temperature"] > 0
        filters = (records["top_p"] < 1) | (records["top_k"] > 0) | (records["min_p"] > 0)
        self._random[slot_A], self._filtered[slot_A] = random, random & filters
        self._logprobs[slot_A] = records["logprobs"]

    def store(self, slots: torch.Tensor, words: torch.Tensor) -> None:
        """Do the device's part of `open`, with both arrays on the device."""
        if len(slots) and not self._on_host:
            self.words.index_copy_(0, slots, words)

    def inputs(self, slots: Int32, slot_S: torch.Tensor, position_S: torch.Tensor) -> SamplerInputs:
        """Return what `sample` takes for rows of these slots; `slot_S` are the same slots on the device."""
        return SamplerInputs(self, slot_S, position_S, *self.kinds(slots))

    def kinds(self, slots: Int32) -> tuple[bool, bool, int]:
        """Return whether any of these slots draws at random, whether any filters, and the most alternatives reported."""
        some = bool(self._random[slots].any()), bool(self._filtered[slots].any())
        return *some, int(self._logprobs[slots].max(initial=-1))

    def columns(self, slot_S: torch.Tensor) -> SlotColumns:
        """Return the fields of these slots' records, copies of S, on the device."""
        return SlotColumns(self.words.index_select(0, slot_S))


def packed(inits: SlotInit) -> tuple[Int64, Int32]:
    """Return what `SlotTable.open` takes: the slots [A], and their records as words [A, W]."""
    records = np.empty(len(inits.slot), RECORD)
    for field in RECORD.names or ():
        records[field] = getattr(inits, field)
    return inits.slot.astype(np.int64), _as_words(records)


def _as_words(records: npt.NDArray[np.void]) -> Int32:
    return records.view(np.int32).reshape(-1, WORDS)
