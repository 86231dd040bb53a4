"""A run on a real Ray cluster of three nodes: an actor killed, a node gone without a word, the driver killed and restarted."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from crash.conftest import Scene
from support import token_device
from typer.testing import CliRunner

from benchmarks.scripted_engine import QUICKSTART
from tokabatch import __version__
from tokabatch.cli import app
from tokabatch.engine.replica_sizes import ReplicaSizes
from tokabatch.errors import EngineError, JobError, UsageError
from tokabatch.job import EngineConfig
from tokabatch.runner.fleet import Fleet
from tokabatch.runner.interruption import Interruption
from tokabatch.runner.replica import Replica, Standing
from tokabatch.scheduling.contracts import Requests, SamplingParams, StepBatch, StepResult
from tokabatch.scheduling.scheduler import Scheduler, SchedulerLimits
from tokabatch.scheduling.stop_conditions import StopRules

ray = pytest.importorskip("ray", reason="needs Ray (`pip install -e .[dev]`)")
from ray.cluster_utils import Cluster  # noqa: E402

from tokabatch.cluster.ray import Actor, Launcher, RayCluster  # noqa: E402

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


@pytest.mark.timeout(60)
@pytest.mark.parametrize("sent", [b"x", b"\x7f\xff\xff\xff"])
def test_a_connection_that_stops_within_its_first_message_or_announces_a_long_one_is_closed(sent: bytes) -> None:
    actor = Actor.__new__(Actor)
    actor._listening, actor._token, actor._connection = socket.create_server(("127.0.0.1", 0)), bytes(16), None
    with actor._listening, socket.create_connection(actor._listening.getsockname()) as end:
        end.send(sent)
        actor._accept()
        assert actor._connection is None and end.recv(1) == b""


def test_whatever_is_lost_each_sample_is_there_once(cluster: Any, tmp_path: Path) -> None:
    questions: list[str | None] = [f"What is {row}?" for row in range(160)]
    questions[7] = None
    scene = Scene(tmp_path, questions, n=8, rows_per_shard=50, flush_seconds=0.5)
    job, notes, log, out = tmp_path / "job.json", tmp_path / "notes", tmp_path / "log", tmp_path / "out"
    notes.mkdir()
    # The driver's working folder is not that of the nodes.
    shutil.copytree(QUICKSTART, tmp_path / "model")
    job.write_text(json.dumps(scene.job(Path("out"), model={"path": "model"}, input={"path": scene.rows.name})))
    nodes = [cluster.add_node(**NODE) for _ in range(2)]
    command = [sys.executable, str(PROGRAM), "0.03", str(notes), "run", str(job), "--quiet"]
    command += ["--on", "ray", "--replicas", "3", "--address", cluster.address]

    def finished() -> int:
        return sum(len(path.read_text().splitlines()) for path in notes.iterdir())

    with log.open("wb") as file:
        driver = subprocess.Popen(command, stdout=file, stderr=file, cwd=tmp_path)
    try:
        wait_until(lambda: finished() > 100 and len(replicas()) == 3, driver, log)
        replicas()[0].kill()
        wait_until(lambda: finished() > 300, driver, log)
        cluster.remove_node(nodes[1], allow_graceful=False)
        wait_until(lambda: finished() > 500 and log.read_text().count("Starting another") == 2, driver, log)
        # The driver is killed as the actor that waits for a node gets one.
        killing = threading.Timer(1.5, driver.kill)
        killing.start()
        nodes[1] = cluster.add_node(**NODE)
        killing.join()
    finally:
        driver.kill()
        driver.wait()
    left = replicas()
    psutil.wait_procs(left, timeout=20)
    assert not replicas(), "actors outlive their driver"
    assert 0 < scene.checker.check(out) < scene.checker.samples
    # Started again while that node is gone: two of three actors have one; the third waits, and then takes its part.
    cluster.remove_node(nodes[1], allow_graceful=False)
    again = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path)
    cluster.add_node(**NODE)
    told, _ = again.communicate(timeout=SECONDS)
    assert again.returncode == 0, told
    scene.checker.check_complete(out)


def test_actors_have_gpus_of_one_node_each_and_one_that_cannot_work_says_why(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray counts GPUs that it was told of. The tokens are more than the nodes' object stores hold."""
    # What runs there is the node's own package where the driver does not stand in its folder.
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other"
    shutil.copytree(ROOT / "tokabatch", other / "tokabatch")
    for file in (other / "tokabatch").rglob("*.py"):
        text = file.read_text()
        changed = re.sub(r"\bPace\b", "Rhythm", text).replace(f'__version__ = "{__version__}"', '__version__ = "9.9"')
        if changed != text:
            file.write_text(changed)
    prompts, params = [[row, 2, 3, 4, 5] for row in range(8)], SamplingParams(n=40, max_tokens=30, ignore_eos=True)
    plan = token_device.make_requests(prompts, [params])
    plan = replace(plan, tokens=np.concatenate((plan.tokens, np.zeros(25_000_000, np.int32))))
    assert plan.tokens.nbytes > NODE["object_store_memory"]
    limits, told = SchedulerLimits(4, 200, 16, 64, 16, None), list[str]()

    class Device:
        sizes = ReplicaSizes(4, 200, 16, 64, 16, 2, 1)

        def __init__(self) -> None:
            self.device, self.waiting = token_device.TokenDevice(limits), list[StepResult]()
            self.device.prompts = prompts

        def submit(self, step: StepBatch) -> None:
            self.waiting.append(self.device.run(step))

        def collect(self) -> StepResult:
            time.sleep(0.01)
            return self.waiting.pop(0)

        def start(self) -> None: ...

        def resume(self) -> None: ...

        def close(self) -> None: ...

    def build(number: int, requests: Requests, before: Standing, *, stop: Any, tell: Callable[[str], None]) -> Replica:
        tell(f"{ray.get_runtime_context().get_node_id()} {os.environ.get('CUDA_VISIBLE_DEVICES')}")
        rules = StopRules(requests.sampling, [token_device.EOS], token_device.VOCAB, None)
        scheduler = Scheduler(requests, limits, rules, counts=before.scheduled)
        count = before.scheduled.finished + int(requests.num_samples().sum())
        return Replica(
            scheduler, Device, depth=2, max_restarts=0, num_samples=count, counts=before.counts, stop=stop, tell=tell
        )

    def fleet(count: int, launch: Any) -> Fleet:
        devices: list[tuple[str, ...]] = [()] * count
        return Fleet(plan, limits, devices, build, stop=Interruption(), tell=told.append, interval=0.0, launch=launch)

    nodes = [cluster.add_node(**{**NODE, "num_cpus": 2}, num_gpus=gpus) for gpus in (2, 5)]
    path = os.pathsep.join([str(other), str(ROOT / "tests")])
    nodes.append(cluster.add_node(**NODE, resources={"other": 1}, env_vars={"PYTHONPATH": path}))
    try:
        before = signal.getsignal(signal.SIGTERM)
        with RayCluster(cluster.address) as found:
            assert signal.getsignal(signal.SIGTERM) is before, "signals are left to the run"
            config = EngineConfig()
            assert found.layout(config.model_copy(update={"replicas": 7}), "cuda").replicas == 7
            for update, device, message in (
                ({"tensor": 8}, "cuda", "takes 8 GPUs of one node"),
                ({}, "cpu", "the driver's node has none"),
                ({"device": "cpu"}, "cpu", "add --replicas 4"),
            ):
                with pytest.raises(JobError, match=message):
                    found.layout(config.model_copy(update=update), device)
            layout = found.layout(config.model_copy(update={"tensor": 2}), "cuda")
            assert (layout.replicas, layout.devices) == (3, ((), (), ()))
            # That an actor is pending on a busy machine is none of what the replicas tell.
            running = fleet(layout.replicas, found.launcher(layout, "cuda", tmp_path, lambda text: None))
            samples = [(c.row_index, c.sample_index) for completions in running.run() for c in completions]
            running.close()
            assert sorted(samples) == [(row, sample) for row in range(8) for sample in range(40)]
            places = [text.partition(": ")[2].split() for text in told]
            here = sorted(sorted(gpus for node, gpus in places if node == each.node_id) for each in nodes[:2])
            assert here == [["0,1"], ["0,1", "2,3"]], told
            for needs, model, message in (
                ({"num_cpus": 1, "resources": {"other": 1}}, tmp_path, f"has tokabatch 9.9, and the driver {__version__}"),
                ({"num_cpus": 1, "num_gpus": 1}, Path("/no/such"), "cannot read the model's folder /no/such"),
            ):
                refused = fleet(1, Launcher(needs, model, told.append))
                with pytest.raises(EngineError, match=message):
                    list(refused.run())
                refused.close()
    finally:
        for node in nodes:
            cluster.remove_node(node)
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--on", "ray", "--address", "ray://head:10001"], "is a Ray Client address"),
        (["--on", "ray", "--address", "127.0.0.1:1"], "there is no Ray cluster at 127.0.0.1:1"),
        (["--on", "dask"], "--on dask is not a kind of cluster"),
        (
            ["--shared", "--on", "slurm"],
            "(for Slurm, see `tokabatch slurm`)",
        ),
        (["--address", "head:6379"], "add --on ray"),
        (["--shared", "--on", "ray", "--address", "head:6379"], "give one of the two"),
    ],
)
def test_what_is_no_cluster_is_refused_and_the_remedy_named(tmp_path: Path, options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["run", str(ROOT / "jobs/quickstart.yaml"), f"output.path={tmp_path / 'out'}", *options])
    assert isinstance(result.exception, UsageError) and message in str(result.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""])
def test_an_address_where_something_else_listens_is_refused_soon(monkeypatch: pytest.MonkeyPatch, answer: bytes) -> None:
    monkeypatch.setattr("tokabatch.cluster.ray.CONNECT_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connected, _ = listening.accept()
            with connected:
                connected.sendall(answer)
                connected.recv(1000)
                time.sleep(3)

        threading.Thread(target=serve, daemon=True).start()
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(UsageError, match=f"there is no Ray cluster at {address}: {'another' if answer else 'timed out'}"):
            RayCluster(address)
        assert time.monotonic() - began < 60
