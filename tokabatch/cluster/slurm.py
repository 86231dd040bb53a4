"""The batch script of a run on Slurm: an array of tasks, each of them `tokabatch run --shared` on the same job and folder.

A task that stops because of Slurm's signal, before the time limit or at preemption, exits with code 75. Slurm itself does not
requeue a job because of its exit code (unless the site sets RequeueExit=75), so the script does. The script runs outside any
container, where scontrol is available.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokabatch.cluster.sbatch_options import check_option
from tokabatch.errors import EXIT_STOPPED, UsageError

UNITS_PER_TASK, LEAST_UNITS = 32, 64
"""Units of the plan for each task, and the fewest of a run. A task that has finished its units takes over units of others, so
that at the end of a run the tasks differ by one unit at most."""
MOST_CRASHES, MOST_STARTS = 5, 100
"""How often a task is requeued at most after being killed by a signal, and after stopping with exit code 75. Without a limit, a
task whose time limit is too short for a single sample would be requeued forever."""
SECONDS_AHEAD = 120
"""Seconds before the time limit at which tasks are signalled to stop; a quarter of the limit if that is shorter."""
MARK = "# Written by `tokabatch slurm`."
"""The comment that marks a script as written by this command."""


@dataclass(frozen=True, slots=True)
class Array:
    """What the script requests of Slurm.

    Tasks are signalled to stop `seconds_ahead` of the time limit (None: see `SECONDS_AHEAD`). `options` are further long
    options of sbatch, such as `partition=gpu`, each replacing the script's own of that name. `setup` are lines of shell before
    the run (modules, a virtual environment); if one of their commands fails, the task ends. `command` starts tokabatch, in a
    container for example `apptainer exec --nv IMAGE tokabatch`.
    """

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
        """The number of units that the plan is cut into."""
        return max(LEAST_UNITS, UNITS_PER_TASK * self.tasks)


def batch_script(job: Path, overrides: tuple[str, ...], array: Array, folder: Path) -> str:
    """Return the text of the script; relative paths of the job are relative to `folder`. Raises UsageError if an option is not
    a long one, or if the command is not a single command on one line."""
    if not array.command.strip() or re.search(r"[\r\n]|(^|\s)#", array.command):
        # The arguments that the script appends would otherwise end up on another line or in a comment.
        raise UsageError(
            f"--command {array.command!r} is not one command on one line, without a comment; write what starts tokabatch: "
            "--command 'apptainer exec --nv IMAGE.sif tokabatch'"
        )
    # Slurm expands % in the names of jobs and logs.
    name = re.sub(r"[^\w.-]+", "-", job.stem)
    asked = [f"job-name=tokabatch-{name}", f"array=0-{array.tasks - 1}", "ntasks=1"]
    asked += [f"gpus-per-task={array.gpus_per_task}"] if array.gpus_per_task else []
    asked += [f"cpus-per-task={array.cpus_per_task}"] if array.cpus_per_task else []
    asked += [f"time={array.time}"] if array.time else []
    ahead = _seconds_ahead(array.time) if array.seconds_ahead is None else array.seconds_ahead
    asked += [f"signal=USR1@{ahead}", "requeue", "open-mode=append", f"output=tokabatch-{name}-%A_%a.log"]
    given = [_option(option)[0] for option in array.options]
    names = {option.partition("=")[0] for option in given}
    asked = [option for option in asked if option.partition("=")[0] not in names] + given
    directives = "\n".join(f"#SBATCH {shlex.quote(f'--{option}')}" for option in asked)
    # Each on a line of its own, as one may end in a comment.
    setup = "\n".join(line for line in array.setup if line.strip()) or "# module load cuda; . /path/to/venv/bin/activate"
    words = [str(job), *overrides, "--shared", "--units", str(array.units), "--quiet"]
    return f"""#!/usr/bin/env bash
{directives}
{MARK} Submit it with sbatch, again if necessary: finished samples are not computed again.

cd {shlex.quote(str(folder))} || exit 2
# A command that fails here ends the task. Commands inside a sourced script, such as activate, may fail.
trap '[ ${{#BASH_SOURCE[@]}} -gt 1 ] || exit 2' ERR
{setup}
trap - ERR

# Slurm also signals this script when it stops the run; the script must survive the signal to requeue its task.
trap : TERM USR1
# Without --cpus-per-task srun would give the step a single core.
cores=${{SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}}
srun --ntasks=1 $cores {array.command} run {shlex.join(words)} --task "$SLURM_ARRAY_TASK_ID"
status=$?

# Status {EXIT_STOPPED}: stopped before the time limit, or preempted. Above 128: killed by a signal. Both are run again, up to
# a limit, while the other tasks continue. Any other status is final: 0 is success; for the others, see the log.
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


_SIGNATURE = "# As written by `tokabatch slurm`: "


def _signed(text: str) -> str:
    """Return the script with a digest in its last line, by which one that was edited is told apart."""
    return f"{text}{_SIGNATURE}{hashlib.sha256(text.encode(errors='replace')).hexdigest()[:16]}\n"


def write_script(path: Path, text: str, *, overwrite: bool = False) -> None:
    """Write the script. An earlier one that was edited is replaced only if `overwrite`, a file that this command did not write
    never. Raises UsageError if it cannot be written or such a file is in its place."""
    text = _signed(text)
    try:
        there = path.read_text(errors="replace") if path.exists() else text
        if MARK not in there:
            raise UsageError(
                f"--to {path} exists and was not written by `tokabatch slurm`, so it is not replaced; name another file, or "
                "move this one away"
            )
        if there != _signed(there.rpartition(_SIGNATURE)[0]) and not overwrite:
            raise UsageError(f"--to {path} was edited; replace it with --overwrite, or name another file (--to)")
        path.write_text(text)
    except OSError as error:
        raise UsageError(
            f"--to {path} cannot be written: {error.strerror}; name a file in a folder that you may write to"
        ) from error


def describe_doubtful(options: Sequence[str]) -> list[str]:
    """Return a warning for each option that sbatch does not document, with a name like one that it does. Raises UsageError as
    `batch_script` does."""
    read = map(_option, options)
    return [
        f"warning: --sbatch {option}: sbatch documents no such option; did you mean --sbatch {meant}?"
        for option, meant in read
        if meant
    ]


def _option(given: str) -> tuple[str, str]:
    """Return an option as a directive takes it, without dashes, and the one that was perhaps meant. Raises UsageError if it is
    not one long option, or is certainly wrong."""
    found = re.fullmatch(r"(?:--)?([a-z][a-z0-9-]+)(?:=(.*))?", given.strip())
    if found is None or re.search(r"\s-|\s[a-z-]+=", found[2] or ""):
        raise UsageError(
            f"--sbatch {given!r} is not one long option of sbatch; write its long name, and --sbatch once for each option: "
            "--sbatch partition=gpu --sbatch account=NAME"
        )
    meant = check_option(found[1], found[2])
    return found[1] if found[2] is None else f"{found[1]}={found[2]}", meant


def _seconds_ahead(limit: str) -> int:
    """Return the seconds between signal and time limit, given the limit in sbatch's formats: minutes, minutes:seconds,
    hours:minutes:seconds, or days-hours and so on."""
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
    """Submit the script to Slurm and return the output of sbatch. Raises UsageError if that fails."""
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
