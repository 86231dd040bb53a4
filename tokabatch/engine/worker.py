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
from tokabatch.messages import Int32, SlotInit, StepBatch, StepResult
from tokabatch.model.decoder import Decoder
from tokabatch.model.sampler import Sampled, SamplerInputs, sample
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
        self._slots = _SlotParams(num_slots)

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
        sampled = sample(logits_SV, self._slots.inputs(slots, position_S, self._device))
        self._last_token[self._tensor(slots)] = sampled.token_S.long()
        return Launched(step.index, sampled)

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return to_device(values.astype(np.int64), self._device)


class Launched:
    """A step on its way: its results travel to the host behind it, and `wait` is for them alone."""

    def __init__(self, index: int, sampled: Sampled) -> None:
        self._index = index
        self._token_S = to_host(sampled.token_S)
        self._finite_S = to_host(sampled.finite_S)
        self._logprob_S = to_host(sampled.logprob_S)
        self._top_ids_SK = to_host(sampled.top_ids_SK)
        self._top_logprobs_SK = to_host(sampled.top_logprobs_SK)
        self._event: torch.cuda.Event | None = None
        if sampled.token_S.is_cuda:
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
            token=self._token_S.numpy(),
            finite=self._finite_S.numpy(),
            logprob=self._logprob_S.numpy(),
            top_ids=self._top_ids_SK.numpy(),
            top_logprobs=self._top_logprobs_SK.numpy(),
        )


class _SlotParams:
    """Sampling parameters by slot, kept on the host: a step gathers those of the slots it samples."""

    def __init__(self, num_slots: int) -> None:
        self._seed, self._row = np.zeros(num_slots, np.int64), np.zeros(num_slots, np.int64)
        self._sample, self._top_k = np.zeros(num_slots, np.int32), np.zeros(num_slots, np.int32)
        self._logprobs = np.full(num_slots, -1, np.int32)
        self._temperature, self._top_p = np.ones(num_slots, np.float32), np.ones(num_slots, np.float32)
        self._min_p = np.zeros(num_slots, np.float32)

    def open(self, inits: SlotInit) -> None:
        slot = inits.slot
        self._seed[slot], self._row[slot], self._sample[slot] = inits.seed, inits.row, inits.sample
        self._temperature[slot], self._top_p[slot] = inits.temperature, inits.top_p
        self._top_k[slot], self._min_p[slot] = inits.top_k, inits.min_p
        self._logprobs[slot] = inits.logprobs

    def inputs(self, slots: Int32, position_S: Int32, device: torch.device) -> SamplerInputs:
        def gather(values: np.ndarray) -> torch.Tensor:
            return to_device(values, device)

        temperature, top_p = self._temperature[slots], self._top_p[slots]
        top_k, min_p, logprobs = self._top_k[slots], self._min_p[slots], self._logprobs[slots]
        return SamplerInputs(
            seed=gather(self._seed[slots]),
            row=gather(self._row[slots]),
            sample=gather(self._sample[slots]),
            position=gather(position_S),
            temperature=gather(temperature),
            top_p=gather(top_p),
            top_k=gather(top_k),
            min_p=gather(min_p),
            logprobs=gather(logprobs),
            any_random=bool((temperature > 0).any()),
            any_filter=bool(((top_p < 1) | (top_k > 0) | (min_p > 0)).any()),
            max_logprobs=int(logprobs.max(initial=-1)),
        )
