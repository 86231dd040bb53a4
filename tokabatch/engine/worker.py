"""Executes steps: the model, its KV cache and the sampler of one replica, on one device.

The worker holds what a step only refers to: the page table (in the attention backend), each slot's sampling parameters and
its last sampled token, which the next step consumes without a trip to the scheduler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from tokabatch.arrays import Int32
from tokabatch.attention import create_backend
from tokabatch.attention.base import AttentionBackend, token_slots
from tokabatch.attention.capturable import Capturable
from tokabatch.attention.upload import Outbox, to_host
from tokabatch.cores import usable_cores
from tokabatch.engine.memory import captured_tokens, fitting_pages
from tokabatch.engine.replica_sizes import ReplicaSizes, kv_shape, settle_pages
from tokabatch.engine.warm_up import warm_up_steps
from tokabatch.model.decoder import Decoder, KVPages
from tokabatch.model.file_digests import ModelFile, refuse_changed
from tokabatch.model.sampling.penalties import Penalties
from tokabatch.model.sampling.sampler import Sampled, sample, score
from tokabatch.model.sampling.slot_table import SlotTable, packed
from tokabatch.model.spec import ModelSpec
from tokabatch.model.weights import load_decoder
from tokabatch.parallel.collectives import compare_choice, least
from tokabatch.parallel.mesh import Mesh, Place
from tokabatch.parallel.peer_links import meet_neighbours
from tokabatch.parallel.peer_memory import PeerSums
from tokabatch.scheduling.contracts import SamplingParams, ScoredPlaces, Scores, StepBatch, StepResult

if TYPE_CHECKING:
    from tokabatch.engine.captured import CapturedSteps

AHEAD_EVERY = 4
"""Steps between graph captures ahead of use on a worker of several tensor ranks."""
SCORED_CPU, SCORED_DEVICE = 1 << 22, 1 << 26
"""The most logits computed at a time when given tokens are scored."""


@dataclass(frozen=True, slots=True)
class TraceSpec:
    """Record `steps` steps from step `start` on (the first is 1) into the Chrome trace `path`."""

    path: Path
    start: int
    steps: int


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """The description from which a worker is built; picklable, so that it can be built in another process."""

    folder: Path
    spec: ModelSpec
    dtype: torch.dtype
    device: str
    backend: str
    sizes: ReplicaSizes
    fp8: bool = False
    """Whether the matrices of the layers are stored in FP8 (e4m3)."""
    kv_dtype: torch.dtype | None = None
    """The data type of keys and values; None means the model's."""
    trace: TraceSpec | None = None
    files: tuple[ModelFile, ...] = ()
    """The files of the model and its tokenizer; every worker of a run refuses files that differ from them."""
    replicas: int = 1
    """The number of replicas among which the cores of a host are divided."""
    draws: tuple[SamplingParams, ...] = ()
    """The kinds of drawing to warm up (`warm_up.kinds_of_drawing`)."""
    async_tp: bool = True
    """Whether products of tensor ranks may overlap with their exchange, if that is measured to be faster."""
    place: Place | None = None
    """The place of one rank in a worker of several ranks; None for a worker of one."""


