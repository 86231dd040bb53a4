"""The long options of Slurm's sbatch, by its manual page (25.05), and what is certainly wrong about one, which is found here
instead of in the queue. A site may have further options, of its plugins or a newer Slurm."""

from __future__ import annotations

from difflib import get_close_matches

from tokabatch.errors import UsageError

_FLAGS = frozenset(
    "consolidate-segments contiguous help hold ignore-pbs no-requeue overcommit parsable quiet reboot spread-job "
    "spread-segments stepmgr test-only usage use-min-nodes verbose version wait".split()
)
_PERHAPS_VALUES = frozenset("exclusive get-user-env nice no-kill oversubscribe propagate requeue".split())
"""Options that take a value or none."""
_VALUES = frozenset(
    "account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment constraint "
    "container container-id core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency "
    "distribution error exclude export export-file extra extra-node-info gid gpu-bind gpu-freq gpus gpus-per-node "
    "gpus-per-socket gpus-per-task gres gres-flags hint input job-name kill-on-invalid-dep licenses mail-type mail-user "
    "mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus network nodefile nodelist nodes ntasks ntasks-per-core "
    "ntasks-per-gpu ntasks-per-node ntasks-per-socket open-mode output partition prefer priority profile qos reservation "
    "segment signal sockets-per-node switches thread-spec threads-per-core time time-min tmp tres-bind tres-per-task uid "
    "wait-all-nodes wckey wrap".split()
)
_ALL = sorted(_FLAGS | _PERHAPS_VALUES | _VALUES)
_PLUGIN = "container-"
"""Begins options of Pyxis, which clusters use for containers."""


def check_option(name: str, value: str | None) -> str:
    """Return the option that was meant, for an unknown one with a name like a known one's, else nothing. Raises UsageError for
    an option without the value that it needs, or with one that it does not take; sbatch also takes the beginning of a name, if
    it is that of one option alone."""
    near = ""
    begun = [name] if name in _ALL else [each for each in _ALL if each.startswith(name)]
    if len(begun) > 1:
        raise UsageError(f"--sbatch {name}: may be {', '.join(begun)}; write one of them in full")
    if not begun:
        near = "" if name.startswith(_PLUGIN) else next(iter(get_close_matches(name, _ALL, n=1, cutoff=0.75)), "")
        begun = [name]
    if value == "" or (value is None and begun[0] in _VALUES):
        raise UsageError(f"--sbatch {name}: needs a value; write --sbatch {begun[0]}=VALUE")
    if value is not None and begun[0] in _FLAGS:
        raise UsageError(f"--sbatch {name}: takes no value; write --sbatch {begun[0]}")
    return near and (near if value is None else f"{near}={value}")
