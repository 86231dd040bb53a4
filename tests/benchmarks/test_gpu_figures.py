"""The list of commands that measure the figures of GPUs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from support.processes import started_with

from benchmarks.gpu import figures
from benchmarks.gpu.__main__ import MICRO, REAL, parse_part
from benchmarks.gpu.jobs import job
from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.workloads import make_gpu_workload
from tokabatch import Job

COMMANDS = [figure.command.split() for listed in figures.FIGURES.values() for figure in listed]


def test_workloads_keys_and_models_of_every_command_exist(tmp_path: Path) -> None:
    rows, out = tmp_path / "rows.parquet", tmp_path / "out"
    workload = make_gpu_workload("a", 256, 0.02)
    for command in COMMANDS:
        assert find_spec(command[1]), command
        if "--model" in command:
            assert command[command.index("--model") + 1] in SHAPES
        if command[1] == "benchmarks.gpu":
            names = command[2 : next(place for place, word in enumerate(command) if word.startswith(("--", "{")))]
            for name in names:
                kind, _, keys = name.partition(":")
                overrides = keys.split(",") if kind in (REAL, MICRO) else parse_part(name).overrides
                Job.load(job(tmp_path, rows, out, workload), *filter(None, overrides))


def test_a_command_ends_at_its_limit_with_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert figures.measure(["-c", "raise SystemExit(3)"], 60.0).startswith("exit code 3")
    assert figures.measure(["-c", "1 / 0"], 1.0) == "left out, no time"
    monkeypatch.setattr(figures, "LEAST_SECONDS", 0.0)
    # As a shell, which leaves its child behind.
    sleeping = "import subprocess; subprocess.run(['sh', '-c', 'sleep 7791; true'])"
    assert figures.measure(["-c", sleeping], 1.0) == "ended after 1 s"
    # The signal reaches all of them at once, but they do not end in that instant.
    _, alive = psutil.wait_procs(started_with("sleep 7791", list(psutil.process_iter())), timeout=10)
    assert not alive
