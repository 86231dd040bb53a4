"""Captured steps against the torch backend, and the ladder of their sizes.

On a machine without a GPU the kernels run in Triton's interpreter, and a graph is its work, done again.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from support import tiny_models, token_device
from support.captured_worker import captured_worker, sizes_of
from support.interpreter import DEVICES, INTERPRETING
from support.stage_pair import StagePair

from tokabatch.engine.graphs import COARSE_STEPS, FINE_STEPS, LEAST_WORTH, MOST_WORTH, Ladder, size_above, worth_capturing
from tokabatch.engine.worker import Worker, WorkerSpec
from tokabatch.model.families import read_spec
from tokabatch.model.weights import load_decoder
from tokabatch.parallel.mesh import Mesh
from tokabatch.scheduling.contracts import Completion, SamplingParams
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.scheduler import Scheduler, SchedulerLimits
from tokabatch.scheduling.stop_conditions import StopRules

N, TOKENS = (2, 4) if INTERPRETING else (4, 7)
"""Enough for slots to be used again; a step takes the interpreter half a second."""
VOCAB = 97
HEADS = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
"""The matrix units multiply no fewer than 16 columns."""
PENALISED = {"temperature": 0.0, "repetition_penalty": 1.4, "frequency_penalty": 0.5, "bad_words": ((9,), (4, 4))}


@pytest.mark.parametrize("steps", [FINE_STEPS, COARSE_STEPS])
def test_sizes_are_near_above(steps):
    sizes = [size_above(count, steps) for count in range(1, 20_000)]
    assert all(size >= count for count, size in enumerate(sizes, 1)) and sizes == sorted(sizes)
    assert all(size - count <= max(31, count / steps) for count, size in enumerate(sizes, 1))
    assert all(size_above(size, steps) == size for size in sizes)
    assert {size_above(count, COARSE_STEPS) for count in range(1, 10_000)} <= set(sizes)


def test_a_size_is_captured_once_it_is_wanted_often():
    made: list[tuple[int, str]] = []
    ladder = Ladder(5000, lambda size, kind: made.append((size, kind)))
    filled = 0
    while filled < MOST_WORTH:
        assert ladder.size(1040, "a") == 1536
        filled += 1536 - 1056
    ladder.at(1536, "a")
    assert ladder.make_ahead() and made == [(1536, "a"), (1056, "a")]
    ladder.at(1056, "a")
    assert len(made) == 2
    assert ladder.size(1050, "a") == 1056 and ladder.size(1030, "a") == 1056 and ladder.size(1030, "b") == 1536
    assert ladder.size(4999, "a") == 5000


def test_a_larger_size_serves_until_a_nearer_one_is_worth_capturing():
    made: list[tuple[int, str]] = []
    ladder = Ladder(9000, lambda size, kind: made.append((size, kind)))
    ladder.at(1024, "a")
    uses = 0
    while ladder.size(300, "a") == 1024 and not ladder.make_ahead():
        uses += 1
    assert uses == MOST_WORTH // (1024 - 512) - 1 and made == [(1024, "a"), (512, "a")]
    assert ladder.size(300, "a") == 512 and ladder.size(300, "b") == 512
    ladder.at(9000, "a")
    # As many as that are not filled up even once.
    assert ladder.size(1025, "a") == 1536 and ladder.size(6200, "a") == 9000


def test_large_sizes_below_are_captured_before_fewer_samples_are_left():
    made: list[tuple[int, str]] = []
    ladder = Ladder(5000, lambda size, kind: made.append((size, kind)))
    assert not ladder.make_ahead()
    ladder.at(ladder.size(2100, "a"), "a")
    ladder.size(2100, "b")
    while ladder.make_ahead():
        pass
    assert made == [(3072, "a"), *((size, kind) for size in (2048, 1536, 1024) for kind in "ab")]
    for count in range(2048, 0, -1):
        size = ladder.size(count, "a")
        assert size >= count
        ladder.at(size, "a")
        ladder.make_ahead()
    # Small sizes gain little: they are captured where a larger one has served for long.
    assert len(made) < 20


def test_coarse_sizes_are_captured_before_the_first_step():
    made: list[tuple[int, str]] = []
    ladder = Ladder(5000, lambda size, kind: made.append((size, kind)))
    ladder.prepare("a")
    assert [size for size, _ in made] == [5000, 4096, 3072, 2048, 1536, 1024, 512, 256]
    assert ladder.size(2100, "a") == 3072 and ladder.size(3, "a") == 256 and not ladder.make_ahead()


def test_steps_of_large_models_are_filled_up_less():
    """A token of 8B parameters takes as long as eighty of a small model: sizes are nearer, and worth capturing sooner."""
    assert worth_capturing(100_000_000) == MOST_WORTH and worth_capturing(7_000_000_000) == LEAST_WORTH
    made: list[tuple[int, str]] = []
    ladder = Ladder(5000, lambda size, kind: made.append((size, kind)), LEAST_WORTH)
    ladder.prepare("a")
    assert [size for size, _ in made] == [5000, 4096, 3072, 2048, 1536, 1024, 768, 512, 384, 256]
    uses = 0
    while ladder.size(1280, "a") == 1536:
        uses += 1
        ladder.make_ahead()
    assert uses == LEAST_WORTH // (1536 - 1280) and ladder.size(1280, "a") == 1280
    assert ladder.size(300, "a") == 384


def test_ranks_of_uneven_shards_choose_the_same_graphs(tmp_path):
    heads = {"hidden_size": 40, "num_attention_heads": 10, "num_key_value_heads": 5, "head_dim": 4}
    folder = tiny_models.build("llama", tmp_path, **heads, intermediate_size=72)
    spec, device = read_spec(folder), torch.device("cpu")
    meshes = [Mesh(rank, 5, 1) for rank in range(5)]
    assert len({len(mesh.shard(spec.intermediate_size)) for mesh in meshes}) > 1
    assert len({load_decoder(folder, spec, torch.float32, device, mesh).body_elements for mesh in meshes}) == 1


def generate(
    worker: Worker | StagePair, prompts: list[list[int]], params: SamplingParams, grouping: GroupingLimits | None
) -> list[Completion]:
    sizes, stages = worker.sizes, 2 if isinstance(worker, StagePair) else 1
    limits = SchedulerLimits(
        sizes.page_size,
        sizes.num_pages,
        sizes.max_running,
        sizes.max_step_tokens,
        sizes.max_pages_per_sequence,
        grouping,
        stages,
    )
    scheduler = Scheduler(token_device.make_requests(prompts, [params]), limits, StopRules([params], [], VOCAB, None))
    done: list[Completion] = []
    while not scheduler.done:
        if isinstance(worker, StagePair):
            while scheduler.num_in_flight < stages + 1 and (step := scheduler.schedule()) is not None:
                worker.submit(step)
            done += scheduler.apply(worker.collect())
        else:
            done += scheduler.apply(worker.run(scheduler.schedule()))
        if not INTERPRETING:
            # In the place of a recorder it would compute what is captured.
            worker.make_ahead()
    return sorted(done, key=lambda c: (c.row_index, c.sample_index))


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize(
    ("family", "page", "grouping", "params"),
    [
        (
            "llama",
            4,
            GroupingLimits(2, 1),
            SamplingParams(n=N, temperature=0.0, max_tokens=TOKENS, logprobs=0, ignore_eos=True),
        ),
        ("qwen3", 16, GroupingLimits(2, 1), SamplingParams(n=N, top_k=5, max_tokens=TOKENS, logprobs=2, ignore_eos=True)),
        ("llama", 4, GroupingLimits(2, 1), SamplingParams(n=N, max_tokens=TOKENS, logprobs=1, **PENALISED)),
    ],
)
def test_captured_steps_give_what_the_torch_backend_gives(tmp_path, where, family, page, grouping, params):
    """Prompts computed beside running samples, shared beginnings, forks, slots used again, steps of every size."""
    folder = tiny_models.build(family, tmp_path, **HEADS)
    sizes = sizes_of(page, 7, 30)
    compare(captured_worker(folder, sizes, torch.device(where)), folder, params, grouping)


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize(
    ("family", "captured", "grouping", "params"),
    [
        ("qwen2", (30, 12), None, SamplingParams(n=N, max_tokens=TOKENS, logprobs=0, ignore_eos=True)),
        (
            "qwen3",
            (9, 30),
            GroupingLimits(2, 1),
            SamplingParams(n=N, top_k=5, max_tokens=TOKENS, logprobs=1, ignore_eos=True, repetition_penalty=1.4),
        ),
    ],
)
def test_captured_stages_give_what_one_rank_gives(tmp_path, where, family, captured, grouping, params):
    """With three steps in flight, the first stage given the tokens to decode by the scheduler. Large steps are captured on one
    stage and run kernel by kernel on the other."""
    folder = tiny_models.build(family, tmp_path, **HEADS)
    stages = StagePair(folder, sizes_of(4, 7, 30), torch.device(where), captured)
    compare(stages, folder, params, grouping)


SHARED = [5, 9, 9, 41, 3, 77, 60, 12, 13, 14, 15, 16, 17]
PROMPTS = [[*SHARED, 9], [*SHARED, 8, 30, 30, 2], [8], [*SHARED, 8, 30, 30, 7, 50], [4] * 30]


def compare(
    worker: Worker | StagePair,
    folder: Path,
    params: SamplingParams,
    grouping: GroupingLimits | None,
    prompts: list[list[int]] = PROMPTS,
) -> None:
    """A job's samples and those of one rank in plain torch: the same tokens, log-probabilities but for rounding."""
    plain = WorkerSpec(folder, read_spec(folder), torch.float32, "cpu", "torch_paged", worker.sizes, draws=(params,))
    expected = generate(Worker.build(plain), prompts, params, grouping)
    found = generate(worker, prompts, params, grouping)
    where = "cpu" if INTERPRETING else "cuda"
    same = [a.token_ids.tolist() == b.token_ids.tolist() for a, b in zip(expected, found, strict=True)]
    if where == "cpu":
        assert all(same)
    for ours, theirs in zip(found, expected, strict=True):
        # In 16 bits samples part where two tokens are about as likely: up to there they agree.
        agree = int(np.argmin(np.append(ours.token_ids == theirs.token_ids, False)))
        np.testing.assert_allclose(
            ours.logprobs[:agree], theirs.logprobs[:agree], **({"atol": 1e-3} if where == "cpu" else {"atol": 0.3})
        )
    assert len(found) == params.n * len(prompts)


