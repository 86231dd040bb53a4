"""The recipe of an attention backend: one file of two methods, which a worker takes by its name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import tiny_models, token_device

from tokabatch import attention
from tokabatch.engine.replica_sizes import ReplicaSizes
from tokabatch.engine.worker import Worker, WorkerSpec
from tokabatch.model.families import read_spec
from tokabatch.scheduling.contracts import Completion, SamplingParams
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.scheduler import Scheduler, SchedulerLimits
from tokabatch.scheduling.stop_conditions import StopRules

PLAIN_PAGED = '''
"""Attention one run after another, each over all the pages of its slot: nothing is shared, nothing is batched."""

from __future__ import annotations

import numpy as np
import torch

from tokabatch.attention.base import KVShape
from tokabatch.attention.upload import Outbox
from tokabatch.scheduling.contracts import StepBatch


class Backend:
    """See `AttentionBackend`. The cache is [L, pages, P, K, D]."""

    def __init__(self, shape: KVShape, dtype: torch.dtype, device: torch.device, kv_dtype: torch.dtype | None = None) -> None:
        self.shape = shape
        pages = (shape.num_layers, shape.num_pages, shape.page_size, shape.num_kv_heads, shape.head_dim)
        self.k_cache, self.v_cache = (torch.zeros(pages, dtype=kv_dtype or dtype, device=device) for _ in range(2))
        self.page_table = np.zeros((shape.num_slots, shape.max_pages), np.int64)
        self.runs: list[tuple[int, int, int]] = []

    def plan(self, step: StepBatch, outbox: Outbox) -> None:
        self.page_table[step.table_slot, step.table_column] = step.table_page
        for cache in (self.k_cache, self.v_cache):
            cache[:, torch.from_numpy(step.clear_pages).long()] = 0
            cache[:, torch.from_numpy(step.copy_dst).long()] = cache[:, torch.from_numpy(step.copy_src).long()]
        self.runs = list(zip(step.run_slot.tolist(), step.run_start.tolist(), step.run_length.tolist(), strict=True))

    def attend(self, layer: int, q_THD: torch.Tensor, k_TKD: torch.Tensor | None, v_TKD: torch.Tensor | None) -> torch.Tensor:
        assert k_TKD is not None and v_TKD is not None
        lengths = [length for _, _, length in self.runs]
        out = [
            self._run(layer, slot, start, *new)
            for (slot, start, _), *new in zip(self.runs, *(each.split(lengths) for each in (q_THD, k_TKD, v_TKD)), strict=True)
        ]
        return torch.cat(out)

    def _run(
        self, layer: int, slot: int, start: int, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor
    ) -> torch.Tensor:
        size, end = self.shape.page_size, start + len(q_THD)
        position_T = np.arange(start, end)
        place_T = self.page_table[slot, position_T // size] * size + position_T % size
        pages = self.page_table[slot, : -(-end // size)]
        seen = []
        for cache, new in ((self.k_cache, k_TKD), (self.v_cache, v_TKD)):
            cache[layer].flatten(0, 1)[torch.from_numpy(place_T)] = new.to(cache.dtype)
            seen.append(cache[layer, torch.from_numpy(pages)].flatten(0, 1)[:end].to(q_THD.dtype))
        mask_TL = torch.from_numpy(np.arange(end) <= position_T[:, None])
        q, k, v = (heads.transpose(0, 1) for heads in (q_THD, *seen))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask_TL, enable_gqa=True)
        return mixed.transpose(0, 1)
'''
PROMPTS = [[5, 9, 9, 41, 3, 77], [5, 9, 9, 41, 3, 77, 60, 12], [5, 9, 9, 41, 8], [8]]


@pytest.fixture
def plain_paged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    folder = tmp_path / "backends"
    folder.mkdir()
    (folder / "plain_paged.py").write_text(PLAIN_PAGED)
    monkeypatch.setattr(attention, "__path__", [*attention.__path__, str(folder)])
    yield "plain_paged"
    sys.modules.pop("tokabatch.attention.plain_paged", None)


def generate(folder: Path, backend: str) -> list[Completion]:
    """All samples, of which no more than six run at a time."""
    spec = read_spec(folder)
    worker = Worker.build(WorkerSpec(folder, spec, torch.float64, "cpu", backend, ReplicaSizes(4, 20, 6, 20, 6, 2, 1)))
    params = SamplingParams(n=4, max_tokens=12, logprobs=2, ignore_eos=True, seed=4)
    limits = SchedulerLimits(4, 20, 6, 20, 6, GroupingLimits(2, 1))
    requests = token_device.make_requests(PROMPTS, [params])
    scheduler = Scheduler(requests, limits, StopRules([params], [], spec.vocab_size, None))
    done: list[Completion] = []
    levels = copies = 0
    while not scheduler.done:
        step = scheduler.schedule()
        assert step is not None
        levels, copies = levels + len(step.prefix_levels), copies + len(step.copy_src)
        done += scheduler.apply(worker.run(step))
    assert levels and copies, "steps share pages and copy them"
    return sorted(done, key=lambda completion: (completion.row_index, completion.sample_index))


def test_a_backend_is_one_file(plain_paged, tmp_path):
    folder = tiny_models.build("llama", tmp_path / "model")
    own, known = generate(folder, plain_paged), generate(folder, "torch_paged")
    assert len(own) == len(known) == 16
    for ours, theirs in zip(own, known, strict=True):
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
