"""A run where Linux's own calls are missing, as on macOS."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WITHOUT = """
import os, resource, select, socket
for module, names in (
    (os, ("sched_getaffinity", "sched_setaffinity", "process_cpu_count", "fdatasync", "posix_fallocate", "posix_fadvise",
          "pidfd_open", "eventfd", "memfd_create", "copy_file_range", "splice", "getrandom", "O_TMPFILE", "O_DIRECT")),
    (select, ("epoll",)), (socket, ("SOCK_SEQPACKET",)), (resource, ("prlimit",)),
):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
set_limit = resource.setrlimit
def setrlimit(kind, limits):
    if kind == resource.RLIMIT_AS:
        raise ValueError("current limit exceeds maximum limit")
    set_limit(kind, limits)
resource.setrlimit = setrlimit
"""
"""What macOS lacks of Python's calls; its processes get it as `sitecustomize`."""
COMMANDS = """
import sys
import torch, transformers, psutil, pyarrow.dataset
sys.platform = "darwin"
from tokabatch.cli import main
for command in sys.argv[1].split(";"):
    sys.argv = ["tokabatch", *command.split()]
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise
"""


@pytest.mark.parametrize("verify", [{"kind": "gsm8k", "answer": "answer"}, {"kind": "code", "allow_code_execution": True}])
def test_a_run_needs_nothing_of_linux_alone(tmp_path: Path, verify: dict[str, object]) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WITHOUT)
    job = yaml.safe_load((ROOT / "jobs" / "quickstart.yaml").read_text())
    job["generation"] = {"n": 2, "max_tokens": 8}
    if verify["kind"] == "code":
        rows = '{"question": "1 + 1?", "test_list": ["assert True"]}\n'
        (tmp_path / "rows.jsonl").write_text(rows)
        job["input"] = {"path": str(tmp_path / "rows.jsonl")}
    job["input"]["limit"] = 1
    out = tmp_path / "out"
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({**job, "verify": verify, "output": {"path": str(out)}}))
    again = f"run {tmp_path}/job.yaml generation.n=3"
    commands = f"run {tmp_path}/job.yaml;{again};status {out};check {out};export {out} --to {tmp_path}/samples.csv"
    path = os.pathsep.join((str(tmp_path / "site"), str(ROOT)))
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, commands],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "3 = 3 ok + 0 errors" in done.stdout and "pass@3" in done.stdout and "no verdict" not in done.stdout, done.stdout
    assert (tmp_path / "samples.csv").read_text().count(',"ok",') == 3
