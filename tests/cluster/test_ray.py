"""A run on a real Ray cluster of three nodes: an actor killed, a node gone without a word, the driver killed and restarted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from crash.conftest import Scene
from typer.testing import CliRunner

from tokabatch.cli import app
from tokabatch.errors import JobError, UsageError
from tokabatch.job import EngineConfig

ray = pytest.importorskip("ray", reason="needs Ray (`pip install -e .[dev]`)")
from ray.cluster_utils import Cluster  # noqa: E402

from tokabatch.cluster.ray import RayCluster  # noqa: E402

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).parent / "scripted_tokabatch.py"
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}
SECONDS = 240
"""For each thing that is waited for: much more than it takes, as others may use the machine."""
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Its processes find the package and the tests' own modules as this one does."""
    handler = signal.getsignal(signal.SIGTERM)
    kept = {name: os.environ.get(name) for name in ("PYTHONPATH", "RAY_worker_niceness")}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    # Ray's workers give way to all other processes, tests that run beside this one included.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    try:
        yield cluster
    finally:
        cluster.shutdown()
        # Starting a node puts one of Ray's in its place.
        signal.signal(signal.SIGTERM, handler)
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def replicas() -> list[psutil.Process]:
    """The actors' processes."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter(["cmdline"]):
        if any("ray::TokabatchReplica" in word for word in process.info["cmdline"] or ()):
            found.append(process)
    return found


def wait_until(reached: Callable[[], bool], driver: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not reached():
        assert driver.poll() is None, f"the driver has ended with {driver.returncode}: {log.read_text()}"
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def test_whatever_is_lost_each_sample_is_there_once(cluster: Any, tmp_path: Path) -> None:
    questions: list[str | None] = [f"What is {row}?" for row in range(160)]
    questions[7] = None
    scene = Scene(tmp_path, questions, n=8, rows_per_shard=50, flush_seconds=0.5)
    job, notes, log, out = tmp_path / "job.json", tmp_path / "notes", tmp_path / "log", tmp_path / "out"
    notes.mkdir()
    job.write_text(json.dumps(scene.job(out)))
    nodes = [cluster.add_node(**NODE) for _ in range(2)]
    command = [sys.executable, str(PROGRAM), "0.03", str(notes), "run", str(job), "--quiet"]
    command += ["--on", "ray", "--replicas", "3", "--address", cluster.address]

    def finished() -> int:
        return sum(len(path.read_text().splitlines()) for path in notes.iterdir())

    with log.open("wb") as file:
        driver = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        wait_until(lambda: finished() > 100 and len(replicas()) == 3, driver, log)
        replicas()[0].kill()
        wait_until(lambda: finished() > 300, driver, log)
        cluster.remove_node(nodes[1], allow_graceful=False)
        wait_until(lambda: finished() > 500 and log.read_text().count("Starting another") == 2, driver, log)
    finally:
        driver.kill()
        driver.wait()
    left = replicas()
    psutil.wait_procs(left, timeout=20)
    assert not replicas(), "actors outlive their driver"
    assert 0 < scene.checker.check(out) < scene.checker.samples
    # Two of three actors have a node; the third waits, and then takes its part.
    again = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    cluster.add_node(**NODE)
    told, _ = again.communicate(timeout=SECONDS)
    assert again.returncode == 0, told
    scene.checker.check_complete(out)


def test_the_cluster_says_how_many_replicas_fit_and_leaves_signals_to_the_run(cluster: Any) -> None:
    gpus = cluster.add_node(num_gpus=5, **NODE)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with RayCluster(cluster.address) as found:
            assert signal.getsignal(signal.SIGTERM) is before
            config = EngineConfig()
            layout = found.layout(config.model_copy(update={"tensor": 2}), "cuda")
            assert (layout.replicas, layout.devices) == (2, ((), ()))
            assert found.layout(config.model_copy(update={"replicas": 7}), "cuda").replicas == 7
            for update, device, message in (
                ({"tensor": 8}, "cuda", "takes 8 GPUs of one node"),
                ({}, "cpu", "the driver sees none"),
                ({"device": "cpu"}, "cpu", "add --replicas 4"),
            ):
                with pytest.raises(JobError, match=message):
                    found.layout(config.model_copy(update=update), device)
    finally:
        cluster.remove_node(gpus)
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--on", "ray", "--address", "ray://head:10001"], "is that of Ray's client"),
        (["--on", "ray", "--address", "127.0.0.1:1"], "there is no Ray cluster at 127.0.0.1:1"),
        (["--on", "dask"], "--on dask is not a kind of cluster"),
        (["--address", "head:6379"], "add --on ray"),
    ],
)
def test_what_is_no_cluster_is_refused_and_the_remedy_named(tmp_path: Path, options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["run", str(ROOT / "jobs/quickstart.yaml"), f"output.path={tmp_path / 'out'}", *options])
    assert isinstance(result.exception, UsageError) and message in str(result.exception)
    assert not (tmp_path / "out").exists()
