"""The batch script does what is promised under a pretended srun and scontrol; test_slurm.py runs it under the real ones."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tokabatch.cli import app

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"}


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [(0, "", False), (75, "", True), (75, "40", True), (137, "4", True), (137, "5", False), (2, "", False)],
)
def test_a_task_that_was_stopped_or_killed_is_requeued(tmp_path, monkeypatch, status, restarts, requeued):
    monkeypatch.chdir(ROOT)
    script, log = tmp_path / "job.sbatch", tmp_path / "log"
    arguments = ["slurm", "jobs/quickstart.yaml", "generation.n=4", "--tasks", "8", "--gpus-per-task", "2", "--time", "1:00:00"]
    arguments += [
        "--sbatch",
        "partition=gpu",
        "--setup",
        "export READY=yes",
        "--command",
        "box run tokabatch",
        "--to",
        str(script),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for name, does in {
        "srun": f'echo "srun $READY $*" >> {log}; exit {status}',
        "scontrol": f'echo "scontrol $*" >> {log}; exit 1',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        **ENVIRONMENT,
        **({"SLURM_RESTART_COUNT": restarts} if restarts else {}),
    }
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status and not done.stderr
    first, *rest = log.read_text().splitlines()
    assert first == (
        "srun yes --ntasks=1 box run tokabatch run jobs/quickstart.yaml generation.n=4 --shared --units 256 --quiet --task 3"
    )
    assert rest == (["scontrol requeue 17_3"] if requeued else [])
    text = script.read_text()
    for option in ("array=0-7", "gpus-per-task=2", "time=1:00:00", "signal=USR1@120", "requeue", "partition=gpu"):
        assert f"#SBATCH --{option}\n" in text


def test_without_slurm_the_script_is_written_and_the_remedy_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    script = tmp_path / "job.sbatch"
    result = CliRunner().invoke(app, ["slurm", str(ROOT / "jobs/quickstart.yaml"), "--to", str(script), "--submit"])
    assert script.exists() and "sbatch cannot be started" in str(result.exception)
