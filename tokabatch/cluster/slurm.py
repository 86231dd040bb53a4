"""The batch script of a run on Slurm: an array of tasks, each of them `tokabatch run --shared` on the same job and folder.

A task stops with exit code 75 where it is to run again: Slurm signals it ahead of the time limit, or to preempt it. Slurm
by itself requeues no job for its exit code (unless the site sets RequeueExit=75), so the script does. It stands outside of any
container, for there is no scontrol inside.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tokabatch.errors import EXIT_STOPPED, UsageError

UNITS_PER_TASK, LEAST_UNITS = 32, 64
"""A task that ends early takes others' units: what it can wait for in the end is one unit."""
MOST_CRASHES = 5
"""A task that a signal killed is requeued so often at most."""


@dataclass(frozen=True, slots=True)
class Array:
    """What the script asks Slurm for. `seconds_ahead` of the time limit tasks are told to stop; `options` are further ones of
    sbatch, such as `partition=gpu`; `setup` are lines of shell before the run (modules, a virtual environment); `command` is
    what to call, `apptainer exec --nv IMAGE tokabatch` for one in a container."""

    tasks: int
    gpus_per_task: int = 0
    cpus_per_task: int = 0
    time: str = ""
    seconds_ahead: int = 120
    options: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    command: str = "tokabatch"

    @property
    def units(self) -> int:
        """Into how many the plan is cut."""
        return max(LEAST_UNITS, UNITS_PER_TASK * self.tasks)


def batch_script(job: Path, overrides: tuple[str, ...], array: Array, folder: Path) -> str:
    """The script; relative paths of the job count from `folder`."""
    # Names of jobs and logs have their own characters: Slurm replaces %.
    name = re.sub(r"[^\w.-]+", "-", job.stem)
    asked = [f"job-name=tokabatch-{name}", f"array=0-{array.tasks - 1}", "ntasks=1"]
    asked += [f"gpus-per-task={array.gpus_per_task}"] if array.gpus_per_task else []
    asked += [f"cpus-per-task={array.cpus_per_task}"] if array.cpus_per_task else []
    asked += [f"time={array.time}"] if array.time else []
    asked += [f"signal=USR1@{array.seconds_ahead}", "requeue", "open-mode=append", f"output=tokabatch-{name}-%A_%a.log"]
    asked += array.options
    directives = "\n".join(f"#SBATCH {shlex.quote(f'--{option}')}" for option in asked)
    setup = "\n".join(array.setup) or "# module load cuda; . /path/to/venv/bin/activate"
    words = [str(job), *overrides, "--shared", "--units", str(array.units), "--quiet"]
    return f"""#!/usr/bin/env bash
{directives}
# Written by `tokabatch slurm`. Submit with sbatch, as often as you like: what is there is not computed again.

cd {shlex.quote(str(folder))} || exit 2
{setup}

# Slurm ends this script with the step. It has to live until it has had itself requeued.
trap : TERM USR1
# Of the script's cores a step has one, if it does not say how many.
cores=${{SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}}
srun --ntasks=1 $cores {array.command} run {shlex.join(words)} --task "$SLURM_ARRAY_TASK_ID"
status=$?

# {EXIT_STOPPED}: stopped ahead of the time limit or by preemption; above 128: killed. Any other task goes on meanwhile.
restarts=${{SLURM_RESTART_COUNT:-0}}
if [ $status -eq {EXIT_STOPPED} ] || {{ [ $status -gt 128 ] && [ "$restarts" -lt {MOST_CRASHES} ]; }}; then
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID" && sleep 60
fi
exit $status
"""


def submit(script: Path) -> str:
    """Give the script to Slurm; what sbatch says. Raises UsageError where that fails."""
    try:
        done = subprocess.run(["sbatch", str(script)], capture_output=True, text=True, check=False)
    except OSError as error:
        raise UsageError(f"sbatch cannot be started ({error.strerror}); run `sbatch {script}` where Slurm is") from error
    if done.returncode:
        raise UsageError(f"sbatch refuses {script}: {done.stderr.strip()}")
    return done.stdout.strip()
