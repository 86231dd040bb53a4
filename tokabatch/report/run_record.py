"""What a report page shows of a run, as plain frozen values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tokabatch.arrays import Float64
from tokabatch.input.prompts.rebuild import RebuiltPrompt
from tokabatch.output.excerpts import ErrorRows, Excerpt, Kind
from tokabatch.scoring.estimates import Estimate
from tokabatch.scoring.row_counts import RowCounts


@dataclass(frozen=True, slots=True)
class PerToken:
    """The mean log-probability per token of the scored texts: of each text, shape [texts], and over all tokens."""

    of_texts: Float64
    mean: float


@dataclass(frozen=True, slots=True)
class HardRow:
    """A row of which few samples are right: `right` of `samples`, with the answer that most of them give, `answered` times."""

    row_index: int
    id: str | None
    right: int
    samples: int
    answer: str | None
    answered: int
    expected: str


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What a page shows.

    `summary` is the run's summary.json, written by its last start. `steps` are columns over the steps of all starts, empty if
    none were recorded. `lengths` are the numbers of output tokens of the samples that are ok. `facts` describe the run as
    (label, value).
    """

    name: str
    """Of the output folder."""
    model: str
    state: str
    samples: int
    ok: int
    errors: int
    cancelled: int
    lengths: npt.NDArray[np.int32]
    summary: Mapping[str, Any]
    steps: Mapping[str, Float64]
    estimates: tuple[Estimate, ...] | None
    """pass@k and the like; empty while samples are missing, None if nothing is verified."""
    facts: Sequence[tuple[str, str]] = ()
    error_rows: ErrorRows | None = None
    samples_shown: Mapping[Kind, Sequence[Excerpt]] = field(default_factory=dict[Kind, Sequence[Excerpt]])
    prompts: Mapping[int, RebuiltPrompt] = field(default_factory=dict[int, RebuiltPrompt])
    """The prompts of the samples and rows shown, by row number, if they could be rebuilt."""
    row_counts: RowCounts | None = None
    """How many samples of each row are right; None while samples are missing, and if nothing is verified."""
    hardest: Sequence[HardRow] = ()
    """The rows with the smallest share of right samples, those first."""
    without_verdict: int = 0
    """Samples that the judge could not judge."""
    right: int | None = None
    """Samples that are right; None if nothing is verified."""
    unjudged: int = 0
    """Samples that are still to be judged."""
    cut_off: int = 0
    """Samples that ended at max_tokens or at the end of the context."""
    verify: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The job's section."""
    per_token: PerToken | None = None
    """None unless the job scores given texts."""
    shared: bool = False
    """Whether several processes wrote it side by side, each with steps of its own."""

    @property
    def pending(self) -> int:
        """Samples that a later start has to compute."""
        return self.samples - self.ok - self.errors - self.cancelled

    @property
    def whole(self) -> bool:
        """Whether the steps are those of all samples: a start that was killed leaves none, which the counts do not show where
        samples were computed again (--retry-errors, --repair)."""
        tokens = float(self.lengths.sum(dtype=np.int64)) if self.per_token is None else 0.0
        finished, sampled = (float(np.sum(self.steps.get(name, 0.0))) for name in ("finished", "sampled"))
        return bool(self.summary.get("steps_of_all_starts", True)) and finished >= self.ok and sampled >= tokens
