"""Progress of a run: a live display on a terminal, plain lines elsewhere, nothing when asked for nothing.

The runner calls `update` about once an `interval`, from one thread: a snapshot is not made for a display that shows none.
Everything goes to standard error. Knows no engine; a snapshot holds all that is shown.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol, TextIO, cast

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tokabatch.errors import UsageError
from tokabatch.number_text import seconds_text
from tokabatch.report.labels import coloured, coloured_part, labelled

Phase = Literal["starting", "reading", "simulating", "loading", "generating", "judging", "writing"]

_REFRESH_SECONDS = 0.2
_LINE_SECONDS, _LINE_COLUMNS = 5.0, 80
_INDENT = " " * len("[ 0.00 s] ")
"""In front of a second line: the time alone, so that all figures fit in two."""
_WINDOW_SECONDS = 10.0
_TRUSTED_SECONDS = 5.0
"""Of sampling, before the time left is estimated: at first prompts take most of a step."""
_LATEST_SECONDS = 1.0
"""The maximum age of the state in the last line of a run that ends in an error."""


@dataclass(frozen=True, slots=True)
class ProgressSnapshot:
    """Where a run stands. Totals are None while they are not known; a row is done with its last sample; `kv_used` is the
    fraction of the KV pages in use; `elapsed` counts seconds since the run began; `tokens_in` are the prompt tokens
    computed, of which shared ones count once, `tokens_out` the tokens sampled, `share` what is done of a simulation."""

    phase: Phase
    elapsed: float
    rows_done: int = 0
    rows_total: int | None = None
    samples_done: int = 0
    samples_total: int | None = None
    errors: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    kv_used: float = 0.0
    running: int = 0
    waiting: int = 0
    share: float = 0.0
    tokens_left: int | None = None
    """Output tokens still expected, by the lengths seen so far."""


class Progress(Protocol):
    """The caller enters it as a context; the runner only calls `update` and `message`. One that raises is not called again. A
    message that is no note begins with `warning: ` or `error: `."""

    interval: float | None
    """Seconds between snapshots in one phase; None takes none, so that none is made."""

    def update(self, snapshot: ProgressSnapshot) -> None: ...

    def message(self, text: str) -> None: ...

    def __enter__(self) -> Progress: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


def open_progress(quiet: bool) -> Progress:
    """The display that standard error can show; a quiet one has messages alone."""
    if quiet:
        return ExpendableProgress(MessagesOnly(sys.stderr))
    console = Console(stderr=True, highlight=False)
    live = console.is_terminal and not console.is_dumb_terminal
    return ExpendableProgress(LiveProgress(console) if live else LineProgress(sys.stderr))


def default_progress() -> Progress:
    """The display of a run from Python: lines in the output of a notebook's cell, or on a terminal; elsewhere none."""
    if "ipykernel" in sys.modules:
        return LineProgress(sys.stdout)
    # A program without a console has no stream.
    return LineProgress(sys.stderr) if sys.stderr is not None and sys.stderr.isatty() else NullProgress()  # pyright: ignore[reportUnnecessaryComparison]


def chosen_progress(given: object) -> Progress:
    """The display that a Python program chose: True is that of the command line (lines in a notebook), False none, None the
    default one. Raises UsageError for what is none."""
    if given is None:
        return default_progress()
    if given is False:
        return NullProgress()
    if given is True:
        return LineProgress(sys.stdout) if "ipykernel" in sys.modules else open_progress(quiet=False)
    if isinstance(given, type) or not all(hasattr(given, name) for name in ("interval", "update", "message")):
        kind = f"the class {given.__name__}" if isinstance(given, type) else f"a Python {type(given).__name__}"
        raise UsageError(
            f"progress is {kind}; it takes True, False or a tokabatch.Progress, which has `interval`, `update` and `message`"
        )
    return cast("Progress", given)


class NullProgress:
    """Shows nothing."""

    interval: float | None = None

    def update(self, snapshot: ProgressSnapshot) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def __enter__(self) -> NullProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass


class ExpendableProgress:
    """Forwards to a display until that raises, and to nothing from then on: the run continues without it. The exception goes to
    the log of this module."""

    def __init__(self, display: Progress) -> None:
        self._display = display
        self.interval: float | None = None
        with self._giving_up():
            self.interval = display.interval

    def update(self, snapshot: ProgressSnapshot) -> None:
        with self._giving_up():
            self._display.update(snapshot)

    def message(self, text: str) -> None:
        with self._giving_up():
            self._display.message(text)

    def __enter__(self) -> ExpendableProgress:
        with self._giving_up():
            self._display.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._giving_up():
            self._display.__exit__(kind, error, trace)

    @contextmanager
    def _giving_up(self) -> Generator[None]:
        try:
            yield
        except Exception:
            self._display, self.interval = NullProgress(), None
            logging.getLogger(__name__).warning("the display of progress failed; the run continues without it", exc_info=True)


