"""The workloads have the shape that their names promise, the job's input says the same, and the floor is the one roofline."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.uniform_workload import UniformWorkload, workload_seconds

from benchmarks.gpu import jobs, models
from benchmarks.gpu.floor import workload_floor
from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.workloads import WORKLOADS, make_gpu_workload
from benchmarks.workloads import Workload
from tokabatch.forecast.roofline import H200
from tokabatch.model.families import read_spec


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_text(json.dumps(models.config(SHAPES["llama-3.2-1b"])))
    return read_spec(folder)


def test_full_sizes():
    made = {name: make_gpu_workload(name, 128_256) for name in ("a", "b", "c")}
    assert (len(made["a"].prompts), made["a"].n, made["a"].common_prefix(), made["a"].longest) == (16, 512, 900, 1200)
    assert (len(made["b"].prompts), made["b"].n, made["b"].num_output_tokens) == (5000, 1, 1_000_000)
    assert 205 < made["b"].num_prompt_tokens / 5000 < 222
    assert (len(made["c"].prompts), made["c"].common_prefix(), made["c"].num_output_tokens) == (256, 32_768, 16_384)
    assert made["c"].longest == 32_768 + 50 + 64


def test_drawn_lengths_spread_around_200():
    for name in ("a-full", "b-full"):
        lengths = make_gpu_workload(name, 1000, scale=0.3).output_length_PN / 0.3
        assert 190 < lengths.mean() < 210
        assert lengths.std() > 40


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_same_arguments_give_the_same_workload(name, tmp_path):
    first, second = (make_gpu_workload(name, 640, 0.02, seed=3) for _ in range(2))
    first.save(tmp_path / "workload.npz")
    loaded = Workload.load(tmp_path / "workload.npz")
    for again in (second, loaded):
        assert all(np.array_equal(a, b) for a, b in zip(first.prompts, again.prompts, strict=True))
        assert np.array_equal(first.output_length_PN, again.output_length_PN)


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_jobs_input_holds_every_sample(name, tmp_path):
    workload = make_gpu_workload(name, 640, 0.02)
    rows = jobs.write_input(workload, tmp_path / "rows.parquet")
    table = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert len(table) == rows
    lengths: dict[int, list[int]] = {}
    for row in table:
        index, params = row["prompt_index"], row["sampling_params"]
        assert row["prompt_token_ids"] == workload.prompts[index].tolist()
        lengths.setdefault(index, []).extend([params["max_tokens"]] * params["n"])
    assert [sorted(lengths[index]) for index in range(len(workload.prompts))] == np.sort(workload.output_length_PN).tolist()


@pytest.mark.parametrize("hydragen", [True, False])
@pytest.mark.parametrize(
    ("name", "uniform"),
    [
        ("a", UniformWorkload(16, 512, header=900, own=100, output=200, running=8192)),
        ("c", UniformWorkload(256, 1, header=32_768, own=50, output=64, running=8192)),
    ],
)
def test_the_floor_of_a_uniform_workload_is_the_roofline(name, uniform, hydragen, llama):
    workload = make_gpu_workload(name, 128_256)
    uniform = UniformWorkload(
        uniform.prompts, uniform.samples, uniform.header, uniform.own, uniform.output, uniform.running, hydragen
    )
    floor = workload_floor(llama, H200, workload, running=8192, hydragen=hydragen)
    assert floor.seconds == pytest.approx(workload_seconds(llama, H200, uniform), rel=1e-6)


def test_the_floor_of_unequal_lengths_lies_around_that_of_their_mean(llama):
    floor = workload_floor(llama, H200, make_gpu_workload("b", 128_256), running=8192)
    mean = UniformWorkload(5000, 1, header=0, own=216, output=200, running=8192)
    assert floor.rate == pytest.approx(mean.output_tokens / workload_seconds(llama, H200, mean), rel=0.02)
