"""Every attention backend against dense softmax attention, on the steps that the scheduler really makes.

In Triton's interpreter FlashInfer's backend runs on the CPU as well, plain torch in the place of FlashInfer's own kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import plain_flashinfer
from support import token_device as device
from support.interpreter import INTERPRETING

import tokabatch.attention
from tokabatch.attention import create_backend
from tokabatch.attention.base import AttentionBackend, KVShape
from tokabatch.attention.upload import Outbox
from tokabatch.scheduling.contracts import SamplingParams, StepBatch
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.scheduler import Scheduler, SchedulerLimits
from tokabatch.scheduling.stop_conditions import StopRules

LAYERS, HEADS, KV_HEADS = 2, 4, 2
BACKENDS = sorted(path.stem for path in Path(tokabatch.attention.__file__).parent.glob("*_paged.py"))


@dataclass(frozen=True)
class Case:
    """A backend on a device. 16-bit types are compared with a reference over the rounded keys, values and queries."""

    backend: str
    device: str
    dtype: torch.dtype
    dim: int

    @property
    def tolerance(self) -> dict[str, float]:
        exact = self.dtype == torch.float64
        return {"rtol": 1e-10, "atol": 1e-12} if exact else {"rtol": 2e-2, "atol": 2e-2}

    def create(self, page_size: int, num_pages: int, num_slots: int, max_pages: int) -> AttentionBackend:
        shape = KVShape(LAYERS, HEADS, KV_HEADS, self.dim, page_size, num_pages, num_slots, max_pages)
        return create_backend(self.backend, shape, self.dtype, torch.device(self.device))

    def plan(self, attention: AttentionBackend, step: StepBatch) -> None:
        outbox = Outbox(torch.device(self.device))
        attention.plan(step, outbox)
        outbox.send()


CASES = [
    pytest.param(Case("torch_paged", "cpu", torch.float64, 8), id="torch-cpu"),
    *(
        pytest.param(Case(backend, "cuda", torch.bfloat16, dim), id=f"{backend}-{dim}", marks=pytest.mark.gpu)
        for backend in BACKENDS
        for dim in (64, 128)
    ),
]
if INTERPRETING:
    CASES = [pytest.param(Case("flashinfer_paged", "cpu", torch.float16, 64), id="flashinfer-interpreted")]


@pytest.fixture(scope="module", autouse=True)
def _interpreted_gpu() -> Generator[None]:
    """What FlashInfer's backend queries of a GPU, where its kernels are interpreted."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETING:
            patch.setitem(sys.modules, "flashinfer", plain_flashinfer)
            patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=8))
            patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
            patch.setattr(torch.Tensor, "pin_memory", lambda self: self)
            # Few keys are many here, so that both kinds of decode kernel are called.
            patch.setattr("tokabatch.attention.flashinfer_paged.LONG_CONTEXT", 16)
        yield


class DenseReference:
    """Keys and values as functions of (layer, token, position), so that a context's tokens determine what is attended to."""

    def __init__(self, longest: int, case: Case) -> None:
        generator = torch.Generator().manual_seed(0)
        self.case = case
        size = (LAYERS, 2, device.VOCAB, longest, KV_HEADS, case.dim)
        self.kv = torch.randn(size, generator=generator).to(case.dtype).double()

    def new(self, layer: int, tokens: list[int], start: int) -> tuple[torch.Tensor, torch.Tensor]:
        positions = torch.arange(start, start + len(tokens))
        k, v = self.kv[layer, :, torch.tensor(tokens), positions]
        return k, v

    def queries(self, count: int) -> torch.Tensor:
        return torch.randn(count, HEADS, self.case.dim).to(self.case.dtype).double()

    def on_device(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.to(self.case.device, self.case.dtype) for tensor in tensors]

    def attend(self, layer: int, q_HD: torch.Tensor, tokens: list[int]) -> torch.Tensor:
        k_LKD, v_LKD = self.new(layer, tokens, 0)
        k_LHD, v_LHD = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k_LKD, v_LKD))
        weights = torch.softmax(torch.einsum("hd,lhd->hl", q_HD, k_LHD) * self.case.dim**-0.5, -1)
        return torch.einsum("hl,lhd->hd", weights, v_LHD)


