"""The layout on a host's devices: what the job says, or one replica a GPU, and the devices of each."""

from __future__ import annotations

import pytest

from tokabatch.errors import JobError
from tokabatch.job import EngineConfig
from tokabatch.parallel import layout
from tokabatch.parallel.layout import decide_layout, visible_devices


@pytest.mark.parametrize(
    ("named", "count", "expected"),
    [
        (None, 3, ("0", "1", "2")),
        ("2,3", 2, ("2", "3")),
        ("GPU-8932f937, GPU-1a2b3c4d", 2, ("GPU-8932f937", "GPU-1a2b3c4d")),
        ("1,-1,2", 1, ("1",)),
        ("", 0, ()),
    ],
    ids=["no restriction", "numbers", "UUIDs", "those before an invalid one", "none"],
)
def test_visible_devices_are_those_that_the_environment_leaves(named, count, expected, monkeypatch):
    monkeypatch.setattr(layout.torch.cuda, "device_count", lambda: count)
    assert visible_devices({} if named is None else {"CUDA_VISIBLE_DEVICES": named}) == expected


def test_a_cpu_has_one_replica_without_a_device():
    found = decide_layout(EngineConfig(), "cpu", ("0", "1"))
    assert (found.replicas, found.devices) == (1, ((),)) and "CPU" in str(found)


def test_a_gpu_that_is_not_here_is_one():
    assert decide_layout(EngineConfig(), "cuda", None).replicas == 1


def test_the_devices_of_a_replica_of_several_ranks_are_its_own():
    found = decide_layout(EngineConfig(tensor=2), "cuda", ("4", "7", "9"))
    assert (found.replicas, found.tensor, found.pipeline, found.devices) == (1, 2, 1, (("4", "7"),))
    with pytest.raises(JobError, match=r"engine\.tensor is 2 .*takes 4 GPUs, but 3 are visible"):
        decide_layout(EngineConfig(tensor=2, pipeline=2), "cuda", ("0", "1", "2"))


def test_ranks_have_processes_of_their_own():
    with pytest.raises(JobError, match=r"engine\.pipeline 2.*remove engine\.process: false"):
        decide_layout(EngineConfig(pipeline=2, process=False), "cpu", ())


def test_auto_is_a_replica_on_each_visible_gpu():
    found = decide_layout(EngineConfig(), "cuda", ("3", "GPU-8932f937"))
    assert (found.replicas, found.devices, str(found)) == (2, (("3",), ("GPU-8932f937",)), "2 replicas (2 visible GPUs)")
    pairs = decide_layout(EngineConfig(tensor=2), "cuda", ("0", "1", "2", "3", "4"))
    assert (pairs.replicas, pairs.devices) == (2, (("0", "1"), ("2", "3")))


def test_the_job_may_say_how_many():
    assert decide_layout(EngineConfig(replicas=1), "cuda", ("4", "5")).devices == (("4",),)
    assert decide_layout(EngineConfig(replicas=3), "cpu", ()).devices == ((), (), ())


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"replicas": 3}, r"engine\.replicas is 3, but 2 GPUs are visible .*write at most 2, or auto"),
        ({"replicas": 2, "process": False}, r"engine\.replicas is 2.*remove engine\.process: false"),
    ],
)
def test_more_replicas_than_there_can_be_are_refused(engine, message):
    with pytest.raises(JobError, match=message):
        decide_layout(EngineConfig(**engine), "cuda", ("0", "1"))
