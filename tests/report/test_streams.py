"""Standard streams that fail: what is written to them is lost, and nothing else. Real descriptors, real processes."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tokabatch.report.streams import TolerantFile, first_fault

ROOT = Path(__file__).parents[2]
RUN = ["run", "jobs/quickstart.yaml", "input.limit=2", "generation.n=2", "generation.max_tokens=8"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def shell(line: str, *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, standard output and error of a shell's line, in which "$@" is the command `tokabatch` with its arguments."""
    command = ["bash", "-c", line, "bash", sys.executable, "-m", "tokabatch", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


class TestTolerantFile:
    def test_a_reader_that_ends(self) -> None:
        reader, writer = os.pipe()
        file = TolerantFile(writer)
        assert file.write(b"read") == 4 and os.read(reader, 9) == b"read" and file.fault is None
        os.close(reader)
        assert file.write(b"lost") == 4 and isinstance(file.fault, BrokenPipeError)
        os.close(writer)

    def test_a_reader_that_stands_still_is_waited_for_once(self) -> None:
        reader, writer = os.pipe()
        file = TolerantFile(writer, stall_seconds=0.3)
        began = time.monotonic()
        for _ in range(50):
            assert file.write(b"x" * 8192) == 8192
        assert 0.3 <= time.monotonic() - began < 10.0 and isinstance(file.fault, TimeoutError)
        while len(os.read(reader, 1 << 20)) == 1 << 20:
            pass
        file.write(b"again")
        assert os.read(reader, 1 << 20).endswith(b"again")
        for descriptor in (reader, writer):
            os.close(descriptor)

    def test_a_descriptor_that_another_program_made_non_blocking_loses_nothing(self) -> None:
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        count = subprocess.Popen(["sh", "-c", "sleep 0.3; wc -c"], stdin=reader, stdout=subprocess.PIPE, text=True)
        os.close(reader)
        TolerantFile(writer).write(b"x" * 1_000_000)
        os.close(writer)
        assert count.communicate(timeout=20)[0].strip() == "1000000"

    def test_a_stream_of_another_kind_has_no_fault(self) -> None:
        assert first_fault(sys.stdout) is None


@pytest.mark.parametrize(
    "streams",
    [
        '"$@" >/dev/full',
        '"$@" 2>/dev/full',
        '"$@" >&-',
        '"$@" 2>&-',
        '"$@" <&- >&- 2>&- engine.process=true',
        '"$@" 2>&1 engine.process=true | head -1; exit ${PIPESTATUS[0]}',
        '"$@" --quiet | head -0; exit ${PIPESTATUS[0]}',
    ],
)
def test_a_run_continues_without_its_display(streams: str, tmp_path: Path) -> None:
    code, _, stderr = shell(streams, *RUN, f"output.path={tmp_path / 'out'}")
    assert code == 0 and "Traceback" not in stderr, stderr
    assert json.loads((tmp_path / "out" / "_SUCCESS").read_text())["ok"] == 4


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    assert shell('"$@"', *RUN, f"output.path={out}")[0] == 0
    return out


@pytest.mark.parametrize(
    ("command", "streams", "code", "word"),
    [
        ("status", '"$@" >/dev/full', 2, "standard output cannot be written: No space left on device"),
        ("status", '"$@" >&-', 2, "standard output cannot be written: it is closed"),
        ("status", '"$@" | head -0; exit ${PIPESTATUS[0]}', 141, ""),
        ("report", '"$@" >/dev/full', 2, "standard output cannot be written"),
        ("check", '"$@" >/dev/full', 0, "standard output cannot be written"),
        ("check", '"$@" 2>/dev/full | head -0; exit ${PIPESTATUS[0]}', 0, ""),
    ],
)
def test_a_command_that_prints_says_so(command: str, streams: str, code: int, word: str, finished: Path) -> None:
    found, _, stderr = shell(streams, command, finished)
    assert found == code, stderr
    assert word in stderr and "Traceback" not in stderr and len(stderr.splitlines()) == (0 if "2>" in streams else bool(word))


def test_a_run_outlives_its_terminal(tmp_path: Path) -> None:
    """Without a signal: the terminal of a session that a daemon keeps, say."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "tokabatch", *RUN, f"output.path={tmp_path / 'out'}"]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=follower, stderr=follower)
    os.close(follower)
    while b"reading" not in os.read(leader, 1 << 16):
        pass
    os.close(leader)
    assert process.wait(timeout=60) == 0 and (tmp_path / "out" / "_SUCCESS").exists()


@pytest.mark.parametrize(("ignored", "code"), [(False, 75), (True, 0)], ids=["a shell that closes", "nohup"])
def test_a_hangup_stops_a_run_unless_it_is_ignored(ignored: bool, code: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tokabatch", *RUN, "engine.process=true", f"output.path={tmp_path / 'out'}"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL),
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if "loading" in line:
            break
    os.killpg(process.pid, signal.SIGHUP)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code and ("(SIGHUP)" in stderr) == (not ignored), stderr
