"""Results and notes on standard output, messages on standard error."""

from __future__ import annotations

import os
import re
import signal
import sys
from importlib import import_module
from textwrap import fill
from typing import TYPE_CHECKING, TextIO

import typer

from tokabatch.errors import UsageError
from tokabatch.report.labels import coloured, labelled
from tokabatch.report.streams import first_fault

if TYPE_CHECKING:
    from tokabatch.report.sections import Section

READER_ENDED = 128 + signal.SIGPIPE
"""The exit status where the reader of standard output has ended."""


def print_result(content: str | tuple[Section, ...]) -> None:
    """Print what a command is for. Raises UsageError where standard output does not take it; where its reader has ended, as
    `head` does, the command ends without a word."""
    _print(content)
    fault = first_fault(sys.stdout)
    if isinstance(fault, BrokenPipeError):
        raise typer.Exit(READER_ENDED)
    if fault is not None:
        raise UsageError(f"standard output cannot be written: {fault.strerror}")


def print_note(content: str | tuple[Section, ...]) -> None:
    """Print what is also on disk, or what the exit code says, too: where it cannot be printed, that stays true."""
    _print(content)
    fault = first_fault(sys.stdout)
    if fault is not None and not isinstance(fault, BrokenPipeError):
        print_message(f"warning: standard output cannot be written: {fault.strerror}")


def print_message(text: str) -> None:
    """Print a note, warning or error on standard error; on a terminal, in lines that end between words."""
    columns, text = terminal_columns(sys.stderr), labelled(text)
    print(coloured(text if columns is None else between_words(text, columns), sys.stderr), file=sys.stderr)


_BARE_COMMAND = re.compile(r"(?:^|[ :])(?:tokabatch (?:run|score|export|plan|check|errors|download)|mkdir|mv|cd) \S")


def between_words(text: str, columns: int) -> str:
    """Break lines longer than `columns` between words, keeping their indentation, but not within `commands`, which are to be
    pasted. A longer word stays whole, and so does a line with a command that has no quotes around it."""
    lines: list[str] = []
    for line in text.split("\n"):
        held = re.sub(r"`[^`]*`", lambda found: found[0].replace(" ", "\0"), line)
        if _BARE_COMMAND.search(held):
            lines.append(line)
            continue
        indent = " " * (len(line) - len(line.lstrip(" ")))
        lines.append(fill(held, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False))
    return "\n".join(lines).replace("\0", " ")


def terminal_columns(stream: TextIO) -> int | None:
    """The width of the terminal that a stream writes to; None if it writes to none."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except (OSError, ValueError):
        return None


def draws_tables() -> bool:
    """Whether standard output gets tables, each with an empty line below, and not plain text."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _print(content: str | tuple[Section, ...]) -> None:
    if isinstance(content, str):
        print(content)
        return
    render = import_module("tokabatch.report.render")
    if draws_tables():
        import_module("rich.console").Console(highlight=False).print(render.tables(content))
    else:
        print(render.plain(content))
