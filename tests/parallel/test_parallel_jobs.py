"""Whole jobs in float64 over gloo: the tokens of several ranks are those of one, however the job is scheduled."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import tiny_models
from support.ranks import TinyJob, run
from support.sampling import sampler_inputs

from tokabatch.errors import EngineError
from tokabatch.model.partition import VocabularyShard
from tokabatch.model.sampling.sampler import sample
from tokabatch.parallel.mesh import Mesh
from tokabatch.scheduling.contracts import SamplingParams
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.scheduler import SchedulerLimits

VOCAB = 300
"""Three parts: of four tensor ranks one holds none."""
HEADER = [5, 9, 9, 41, 3, 77, 60, 12, 12, 8, 30, 31, 90, 4, 4, 4, 17, 66, 23]
PROMPTS = [[*HEADER, 1], [*HEADER, 250, 251, 52, 53, 54, 255], [*HEADER, 250, 251, 52, 70], [*HEADER[:7], 20, 21], [88], HEADER]
MAX_TOKENS = 6
LONGEST = max(map(len, PROMPTS)) + MAX_TOKENS
FAMILIES = ("llama", "qwen2", "qwen3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: tiny_models.build(family, root / family, vocab_size=VOCAB) for family in FAMILIES}


@st.composite
def jobs(draw):
    page_size = draw(st.sampled_from([1, 4, 8]))
    pages = -(-LONGEST // page_size)
    max_running = draw(st.integers(1, 9))
    limits = SchedulerLimits(
        page_size=page_size,
        num_pages=pages + 1 + draw(st.sampled_from([0, 1, 3, 100])),
        max_running=max_running,
        max_step_tokens=max_running + draw(st.sampled_from([0, 1, 5, 40])),
        max_pages_per_sequence=pages,
        grouping=draw(st.sampled_from([None, GroupingLimits(1, 1), GroupingLimits(2, 1), GroupingLimits(3, 2)])),
    )
    kinds = st.builds(
        SamplingParams,
        n=st.integers(1, 3),
        temperature=st.sampled_from([0.0, 0.0, 0.7, 1.0]),
        top_p=st.sampled_from([1.0, 1.0, 0.8]),
        top_k=st.sampled_from([0, 0, 5]),
        min_p=st.sampled_from([0.0, 0.0, 0.05]),
        logprobs=st.sampled_from([None, 0, 2]),
        max_tokens=st.just(MAX_TOKENS),
        seed=st.integers(0, 3),
    )
    scatter_from = draw(st.sampled_from([None, 1, 6]))
    family, params = draw(st.sampled_from(FAMILIES)), draw(st.lists(kinds, min_size=1, max_size=3))
    return family, params, limits, draw(st.integers(1, 3)), scatter_from


SETTINGS = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2)], ids=["tensor-2", "pipeline-2"])
@settings(max_examples=4, **SETTINGS)
@given(job=jobs())
def test_two_ranks_draw_what_one_draws(mesh, ranks, folders, job):
    compare(mesh, ranks, folders, job)


@pytest.mark.parametrize("mesh", [(2, 2), (4, 1)], ids=["tensor-2-pipeline-2", "tensor-4"])
@settings(max_examples=2, **SETTINGS)
@given(job=jobs())
def test_four_ranks_draw_what_one_draws(mesh, ranks, folders, job):
    compare(mesh, ranks, folders, job)


def compare(mesh, ranks, folders, job):
    """The job on this mesh, and on one rank: the same tokens, and log-probabilities but for rounding."""
    family, params, limits, depth, scatter_from = job
    job = TinyJob(folders[family], PROMPTS, params, limits, depth, scatter_from=scatter_from)
    expected = run(Mesh.single(), job)
    for drawn in ranks(mesh).call(mesh, run, job):
        assert drawn.keys() == expected.keys()
        for key, completion in drawn.items():
            other = expected[key]
            assert completion.token_ids.tolist() == other.token_ids.tolist()
            assert completion.finish_reason == other.finish_reason
            assert (completion.logprobs is None) == (other.logprobs is None)
            if completion.logprobs is not None:
                np.testing.assert_allclose(completion.logprobs, other.logprobs, atol=1e-5)
            if completion.top_ids is not None:
                np.testing.assert_array_equal(completion.top_ids, other.top_ids)
                np.testing.assert_allclose(completion.top_logprobs, other.top_logprobs, atol=1e-5)


def run_apart(mesh: Mesh, job: TinyJob) -> None:
    """The second rank scatters its tokens, the first does not."""
    assert mesh.compares
    run(mesh, replace(job, scatter_from=1 if mesh.tensor_rank else None))


def run_other_steps(mesh: Mesh, job: TinyJob) -> None:
    run(mesh, replace(job, prompts=[*job.prompts, [7, mesh.tensor_rank]]))


@pytest.mark.parametrize(
    ("way", "told"),
    [(run_apart, r"0 and 1 .*scattered: None and .*scattered: \[\]"), (run_other_steps, "step 1 of the bytes")],
)
def test_a_rank_that_takes_another_path_is_reported_before_a_deadlock(way, told, ranks, folders):
    limits = SchedulerLimits(4, 100, 4, 60, -(-LONGEST // 4), None)
    job = TinyJob(folders["llama"], PROMPTS[:2], [SamplingParams(max_tokens=3)], limits)
    with pytest.raises(EngineError, match=told):
        ranks((2, 1)).call((2, 1), way, job)
    compare((2, 1), ranks, folders, ("llama", [SamplingParams(max_tokens=3)], limits, 2, None))


def drawn_by(mesh: Mesh, vocab_size: int, params: dict) -> torch.Tensor:
    """What 400 rows of the same logits draw where each rank has its shard of them, packed."""
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(400, vocab_size, generator=generator, dtype=torch.float32) * 3
    logits[7, 3], logits[8], logits[9, vocab_size - 1] = torch.nan, -torch.inf, torch.inf
    logits[10, :] = 1.0
    shard = VocabularyShard.of(vocab_size, mesh)
    own = torch.nn.functional.pad(logits[:, shard.tokens.start : shard.tokens.stop], (0, shard.width - len(shard.tokens)))
    last = torch.zeros(400, dtype=torch.int64)
    packed = sample(own, sampler_inputs(400, **params), last, shard=shard).packed
    assert torch.equal(last, packed[0].long())
    return packed


@pytest.mark.parametrize(("mesh", "vocab_size"), [((2, 1), 100), ((2, 1), 1111), ((4, 1), 300)])
def test_a_draw_from_shards_is_that_from_all_logits_to_the_last_bit(mesh, vocab_size, ranks):
    kinds = {
        "temperature": [(0.0, 1.0, 0.6, 1.7)[row % 4] for row in range(400)],
        "logprobs": [(-1, 0)[row % 2] for row in range(400)],
    }
    filters = {"top_p": [(1.0, 0.9)[row // 4 % 2] for row in range(400)], "top_k": [(0, 0, 9)[row % 3] for row in range(400)]}
    for params in (kinds, kinds | filters, {"min_p": 0.1}):
        expected = drawn_by(Mesh.single(), vocab_size, params)
        for packed in ranks(mesh).call(mesh, drawn_by, vocab_size, params):
            finite = expected[1] != 0
            assert torch.equal(packed[:2], expected[:2]) and torch.equal(packed[:, finite], expected[:, finite])
