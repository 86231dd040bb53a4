"""What a scheduler has done so far, for progress display and summary."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class SchedulerCounts:
    """Running totals of one scheduler."""

    steps: int = 0
    prompt_tokens: int = 0
    """Prompt tokens of admitted samples, each sample counting its whole prompt."""
    cached_tokens: int = 0
    """Those among them that were already computed when the sample was admitted."""
    prefilled_tokens: int = 0
    output_tokens: int = 0
    finished: int = 0
    finished_prompts: int = 0
    """Prompts all of whose samples are finished."""
    preemptions: int = 0
    given_up_tokens: int = 0
    """Positions of preempted samples that have to be computed again."""
    recomputed_tokens: int = 0
    """Positions computed again once a sample came back, preempted or taken back."""
    waited_steps: int = 0
    """Steps that running samples sat out for want of pages, summed over samples."""
    requeued: int = 0
    """Running samples taken back because the worker was lost."""
