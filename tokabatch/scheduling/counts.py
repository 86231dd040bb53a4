"""Running totals of a scheduler, for the progress display and the summary."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class SchedulerCounts:
    """Running totals of one scheduler."""

    steps: int = 0
    prompt_tokens: int = 0
    """Prompt tokens of admitted samples, each sample counting its whole prompt."""
    cached_tokens: int = 0
    """Prompt tokens, of `prompt_tokens`, that were already computed when the sample was admitted."""
    prefilled_tokens: int = 0
    output_tokens: int = 0
    finished: int = 0
    finished_prompts: int = 0
    """Prompts all of whose samples are finished."""
    preemptions: int = 0
    given_up_tokens: int = 0
    """Positions of preempted samples that have to be computed again."""
    recomputed_tokens: int = 0
    """Positions computed again when a preempted or requeued sample was readmitted."""
    waited_steps: int = 0
    """Steps in which running samples waited for pages, summed over samples."""
    requeued: int = 0
    """Running samples requeued because the worker was lost."""
