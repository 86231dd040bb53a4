"""Right when the program that the text is, or completes, passes the row's tests.

The row has the columns of HumanEval (`prompt`, `entry_point`, `test`; Chen et al., 2021) or of MBPP (`test_list`, and
`test_setup_code` or `test_imports` where there are such; Austin et al., 2021). The program is the last block of code
between three backticks where there is one, else the text; of HumanEval it follows the prompt, which it may repeat.

Each program runs in a Python process of its own, in an empty folder that goes with it, with nothing in its environment, for
`verify.options.seconds` at most (5) and in `verify.options.memory_mb` of address space (1024); what it starts is killed with
it. That keeps accidents small. It is no sandbox: a program has the rights of the user that the run has, so it can read and
delete files, use the network and fill the disk. Run it in a container of your own, as another user.
"""

from __future__ import annotations

import os
import re
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tokabatch.scoring.limits import limit_resource

COLUMNS = {"outcome": str}
_BLOCK = re.compile(r"```(?:python|py|Python)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_FILE_BYTES = 16 << 20
_SHOWN = 200


def verify(text: str, row: Mapping[str, Any], *, seconds: float = 5.0, memory_mb: int = 1024) -> dict[str, Any]:
    """Return whether the tests pass; `outcome` is `passed`, or what went wrong. Raises ValueError for a row without tests."""
    done = secrets.token_hex(16)
    # A program that ends before its tests has not passed them.
    program = f"{_program(text, row)}\nprint({done!r})\n"
    with tempfile.TemporaryDirectory(prefix="tokabatch-code-") as folder:
        path = Path(folder)
        (path / "program.py").write_text(program, errors="replace")
        with (path / "out").open("wb") as out, (path / "err").open("wb") as err:
            process = subprocess.Popen(
                [sys.executable, "-I", "program.py"],
                cwd=folder,
                env={"PATH": os.defpath, "HOME": folder, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                preexec_fn=lambda: _limit(seconds, memory_mb),
            )
            try:
                process.wait(seconds)
                outcome = None
            except subprocess.TimeoutExpired:
                outcome = f"not done within {seconds:g} s"
            finally:
                _kill_children()
        if outcome is None:
            said = (path / "out").read_bytes().rstrip().endswith(done.encode())
            passed = process.returncode == 0 and said
            errors = (path / "err").read_text(errors="replace").strip().rsplit("\n", 1)[-1]
            outcome = "passed" if passed else errors[:_SHOWN] or f"ended with code {process.returncode} before its tests did"
    return {"score": outcome == "passed", "outcome": outcome}


def check(row: Mapping[str, Any]) -> None:
    """Raise ValueError if the row has no tests in a supported form."""
    _program("", row)


def _program(text: str, row: Mapping[str, Any]) -> str:
    blocks = _BLOCK.findall(text)
    code = blocks[-1] if blocks else text
    if row.get("test") and row.get("entry_point"):
        return f"{row.get('prompt') or ''}{'' if not blocks else chr(10)}{code}\n{row['test']}\ncheck({row['entry_point']})"
    if row.get("test_list"):
        setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or [])
        return "\n".join([setup, code, *row["test_list"]])
    raise ValueError("the row has neither HumanEval's columns entry_point and test nor MBPP's test_list")


def _limit(seconds: float, memory_mb: int) -> None:
    """Set the limits, in the program's process before it starts."""
    for kind, limit in (
        (resource.RLIMIT_CPU, int(seconds) + 1),
        (resource.RLIMIT_AS, memory_mb << 20),
        (resource.RLIMIT_FSIZE, _FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        limit_resource(kind, limit)


def _kill_children() -> None:
    """Kill the program and whatever it started: orphans are children of this process, too (`judge_process`)."""
    while children := psutil.Process().children(recursive=True):
        for child in children:
            with suppress(psutil.Error):
                child.send_signal(signal.SIGKILL)
        for child in children:
            with suppress(psutil.Error, ChildProcessError):
                child.wait(1.0)