class MessagesOnly(NullProgress):
    """Shows messages for people, and no progress."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def message(self, text: str) -> None:
        self._write(coloured(labelled(text), self._stream))

    def _write(self, text: str) -> None:
        self._stream.write(f"{text}\n")
        self._stream.flush()


class Rates:
    """Speeds over the last seconds, from the snapshots that were shown."""

    def __init__(self, window: float = _WINDOW_SECONDS) -> None:
        self._window = window
        self._points: deque[ProgressSnapshot] = deque()
        self._first: ProgressSnapshot | None = None
        """Of those in which samples are generated or judged, or a run is simulated."""
        self.done: float | None = None
        """The share of the run that is done, by output tokens; None while nothing is known of these. Samples that were there
        before count as such. It does not fall where more tokens are expected than before."""

    def add(self, snapshot: ProgressSnapshot) -> None:
        self._points.append(snapshot)
        if self._first is None and snapshot.phase in ("generating", "judging", "simulating"):
            self._first = snapshot
        # The oldest point is the last one outside of the window, so that the window is always covered.
        while len(self._points) > 2 and self._points[1].elapsed <= snapshot.elapsed - self._window:
            self._points.popleft()
        if (share := self._share()) is not None:
            self.done = max(self.done or 0.0, share)

    @property
    def tokens_in(self) -> float:
        """Prompt tokens per second."""
        return self._per_second(lambda snapshot: snapshot.tokens_in)

    @property
    def tokens_out(self) -> float:
        """Sampled tokens per second."""
        return self._per_second(lambda snapshot: snapshot.tokens_out)

    @property
    def samples(self) -> float:
        """Samples per second."""
        return self._per_second(lambda snapshot: snapshot.samples_done)

    @property
    def eta(self) -> float | None:
        """Seconds that the tokens still expected, or the samples to judge, take at the present speed, or the rest of a
        simulation at its speed so far; None until a sample is finished and this goes on for some seconds."""
        if self._first is None or not self._points:
            return None
        last, speed = self._points[-1], self.tokens_out
        seconds = last.elapsed - self._first.elapsed
        if last.phase == "simulating":
            return seconds * (1 - last.share) / last.share if last.share and seconds >= _TRUSTED_SECONDS else None
        trusted = seconds >= _TRUSTED_SECONDS and last.samples_done > self._first.samples_done
        if last.phase == "judging" and last.samples_total is not None and self.samples > 0:
            return (last.samples_total - last.samples_done) / self.samples if trusted else None
        if last.phase != "generating" or last.tokens_left is None or speed <= 0:
            return None
        return last.tokens_left / speed if trusted else None

    def _share(self) -> float | None:
        first, last = self._first, self._points[-1] if self._points else None
        if first is None or last is None or last.tokens_left is None or not last.samples_total:
            return None
        expected, before = last.tokens_out + last.tokens_left, first.samples_done / last.samples_total
        return before + (1 - before) * last.tokens_out / expected if expected else None

    def _per_second(self, value: Callable[[ProgressSnapshot], int]) -> float:
        if len(self._points) < 2:
            return 0.0
        first, last = self._points[0], self._points[-1]
        seconds = last.elapsed - first.elapsed
        return (value(last) - value(first)) / seconds if seconds > 0 else 0.0


class LineProgress(MessagesOnly):
    """The figures every few seconds and at each change of phase, as plain text without control codes: a line, or two where they
    are too wide for a terminal that the text is read on later."""

    interval: float | None = _LATEST_SECONDS

    def __init__(self, stream: TextIO, interval: float = _LINE_SECONDS) -> None:
        super().__init__(stream)
        self._interval = interval
        self._next = 0.0
        self._phase: Phase | None = None
        self._rates = Rates()
        self._unshown: ProgressSnapshot | None = None

    def update(self, snapshot: ProgressSnapshot) -> None:
        if snapshot.elapsed < self._next and snapshot.phase == self._phase:
            self._unshown = snapshot
            return
        self._show(snapshot)

    def __enter__(self) -> LineProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._unshown is not None:
            self._show(self._unshown)

    def _show(self, snapshot: ProgressSnapshot) -> None:
        self._next = snapshot.elapsed + self._interval
        self._phase = snapshot.phase
        self._unshown = None
        self._rates.add(snapshot)
        begin = f"[{seconds_text(snapshot.elapsed):>7}] {snapshot.phase:<10} "
        lines = _lines(_facts(snapshot, self._rates), _LINE_COLUMNS - len(_INDENT), len(begin) - len(_INDENT))
        self._write(begin + f"\n{_INDENT}".join(lines))


class LiveProgress:
    """A bar and the figures, redrawn in place a few times a second."""

    interval: float | None = _REFRESH_SECONDS

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False, transient=False)
        self._next = 0.0
        self._phase: Phase | None = None
        self._rates = Rates()
        self._unshown: ProgressSnapshot | None = None

    def update(self, snapshot: ProgressSnapshot) -> None:
        now = time.monotonic()
        if now < self._next and snapshot.phase == self._phase:
            self._unshown = snapshot
            return
        self._next = now + _REFRESH_SECONDS
        self._phase = snapshot.phase
        self._show(snapshot)

    def message(self, text: str) -> None:
        text = labelled(text)
        word, colour = coloured_part(text, self._live.console.file)
        self._live.console.print(Text.assemble((word, f"bold color({colour})"), text[len(word) :]))

    def __enter__(self) -> LiveProgress:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._unshown is not None:
            self._show(self._unshown)
        self._live.stop()

    def _show(self, snapshot: ProgressSnapshot) -> None:
        self._unshown = None
        self._rates.add(snapshot)
        self._live.update(_draw(snapshot, self._rates, self._live.console.width), refresh=True)


def _draw(snapshot: ProgressSnapshot, rates: Rates, width: int) -> Group:
    done, total = float(snapshot.samples_done), snapshot.samples_total
    if snapshot.phase == "simulating":
        done, total = snapshot.share, 1
    elif snapshot.phase == "reading" or total is None:
        done, total = float(snapshot.rows_done), snapshot.rows_total
    elif snapshot.phase in ("generating", "writing") and (share := rates.done) is not None:
        # By tokens, unless all samples are there: a run that was stopped has generated parts of others.
        done = share * total if done < total else done
    grid = Table.grid(padding=(0, 1))
    percent = Text(f"{done / total:.1%}" if total else "", style="bold")
    bar = ProgressBar(total=total or None, completed=done, width=40, pulse=not total, animation_time=snapshot.elapsed)
    grid.add_row(Text(snapshot.phase, style="bold cyan"), bar, percent, Text(seconds_text(snapshot.elapsed), style="dim"))
    return Group(grid, Text("\n".join(_lines(_facts(snapshot, rates), width)), overflow="fold"))


def _lines(facts: list[str], width: int, in_front: int = 0) -> list[str]:
    """Return the facts in lines of at most `width` characters, each whole; so many stand in front of the first line."""
    lines = facts[:1]
    for fact in facts[1:]:
        if len(lines[-1]) + 2 + len(fact) <= width - (in_front if len(lines) == 1 else 0):
            lines[-1] += f"  {fact}"
        else:
            lines.append(fact)
    return lines


def _facts(snapshot: ProgressSnapshot, rates: Rates) -> list[str]:
    if snapshot.phase == "starting":
        return ["loading PyTorch, the model's files and its tokenizer"]
    eta = [] if rates.eta is None else [f"eta {seconds_text(rates.eta)}"]
    if snapshot.phase == "simulating":
        return [f"{snapshot.share:.0%} of the simulation", *eta]
    if snapshot.phase == "judging" and snapshot.samples_total is None:
        return ["reading the files of the output folder"]
    if snapshot.phase == "judging":
        speed = [f"{rates.samples:,.0f} per second"] if rates.samples else []
        return [f"samples {_of(snapshot.samples_done, snapshot.samples_total)}", *speed, *eta]
    facts = [f"rows {_of(snapshot.rows_done, snapshot.rows_total)}"]
    if snapshot.samples_total is not None:
        facts.append(f"samples {_of(snapshot.samples_done, snapshot.samples_total)}")
    facts.append(f"errors {snapshot.errors:,}")
    if snapshot.phase != "generating":
        return facts
    if snapshot.tokens_in or snapshot.tokens_out:
        facts += [f"in {rates.tokens_in:,.0f} tok/s", f"out {rates.tokens_out:,.0f} tok/s", f"KV cache {snapshot.kv_used:.0%}"]
        facts.append(f"running {snapshot.running:,}")
    facts.append(f"waiting {snapshot.waiting:,}")
    return [*facts, *eta]


def _of(done: int, total: int | None) -> str:
    return f"{done:,}" if total is None else f"{done:,}/{total:,}"