@pytest.mark.parametrize("where", DEVICES)
def test_a_step_in_a_larger_graph_fills_no_more_planes_than_that_has(tmp_path, where, monkeypatch):
    """The graph of all tokens exists from the beginning and serves a few tokens, too."""
    for name, value in {"ENOUGH_PLANES": 2, "MAX_PLANES": 8, "FINEST": 4}.items():
        monkeypatch.setattr(f"tokabatch.engine.captured.{name}", value)
    for name, value in {"SHORT_RUN": 2, "LONG_CONTEXT": 3, "SPLIT_KEYS": 2, "SPLIT_STEP": 2}.items():
        monkeypatch.setattr(f"tokabatch.attention.tiles.{name}", value)
    folder = tiny_models.build("llama", tmp_path, **HEADS)
    worker = captured_worker(folder, sizes_of(4, 7, 30), torch.device(where))
    assert worker._captured is not None
    body, most = worker._captured.body, []
    fit = body.fit

    def watched(step):
        fitted = fit(step)
        if fitted is not None:
            header = import_module("tokabatch.engine.captured").HEADER
            planes_T = fitted.words[header:].reshape(-1)[4 * (-(-fitted.size // 4) * 4) :][: step.num_tokens]
            most.append((int(planes_T.max()), body._num_planes(fitted.size), fitted.size))
        return fitted

    monkeypatch.setattr(body, "fit", watched)
    prompts = [[5] * 40 + [9], [5] * 40 + [8, 30], [5] * 40 + [7]]
    generate(worker, prompts, SamplingParams(n=2, temperature=0.0, max_tokens=TOKENS, ignore_eos=True), GroupingLimits(2, 1))
    assert all(planes <= there for planes, there, _ in most)
    assert max(planes for planes, _, _ in most) > 1
