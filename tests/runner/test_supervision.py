"""Whole runs whose worker process is killed, stopped or poisoned: the table is that of an undisturbed run, the books close, and
no process stays behind. Real signals, real model, real processes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from support import poisoned_worker, tiny_models

from tokabatch import Job, run
from tokabatch.engine.executor import WORKER_NAME, ProcessExecutor
from tokabatch.engine.heartbeat import Patience
from tokabatch.errors import ModelError
from tokabatch.report.progress import NullProgress, ProgressSnapshot

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("TOKABATCH_TEST_KILLS", "4"))
"""How many times the worker is killed at random moments; the full count is 50."""
ROWS = [{"question": f"Say {i} and {i % 3}"} for i in range(10)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.add_tokenizer(tiny_models.build("llama", tmp_path_factory.mktemp("models") / "llama"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def job(model: Path, rows: Path, out: Path, **changes: Any) -> Job:
    base: dict[str, Any] = {
        "model": {"path": str(model), "dtype": "float64"},
        "input": {"path": str(rows)},
        "prompt": {"template": "One header for all.\nQ: {{ question }}\nA:"},
        "generation": {"n": 6, "temperature": 0.9, "max_tokens": 60, "seed": 3, "ignore_eos": True},
        "engine": {"device": "cpu", "process": True, "max_running": 16, "queue_depth": 2},
        "output": {"path": str(out)},
    }
    for section, values in changes.items():
        base[section] = {**base.get(section, {}), **values}
    return Job.load(base)


def table(out: Path) -> list[tuple[Any, ...]]:
    names = ["row_index", "sample_index", "status", "token_ids", "text", "finish_reason", "num_prompt_tokens"]
    samples = [row for shard in (out / "data").glob("*.parquet") for row in pq.read_table(shard, columns=names).to_pylist()]
    return sorted(tuple(map(str, row.values())) for row in samples)


def worker_of(parent: int) -> psutil.Process | None:
    """The worker of a run, if it is there already."""
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(parent).children(recursive=True)
        return next((each for each in family if each.name() == WORKER_NAME), None)
    return None


class Killer(NullProgress):
    """Sends `signals` to the worker, each a random time after the one before it took effect. Looks after every step."""

    interval = 0.0

    def __init__(self, signals: list[int], seed: int, longest: float = 0.3) -> None:
        self.signals = list(signals)
        self.told: list[str] = []
        self._random = random.Random(seed)
        self._longest = longest
        self._due: float | None = None
        self._struck: set[int] = set()

    def update(self, snapshot: ProgressSnapshot) -> None:
        if snapshot.phase != "generating" or not self.signals:
            return
        now = time.monotonic()
        worker = worker_of(os.getpid())
        if worker is None or worker.pid in self._struck:
            return
        self._due = self._due or now + self._random.uniform(0.0, self._longest)
        if now >= self._due:
            self._struck.add(worker.pid)
            self._due = None
            worker.send_signal(self.signals.pop())

    def message(self, text: str) -> None:
        self.told.append(text)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hangs are noticed soon."""
    monkeypatch.setattr("tokabatch.engine.heartbeat.WARMING_STEPS", 1)
    monkeypatch.setattr("tokabatch.runner.make_replica.Patience.of", lambda seconds: Patience(seconds, 60.0, seconds, 60.0))


def test_kills_at_random_moments_change_nothing(model, rows, tmp_path, watched):
    assert run(job(model, rows, tmp_path / "calm", engine={"process": False})).exit_code == 0
    killer = Killer([signal.SIGKILL] * KILLS, seed=1)
    summary = run(job(model, rows, tmp_path / "killed", engine={"max_restarts": KILLS + 2}), killer)
    assert (summary.exit_code, summary.ok, summary.errors) == (0, 60, 0)
    assert dict(summary.restarts) == {"killed": KILLS} and not killer.signals
    assert summary.requeued > 0 and summary.recomputed_tokens > 0
    assert len(killer.told) == KILLS and "SIGKILL" in killer.told[0]
    assert table(tmp_path / "killed") == table(tmp_path / "calm")
    assert json.loads((tmp_path / "killed" / "summary.json").read_text())["this_start"]["restarts"] == {"killed": KILLS}


