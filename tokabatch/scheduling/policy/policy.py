"""What a scheduling policy decides: the order of waiting samples, how many are admitted, and which wait for pages.

This is the interface; `forecast_policy` is the default implementation, and `admission` carries out what it returns.
Everything else follows from the cache and the limits: a step has only so many tokens, slots and pages, and a prompt is
computed once before its samples fork. `guarded_policy` overrides a policy where only one answer is possible. To write another
policy, derive from `ForecastPolicy` or implement the five methods, and pass the class to `Scheduler`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tokabatch.arrays import Int32, Int64
from tokabatch.scheduling.kv.prefix_tree import PromptPages


@dataclass(frozen=True, slots=True)
class Candidates:
    """Waiting samples for which a step has slots and tokens: C entries, and S samples in all, in the order of
    admission. The first `num_known` entries are of prompts that have been open before, the others of prompts never begun."""

    num_known: int
    request: Int32
    """Shape [C]."""
    counts: Int32
    """Samples of each entry, shape [C]."""
    produced: Int32
    """Output tokens that each of an entry's samples had when it was preempted, shape [C]."""
    samples: Int32
    """The number of each sample within its prompt, grouped by entry, shape [S]."""
    lengths: Int32
    """Predicted output tokens of each sample in the end, shape [S]."""

    def begun(self) -> Candidates:
        """Return only the candidates of prompts that have been open before."""
        known, samples = self.num_known, int(self.counts[: self.num_known].sum())
        entries = self.request[:known], self.counts[:known], self.produced[:known]
        return Candidates(known, *entries, self.samples[:samples], self.lengths[:samples])


class Policy(Protocol):
    """A scheduling policy, constructed by the scheduler with its work, cache and length estimates, which it only reads."""

    def order(self, waiting: list[PromptPages]) -> list[PromptPages]:
        """Return prompts that have been open before in the order of admission. They are given in plan order, those without
        pages first. Prompts never begun follow them, in plan order, so that they share their prefixes."""
        ...

    def admit(self, candidates: Candidates) -> Int32:
        """Return how many samples of each candidate to admit, shape [C]; zero after the first one not admitted in full."""
        ...

    def hold(self, decoding: Int64) -> Int64:
        """Return the slots, of those given, that compute their next token in this step, at least one if any is given. The
        samples in the others wait and keep their pages. Called once a step."""
        ...

    def rank(self, slots: Int64) -> Int64:
        """Return these slots, given in plan order, by descending priority. When pages are short, the samples ranked last wait,
        and are preempted if that is not enough."""
        ...

    def invalidate(self) -> None:
        """Discard cached forecasts. Called when samples have been requeued, added or cancelled, when lengths have been
        estimated anew, and when the number of pages has changed."""
        ...
