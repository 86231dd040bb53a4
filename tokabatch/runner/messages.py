"""The messages between main and the members of a run: `Message` to main, `Order` to a member."""

from __future__ import annotations

from dataclasses import dataclass

from tokabatch.arrays import Bool, Int32, Int64
from tokabatch.errors import TokabatchError
from tokabatch.forecast.step_log import Steps
from tokabatch.runner.ledger import Part
from tokabatch.runner.replica import Standing
from tokabatch.scheduling.completion_batch import Completions


@dataclass(frozen=True, slots=True)
class Pace:
    """How often a member reports, in seconds: the least time between two standings (None: the first and the last alone), and
    between two messages of finished samples while it has others to run."""

    standing: float | None
    finished: float = 0.0


@dataclass(frozen=True, slots=True)
class Share:
    """To a member: give back what `to_give` says of the samples that have never been admitted here; the member that wants more
    holds so many, running ones included."""

    held: int


@dataclass(frozen=True, slots=True)
class Withdraw:
    """To a member: give back all samples of these rows that are not finished, those that run included."""

    rows: Int64


@dataclass(frozen=True, slots=True)
class Cancel:
    """To a member: of each of these rows, draw no sample from its first number on."""

    rows: Int64
    first: Int32


@dataclass(frozen=True, slots=True)
class Lengths:
    """To a member: how long samples were that others finished; `stopped` is False where the limit ended them."""

    length: Int32
    stopped: Bool


@dataclass(frozen=True, slots=True)
class Finished:
    """From a member: finished samples, and its progress if that is due."""

    completions: Completions
    """Packed where they have come to main."""
    standing: Standing | None


@dataclass(frozen=True, slots=True)
class Wants:
    """From a member: it can take more, having been given so many parts; so many samples wait."""

    waiting: int
    parts: int


@dataclass(frozen=True, slots=True)
class Given:
    """From a member: what it gives back."""

    part: Part


@dataclass(frozen=True, slots=True)
class Suspects:
    """From a member: rows one of which may kill workers; none where that is over."""

    rows: Int64


@dataclass(frozen=True, slots=True)
class Ended:
    """From a member: its last word. `idle` are the times, by the system's monotonic clock, in which it had nothing to run."""

    standing: Standing
    steps: Steps
    idle: tuple[tuple[float, float], ...]
    error: TokabatchError | None


Message = Finished | Wants | Given | Suspects | Ended | str
"""To main; a text is shown to the user."""
Order = Part | Share | Withdraw | Cancel | Lengths
"""To a member."""