@st.composite
def workloads(draw):
    heads = draw(st.lists(st.lists(st.integers(0, 3), max_size=20), min_size=1, max_size=3))
    tails = st.lists(st.integers(0, 3), min_size=1, max_size=9)
    prompts = [draw(st.sampled_from(heads)) + draw(tails) for _ in range(draw(st.integers(1, 5)))]
    return prompts, draw(st.sampled_from([1, 4, 16])), draw(st.sampled_from([None, GroupingLimits(1, 1), GroupingLimits(2, 1)]))


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=25, deadline=None)
@given(workloads())
def test_backend_equals_dense_attention(case, workload):
    check_workload(case, *workload)


@pytest.mark.parametrize("case", [each for each in CASES if each.values[0].backend == "flashinfer_paged"])
@pytest.mark.parametrize(("fewest", "block"), [(1, 4096), (40, 4096), (1, 256)])
def test_keys_that_are_copied_out_of_their_pages(case, fewest, block, monkeypatch):
    """Those of prompts and of prefixes, in full pages and in others; with 40, not all are copied. A page is
    copied in one part, or in several."""
    monkeypatch.setattr("tokabatch.attention.triton_page_store._BLOCK", block)
    if case.device == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    for name, value in {"COPIED_ROWS": fewest, "LONG_PREFILL": 1, "TILE_QUERIES": 1}.items():
        monkeypatch.setattr(f"tokabatch.attention.flashinfer_paged.{name}", value)
    module, copies = import_module("tokabatch.attention.flashinfer_paged"), []
    copy_out = module.copy_out
    monkeypatch.setattr(module, "copy_out", lambda *args: (copies.append(len(args[1])), copy_out(*args)))
    head = [i % 4 for i in range(70)]
    check_workload(case, [[*head, *[index] * (5 * index + 1)] for index in range(4)], 16, GroupingLimits(1, 1))
    assert copies


def check_workload(case: Case, prompts: list[list[int]], page_size: int, grouping: GroupingLimits | None) -> None:
    """Every step of the prompts' samples, against dense attention."""
    params = SamplingParams(n=3, max_tokens=6)
    longest = max(map(len, prompts)) + 6
    limits = SchedulerLimits(page_size, 400, 7, 20, -(-longest // page_size), grouping)
    requests = device.make_requests(prompts, [params])
    scheduler = Scheduler(requests, limits, StopRules(requests.sampling, [device.EOS], device.VOCAB, None))
    tokens_device = device.TokenDevice(limits)
    tokens_device.prompts = prompts
    attention = case.create(page_size, 400, 7, limits.max_pages_per_sequence)
    reference = DenseReference(longest, case)
    while not scheduler.done:
        step = scheduler.schedule()
        result = tokens_device.run(step)
        case.plan(attention, step)
        contexts = [
            (int(start), tokens_device.expected(*tokens_device.identity[int(slot)], int(start + length)))
            for slot, start, length in zip(step.run_slot, step.run_start, step.run_length, strict=True)
        ]
        for layer in range(LAYERS):
            new = [reference.new(layer, tokens[start:], start) for start, tokens in contexts]
            q_THD = reference.queries(step.num_tokens)
            k_TKD, v_TKD = torch.cat([n[0] for n in new]), torch.cat([n[1] for n in new])
            out = attention.attend(layer, *reference.on_device(q_THD, k_TKD, v_TKD))
            ends = [tokens[: i + 1] for start, tokens in contexts for i in range(start, len(tokens))]
            expected = torch.stack([reference.attend(layer, q, tokens) for q, tokens in zip(q_THD, ends, strict=True)])
            torch.testing.assert_close(out.double().cpu(), expected, **case.tolerance)
        scheduler.apply(result)


@pytest.mark.parametrize("case", CASES)
def test_long_prompts_stay_exact(case, monkeypatch):
    monkeypatch.setattr("tokabatch.attention.torch_paged.MAX_SCORES", 4096)
    prompt = [i % device.VOCAB for i in range(700)]
    limits = SchedulerLimits(16, 64, 2, 1000, 64, GroupingLimits(1, 1))
    requests = device.make_requests([prompt], [SamplingParams(n=2, max_tokens=2, ignore_eos=True)])
    scheduler = Scheduler(requests, limits, StopRules(requests.sampling, [], device.VOCAB, None))
    attention = case.create(16, 64, 2, 64)
    reference = DenseReference(710, case)
    case.plan(attention, scheduler.schedule())
    q_THD = reference.queries(700)
    out = attention.attend(0, *reference.on_device(q_THD, *reference.new(0, prompt, 0))).double().cpu()
    for i in (0, 1, 299, 698, 699):
        torch.testing.assert_close(out[i], reference.attend(0, q_THD[i], prompt[: i + 1]), **case.tolerance)
