"""What a policy decides: in what order waiting samples come in, how many of them, and who waits when pages run short.

Everything else follows from the cache and the limits: a step has only so many tokens, slots and pages, a prompt is computed
once before its samples fork. `guarded_policy` has the cases in which no policy is free to answer. To write another policy,
derive from `ForecastPolicy` or write the five methods, and give the class to `Scheduler`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tokabatch.arrays import Int32, Int64
from tokabatch.scheduling.kv.prefix_tree import PromptPages


@dataclass(frozen=True, slots=True)
class Candidates:
    """Waiting samples for which a step has slots and tokens: C entries, and S samples in all, in the order in which they come
    in. The first `num_known` entries are of prompts that have been open before, the others of prompts never begun."""

    num_known: int
    request: Int32
    """Shape [C]."""
    counts: Int32
    """Samples of each entry, shape [C]."""
    produced: Int32
    """Output tokens that each of an entry's samples had when it was preempted, shape [C]."""
    samples: Int32
    """The number of each sample, entry after entry, shape [S]."""
    lengths: Int32
    """Output tokens that each sample is taken to have in the end, shape [S]."""

    def begun(self) -> Candidates:
        """Those of prompts that have been open before."""
        known, samples = self.num_known, int(self.counts[: self.num_known].sum())
        entries = self.request[:known], self.counts[:known], self.produced[:known]
        return Candidates(known, *entries, self.samples[:samples], self.lengths[:samples])


class Policy(Protocol):
    """Made by the scheduler from its work, its cache and its estimates of lengths, all of which it only reads."""

    def order(self, waiting: list[PromptPages]) -> list[PromptPages]:
        """In what order prompts that have been open before come in. They are given in plan order, those without pages first.
        Prompts never begun follow behind them in plan order, by which they share their prefixes."""
        ...

    def admit(self, candidates: Candidates) -> Int32:
        """How many samples of each candidate come in, shape [C]. None behind the first candidate of which not all do."""
        ...

    def hold(self, decoding: Int64) -> Int64:
        """Those of the running samples' slots that compute their next token in this step, at least one if any is given; the
        others wait and keep their pages. Called once a step."""
        ...

    def rank(self, slots: Int64) -> Int64:
        """These slots, in plan order, reordered: where pages are missing the last ones wait for them, and at last give
        theirs up."""
        ...

    def invalidate(self) -> None:
        """Drop what has been worked out about the future: samples have been taken back, added or cancelled, lengths have been
        estimated anew, or there is another number of pages."""
        ...
