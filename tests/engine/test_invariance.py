"""Schedule invariance: in float64 on the CPU a sample's tokens do not depend on how it was scheduled.

The reference is a naive loop over transformers' own model, one sample at a time without a cache.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support import tiny_engine, tiny_models, token_device
from support.tiny_engine import EOS, HEADER, VOCAB
from transformers import AutoModelForCausalLM

from tokabatch.engine.executor import InProcessExecutor, ProcessExecutor
from tokabatch.engine.replica_sizes import ReplicaSizes
from tokabatch.engine.worker import Worker, WorkerSpec
from tokabatch.model.families import family_names, read_spec
from tokabatch.scheduling.contracts import Completion, Requests, SamplingParams
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.scheduler import Scheduler, SchedulerLimits
from tokabatch.scheduling.stop_conditions import StopRules

PROMPTS = [
    [*HEADER, 1],
    [*HEADER, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59],
    [*HEADER, 50, 51, 52, 53, 54, 55, 56, 57, 70],
    [*HEADER[:7], 20, 21],
    [88],
    HEADER,
]


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: tiny_models.build(family, root / family) for family in family_names()}


@pytest.fixture(scope="session")
def naive(model_folders):
    """Greedy continuations by a loop that recomputes everything for every token."""
    out: dict[str, list[list[int]]] = {}
    for family, folder in model_folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        out[family] = []
        for prompt in PROMPTS:
            tokens = list(prompt)
            for _ in range(12):
                with torch.inference_mode():
                    tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
                if tokens[-1] == EOS:
                    break
            out[family].append(tokens[len(prompt) :])
    return out


def generate(folder, requests: Requests, limits: SchedulerLimits, depth: int, executor=InProcessExecutor):
    """Completions by (row, sample)."""
    return tiny_engine.generate(tiny_engine.worker_spec(folder, limits), requests, limits, depth, executor)[0]


@st.composite
def schedules(draw, longest: int, max_samples: int):
    limits, depth = draw(tiny_engine.schedules(longest))
    order = draw(st.permutations(range(len(PROMPTS))))
    return limits, depth, draw(st.integers(1, max_samples)), list(order)


LONGEST = max(map(len, PROMPTS)) + 12
RELAXED = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


def ordered_requests(order: list[int], params: SamplingParams) -> Requests:
    """The prompts as rows in the given order; row numbers stay those of PROMPTS."""
    requests = token_device.make_requests([PROMPTS[i] for i in order], [params])
    row_index = torch.tensor(order)[torch.from_numpy(requests.row_index)].numpy()
    return replace(requests, row_index=row_index)


@pytest.mark.parametrize("family", family_names())
@settings(max_examples=15, **RELAXED)
@given(schedules(LONGEST, 3))
def test_greedy_tokens_equal_the_naive_loop(family, model_folders, naive, schedule):
    limits, depth, n, order = schedule
    requests = ordered_requests(order, SamplingParams(n=n, temperature=0.0, max_tokens=12))
    completions = generate(model_folders[family], requests, limits, depth)
    assert len(completions) == n * len(PROMPTS)
    for (row, _), completion in completions.items():
        assert completion.token_ids.tolist() == naive[family][row]


@pytest.fixture(scope="session")
def drawn(model_folders):
    """Sampled continuations of the first schedule tried; every other schedule has to give the same."""
    limits = SchedulerLimits(4, 400, 64, 256, -(-LONGEST // 4), GroupingLimits(2, 1))
    params = SamplingParams(n=6, temperature=0.9, top_p=0.95, max_tokens=12, seed=11)
    return generate(model_folders["qwen3"], token_device.make_requests(PROMPTS, [params]), limits, 1)


@settings(max_examples=20, **RELAXED)
@given(schedules(LONGEST, 6))
def test_a_sample_is_the_same_alone_and_in_company(model_folders, drawn, schedule):
    limits, depth, n, order = schedule
    params = SamplingParams(n=n, temperature=0.9, top_p=0.95, max_tokens=12, seed=11)
    completions = generate(model_folders["qwen3"], ordered_requests(order, params), limits, depth)
    for key, completion in completions.items():
        assert completion.token_ids.tolist() == drawn[key].token_ids.tolist()


def test_samples_differ_by_row_sample_and_seed(model_folders, drawn):
    texts = {key: tuple(c.token_ids.tolist()) for key, c in drawn.items()}
    assert len(set(texts.values())) > 0.9 * len(texts)
    limits = SchedulerLimits(4, 400, 64, 256, -(-LONGEST // 4), None)
    params = SamplingParams(n=6, temperature=0.9, top_p=0.95, max_tokens=12, seed=12)
    other = generate(model_folders["qwen3"], token_device.make_requests(PROMPTS, [params]), limits, 1)
    assert sum(tuple(other[key].token_ids.tolist()) == text for key, text in texts.items()) < len(texts) / 4


def test_a_worker_process_keeps_the_same_contract(model_folders, drawn):
    limits = SchedulerLimits(8, 60, 7, 30, -(-LONGEST // 8), GroupingLimits(2, 1))
    params = SamplingParams(n=6, temperature=0.9, top_p=0.95, max_tokens=12, seed=11)
    requests = token_device.make_requests(PROMPTS, [params])
    completions = generate(model_folders["qwen3"], requests, limits, 3, ProcessExecutor)
    assert {k: c.token_ids.tolist() for k, c in completions.items()} == {k: c.token_ids.tolist() for k, c in drawn.items()}


def test_logprobs_are_those_of_the_unmodified_model(model_folders):
    folder = model_folders["llama"]
    limits = SchedulerLimits(4, 400, 64, 256, -(-LONGEST // 4), GroupingLimits(2, 1))
    params = SamplingParams(n=2, temperature=0.7, max_tokens=8, logprobs=3, ignore_eos=True)
    completions = generate(folder, token_device.make_requests(PROMPTS, [params]), limits, 2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for (row, _), completion in completions.items():
        tokens = torch.tensor([PROMPTS[row] + completion.token_ids.tolist()])
        with torch.inference_mode():
            logprobs = model(tokens).logits[0, len(PROMPTS[row]) - 1 : -1].log_softmax(-1)
        chosen = logprobs.gather(1, torch.from_numpy(completion.token_ids).long()[:, None])[:, 0]
        torch.testing.assert_close(torch.from_numpy(completion.logprobs).double(), chosen, rtol=0, atol=1e-4)
        top, ids = logprobs.topk(3)
        assert torch.equal(torch.from_numpy(completion.top_ids).long(), ids)
        torch.testing.assert_close(torch.from_numpy(completion.top_logprobs).double(), top, rtol=0, atol=1e-4)


@settings(max_examples=8, **RELAXED)
@example((SchedulerLimits(4, 15, 8, 13, 11, None), 3, 6, list(range(6))), {16})
@example((SchedulerLimits(16, 104, 6, 11, 3, GroupingLimits(1, 1)), 2, 6, list(range(6))), {78})
@example((SchedulerLimits(8, 107, 2, 42, 6, None), 3, 6, list(range(6))), {69})
@given(schedules(LONGEST, 6), st.sets(st.integers(0, 99), min_size=1, max_size=2))
def test_a_token_that_breaks_the_model_costs_those_samples_alone_that_read_it(model_folders, drawn, schedule, numbers):
    """The embeddings of some tokens are NaN, and so are the keys and values of whatever reads them: behind the part of a page
    that other samples have copied, in steps in flight, behind the end of a sample that has stopped."""
    limits, depth, n, order = schedule
    ends = [prompt[-1] for prompt in PROMPTS]
    candidates = [EOS, 50, *ends, *sorted({int(token) for sample in drawn.values() for token in sample.token_ids})]
    bad = {candidates[number % len(candidates)] for number in numbers}

    def build(spec: WorkerSpec) -> Worker:
        worker: Any = Worker.build(spec)
        worker._decoder._weights.embed_VE[list(bad)] = float("nan")
        worker.make_ahead = worker.close = lambda: None
        return worker

    params = SamplingParams(n=n, temperature=0.9, top_p=0.95, max_tokens=12, seed=11)
    requests, executor = ordered_requests(order, params), partial(InProcessExecutor, build=build)
    completions = generate(model_folders["qwen3"], requests, limits, depth, executor)
    assert len(completions) == n * len(PROMPTS)
    for key, completion in completions.items():
        read = {*PROMPTS[key[0]], *drawn[key].token_ids[:-1].tolist()}
        if bad & read:
            assert completion.error_code == "nan_logits"
        else:
            assert completion.error_code is None
            assert completion.token_ids.tolist() == drawn[key].token_ids.tolist()


def test_a_broken_model_ends_the_sample_with_nan_logits(model_folders, tmp_path):
    folder = tiny_models.build("llama", tmp_path / "broken")
    worker = Worker.build(
        WorkerSpec(folder, read_spec(folder), torch.float32, "cpu", "torch_paged", ReplicaSizes(4, 16, 2, 32, 8, 2, 1))
    )
    worker._decoder._weights.final_norm_E.fill_(float("nan"))
    requests = token_device.make_requests([[1, 2, 3]], [SamplingParams(n=50, max_tokens=4)])
    limits = SchedulerLimits(4, 16, 2, 32, 8, None)
    scheduler = Scheduler(requests, limits, StopRules(requests.sampling, [EOS], VOCAB, None))
    completions: list[Completion] = []
    while not scheduler.done:
        completions += scheduler.apply(worker.run(scheduler.schedule()))
    assert [completion.error_code for completion in completions] == ["nan_logits"] * 50
    assert scheduler.counts.steps == 2, "the prompt breaks the model, whatever its sample"
