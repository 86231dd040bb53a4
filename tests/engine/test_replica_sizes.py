"""Sizes follow from memory, weights and the job; what cannot fit is refused with the key to change."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tokabatch.engine import replica_sizes
from tokabatch.engine.replica_sizes import (
    ABSENT_WORKING_BYTES,
    WorkloadFacts,
    decide_sizes,
    kv_shape,
    page_bytes,
    settle_pages,
    weight_bytes,
)
from tokabatch.errors import JobError
from tokabatch.job import EngineConfig
from tokabatch.model.spec import ModelSpec, RopeSpec
from tokabatch.parallel.mesh import Mesh

SPEC = ModelSpec("llama", 1000, 64, 2, 4, 2, 16, 128, 1e-5, RopeSpec(1e4), 4096, tied_embeddings=True)
FACTS = WorkloadFacts(
    num_samples=1000,
    longest_sequence=300,
    shortest_sequence=300,
    longest_output=100,
    num_prompts=100,
    unique_prompt_tokens=20_000,
)
PAGE_BYTES = kv_shape(SPEC, 16, 1, 1, 1).bytes_per_page(torch.float32)


@pytest.fixture
def memory(monkeypatch, tmp_path):
    """Sets what the machine, and the container if any, has left."""

    def set_memory(machine: int, container: int | None = None) -> None:
        monkeypatch.setattr(replica_sizes.psutil, "virtual_memory", lambda: SimpleNamespace(available=machine))
        monkeypatch.setattr(replica_sizes, "CGROUP", tmp_path)
        if container is not None:
            (tmp_path / "memory.max").write_text(str(container + 500))
            (tmp_path / "memory.current").write_text("500")

    return set_memory


def pages(config: EngineConfig | None = None, facts: WorkloadFacts = FACTS) -> int:
    return decide_sizes(config or EngineConfig(), SPEC, torch.float32, facts).num_pages


def test_a_small_job_takes_a_small_cache(memory):
    memory(1 << 40)
    assert pages() <= 20_000 // 16 + 200 + 512 * (100 // 16 + 3) + 20


def test_weights_and_the_container_come_off_first(memory):
    weights = weight_bytes(SPEC, torch.float32, head_apart=True)
    memory(weights + 100 * PAGE_BYTES)
    assert pages() == 60
    memory(1 << 40, container=weights + 50 * PAGE_BYTES)
    assert pages() == 30


def test_too_little_memory_names_the_numbers(memory):
    memory(weight_bytes(SPEC, torch.float32, head_apart=True) + 10 * PAGE_BYTES)
    with pytest.raises(JobError, match="320 tokens of KV cache"):
        pages()


def test_a_cache_that_holds_the_shortest_sample_alone_will_do(memory):
    memory(weight_bytes(SPEC, torch.float32, head_apart=True) + 10 * PAGE_BYTES)
    mixed = replace(FACTS, shortest_sequence=70)
    sizes = decide_sizes(EngineConfig(), SPEC, torch.float32, mixed)
    assert (sizes.num_pages, sizes.max_pages_per_sequence) == (6, 6)
    with pytest.raises(JobError, match=r"shortest sample needs 112 tokens .* but 96 fit"):
        pages(facts=replace(FACTS, shortest_sequence=81))


def test_a_cache_larger_than_memory_is_refused(memory):
    memory(weight_bytes(SPEC, torch.float32, head_apart=True) + 100 * PAGE_BYTES)
    with pytest.raises(JobError, match="memory holds about 960"):
        pages(EngineConfig(kv_cache_tokens=100_000))
    assert pages(EngineConfig(kv_cache_tokens=640)) == 40


def test_stored_logprobs_count_by_the_tokens_that_can_be_stored(memory):
    token = 4 + 8 * 5
    asks = replace(FACTS, logprobs=5, reported_bytes=10**12)
    memory(weight_bytes(SPEC, torch.float32, head_apart=True) + 200 * (PAGE_BYTES + 16 * token * 3 // 2))
    assert pages(facts=asks) == 120
    # One sample among them that asks: what all of the job can report is less than what the cache could hold of such.
    memory(weight_bytes(SPEC, torch.float32, head_apart=True) + 200 * PAGE_BYTES)
    assert pages(facts=replace(asks, reported_bytes=100 * token)) in (119, 120)


@pytest.fixture
def gpu_memory(monkeypatch):
    """Sets what a GPU has left; asking CUDA for it would make a context."""

    def refuse(*_: object) -> None:
        raise AssertionError("a CUDA context was made")

    def set_memory(free: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 << 30))
        monkeypatch.setattr(torch.cuda, "device_memory_used", lambda: (80 << 30) - free)
        monkeypatch.setattr(torch.cuda, "mem_get_info", refuse)

    return set_memory


def test_a_gpu_takes_no_more_pages_than_the_host_can_keep_logprobs_of(gpu_memory, memory):
    gpu_memory(8 << 30)
    facts = replace(
        FACTS, num_samples=10**6, unique_prompt_tokens=10**9, num_prompts=10**6, longest_output=4000, longest_sequence=4200,
        shortest_sequence=4200,
        logprobs=20, reported_bytes=10**12,
    )  # fmt: skip
    memory(1 << 40)
    free = decide_sizes(EngineConfig(), SPEC, torch.bfloat16, facts, "cuda")
    memory(1 << 27)
    sizes = decide_sizes(EngineConfig(), SPEC, torch.bfloat16, facts, "cuda")
    row = 16 * (4 + 8 * 20) * 1.5
    assert sizes.num_pages == settle_pages(sizes, 10**9).num_pages == int((1 << 27) * 0.6) // row < free.num_pages
    memory(1 << 20)
    with pytest.raises(JobError, match=r"generation\.logprobs"):
        decide_sizes(EngineConfig(), SPEC, torch.bfloat16, facts, "cuda")


def test_a_gpu_settles_on_what_is_left_beside_its_largest_step(gpu_memory):
    gpu_memory(8 << 30)
    facts = replace(FACTS, num_samples=10**6, unique_prompt_tokens=10**9, num_prompts=10**6, longest_output=4000)
    sizes = decide_sizes(EngineConfig(), SPEC, torch.bfloat16, facts, "cuda")
    assert settle_pages(sizes, 5000).num_pages == 5000
    assert settle_pages(sizes, 10**9).num_pages == sizes.useful_pages
    with pytest.raises(JobError, match=r"needs 320 tokens .* but 304 fit"):
        settle_pages(sizes, 19)
    asked = decide_sizes(EngineConfig(kv_cache_tokens=160_000), SPEC, torch.bfloat16, facts, "cuda")
    assert settle_pages(asked, 20_000).num_pages == 10_000
    with pytest.raises(JobError, match=r"kv_cache_tokens is 160000, but memory holds about 80000"):
        settle_pages(asked, 5000)


def test_a_configured_cache_is_not_larger_than_the_job_or_the_device(gpu_memory):
    gpu_memory(8 << 30)
    small = decide_sizes(EngineConfig(kv_cache_tokens=10**7), SPEC, torch.bfloat16, replace(FACTS, num_samples=1), "cuda")
    assert settle_pages(small, 10**6).num_pages == small.useful_pages < 10**6
    with pytest.raises(JobError, match="memory holds about 160 beside"):
        settle_pages(small, 10)


def test_replicas_that_leave_no_memory_to_each_are_blamed(memory):
    memory(1 << 30)
    with pytest.raises(
        JobError, match=r"^engine\.replicas is 9999: each .* 1/9999 .* smaller number, at most about \d+$"
    ) as refused:
        decide_sizes(EngineConfig(), SPEC, torch.float32, FACTS, replicas=9999)
    most = int(str(refused.value).split()[-1])
    assert decide_sizes(EngineConfig(), SPEC, torch.float32, FACTS, replicas=most).num_pages > 0
    memory(1 << 10)
    with pytest.raises(JobError, match="smaller model"):
        decide_sizes(EngineConfig(), SPEC, torch.float32, FACTS, replicas=9999)


def test_a_cost_model_decides_how_large_a_step_is_unless_the_job_does(memory):
    memory(1 << 40)
    sizes = decide_sizes(EngineConfig(max_running=100), SPEC, torch.float32, FACTS, prefill_tokens=4096)
    assert sizes.max_step_tokens == 4196
    told = EngineConfig(max_running=100, max_step_tokens=300)
    assert decide_sizes(told, SPEC, torch.float32, FACTS, prefill_tokens=4096).max_step_tokens == 300
    many = replace(FACTS, num_samples=10**5)
    assert decide_sizes(EngineConfig(), SPEC, torch.float32, many, running_samples=20_000).max_running == 20_000
    assert decide_sizes(told, SPEC, torch.float32, many, running_samples=20_000).max_running == 100


def test_without_its_management_library_a_gpu_has_all_its_memory(gpu_memory, monkeypatch):
    gpu_memory(1 << 16)
    facts = replace(FACTS, num_samples=10**6, unique_prompt_tokens=10**9, num_prompts=10**6)
    with pytest.raises(JobError, match=r"model\.path: .* the weights, .* no memory is left .* --simulate --device h100"):
        decide_sizes(EngineConfig(), SPEC, torch.bfloat16, facts, "cuda")

    def absent() -> int:
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "device_memory_used", absent)
    assert decide_sizes(EngineConfig(), SPEC, torch.bfloat16, facts, "cuda").num_pages > 10**5


@pytest.mark.gpu
def test_sizing_makes_no_context_on_the_gpu():
    """In a process of its own: once there is a context, it stays."""
    code = (
        "import ctypes, torch\n"
        "from engine.test_replica_sizes import FACTS, SPEC\n"
        "from tokabatch.attention import choose_backend\n"
        "from tokabatch.engine.replica_sizes import decide_sizes\n"
        "from tokabatch.job import EngineConfig\n"
        "decide_sizes(EngineConfig(), SPEC, torch.bfloat16, FACTS, 'cuda')\n"
        "choose_backend('cuda', torch.bfloat16, 64), torch.cuda.get_device_name()\n"
        "driver, flags, active = ctypes.CDLL('libcuda.so.1'), ctypes.c_uint(), ctypes.c_int()\n"
        "assert driver.cuInit(0) == 0\n"
        "assert driver.cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(active)) == 0\n"
        "print(active.value)\n"
    )
    tests = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join([tests, *sys.path])},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "0\n", done.stderr


def test_an_e4m3_cache_holds_twice_as_much(gpu_memory):
    gpu_memory(1 << 30)
    facts = replace(FACTS, num_samples=10**6, unique_prompt_tokens=10**9, num_prompts=10**6, longest_output=4000)
    half, full = (
        decide_sizes(EngineConfig(kv_cache_dtype=kept), SPEC, torch.bfloat16, facts, "cuda").num_pages
        for kept in ("fp8", "auto")
    )
    assert half == pytest.approx(2 * full, rel=0.01)


def test_fp8_weights_take_a_byte_a_number_and_leave_more_of_a_gpu_to_the_cache(memory):
    memory(1 << 40)
    whole, rounded = (weight_bytes(SPEC, torch.bfloat16, False, fp8=fp8) for fp8 in (False, True))
    # Two layers: queries, keys, values and output of the attention, gate, up and down of the MLP; a scale for each output.
    outputs = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)
    numbers = 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128)
    assert whole - rounded == numbers - 4 * outputs
    wide = replace(SPEC, hidden_size=4096, intermediate_size=8192)
    facts = replace(FACTS, num_samples=10**6, unique_prompt_tokens=10**9, num_prompts=10**6, longest_output=4000)
    here = (decide_sizes(EngineConfig(), wide, torch.bfloat16, facts, "cuda", absent_memory=8 << 30, fp8=f) for f in (0, 1))
    full, half = (sizes.num_pages for sizes in here)
    assert half > full


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (EngineConfig(page_size=8192), "engine.page_size"),
        (EngineConfig(queue_depth=9), "engine.queue_depth"),
        (EngineConfig(max_running=64, max_step_tokens=32), "engine.max_step_tokens"),
    ],
)
def test_limits_that_cannot_work_name_their_key(config, key, memory):
    memory(1 << 40)
    with pytest.raises(JobError, match=key):
        pages(config)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (2, 2)])
def test_the_ranks_of_a_worker_hold_one_copy_of_the_model_between_them(tensor, pipeline, tied):
    spec = replace(SPEC, vocab_size=1024, tied_embeddings=tied)
    ranks = [Mesh(rank, tensor, pipeline) for rank in range(tensor * pipeline)]
    together = sum(weight_bytes(spec, torch.float32, head_apart=False, mesh=mesh) for mesh in ranks)
    norms, vocabulary = (2 * spec.num_layers + 1) * spec.hidden_size, spec.vocab_size * spec.hidden_size
    # Tensor ranks hold all norms each, and a tied embedding is the first stage's and the last one's.
    twice = (tensor - 1) * norms + (vocabulary if tied and pipeline > 1 else 0)
    if pipeline > 1:
        twice += (pipeline - 1) * tensor * spec.hidden_size
    assert together == weight_bytes(spec, torch.float32, head_apart=False) + 4 * twice
    cached = sum(kv_shape(spec, 16, 1, 1, 1, mesh).bytes_per_page(torch.float32) for mesh in ranks)
    assert cached == kv_shape(spec, 16, 1, 1, 1).bytes_per_page(torch.float32)


def test_key_value_heads_that_several_ranks_hold_count_on_each(memory):
    one = replace(SPEC, num_kv_heads=1)
    assert kv_shape(one, 16, 1, 1, 1, Mesh(1, 2, 1)).num_kv_heads == 1
    config = EngineConfig(tensor=2)
    assert page_bytes(config, one, torch.float32) == 2 * page_bytes(EngineConfig(), one, torch.float32)


def test_the_rank_with_least_left_decides_on_gpus_and_all_share_a_cpu(memory):
    facts = replace(FACTS, num_prompts=10**6, unique_prompt_tokens=10**9, num_samples=10**7)
    free = ABSENT_WORKING_BYTES + (64 << 20)
    found = {
        sizes: decide_sizes(
            EngineConfig(max_running=4000, tensor=sizes[0], pipeline=sizes[1]),
            SPEC,
            torch.float32,
            facts,
            "cuda",
            absent_memory=free,
        ).num_pages
        for sizes in ((1, 1), (2, 1), (1, 2))
    }
    assert found[2, 1] > 2 * found[1, 1] and found[1, 2] > 1.9 * found[1, 1]
    memory(64 << 20)
    alone, split = (
        decide_sizes(EngineConfig(max_running=4000, tensor=tensor), SPEC, torch.float32, facts).num_pages for tensor in (1, 2)
    )
    assert 0.98 * alone < split <= alone
