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


@pytest.mark.parametrize("key", ["tensor", "pipeline"])
def test_a_replica_over_several_devices_is_refused(key):
    with pytest.raises(JobError, match=rf"engine\.{key} is 2.*not supported yet"):
        decide_layout(EngineConfig(**{key: 2}), "cuda", ("0", "1"))
