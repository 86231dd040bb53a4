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
"""Tasks that end early take units of the others, so that at the end of a run each waits for one unit at most."""
MOST_CRASHES, MOST_STARTS = 5, 100
"""How often a task is requeued at most that a signal killed, and one that stopped: without a limit, one whose time limit is too
short for a single sample would be requeued for ever."""
SECONDS_AHEAD = 120
"""So long before the time limit tasks are told to stop; a quarter of a limit of a few minutes."""
MARK = "# Written by `tokabatch slurm`."
"""By which a script of ours is known."""


@dataclass(frozen=True, slots=True)
class Array:
    """What the script asks Slurm for. `seconds_ahead` of the time limit tasks are told to stop (None: by `SECONDS_AHEAD`);
    `options` are further ones of sbatch, such as `partition=gpu`, each in place of the script's own of that name; `setup` are
    lines of shell before the run (modules, a virtual environment), and a command of them that fails ends the task; `command` is
    what to call, `apptainer exec --nv IMAGE tokabatch` for one in a container."""

    tasks: int
    gpus_per_task: int = 0
    cpus_per_task: int = 0
    time: str = ""
    seconds_ahead: int | None = None
    options: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    command: str = "tokabatch"

    @property
    def units(self) -> int:
        """Into how many the plan is cut."""
        return max(LEAST_UNITS, UNITS_PER_TASK * self.tasks)


def batch_script(job: Path, overrides: tuple[str, ...], array: Array, folder: Path) -> str:
    """The script; relative paths of the job count from `folder`. Raises UsageError for options that are not long ones, and for
    a command that is not one."""
    if not array.command.strip() or re.search(r"[\r\n]|(^|\s)#", array.command):
        # What the script adds to it must reach the command, not the next line or a comment.
        raise UsageError(
            f"--command {array.command!r} is not one command on one line, without a comment; write what starts tokabatch: "
            "--command 'apptainer exec --nv IMAGE.sif tokabatch'"
        )
    # Names of jobs and logs have their own characters: Slurm replaces %.
    name = re.sub(r"[^\w.-]+", "-", job.stem)
    asked = [f"job-name=tokabatch-{name}", f"array=0-{array.tasks - 1}", "ntasks=1"]
    asked += [f"gpus-per-task={array.gpus_per_task}"] if array.gpus_per_task else []
    asked += [f"cpus-per-task={array.cpus_per_task}"] if array.cpus_per_task else []
    asked += [f"time={array.time}"] if array.time else []
    ahead = _seconds_ahead(array.time) if array.seconds_ahead is None else array.seconds_ahead
    asked += [f"signal=USR1@{ahead}", "requeue", "open-mode=append", f"output=tokabatch-{name}-%A_%a.log"]
    given = [_option(option) for option in array.options]
    names = {option.partition("=")[0] for option in given}
    asked = [option for option in asked if option.partition("=")[0] not in names] + given
    directives = "\n".join(f"#SBATCH {shlex.quote(f'--{option}')}" for option in asked)
    # Each on a line of its own: it may end in a comment.
    setup = "\n".join(line for line in array.setup if line.strip()) or "# module load cuda; . /path/to/venv/bin/activate"
    words = [str(job), *overrides, "--shared", "--units", str(array.units), "--quiet"]
    return f"""#!/usr/bin/env bash
{directives}
{MARK} Submit it with sbatch, again if need be: finished samples are not computed again.

cd {shlex.quote(str(folder))} || exit 2
# A command that fails here ends the task; inside of a script that is sourced, such as activate, that script decides.
trap '[ ${{#BASH_SOURCE[@]}} -gt 1 ] || exit 2' ERR
{setup}
trap - ERR

# Slurm signals this script, too, when it stops the run; the script must outlive that to requeue its task.
trap : TERM USR1
# srun gives a step one core unless it is told how many the task has.
cores=${{SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}}
srun --ntasks=1 $cores {array.command} run {shlex.join(words)} --task "$SLURM_ARRAY_TASK_ID"
status=$?

# Status {EXIT_STOPPED}: stopped ahead of the time limit, or preempted. Above 128: killed by a signal. Both are run again, up to
# a limit; the other tasks go on meanwhile. Any other status is final: 0 is success, else the log says what is wrong.
restarts=${{SLURM_RESTART_COUNT:-0}}
most_restarts=0
[ $status -eq {EXIT_STOPPED} ] && most_restarts={MOST_STARTS}
[ $status -gt 128 ] && most_restarts={MOST_CRASHES}
if [ "$restarts" -lt $most_restarts ]; then
    # scancel stops a run like a preemption does, but Slurm has ended the job by then, and not for its time limit: it stays
    # cancelled. Signals that come again do not reach these commands.
    task="${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
    state=$(trap '' TERM USR1; squeue --noheader --jobs="$task" --format='%T %r')
    case $state in
        CANCELLED* | "COMPLETING None") ;;
        # Slurm ends this script while it sleeps.
        *) (trap '' TERM USR1; scontrol requeue "$task") && sleep 60 ;;
    esac
fi
exit $status
"""


def write_script(path: Path, text: str) -> None:
    """Write the script, over an earlier one alone. Raises UsageError."""
    try:
        if path.exists() and MARK not in path.read_text(errors="replace"):
            raise UsageError(
                f"--to {path} exists and was not written by `tokabatch slurm`, so it is not replaced; name another file, or "
                "move this one away"
            )
        path.write_text(text)
    except OSError as error:
        raise UsageError(
            f"--to {path} cannot be written: {error.strerror}; name a file in a folder that you may write to"
        ) from error


def _option(given: str) -> str:
    """An option as a directive has it behind its dashes. Raises UsageError."""
    found = re.fullmatch(r"(?:--)?([a-z][a-z0-9-]+)(?:=(.*))?", given.strip())
    if found is None or re.search(r"\s-|\s[a-z-]+=", found[2] or ""):
        raise UsageError(
            f"--sbatch {given!r} is not one long option of sbatch; write its long name, and --sbatch once for each option: "
            "--sbatch partition=gpu --sbatch account=NAME"
        )
    return found[1] if found[2] is None else f"{found[1]}={found[2]}"


def _seconds_ahead(limit: str) -> int:
    """Of a time limit as sbatch takes it: minutes, minutes:seconds, hours:minutes:seconds, or days-hours and so on."""
    days, dash, rest = limit.rpartition("-")
    if not rest.replace(":", "").isdigit():
        return SECONDS_AHEAD
    parts = [int(part) for part in rest.split(":")]
    if not dash:
        parts = [0, *parts] if len(parts) < 3 else parts
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    whole = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    return max(1, min(SECONDS_AHEAD, whole // 4))


def submit(script: Path) -> str:
    """Give the script to Slurm; what sbatch says. Raises UsageError where that fails."""
    try:
        done = subprocess.run(["sbatch", str(script)], capture_output=True, text=True, check=False)
    except OSError as error:
        raise UsageError(
            f"sbatch cannot be started ({error.strerror}); {script} is written: run `sbatch {script}` on a host that "
            "has Slurm's commands"
        ) from error
    if done.returncode:
        raise UsageError(
            f"sbatch did not accept {script}: {done.stderr.strip()}. Change the option that it names (--sbatch KEY=VALUE "
            f"replaces the script's own), or edit the script and run `sbatch {script}`"
        )
    return done.stdout.strip()
