"""Milliseconds that penalties add to sampling: python -m benchmarks.penalties [--vocab 128256] [--rows 256 8192]

Rows of random logits (bfloat16 on a GPU, else float32) are drawn with and without penalties, all of them or every tenth; each
has a context of so many tokens, a fifth of them output. Taking in a step's tokens and finding the penalised rows, which every
step of such a job does, is in the figures of the penalised cases. Medians of a number of calls: on a GPU each is waited for, on
a CPU it is the thread's own time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tokabatch.attention.upload import Outbox
from tokabatch.model.sampling.penalties import Penalties
from tokabatch.model.sampling.sampler import sample
from tokabatch.model.sampling.slot_table import SlotTable, packed
from tokabatch.scheduling.contracts import SamplingParams, SlotInit, StepBatch
from tokabatch.scheduling.penalty_rules import PenaltyTable

PAGE = 16
CASES: dict[str, dict[str, Any]] = {
    "none": {},
    "repetition": {"repetition_penalty": 1.1},
    "frequency": {"frequency_penalty": 0.5, "presence_penalty": 0.5},
    "min_tokens": {"min_tokens": 10_000},
    "300 biases": {"logit_bias": tuple((token, 1.0) for token in range(300))},
    "bad words": {"bad_words": ((5, 6), (7, 8, 9), (4,))},
}


class Rows:
    """Slots with contexts, and steps that compute their last tokens and draw the next ones."""

    def __init__(self, case: dict[str, Any], share: int, rows: int, vocab: int, context: int, device: torch.device) -> None:
        """Every `share`-th row is penalised."""
        rng, columns = np.random.default_rng(0), -(-context // PAGE) + 1
        slots, zero = np.arange(rows, dtype=np.int32), np.zeros(rows, np.int32)
        kinds = [SamplingParams(**case), SamplingParams()]
        entries = np.where(slots % share == 0, 0, 1).astype(np.int32)
        table = PenaltyTable(lambda entry: (0,))
        table.extend(kinds)
        penalties = table.of(slots.astype(np.int64), entries, zero + context * 4 // 5)
        ones = np.ones(rows, np.float32)
        self.inits = SlotInit(
            slots, slots.astype(np.int64), zero, zero.astype(np.int64), ones, ones, zero, ones * 0, zero - 1, penalties
        )
        self.device, self.slots, self.context = device, slots, context
        self.table = SlotTable(rows, device)
        self.table.open(*packed(self.inits))
        self.last = torch.zeros(rows, dtype=torch.int64, device=device)
        self.penalties = Penalties(rows, columns, rows * columns, PAGE, vocab, device) if penalties is not None else None
        cells = np.arange(rows * columns, dtype=np.int32)
        self.cells = cells // columns, cells % columns, cells
        self.logits = torch.randn(rows, vocab, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
        self.tokens = rng.integers(0, vocab, rows * (context - 1)).astype(np.int32)
        self.nothing = SlotInit(*(array[:0] for array in packed_columns(self.inits)))
        if self.penalties is not None:
            self._follow(0, context - 1, prefill=True)

    def draw(self) -> None:
        outbox = Outbox(self.device)
        position = np.full(len(self.slots), self.context, np.int32)
        slot, place = outbox.add(self.slots), outbox.add(position)
        if self.penalties is not None:
            self.penalties.follow(self._step(self.context - 1, 1, prefill=False), self.last, outbox)
        penalised = None if self.penalties is None else self.penalties.rows(self.slots, position, outbox)
        outbox.send()
        sample(self.logits, self.table.inputs(self.slots, slot.tensor, place.tensor), self.last, penalised)

    def _follow(self, start: int, length: int, *, prefill: bool) -> None:
        assert self.penalties is not None
        outbox = Outbox(self.device)
        self.penalties.follow(self._step(start, length, prefill=prefill), self.last, outbox)
        outbox.send()

    def _step(self, start: int, length: int, *, prefill: bool) -> StepBatch:
        none, count = np.zeros(0, np.int32), len(self.slots)
        cells = self.cells if prefill else (none, none, none)
        full = np.full(count, 1, np.int32)
        runs = self.slots, full * start, full * length, full > 0, full * 0
        inits = self.inits if prefill else self.nothing
        tokens = self.tokens if prefill else none
        return StepBatch(1, inits, *cells, none, none, none, count if prefill else 0, *runs, tokens, ())


def packed_columns(inits: SlotInit) -> list[Any]:
    """The arrays of it, in order."""
    names = ("slot", "row", "sample", "seed", "temperature", "top_p", "top_k", "min_p", "logprobs")
    return [getattr(inits, name) for name in names]


def timed(work: Callable[[], None], calls: int, device: torch.device) -> float:
    """Milliseconds, the median."""
    found: list[float] = []
    for _ in range(calls + 2):
        clock = time.perf_counter if device.type == "cuda" else time.thread_time
        began = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(clock() - began)
    return float(np.median(found[2:])) * 1e3


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 8192])
    parser.add_argument("--context", type=int, default=1000)
    parser.add_argument("--calls", type=int, default=20)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for rows in args.rows:
        print(f"{rows} rows x {args.vocab}, contexts of {args.context}, {device.type}: ms of all rows, of every tenth")
        for name, case in CASES.items():
            shares = [
                timed(Rows(case, share, rows, args.vocab, args.context, device).draw, args.calls, device) for share in (1, 10)
            ]
            print(f"  {name:<12} {shares[0]:9.2f} {shares[1]:9.2f}", flush=True)


if __name__ == "__main__":
    main()
