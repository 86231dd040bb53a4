"""A model without a model: the token at (row, sample, position) is a hash of the three, drawn in numpy.

It answers steps as a worker does, so that everything around the model (input, scheduler, shards) can be run a million rows at a
time, or killed 200 times a minute. Like keyed sampling it does not depend on what runs beside a sample, and `expected_tokens`
says what a sample must be without having seen the run.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokabatch.arrays import Int32, Int64
from tokabatch.engine.replica_sizes import ReplicaSizes
from tokabatch.forecast.cost_model import CostModel
from tokabatch.forecast.step_work import measure_work
from tokabatch.scheduling.contracts import StepBatch, StepResult

STOP_ONE_IN = 12
QUICKSTART = Path(__file__).parent.parent / "jobs" / "quickstart"


@dataclass(frozen=True, slots=True)
class Script:
    """`step_seconds` are slept in each step; ids are below `vocab_size`, and `eos` ends a sample."""

    vocab_size: int
    eos: int
    step_seconds: float = 0.0
    slots: int = 1 << 14


def quickstart_script(**settings: float) -> Script:
    """One that answers in the words of the quickstart's model."""
    config = json.loads((QUICKSTART / "config.json").read_text())
    return Script(vocab_size=config["vocab_size"], eos=config["eos_token_id"], **settings)  # pyright: ignore


def drawn_tokens(script: Script, row: Int64, sample: Int64, position: Int64) -> Int32:
    """The tokens at these places, one each. The end comes with the same chance everywhere."""
    bits = row.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) ^ sample.astype(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F)
    bits = (bits ^ position.astype(np.uint64)) * np.uint64(0xFF51AFD7ED558CCD)
    bits = (bits ^ (bits >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    bits ^= bits >> np.uint64(29)
    ends = bits % np.uint64(STOP_ONE_IN) == 0
    # Letters and digits of a byte-level vocabulary, so that any sequence is text.
    tokens = np.uint64(script.vocab_size // 2) + (bits >> np.uint64(8)) % np.uint64(script.vocab_size // 4)
    return np.where(ends, np.uint64(script.eos), tokens).astype(np.int32)


def expected_tokens(script: Script, row: int, sample: int, prompt_length: int, max_tokens: int) -> list[int]:
    """All tokens of one sample, its end token included."""
    places = np.arange(prompt_length, prompt_length + max_tokens, dtype=np.int64)
    tokens = drawn_tokens(script, np.full_like(places, row), np.full_like(places, sample), places).tolist()
    return tokens[: tokens.index(script.eos) + 1] if script.eos in tokens else tokens


@dataclass(frozen=True, slots=True)
class Answered:
    """A step whose result exists already."""

    result: StepResult
    done: bool = True

    def wait(self) -> StepResult:
        return self.result


class ScriptedWorker:
    """Launches steps as the engine's worker does."""

    def __init__(self, script: Script, sizes: ReplicaSizes) -> None:
        self._script, self.sizes = script, sizes
        self._row = np.zeros(script.slots, np.int64)
        self._sample = np.zeros(script.slots, np.int64)

    def close(self) -> None:
        """Nothing is held."""

    def make_ahead(self) -> None:
        """Everything is ready."""

    def launch(self, step: StepBatch) -> Answered:
        self._row[step.inits.slot], self._sample[step.inits.slot] = step.inits.row, step.inits.sample
        if self._script.step_seconds:
            time.sleep(self._script.step_seconds)
        slots = step.run_slot[step.run_samples]
        position = (step.run_start + step.run_length)[step.run_samples].astype(np.int64)
        return Answered(
            StepResult.of_tokens(step.index, drawn_tokens(self._script, self._row[slots], self._sample[slots], position))
        )


def build_worker(made_of: tuple[Script, ReplicaSizes]) -> ScriptedWorker:
    """What an executor calls for its worker."""
    return ScriptedWorker(*made_of)


@dataclass(frozen=True, slots=True)
class Timed:
    """A step whose result a device would have at that time of the monotonic clock."""

    result: StepResult
    end: float

    @property
    def done(self) -> bool:
        return time.monotonic() >= self.end

    def wait(self) -> StepResult:
        time.sleep(max(0.0, self.end - time.monotonic()))
        return self.result


class PacedWorker:
    """A scripted worker whose steps take as long as a cost model says, one behind the other, while the caller goes on: the pace
    of a GPU."""

    def __init__(self, script: Script, sizes: ReplicaSizes, cost: CostModel) -> None:
        self.sizes = sizes
        self._worker = ScriptedWorker(script, sizes)
        self._cost = cost
        self._free = 0.0
        """When the device has computed all that was launched."""

    def close(self) -> None:
        """Nothing is held."""

    def make_ahead(self) -> None:
        """Everything is ready."""

    def launch(self, step: StepBatch) -> Timed:
        result = self._worker.launch(step).result
        seconds = float(self._cost.seconds(measure_work(step, self.sizes.page_size)))
        self._free = max(self._free, time.monotonic()) + seconds
        return Timed(result, self._free)


def build_paced_worker(made_of: tuple[Script, ReplicaSizes, CostModel]) -> PacedWorker:
    """What an executor calls for its worker."""
    return PacedWorker(*made_of)
