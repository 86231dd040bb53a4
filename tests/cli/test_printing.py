"""Messages and keys on a terminal: lines end between words, and commands to be pasted stay whole."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console

from tokabatch.cli import main
from tokabatch.cli.printing import between_words
from tokabatch.report.outlook import Outlook, Trial, outlook_sections
from tokabatch.report.render import tables

LONG = "no/such/folder/with-a-name-that-is-longer/than-the/terminal/is-wide/x.jsonl"
COLOUR = r"\x1b\[[0-9;]*m"
MESSAGE = (
    f"error: {LONG} does not exist; `tokabatch export out/quickstart --to samples.jsonl --columns id,text` writes it\n"
    "  generation.temperature: 0.7 then, 0.8 now, and so on until the line is longer than it may be\n"
    "Choose another output.path."
)


def test_a_line_with_a_command_to_paste_stays_whole() -> None:
    line = "This moves it away and continues: mkdir 'a b' && mv x 'a b/' && tokabatch run job.yaml output.path=out --repair"
    assert between_words(f"{MESSAGE}\n{line}", 40).endswith("\n" + line)
    assert between_words(f"tokabatch needs {'words ' * 20}", 40).count("\n") > 2


@pytest.mark.parametrize("columns", [30, 40, 80, 1000])
def test_lines_end_between_words_but_not_within_commands(columns: int) -> None:
    lines = between_words(MESSAGE, columns).split("\n")
    assert " ".join(line.strip() for line in lines) == " ".join(MESSAGE.split())
    command = re.search("`.*`", MESSAGE)
    assert command is not None and any(command[0] in line for line in lines)
    assert all(len(line) <= columns or line.strip() in (LONG, command[0]) for line in lines)
    assert columns < 1000 or lines == MESSAGE.split("\n")


def read_all(leader: int) -> str:
    """All that was written to a terminal whose other end is closed, and close it."""
    written = b""
    with suppress(OSError):  # What Linux says at the end.
        while piece := os.read(leader, 65536):
            written += piece
    os.close(leader)
    return written.decode().replace("\r", "")


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The lines that a command writes on a terminal of so many columns, before it breaks any, without their colours."""

    def show(columns: int, *arguments: str) -> list[str]:
        leader, follower = pty.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        with os.fdopen(follower, "w") as terminal, monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["tokabatch", *arguments])
            patch.setattr(sys, "stdout", terminal)
            patch.setattr(sys, "stderr", terminal)
            try:
                main()
            except SystemExit as ended:
                assert ended.code in (0, 2)
        return re.sub(COLOUR, "", read_all(leader)).rstrip("\n").split("\n")

    return show


@pytest.mark.parametrize("arguments", [("keys", "verify.stop"), ("run", "no/job.yaml"), ("run", "--limit"), ("statuz",)])
def test_no_word_is_cut(arguments: tuple[str, ...], shown: Callable[..., list[str]]) -> None:
    wide, narrow = (shown(columns, *arguments) for columns in (1000, 60))
    assert max(map(len, narrow)) <= 60
    assert "\n".join(narrow).split() == "\n".join(wide).split()


def test_the_recommended_settings_fit_a_terminal_of_80_columns() -> None:
    trial = Trial(max_running=131_072, max_step_tokens=139_264, seconds=86_000.0, output_tokens=10**12, recommended=True)
    counts = dict.fromkeys(("samples", "output_tokens", "prefilled_tokens", "saved_tokens", "cacheable_tokens", "steps"), 1)
    counts |= dict.fromkeys(("seconds", "tail_seconds", "kv_tokens", "kv_mean", "kv_use", "preemptions", "waste", "waited"), 1)
    outlook = Outlook("d", "c", "l", **counts, kv_over_time=(0.5,), simulated_in=1.0, trials=(trial,), trial_samples=1)
    console = Console(width=80)
    with console.capture() as shown:
        console.print(tables(outlook_sections(outlook)[1:]))
    assert {"recommended:", "the", "smallest", "within", "0.5", "%"} <= set(shown.get().split())


STOPPED = """
import os, signal
from tokabatch.cli.signals import stop_on_signals
os.write(2, b"bar")
with stop_on_signals():
    os.kill(os.getpid(), signal.SIGINT)
"""


def test_that_a_run_stops_is_said_on_a_line_of_its_own_which_a_display_does_not_draw_over() -> None:
    leader, follower = pty.openpty()
    subprocess.run([sys.executable, "-c", STOPPED], stderr=follower, check=True, cwd=Path(__file__).parents[2])
    os.close(follower)
    assert read_all(leader) == "bar\nstopping: committing finished samples, if any; Ctrl-C again to stop at once\n\n\n"


RUN = """
import sys
from tokabatch.cli.printing import print_message
from tokabatch.report.progress import open_progress
for text in ("error: e", "errors:\\n  x", "warning: w", "n: m"):
    print_message(text)
for quiet in (False, True):
    with open_progress(quiet) as progress:
        progress.message("warning: [w]")
        progress.message("n")
"""
LABELLED = "error: e\nerrors:\n  x\nwarning: w\nnote: n: m\n" + "warning: [w]\nnote: n\n" * 2


@pytest.mark.parametrize("environment", [{"TERM": "xterm"}, {"TERM": "xterm", "NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_the_word_in_front_of_a_message_is_in_colour_where_the_terminal_shows_it(environment: dict[str, str]) -> None:
    leader, follower = pty.openpty()
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    program, cwd = [sys.executable, "-c", RUN], Path(__file__).parents[2]
    subprocess.run(program, stderr=follower, check=True, cwd=cwd, env=clean | environment)
    os.close(follower)
    written = read_all(leader)
    moves = r"\x1b\[(?:\?25[hl]|\d*[A-K])"
    assert re.sub(rf"{COLOUR}|{moves}", "", written).replace("\n\n", "\n") == LABELLED
    words = re.findall(r"\x1b\[1;3(\d)m(\w+:)\x1b\[0m", written)
    warned = [("3", "warning:"), ("6", "note:")]
    colours = [("1", "error:"), ("1", "errors:"), *warned * 3]
    assert words == (colours if environment == {"TERM": "xterm"} else []), written
    assert len(re.findall(COLOUR, written)) == 2 * len(words)


def test_the_word_in_front_of_a_message_is_plain_where_standard_error_is_a_file() -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stderr == LABELLED


def test_headings_and_names_of_the_help_are_in_colour_on_a_terminal(
    shown: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for arguments in (("--help",), ("run", "--help")):
        with monkeypatch.context() as patch:
            plain = shown(80, *arguments)
            patch.setattr(f"{__name__}.COLOUR", "(?!)")
            coloured = shown(80, *arguments)
        assert [re.sub(COLOUR, "", line) for line in coloured] == plain
        heads = [line for line in coloured if line.startswith("\x1b[1m")]
        assert next(re.sub(COLOUR, "", line).split(":")[0] for line in heads if ":" in line) == "Usage"
        assert "\x1b[1mOptions\x1b[0m:" in coloured and "  \x1b[1mExamples\x1b[0m" in coloured
        assert any(line.startswith("  \x1b[36m-h, --help\x1b[0m  ") for line in coloured), coloured
    assert any(line.startswith("  \x1b[36mJOB.yaml <path>\x1b[0m") for line in coloured)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(f"{__name__}.COLOUR", "(?!)")
    assert shown(80, "run", "--help") == plain
