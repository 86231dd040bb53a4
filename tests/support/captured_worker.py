"""Workers whose steps are captured. On a machine without a GPU their kernels run in Triton's interpreter, and a graph is its
work, done again."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch

from support.interpreter import INTERPRETING
from tokabatch.attention.base import token_slots
from tokabatch.attention.capturable import Capturable
from tokabatch.attention.upload import Outbox, Parcel
from tokabatch.engine.graphs import GraphRecorder
from tokabatch.engine.replica_sizes import ReplicaSizes, kv_shape
from tokabatch.engine.worker import Worker
from tokabatch.model.families import read_spec
from tokabatch.model.weights import load_decoder
from tokabatch.parallel.mesh import Mesh
from tokabatch.scheduling.contracts import StepBatch

DTYPE = torch.float32 if INTERPRETING else torch.bfloat16


class Redoing:
    """In the place of a recorder: a graph that is its work, done again, its outputs in the same place."""

    def trial(self, work: Callable[[], object]) -> None:
        work()

    def capture(self, work: Callable[[], torch.Tensor | None]) -> tuple[Redone, torch.Tensor | None]:
        made = work()
        return Redone(work, made), made


class Redone:
    def __init__(self, work: Callable[[], torch.Tensor | None], made: torch.Tensor | None) -> None:
        self._work, self._made = work, made

    def replay(self) -> None:
        again = self._work()
        if self._made is not None and again is not None:
            self._made.copy_(again)


def sizes_of(page: int, max_running: int, step: int) -> ReplicaSizes:
    return ReplicaSizes(page, 120, max_running, step, -(-48 // page), 2, 1)


class KernelByKernel:
    """In the place of a backend, over another one's cache: attention in plain torch, for the steps that are not captured."""

    def __init__(self, store: Capturable) -> None:
        self._store = store
        self._step: tuple[Parcel, Parcel] | None = None

    @property
    def cache(self):
        return self._store.cache

    def update_cache(self, step: StepBatch, outbox: Outbox) -> None:
        self._store.update_cache(step, outbox)

    def plan(self, step: StepBatch, outbox: Outbox) -> None:
        self._store.update_cache(step, outbox)
        self._step = outbox.add(token_slots(step).astype("int64")), outbox.add(step.positions().astype("int64"))

    def attend(self, layer: int, q_THD: torch.Tensor, *_: torch.Tensor | None) -> torch.Tensor:
        assert self._step is not None
        slot_T, position_T = (parcel.tensor for parcel in self._step)
        pages_TC = self.cache.table[slot_T].long()
        # From [T, pages, K, P, D] to a row of keys for each token.
        k, v = (
            kept[layer][pages_TC].transpose(2, 3).flatten(1, 2).transpose(1, 2).float()
            for kept in (self.cache.k_LNKPD, self.cache.v_LNKPD)
        )
        seen_TL = torch.arange(k.shape[2], device=k.device) <= position_T[:, None]
        mixed = torch.nn.functional.scaled_dot_product_attention(
            q_THD[:, :, None].float(), k, v, attn_mask=seen_TL[:, None, None], enable_gqa=True
        )
        return mixed[:, :, 0].to(q_THD.dtype)


def captured_worker(
    folder: Path, sizes: ReplicaSizes, device: torch.device, mesh: Mesh | None = None, captured_tokens: int | None = None
) -> Worker:
    """Steps of up to `captured_tokens` are captured; None is all of them."""
    spec, mesh = read_spec(folder), mesh or Mesh.single()
    decoder = load_decoder(folder, spec, DTYPE, device, mesh)
    shape = kv_shape(spec, sizes.page_size, sizes.num_pages, sizes.max_running, sizes.max_pages_per_sequence, mesh)
    store = import_module("tokabatch.attention.triton_page_store").PageStore(shape, DTYPE, device)
    backend = KernelByKernel(store)
    assert isinstance(backend, Capturable)
    worker = Worker(decoder, backend, sizes, penalised=True)
    recorder = Redoing() if device.type == "cpu" else GraphRecorder()
    make = import_module("tokabatch.engine.captured").CapturedSteps
    with torch.inference_mode():
        most = captured_tokens or sizes.max_step_tokens
        captured = make(decoder, backend, worker._last_token, worker._slots, most, recorder, 2)
        captured.prepare()
    worker._captured = captured
    return worker
