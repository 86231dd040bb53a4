"""The engine against transformers: every family, every way a step can be executed.

On a GPU in 16 bits, on FlashInfer's kernels; everywhere else the same tests run small, on the CPU in plain torch and float32.

A sample is drawn by the engine; its tokens are then scored by transformers, all at once, in float32 and in the engine's own
dtype. The engine's reported log-probabilities may be no further from float32 than transformers' own are, by a small factor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import tiny_models, token_device
from transformers import AutoModelForCausalLM

from tokabatch.engine.executor import InProcessExecutor
from tokabatch.engine.replica_sizes import ReplicaSizes
from tokabatch.engine.worker import WorkerSpec
from tokabatch.model.families import family_names, read_spec
from tokabatch.scheduling.contracts import Completion, SamplingParams
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.scheduler import Scheduler, SchedulerLimits
from tokabatch.scheduling.stop_conditions import StopRules

VOCAB, CONTEXT = 499, 40_000
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "intermediate_size": 512,
    "max_position_embeddings": CONTEXT,
}


@dataclass(frozen=True)
class Device:
    """Where the engine runs, in which type, and on which attention backend."""

    name: str
    dtype: torch.dtype
    backend: str

    def size(self, on_gpu: int, on_cpu: int) -> int:
        return on_gpu if self.name == "cuda" else on_cpu


GPU = pytest.param(Device("cuda", torch.bfloat16, "flashinfer_paged"), id="cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=[pytest.param(Device("cpu", torch.float32, "torch_paged"), id="cpu"), GPU])
def device(request) -> Device:
    return request.param


@dataclass(frozen=True)
class Ways:
    """How the engine executes; every field is a way that must not show in the results."""

    page_size: int = 16
    max_running: int = 64
    prefill_tokens: int = 512
    hydragen: bool = True
    graphs: bool = True
    num_pages: int = 4000
    fp8: bool = False
    kv_fp8: bool = False


def random_prompts(count: int, header: int, tail: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    common = rng.integers(3, VOCAB, header).tolist()
    return [common + rng.integers(3, VOCAB, int(rng.integers(1, tail + 1))).tolist() for _ in range(count)]


PROMPTS = [*random_prompts(5, 70, 20), *random_prompts(4, 200, 9, seed=1), *random_prompts(3, 0, 40, seed=2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    made: dict[tuple[str, int], Path] = {}

    def build(family: str, head_dim: int) -> Path:
        if (family, head_dim) not in made:
            heads = {64: (8, 2), 128: (4, 4)}[head_dim]
            sizes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": head_dim}
            target = tmp_path_factory.mktemp(family)
            made[family, head_dim] = tiny_models.build(family, target, deviation=0.06, **(SHAPE | sizes))
        return made[family, head_dim]

    return build


def generate(
    device: Device, folder: Path, prompts: Sequence[list[int]], params: SamplingParams, ways: Ways
) -> list[Completion]:
    longest = max(map(len, prompts)) + params.max_tokens
    columns = -(-longest // ways.page_size)
    grouping = GroupingLimits(2, 1) if ways.hydragen else None
    pages = max(columns + 1, ways.num_pages * 16 // ways.page_size)
    step = ways.max_running + ways.prefill_tokens
    sizes = ReplicaSizes(
        ways.page_size, device.size(0, pages), ways.max_running, step, columns, 2, 1, pages, pages * ways.page_size
    )
    spec = read_spec(folder)
    kept = torch.float8_e4m3fn if ways.kv_fp8 else None
    worker = WorkerSpec(folder, spec, device.dtype, device.name, device.backend, sizes, fp8=ways.fp8, kv_dtype=kept)
    with pytest.MonkeyPatch.context() as patch:
        if not ways.graphs and device.name == "cuda":
            patch.setattr("tokabatch.engine.captured.BodyGraphs.fit", lambda graphs, step: None)
        executor = InProcessExecutor(worker)
        executor.start()
        limits = SchedulerLimits(ways.page_size, executor.sizes.num_pages, ways.max_running, step, columns, grouping)
        requests = token_device.make_requests(prompts, [params])
        scheduler = Scheduler(requests, limits, StopRules([params], [], spec.vocab_size, None))
        done: list[Completion] = []
        while not scheduler.done:
            decided = scheduler.schedule() if scheduler.num_in_flight < 2 else None
            if decided is not None:
                executor.submit(decided)
                continue
            done += scheduler.apply(executor.collect())
        executor.close()
    return sorted(done, key=lambda c: (c.row_index, c.sample_index))


class Judge:
    """transformers' log-probabilities of given continuations, in float32 and in bf16."""

    def __init__(self, device: Device, folder: Path) -> None:
        self.device = device.name
        self.models = {
            dtype: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device.name)
            for dtype in (torch.float32, torch.bfloat16)
        }

    @torch.inference_mode()
    def score(self, dtype: torch.dtype, prompt: list[int], output: np.ndarray) -> torch.Tensor:
        tokens = torch.tensor([[*prompt, *output.tolist()]], device=self.device)
        logits = self.models[dtype](tokens).logits[0, len(prompt) - 1 : -1].float()
        return logits.log_softmax(-1).gather(1, tokens[0, len(prompt) :, None])[:, 0].cpu()

    def errors(self, prompts: Sequence[list[int]], completions: list[Completion]) -> tuple[torch.Tensor, torch.Tensor]:
        """How far from float32 the engine's figures are, and transformers' bf16 ones, for every token."""
        ours, theirs = [], []
        for completion in completions:
            assert completion.logprobs is not None and completion.error_code is None
            prompt = prompts[completion.row_index]
            truth = self.score(torch.float32, prompt, completion.token_ids)
            ours.append((torch.from_numpy(completion.logprobs.copy()) - truth).abs())
            theirs.append((self.score(torch.bfloat16, prompt, completion.token_ids) - truth).abs())
        return torch.cat(ours), torch.cat(theirs)