def test_a_killed_scheduler_is_counted_and_the_next_one_continues_its_counts(model, rows, tmp_path, watched):
    struck: list[int] = []

    class Striking(NullProgress):
        interval = 0.0

        def update(self, snapshot: ProgressSnapshot) -> None:
            if snapshot.phase == "generating" and snapshot.samples_done >= 5 and not struck:
                scheduler = worker_of(os.getpid()).parent()
                assert scheduler.pid != os.getpid()
                struck.append(snapshot.tokens_in)
                scheduler.kill()

    calm = run(job(model, rows, tmp_path / "calm", engine={"process": False}))
    summary = run(job(model, rows, tmp_path / "killed"), Striking())
    assert table(tmp_path / "killed") == table(tmp_path / "calm")
    assert dict(summary.restarts) == {"scheduler": 1}
    assert summary.prefilled_tokens > struck[0] and summary.prompt_tokens >= calm.prompt_tokens > 0
    assert summary.prefilled_tokens + summary.cached_tokens >= summary.prompt_tokens


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_worker_that_meets_other_files_refuses_them_and_what_is_finished_stays(name, model, rows, tmp_path, watched):
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    done: list[int] = []

    class Replacing(NullProgress):
        """Replaces a file under the running worker and kills that."""

        interval = 0.0

        def update(self, snapshot: ProgressSnapshot) -> None:
            worker = worker_of(os.getpid())
            if snapshot.phase == "generating" and snapshot.samples_done >= 10 and worker is not None and not done:
                content = bytearray((copy / name).read_bytes())
                content[-5] ^= 1
                (copy / "new").write_bytes(content)
                (copy / "new").replace(copy / name)
                done.append(snapshot.samples_done)
                worker.kill()

    with pytest.raises(ModelError, match=rf"SIGKILL(?s:.*){name} has changed since this run began"):
        run(job(copy, rows, tmp_path / "out"), Replacing())
    assert committed(tmp_path / "out") >= done[0] and not (tmp_path / "out" / "_SUCCESS").exists()
    run(job(model, rows, tmp_path / "calm", engine={"process": False}))
    calm = table(tmp_path / "calm")
    assert all(sample in calm for sample in table(tmp_path / "out"))


def test_a_stopped_worker_is_replaced(model, rows, tmp_path, watched):
    run(job(model, rows, tmp_path / "calm", engine={"process": False}))
    # Early: on a fast machine the run lasts for a fraction of a second.
    killer = Killer([signal.SIGSTOP], seed=2, longest=0.05)
    summary = run(job(model, rows, tmp_path / "stopped", engine={"hang_seconds": 2.0}), killer)
    assert dict(summary.restarts) == {"hung": 1}
    assert table(tmp_path / "stopped") == table(tmp_path / "calm")


@pytest.mark.gpu
def test_a_run_on_a_gpu(model, rows, tmp_path):
    """The scheduler's process is forked and could not query the GPU."""
    given = job(model, rows, tmp_path / "out", engine={"device": "cuda", "process": "auto"}).given()
    given["model"]["dtype"] = "bfloat16"
    summary = run(Job.load(given))
    assert (summary.exit_code, summary.ok) == (0, summary.samples)


def test_a_poison_row_costs_its_own_samples(model, tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"question": q}) + "\n" for q in ("a", "b", "kills", "c")))
    monkeypatch.setattr("tokabatch.runner.make_replica.ProcessExecutor", partial(ProcessExecutor, build=poisoned_worker.build))
    told: list[str] = []

    class Told(NullProgress):
        def message(self, text: str) -> None:
            told.append(text)

    changes = {"generation": {"n": 2, "max_tokens": 8}, "errors": {"max_fraction": 0.5}}
    summary = run(job(model, file, tmp_path / "out", **changes), Told())
    assert (summary.exit_code, summary.ok, summary.errors) == (0, 6, 2)
    assert f"row 2 ({file} line 3) has killed the worker again" in "".join(told)
    assert dict(summary.error_counts) == {"worker_crash": 2}
    samples = [row for shard in (tmp_path / "out" / "data").glob("*.parquet") for row in pq.read_table(shard).to_pylist()]
    failed = [s for s in samples if s["status"] == "error"]
    assert {(s["row_index"], s["sample_index"]) for s in failed} == {(2, 0), (2, 1)}
    line = f"{file} line 3: "
    assert all(s["error_message"].startswith(line) and "died whenever this row ran" in s["error_message"] for s in failed)
    assert all(s["text"] is None for s in failed)


