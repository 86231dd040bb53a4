"""Warming up executes on any backend, for every kind of drawing, and leaves nothing behind that a run could read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import tiny_models, token_device

from tokabatch.engine.replica_sizes import ReplicaSizes
from tokabatch.engine.warm_up import kinds_of_drawing, warm_up_steps
from tokabatch.engine.worker import Worker, WorkerSpec
from tokabatch.model.families import read_spec
from tokabatch.scheduling.contracts import SamplingParams
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.scheduler import Scheduler, SchedulerLimits
from tokabatch.scheduling.stop_conditions import StopRules

GREEDY, PLAIN = SamplingParams(temperature=0.0), SamplingParams()
FILTERED, SCORED = SamplingParams(top_k=5), SamplingParams(temperature=0.0, logprobs=3)


@pytest.mark.parametrize(
    ("sampling", "kinds"),
    [
        ([GREEDY], {(False, False, -1)}),
        ([PLAIN, PLAIN], {(True, False, -1)}),
        ([SamplingParams(temperature=0.0, top_k=5)], {(False, False, -1)}),
        ([FILTERED, SCORED], {(True, True, -1), (False, False, 3), (True, True, 3)}),
        ([], {(False, False, -1)}),
    ],
)
def test_one_of_each_kind_and_all_together(sampling, kinds):
    def kind(params):
        random = params.temperature > 0
        filtered = random and (params.top_p < 1 or params.top_k > 0 or params.min_p > 0)
        return random, filtered, -1 if params.logprobs is None else params.logprobs

    found = [kind(params) for params in kinds_of_drawing(sampling)]
    assert set(found) == kinds and len(found) == len(kinds)


@pytest.mark.parametrize("page", [4, 16])
def test_a_warm_worker_gives_what_a_cold_one_gives(tmp_path, page):
    folder = tiny_models.build("llama", tmp_path)
    prompts = [[5, 9, 9, 41, 3, 77], [5, 9, 9, 41, 3, 77, 60, 12], [8]]
    params = SamplingParams(n=3, max_tokens=9, logprobs=2, ignore_eos=True, seed=4)
    columns = -(-17 // page)
    sizes = ReplicaSizes(page, 40, 6, 20, columns, 2, 1)
    spec = WorkerSpec(folder, read_spec(folder), torch.float64, "cpu", "torch_paged", sizes)
    outputs = []
    for warm in (False, True):
        worker = Worker.build(spec)
        if warm:
            worker.warm_up(kinds_of_drawing([GREEDY, FILTERED, SCORED, params]))
        limits = SchedulerLimits(page, 40, 6, 20, columns, GroupingLimits(2, 1))
        scheduler = Scheduler(token_device.make_requests(prompts, [params]), limits, StopRules([params], [], 97, None))
        done = []
        while not scheduler.done:
            done += scheduler.apply(worker.run(scheduler.schedule()))
        done.sort(key=lambda c: (c.row_index, c.sample_index))
        outputs.append([(c.token_ids.tolist(), c.logprobs.tolist()) for c in done])
    assert outputs[0] == outputs[1] and len(outputs[0]) == 9


def test_a_cache_too_small_for_a_prompt_is_left_alone():
    sizes = ReplicaSizes(16, 2, 1, 8, 1, 0, 1)
    assert list(warm_up_steps(sizes, [GREEDY])) == []


def test_every_kind_has_a_step_of_its_own():
    sizes = ReplicaSizes(16, 100, 8, 200, 4, 2, 1)
    steps = list(warm_up_steps(sizes, [PLAIN, FILTERED]))
    assert [step.index for step in steps] == [0, 1, 2, 3, 4]
    assert np.array_equal(steps[-1].inits.top_k, [5] * 8) and steps[2].prefix_levels and len(steps[1].copy_src) == 1


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 8])
def test_decode_steps_fill_the_device_and_leave_it_idle(kv_heads):
    """For few programs the decode kernel is another one (`attention.triton_decode`): both are compiled before a run."""
    few_programs = 512
    steps = list(warm_up_steps(ReplicaSizes(16, 5000, 8192, 16_384, 100, 2, 1), [PLAIN]))
    for is_shared in (False, True):
        decodes = [step for step in steps[1:-1] if bool(step.prefix_levels) == is_shared]
        assert {len(step.run_slot) * kv_heads <= few_programs for step in decodes} == {True, False}
