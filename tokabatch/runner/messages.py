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
    """How often a member reports: the least seconds between two standings (None: only the first and the last are sent), and
    between two messages of finished samples while others are running."""

    standing: float | None
    finished: float = 0.0
    headway: bool = False
    """Whether `Finished` is to have the headway, by which work is divided between several members."""


@dataclass(frozen=True, slots=True)
class Share:
    """Sent to a member: give back samples that were never admitted there, as many as `ledger.to_give` returns. `work` is that
    of the member that requested more, as `Ledger.work` returns it."""

    work: float


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Sent to a member: give back all unfinished samples of these rows, running ones included."""

    rows: Int64


@dataclass(frozen=True, slots=True)
class Cancel:
    """Sent to a member: cancel the samples of each row from the given number on."""

    rows: Int64
    first: Int32


@dataclass(frozen=True, slots=True)
class Lengths:
    """Sent to a member: the lengths of samples that others finished; `stopped` is False if the length limit ended them."""

    length: Int32
    stopped: Bool


@dataclass(frozen=True, slots=True)
class Finished:
    """Sent by a member: finished samples, and its standing if that is due."""

    completions: Completions
    """`PackedCompletions` once they have arrived in main."""
    standing: Standing | None
    headway: float = 0.0
    """`Scheduler.headway` once these samples were finished, if `Pace` requests it."""


@dataclass(frozen=True, slots=True)
class Wants:
    """Sent by a member that has room for more samples: the number of parts that it has received, and of samples waiting."""

    waiting: int
    parts: int


@dataclass(frozen=True, slots=True)
class Given:
    """Sent by a member: the samples that it gives back."""

    part: Part


@dataclass(frozen=True, slots=True)
class Suspects:
    """Sent by a member: rows one of which may crash workers; empty when the suspicion has been cleared."""

    rows: Int64


@dataclass(frozen=True, slots=True)
class Ended:
    """Sent by a member as its last message. `idle` are the periods, in times of the system's monotonic clock, in which it had
    nothing to run."""

    standing: Standing
    steps: Steps
    idle: tuple[tuple[float, float], ...]
    error: TokabatchError | None


Message = Finished | Wants | Given | Suspects | Ended | str
"""Sent to main; a text is shown to the user."""
Order = Part | Share | Withdraw | Cancel | Lengths
"""Sent to a member."""