def assert_as_near_as_transformers(
    device: Device, folder: Path, prompts: Sequence[list[int]], completions: list[Completion]
) -> None:
    every = -(-len(completions) // device.size(len(completions), 15))
    ours, theirs = Judge(device, folder).errors(prompts, completions[::every])
    assert ours.mean() < 1.3 * theirs.mean() + 1e-3, (float(ours.mean()), float(theirs.mean()))
    assert ours.max() < 3 * theirs.max() + 1e-2, (float(ours.max()), float(theirs.max()))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("family", family_names())
def test_logprobs_are_as_near_to_float32_as_transformers(device, folder, family, head_dim):
    model = folder(family, head_dim)
    params = SamplingParams(n=device.size(6, 3), max_tokens=24, logprobs=0, ignore_eos=True)
    completions = generate(device, model, PROMPTS, params, Ways())
    assert len(completions) == params.n * len(PROMPTS) and all(len(c.token_ids) == 24 for c in completions)
    assert_as_near_as_transformers(device, model, PROMPTS, completions)


@pytest.mark.parametrize(
    "ways",
    [
        Ways(hydragen=False),
        Ways(graphs=False),
        Ways(page_size=64),
        Ways(page_size=64, hydragen=False, graphs=False),
        Ways(max_running=3, prefill_tokens=0),
        Ways(prefill_tokens=17, num_pages=60),
    ],
    ids=["no-hydragen", "no-graphs", "page-64", "page-64-plain", "few", "small-cache"],
)
def test_no_way_of_executing_shows(device, folder, ways):
    model = folder("llama", 64)
    params = SamplingParams(n=device.size(5, 2), max_tokens=20, logprobs=0, ignore_eos=True)
    completions = generate(device, model, PROMPTS, params, ways)
    assert_as_near_as_transformers(device, model, PROMPTS, completions)


@pytest.mark.parametrize("hydragen", [True, False])
def test_long_prompts(device, folder, hydragen):
    model = folder("qwen3", 64)
    prompts = random_prompts(3, device.size(32_000, 1_000), 60, seed=5)
    params = SamplingParams(n=3, max_tokens=8, logprobs=0, ignore_eos=True)
    completions = generate(device, model, prompts, params, Ways(prefill_tokens=8192, num_pages=8000, hydragen=hydragen))
    assert_as_near_as_transformers(device, model, prompts, completions)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=8),
    ways=st.builds(
        Ways,
        page_size=st.sampled_from([16, 64]),
        max_running=st.sampled_from([1, 7, 40, 600, 8192]),
        prefill_tokens=st.sampled_from([0, 5, 300]),
        hydragen=st.booleans(),
        num_pages=st.sampled_from([30, 300, 4000]),
    ),
)
def test_samples_start_and_finish_in_every_pattern(device, folder, counts, ways):
    """Rows with lengths and sample numbers of their own; every one of them is complete and right."""
    model = folder("llama", 64)
    header = random_prompts(1, 40, 1, seed=9)[0][:40]
    rng = np.random.default_rng(len(counts))
    prompts = [header[: size // 2] + rng.integers(3, VOCAB, size).tolist() for size, _, _ in counts]
    most = max(n for _, n, _ in counts)
    params = SamplingParams(
        n=device.size(most, min(most, 5)), max_tokens=max(out for _, _, out in counts), logprobs=0, ignore_eos=True
    )
    completions = generate(device, model, prompts, params, ways)
    assert len(completions) == params.n * len(prompts)
    assert_as_near_as_transformers(device, model, prompts, completions)


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize(("fp8", "kv_fp8", "most"), [(True, False, 0.12), (False, True, 0.12), (True, True, 0.16)])
def test_e4m3_stays_near(device, folder, fp8, kv_fp8, most):
    """Rounding to three mantissa bits moves log-probabilities of these models by about 0.05. A CPU has no units for e4m3."""
    model = folder("qwen2", 128)
    params = SamplingParams(n=4, max_tokens=16, logprobs=0, ignore_eos=True)
    completions = generate(device, model, PROMPTS, params, Ways(fp8=fp8, kv_fp8=kv_fp8))
    ours, _ = Judge(device, model).errors(PROMPTS, completions)
    assert 1e-3 < ours.mean() < most, float(ours.mean())
