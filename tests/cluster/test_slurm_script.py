"""The batch script does what is promised under a pretended srun and scontrol; test_slurm.py runs it under the real ones."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tokabatch.cli import app
from tokabatch.cluster.slurm import Array, batch_script
from tokabatch.errors import UsageError

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3", "SLURM_CPUS_PER_TASK": "6"}


RUNNING = "RUNNING None"


@pytest.mark.parametrize(
    ("status", "restarts", "state", "requeued"),
    [
        (0, "", RUNNING, False),
        (75, "", RUNNING, True),
        (75, "40", RUNNING, True),
        (75, "100", RUNNING, False),
        (137, "4", RUNNING, True),
        (137, "5", RUNNING, False),
        (2, "", RUNNING, False),
        (75, "", "", True),  # squeue failed
        (75, "", "COMPLETING TimeLimit", True),
        (75, "", "COMPLETING None", False),  # by scancel
        (137, "", "COMPLETING None", False),
        (75, "", "CANCELLED None", False),
    ],
)
def test_a_task_that_was_stopped_or_killed_is_requeued_unless_it_was_cancelled(
    tmp_path, monkeypatch, status, restarts, state, requeued
):
    monkeypatch.chdir(ROOT)
    script, log = tmp_path / "job.sbatch", tmp_path / "log"
    arguments = ["slurm", "jobs/quickstart.yaml", "generation.n=4", "--tasks", "8", "--gpus-per-task", "2", "--time", "1:00:00"]
    arguments += [
        "--sbatch",
        "partition=gpu",
        "--sbatch",
        "comment=of two words",
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
        "squeue": f'[ "$*" = "--noheader --jobs=17_3 --format=%T %r" ] && echo "{state}"',
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
        "srun yes --ntasks=1 --cpus-per-task=6 box run tokabatch "
        "run jobs/quickstart.yaml generation.n=4 --shared --units 256 --quiet --task 3"
    )
    assert rest == (["scontrol requeue 17_3"] if requeued else [])
    text = script.read_text()
    for option in ("array=0-7", "gpus-per-task=2", "time=1:00:00", "signal=USR1@120", "requeue", "partition=gpu"):
        assert f"#SBATCH --{option}\n" in text
    assert "#SBATCH '--comment=of two words'\n" in text


def test_names_of_the_job_and_of_its_logs_have_no_character_that_means_something_to_slurm():
    text = batch_script(Path("jobs/my job 100%.yaml"), (), Array(2), Path("/data/my runs"))
    assert "#SBATCH --job-name=tokabatch-my-job-100-\n" in text
    assert "#SBATCH --output=tokabatch-my-job-100--%A_%a.log\n" in text
    assert "\ncd '/data/my runs' || exit 2\n" in text and " run 'jobs/my job 100%.yaml' --shared" in text


@pytest.mark.parametrize(
    ("override", "message"),
    [("errors.policy=stop", "errors.policy is stop"), ("verify.stop.after_correct=1", "verify.stop looks at all samples")],
)
def test_a_job_that_several_processes_cannot_compute_is_refused(tmp_path, override, message):
    script = tmp_path / "job.sbatch"
    job = [str(ROOT / "jobs/gsm8k.yaml"), override]
    for command in (["slurm", *job, "--to", str(script)], ["run", *job, f"output.path={tmp_path / 'out'}", "--shared"]):
        result = CliRunner().invoke(app, command)
        assert message in str(result.exception)
    assert not script.exists()


def test_without_slurm_the_script_is_written_and_the_remedy_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    script = tmp_path / "job.sbatch"
    result = CliRunner().invoke(app, ["slurm", str(ROOT / "jobs/quickstart.yaml"), "--to", str(script), "--submit"])
    assert script.exists() and "sbatch cannot be started" in str(result.exception)


def _write(*arguments: str) -> tuple[str, str]:
    """The script that these arguments make of the first job of the gallery in the working folder, and what is printed."""
    result = CliRunner().invoke(
        app, ["slurm", str(ROOT / "jobs/quickstart.yaml"), "--to", "job.sbatch", "--overwrite", *arguments]
    )
    if result.exception is not None:
        raise result.exception
    return Path("job.sbatch").read_text(), result.output


def test_an_edited_script_is_replaced_only_if_that_is_requested(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["slurm", str(ROOT / "jobs/quickstart.yaml"), "--to", "job.sbatch"]
    assert CliRunner().invoke(app, given).exit_code == CliRunner().invoke(app, given).exit_code == 0
    written = Path("job.sbatch").read_text()
    assert CliRunner().invoke(app, [*given, "--tasks", "3"]).exit_code == 0, "with other options it is replaced"
    assert Path("job.sbatch").read_text() != written
    assert CliRunner().invoke(app, given).exit_code == 0 and Path("job.sbatch").read_text() == written
    Path("job.sbatch").write_text(edited := written.replace("exit $status", "exit 0"))
    refused = str(CliRunner().invoke(app, given).exception)
    assert "was edited" in refused and "--overwrite" in refused and "--to" in refused
    assert Path("job.sbatch").read_text() == edited
    assert CliRunner().invoke(app, [*given, "--overwrite"]).exit_code == 0 and Path("job.sbatch").read_text() == written


def test_options_are_written_as_sbatch_reads_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, _ = _write("--tasks", "4", "--sbatch", "--partition=gpu", "--sbatch", "exclusive", "--sbatch", "array=0-3%2")
    directives = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --partition=gpu", "#SBATCH --exclusive", "#SBATCH --array=0-3%2"} <= set(directives)
    assert len([line for line in directives if "--array" in line]) == 1
    for wrong in ("-p gpu", "partition gpu", "partition=gpu account=me", "partition=gpu --mem=0", ""):
        with pytest.raises(UsageError, match="is not one long option of sbatch"):
            _write("--sbatch", wrong)
    for wrong, remedy in (
        ("partition", "needs a value; write --sbatch partition=VALUE"),
        ("mem=", "needs a value; write --sbatch mem=VALUE"),
        ("hold=yes", "takes no value; write --sbatch hold"),
        ("--gpus-per-nod=2", ""),
        ("consolidate-segments", ""),
        ("requeue=expedite", ""),
        ("gpu=2", "may be gpu-bind, gpu-freq, gpus, gpus-per-node, .*; write one of them in full"),
        ("mail-typ=END", ""),
        ("container-image=a.sqsh", ""),
        ("power-cap=300", ""),
        ("nice=10", ""),
    ):
        if remedy:
            with pytest.raises(UsageError, match=f"--sbatch .*{remedy}"):
                _write("--sbatch", wrong)
        else:
            assert f"#SBATCH --{wrong.removeprefix('--')}\n" in _write("--sbatch", wrong)[0]
    # A site may have options of its own.
    text, said = _write("--sbatch", "partion=gpu")
    assert "#SBATCH --partion=gpu\n" in text and "warning: --sbatch partion=gpu" in said
    assert "did you mean --sbatch partition=gpu?" in " ".join(said.split())
    for limit, ahead in (("2:00", 30), ("3", 45), ("4:00:00", 120), ("1-12", 120), ("UNLIMITED", 120)):
        assert f"signal=USR1@{ahead}\n" in _write("--time", limit)[0]


def test_what_would_fail_in_the_queue_is_reported_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="write --gpus-per-task 4"):
        _write("--gpus-per-task", "2", "engine.replicas=2", "engine.tensor=2", "engine.device=auto")
    Path("job.sbatch").write_text("model: precious")
    with pytest.raises(UsageError, match="was not written by `tokabatch slurm`"):
        _write()
    assert Path("job.sbatch").read_text() == "model: precious"
    Path("job.sbatch").unlink()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/_SUCCESS").touch()
    text, told = _write("--setup", ". missing/bin/activate", f"output.path={tmp_path / 'out'}")
    assert "nothing to do" in told and "every host has its own" in told
    log = tmp_path / "log"
    (tmp_path / "srun").write_text(f"#!/bin/sh\necho started >> {log}\n")
    (tmp_path / "srun").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **ENVIRONMENT}
    done = subprocess.run(["bash", "job.sbatch"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "missing/bin/activate" in done.stderr and not log.exists()
    assert _write()[0] != text


def test_a_command_of_the_setup_that_fails_ends_the_task(tmp_path: Path) -> None:
    (tmp_path / "env").write_text("false\nfalse && export NOT=so\nexport READY=yes\n")
    (tmp_path / "srun").write_text('#!/bin/sh\necho "started $READY"\n')
    (tmp_path / "srun").chmod(0o755)
    for setup, status, told in (
        (". ./env   # defines READY", 0, "started yes\n"),
        (". ./missing   # note", 2, ""),
        ("false; export READY=no", 2, ""),
        ("cd missing\nexport READY=no", 2, ""),
        ("false || export READY=maybe", 0, "started maybe\n"),
        ("load() { false; export READY=loaded; }; load | cat; load", 0, "started loaded\n"),
        ("   ", 0, "started \n"),
    ):
        script = tmp_path / "job.sbatch"
        script.write_text(batch_script(Path("a.yaml"), (), Array(2, setup=(setup, "# the last line")), tmp_path))
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **ENVIRONMENT}
        done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (status, told), (setup, done.stderr)


@pytest.mark.parametrize("command", ["", "  ", "tokabatch\n", "box run\ntokabatch", "tokabatch # 0.1"])
def test_a_command_that_would_lose_its_arguments_is_refused(command: str) -> None:
    with pytest.raises(UsageError, match="is not one command on one line"):
        batch_script(Path("a.yaml"), (), Array(2, command=command), Path("/data"))


def test_a_cancelled_task_stays_so_whatever_signals_come_again(tmp_path: Path) -> None:
    """scancel: Slurm signals all processes of the job, its script and what the script runs included."""
    script, log = tmp_path / "job.sbatch", tmp_path / "log"
    script.write_text(batch_script(Path("a.yaml"), (), Array(2, command=str(tmp_path / "tokabatch")), tmp_path))
    for name, does in {
        "tokabatch": "trap 'exit 75' TERM; touch started; while :; do sleep 0.05; done",
        "srun": 'while [ "$1" != run ]; do case $1 in -*) shift ;; *) break ;; esac; done; exec "$@"',
        "squeue": "touch asked; sleep 1; echo COMPLETING None",
        "scontrol": f'echo "$*" >> {log}',
    }.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **ENVIRONMENT}
    job = subprocess.Popen(["bash", str(script)], env=environment, start_new_session=True)
    for mark in ("started", "asked"):
        deadline = time.monotonic() + 60
        while not (tmp_path / mark).exists():
            assert time.monotonic() < deadline, mark
            time.sleep(0.01)
        os.killpg(job.pid, signal.SIGTERM)
    assert job.wait(60) == 75 and not log.exists()