def job_file(model: Path, rows: Path, folder: Path, **changes: Any) -> Path:
    path = folder / "job.yaml"
    path.write_text(json.dumps(job(model, rows, folder / "out", **changes).given()))
    return path


def begin(path: Path, program: tuple[str, str] = ("-m", "tokabatch")) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *program, "run", str(path)], cwd=ROOT, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def committed(out: Path) -> int:
    return sum(pq.read_metadata(shard).num_rows for shard in out.glob("data/part-*.parquet"))


@pytest.mark.parametrize(
    ("number", "process", "code"), [(signal.SIGTERM, True, 75), (signal.SIGUSR1, False, 75), (signal.SIGINT, True, 130)]
)
def test_signals_to_the_whole_group_stop_a_run(number, process, code, model, rows, tmp_path):
    changes = {"generation": {"n": 400, "max_tokens": 40}, "engine": {"process": process}}
    running = begin(job_file(model, rows, tmp_path, **changes))
    assert running.stderr is not None
    for line in running.stderr:
        if "generating" in line and "samples 0/" not in line:
            break
    family = psutil.Process(running.pid).children(recursive=True)
    began = time.monotonic()
    os.killpg(running.pid, number)
    stdout, stderr = running.communicate(timeout=100)
    assert running.returncode == code, stderr
    assert time.monotonic() - began < 60.0
    assert not psutil.wait_procs(family, timeout=30.0)[1]
    assert "Traceback" not in stderr and stderr.count("stopping: committing") == 1
    assert committed(tmp_path / "out") > 0 and f" = {committed(tmp_path / 'out'):,} ok" in stdout
    assert not (tmp_path / "out" / "_SUCCESS").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signals_while_the_input_is_read(number, code, model, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"question": "how many are there of these?"}\n' * 400_000)
    running = begin(job_file(model, file, tmp_path))
    assert running.stderr is not None
    for line in running.stderr:
        if "reading" in line:
            break
    running.send_signal(number)
    _, stderr = running.communicate(timeout=100)
    assert running.returncode == code, stderr
    assert "Traceback" not in stderr and "run the same command again" in stderr
    assert not (tmp_path / "out").exists()


def test_a_signal_while_the_model_loads(model, rows, tmp_path):
    # No sample is finished within the seconds that it may take to stop the worker.
    running = begin(job_file(model, rows, tmp_path, generation={"n": 400, "max_tokens": 400}))
    assert running.stderr is not None
    for line in running.stderr:
        if "loading" in line:
            break
    worker = None
    while worker is None:
        worker = worker_of(running.pid)
    worker.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    running.send_signal(signal.SIGTERM)
    stdout, stderr = running.communicate(timeout=100)
    assert running.returncode == 75 and time.monotonic() - began < 60.0, stderr
    assert "4,000 pending" in stdout and not psutil.wait_procs([worker], timeout=30.0)[1]


def test_a_second_ctrl_c_exits_at_once(model, rows, tmp_path):
    file = job_file(model, rows, tmp_path, generation={"n": 400}, engine={"process": True})
    # As long would closing a stopped worker take, during which the second Ctrl-C comes.
    patient = "from tokabatch import cli; from tokabatch.engine import executor; executor.STOP_SECONDS = 100.0; cli.program()"
    running = begin(file, ("-c", patient))
    assert running.stderr is not None
    for line in running.stderr:
        if "generating" in line:
            break
    worker = worker_of(running.pid)
    assert worker is not None
    worker.send_signal(signal.SIGSTOP)
    running.send_signal(signal.SIGINT)
    for line in running.stderr:
        if "stopping: committing" in line:
            break
    began = time.monotonic()
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=90)
    assert running.returncode == 130 and time.monotonic() - began < 60.0
    assert not psutil.wait_procs([worker], timeout=30.0)[1]
