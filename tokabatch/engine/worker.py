"""Executes steps: the model, its KV cache and the sampler of one replica, on one device.

The worker holds what a step only refers to: the page table (in the attention backend), each slot's sampling parameters and
its last sampled token, which the next step consumes without a trip to the scheduler.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tokabatch.attention import create_backend
from tokabatch.attention.base import AttentionBackend
from tokabatch.engine.sizing import ReplicaSizes, kv_shape
from tokabatch.messages import StepBatch, StepResult
from tokabatch.model.decoder import Decoder
from tokabatch.model.sampler import Sampled, sample
from tokabatch.model.slot_table import SlotTable
from tokabatch.model.spec import ModelSpec
from tokabatch.model.weights import load_decoder
from tokabatch.transfer import to_device, to_host


@dataclass(frozen=True, slots=True)
class ProfileSpec:
    """Record `steps` steps from step `start` on (the first is 1) into the Chrome trace `path`."""

    path: Path
    start: int
    steps: int


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """All a worker is built from; picklable, so that it can be built in another process."""

    folder: Path
    spec: ModelSpec
    dtype: torch.dtype
    device: str
    backend: str
    sizes: ReplicaSizes
    profile: ProfileSpec | None = None


class Worker:
    """One replica's model side. Steps run in the order given."""

    def __init__(self, decoder: Decoder, backend: AttentionBackend, num_slots: int) -> None:
        self._decoder = decoder
        self._backend = backend
        self._device = decoder.device
        self._last_token = torch.zeros(num_slots, dtype=torch.int64, device=self._device)
        self._slots = SlotTable(num_slots, self._device)

    @classmethod
    def build(cls, spec: WorkerSpec) -> Worker:
        """Load the weights and allocate the cache. Raises ModelError."""
        sizes = spec.sizes
        device = torch.device(spec.device)
        decoder = load_decoder(spec.folder, spec.spec, spec.dtype, device)
        shape = kv_shape(spec.spec, sizes.page_size, sizes.num_pages, sizes.max_running, sizes.max_pages_per_sequence)
        return cls(decoder, create_backend(spec.backend, shape, spec.dtype, device), sizes.max_running)

    def run(self, step: StepBatch) -> StepResult:
        """Execute one step and wait for its result."""
        return self.launch(step).wait()

    @torch.inference_mode()
    def launch(self, step: StepBatch) -> Launched:
        """Queue one step on the device; on a CPU it is computed before this returns."""
        self._slots.open(step.inits)
        self._backend.prepare(step)
        run_stop = np.cumsum(step.run_length)
        decoding = self._tensor(step.run_slot[step.num_prefill_runs :])
        token_T = torch.cat((self._tensor(step.token_ids), self._last_token[decoding]))
        logits_SV = self._decoder.forward(
            token_T, self._tensor(step.positions()), self._backend.attend, self._tensor(run_stop[step.run_samples] - 1)
        )
        slots = step.run_slot[step.run_samples]
        position_S = (step.run_start + step.run_length)[step.run_samples]
        inputs = self._slots.inputs(slots, self._tensor(slots), to_device(position_S, self._device))
        sampled = sample(logits_SV, inputs, self._last_token)
        return Launched(step.index, sampled)

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return to_device(values.astype(np.int64), self._device)


class Launched:
    """A step on its way: its results travel to the host behind it, and `wait` is for them alone."""

    def __init__(self, index: int, sampled: Sampled) -> None:
        self._index = index
        self._sampled = Sampled(to_host(sampled.packed))
        self._event: torch.cuda.Event | None = None
        if sampled.packed.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    @property
    def done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._event is None or self._event.query()

    def wait(self) -> StepResult:
        if self._event is not None:
            self._event.synchronize()
        return StepResult(
            index=self._index,
            token=self._sampled.token_S.numpy(),
            finite=self._sampled.finite_S.numpy(),
            logprob=self._sampled.logprob_S.numpy(),
            top_ids=self._sampled.top_ids_SK.numpy(),
            top_logprobs=self._sampled.top_logprobs_SK.numpy(),
        )