class Worker:
    """One replica's model side. Steps run in the order given."""

    def __init__(self, decoder: Decoder, backend: AttentionBackend, sizes: ReplicaSizes, *, penalised: bool = False) -> None:
        """`penalised` says that some samples have penalties (`SamplingParams.penalised`)."""
        num_slots = sizes.max_running
        self.sizes = sizes
        """The sizes after settling the cache: the limits of the scheduler."""
        self._decoder = decoder
        self._backend = backend
        self._shared_cache = backend.cache if isinstance(backend, Capturable) else None
        self._device = decoder.device
        # One more entry than slots: the padding of captured steps reads and writes it.
        self._last_token = torch.zeros(num_slots + 1, dtype=torch.int64, device=self._device)
        self._slots = SlotTable(num_slots + 1, self._device)
        self._penalties: Penalties | None = None
        if penalised:
            pages = sizes.max_pages_per_sequence, sizes.num_pages, sizes.page_size
            self._penalties = Penalties(num_slots, *pages, decoder.spec.vocab_size, self._device)
        self._captured: CapturedSteps | None = None

    @classmethod
    def build(cls, spec: WorkerSpec, mesh: Mesh | None = None) -> Worker:
        """Load the weights, of one rank if there is a mesh, settle and allocate the cache, and on a GPU warm up. Raises
        ModelError, also for a file that is not the one that the run began with, and JobError if the shortest sample does not
        fit beside what a step needs."""
        sizes, device, penalised = spec.sizes, torch.device(spec.device), any(params.penalised for params in spec.draws)
        mesh = mesh or Mesh.single()
        if device.type == "cpu":
            ranks = mesh.tensor_size * mesh.pipeline_size
            threads = min(torch.get_num_threads() // spec.replicas, usable_cores() // (spec.replicas * ranks))
            torch.set_num_threads(max(1, threads))
        refuse_changed(spec.files)
        decoder = load_decoder(spec.folder, spec.spec, spec.dtype, device, mesh, fp8=spec.fp8)
        # Once more: they may have been replaced while they were read.
        refuse_changed(spec.files)
        room = sizes.max_step_tokens, spec.spec.hidden_size, spec.dtype, decoder.device
        if device.type == "cuda" and mesh.pipeline_size > 1:
            decoder.peer_links = meet_neighbours(mesh, *room)
        if device.type == "cuda" and mesh.tensor_size > 1:
            decoder.peer_sums = PeerSums.meet(mesh, *room)
            if decoder.peer_sums is not None and spec.async_tp:
                decoder.measure_scattering(sizes.max_step_tokens)
        if device.type == "cuda":
            one_page = kv_shape(spec.spec, sizes.page_size, 1, 1, 1, mesh).bytes_per_page(spec.kv_dtype or spec.dtype)
            fitting = fitting_pages(decoder, sizes, one_page, penalised=penalised)
            sizes = settle_pages(sizes, least(fitting, mesh, device))
        shape = kv_shape(spec.spec, sizes.page_size, sizes.num_pages, sizes.max_running, sizes.max_pages_per_sequence, mesh)
        backend = create_backend(spec.backend, shape, spec.dtype, device, spec.kv_dtype)
        worker = cls(decoder, backend, sizes, penalised=penalised)
        if device.type == "cuda":
            worker.warm_up(spec.draws)
        return worker

    @torch.inference_mode()
    def warm_up(self, draws: Sequence[SamplingParams]) -> None:
        """Compile and load every kernel. From now on steps are captured, if the backend is `Capturable`."""
        for step in warm_up_steps(self.sizes, draws):
            self.run(step)
        backend = self._backend
        if isinstance(backend, Capturable):
            # Imports Triton, which need not be installed without a GPU.
            build = import_module("tokabatch.engine.captured").captured_on_gpu
            self._captured = build(self._decoder, backend, self._last_token, self._slots, captured_tokens(self.sizes))

    def run(self, step: StepBatch) -> StepResult:
        """Execute one step and wait for its result."""
        return self.launch(step).wait()

    @torch.inference_mode()
    def launch(self, step: StepBatch) -> Launched:
        """Queue one step on the device; on a CPU it is computed before this returns."""
        compare_choice(lambda: f"step {step.index} of the bytes {step.digest()}", self._decoder.mesh)
        outbox, opened = Outbox(self._device), packed(step.inits)
        self._slots.note(*opened)
        slot_A, words_AW = (outbox.add(values) for values in opened)
        if self._penalties is not None:
            self._penalties.follow(step, self._last_token, outbox)
        else:
            assert step.inits.penalties is None, "the worker was built for samples without penalties (WorkerSpec.draws)"
        if step.scored is not None:
            score = self._scoring(step, step.scored, outbox)
            outbox.send()
            self._slots.store(slot_A.tensor, words_AW.tensor)
            drawn, scores = score()
            return Launched(step.index, drawn, int(np.count_nonzero(step.run_samples)), scores)
        compute = self._by_kernels(step, outbox) if self._captured is None else self._by_graphs(self._captured, step, outbox)
        outbox.send()
        self._slots.store(slot_A.tensor, words_AW.tensor)
        launched = Launched(step.index, compute(), int(np.count_nonzero(step.run_samples)))
        if self._captured is not None and self._decoder.mesh.tensor_size > 1 and step.index % AHEAD_EVERY == 0:
            # Two tensor ranks that run different graphs would deadlock: which ones exist must follow from the steps alone.
            self._captured.make_ahead()
        return launched

    @torch.inference_mode()
    def make_ahead(self) -> None:
        """Capture a graph for later steps, which takes some 20 ms; call this while the device is busy."""
        if self._captured is not None and self._decoder.mesh.tensor_size == 1:
            self._captured.make_ahead()

    def _by_kernels(self, step: StepBatch, outbox: Outbox) -> Callable[[], Sampled]:
        """Prepare the step kernel by kernel. The returned function computes it once the outbox is sent."""
        hidden = self._hidden(step, outbox, _last_tokens(step))
        draw = self._draw(step, outbox)
        return lambda: draw(hidden())

    def _draw(self, step: StepBatch, outbox: Outbox) -> Callable[[torch.Tensor], Sampled]:
        """Prepare the head kernel by kernel. The returned function draws from hidden_SE once the outbox is sent."""
        slots, positions = _sampled(step)
        slot, position = outbox.add(slots), outbox.add(positions)
        penalised = None if self._penalties is None else self._penalties.rows(slots, positions, outbox)

        def compute(hidden_SE: torch.Tensor) -> Sampled:
            decoder = self._decoder
            if not decoder.mesh.is_last_stage:
                return Sampled(torch.empty(3, 0, dtype=torch.int32, device=self._device))
            inputs = self._slots.inputs(slots, slot.tensor, position.tensor)
            return sample(decoder.logits(hidden_SE), inputs, self._last_token, penalised, decoder.vocabulary)

        return compute

    def _by_graphs(self, captured: CapturedSteps, step: StepBatch, outbox: Outbox) -> Callable[[], Sampled]:
        """Prepare the step with captured graphs, except for the layers of a step that is too large for one and the head of a
        step with penalised rows. Only the last pipeline stage draws."""
        body = captured.body.fit(step)
        rows, draws = np.flatnonzero(step.run_samples), self._decoder.mesh.is_last_stage
        if body is None:
            hidden, words = self._hidden(step, outbox, _last_tokens(step)), None
            rows = np.arange(len(rows))
        else:
            hidden, words = None, outbox.add(body.words)
            captured.backend.update_cache(step, outbox)
            rows = (np.cumsum(step.run_length) - 1)[rows]
        slots, positions = _sampled(step)
        if draws and self._penalties is not None and self._penalties.any_in(slots):
            draw, row = self._draw(step, outbox), outbox.add(rows)
            head = head_words = None
        else:
            draw = row = None
            head = captured.head.fit(rows.astype(np.int32), slots, positions) if draws and len(rows) else None
            head_words = None if head is None else outbox.add(head.words)
        chosen = [each and (each.size, each.kind) for each in (body, head)]
        compare_choice(lambda: f"captured layers and head {chosen}", self._decoder.mesh)

        def compute() -> Sampled:
            if hidden is not None:
                hidden_SE = hidden()
                if draws:
                    captured.body.hidden_TE[: len(rows)].copy_(hidden_SE)
            elif body is not None and words is not None:
                captured.body.run(body, words.tensor)
            if draw is not None and row is not None:
                return draw(captured.body.hidden_TE.index_select(0, row.tensor))
            if head is None or head_words is None:
                return Sampled(torch.empty(3, 0, dtype=torch.int32, device=self._device))
            return Sampled(captured.head.run(head, head_words.tensor))

        return compute

    def _scoring(
        self, step: StepBatch, scored: ScoredPlaces, outbox: Outbox
    ) -> Callable[[], tuple[Sampled, tuple[torch.Tensor, ...]]]:
        """Prepare a step that scores given tokens, kernel by kernel. The returned function returns what is drawn, and the
        results of `score`."""
        ends = np.cumsum(step.run_length)[step.run_samples] - 1
        rows = np.concatenate((scored.token, ends)) if step.draws else scored.token
        hidden, target = self._hidden(step, outbox, rows.astype(np.int32)), outbox.add(scored.target.astype(np.int64))
        draw = self._draw(step, outbox) if step.draws else None

        def compute() -> tuple[Sampled, tuple[torch.Tensor, ...]]:
            hidden_RE, target_R, decoder = hidden(), target.tensor, self._decoder
            floats, ids = torch.empty(0, dtype=torch.float64), torch.empty(0, 0, dtype=torch.int32)
            parts = [(floats, floats.bool(), ids, ids.float())]
            if decoder.mesh.is_last_stage:
                size = max(1, (SCORED_CPU if self._device.type == "cpu" else SCORED_DEVICE) // decoder.spec.vocab_size)
                places = [slice(start, start + size) for start in range(0, len(target_R), size)]
                parts = [
                    score(
                        decoder.logits(hidden_RE[: len(target_R)][part]),
                        target_R[part],
                        decoder.vocabulary,
                        scored.alternatives,
                    )
                    for part in places
                ]
            drawn = self._nothing_drawn(step) if draw is None else draw(hidden_RE[len(target_R) :])
            return drawn, tuple(torch.cat(each) for each in zip(*parts, strict=True))

        return compute

    def _nothing_drawn(self, step: StepBatch) -> Sampled:
        packed = torch.zeros(3, int(np.count_nonzero(step.run_samples)), dtype=torch.int32, device=self._device)
        packed[1] = 1
        return Sampled(packed)

    def _hidden(self, step: StepBatch, outbox: Outbox, rows_S: Int32 | None) -> Callable[[], torch.Tensor]:
        """Prepare the layers kernel by kernel. The returned function returns hidden_SE of these of the step's tokens (None: of
        all) once the outbox is sent."""
        slot, position = outbox.add(token_slots(step)), outbox.add(step.positions().astype(np.int32))
        from_host = step.token_ids if step.decode_ids is None else np.concatenate((step.token_ids, step.decode_ids))
        token_ids = outbox.add(from_host)
        only_decodes = step.num_prefill_runs == 0
        rows = None if rows_S is None else outbox.add(rows_S)
        self._backend.plan(step, outbox)

        def compute() -> torch.Tensor:
            slot_T, token_T = slot.tensor, token_ids.tensor
            if step.decode_ids is None:
                token_T = self._last_token.index_select(0, slot_T[len(from_host) :])
                if not only_decodes:
                    token_T = torch.cat((token_ids.tensor, token_T))
            rows_S = None if rows is None else rows.tensor
            pages = None if self._shared_cache is None else KVPages(self._shared_cache, slot_T)
            return self._decoder.hidden(token_T, position.tensor, self._backend.attend, rows_S, pages)

        return compute


def _last_tokens(step: StepBatch) -> Int32 | None:
    """Return the places on the step's token axis at which tokens are drawn; None if that is everywhere."""
    if step.num_prefill_runs == 0:
        return None
    return (np.cumsum(step.run_length)[step.run_samples] - 1).astype(np.int32)


def _sampled(step: StepBatch) -> tuple[Int32, Int32]:
    """Return slot and position of each token that is drawn, shape [S] each."""
    return step.run_slot[step.run_samples], (step.run_start + step.run_length)[step.run_samples]


class Launched:
    """A step in flight. Its results are copied to the host after it, and `wait` waits only for these."""

    def __init__(self, index: int, sampled: Sampled, count: int, scores: tuple[torch.Tensor, ...] | None = None) -> None:
        """`count` is the number of rows that belong to the step; the others are padding."""
        self.launch_seconds = 0.0
        """CPU time in seconds that the launch took, 0 if it was not measured."""
        self._index = index
        self._sampled = Sampled(to_host(sampled.packed)[:, :count])
        self._scores = None if scores is None else [to_host(each) for each in scores]
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
            launch_seconds=self.launch_seconds,
            scores=None if self._scores is None else Scores(*(each.numpy() for each in self._scores)),
        )
