"""Limits of engine settings that follow from the model and the job alone: what is refused before torch is imported."""

from __future__ import annotations

from tokabatch.errors import JobError
from tokabatch.job import EngineConfig
from tokabatch.number_text import counted

MAX_QUEUE_DEPTH = 3


def refuse_limits(config: EngineConfig, context_length: int) -> None:
    """Raise JobError for settings that no replica of a model with this context can have."""
    if config.page_size > context_length:
        raise JobError(
            f"engine.page_size is {config.page_size}, more than the model's context of {counted(context_length, 'token')}; "
            "write 16"
        )
    if config.queue_depth != "auto" and config.queue_depth > MAX_QUEUE_DEPTH:
        raise JobError(
            f"engine.queue_depth is {config.queue_depth}; more than {MAX_QUEUE_DEPTH} steps ahead gain nothing, write 1 to "
            f"{MAX_QUEUE_DEPTH} or auto"
        )


def least_pages(shortest: int, page_size: int) -> int:
    """Return the pages that a sample of `shortest` tokens needs: one more than its own, as the last page of its prompt is
    copied for it."""
    return -(-shortest // page_size) + 1


def refuse_small_cache(config: EngineConfig, least: int) -> None:
    """Raise JobError if the job's KV cache holds less than the `least` pages of the shortest sample."""
    asked, page = config.kv_cache_tokens, config.page_size
    if asked != "auto" and asked // page < least:
        raise JobError(
            f"engine.kv_cache_tokens is {asked}, but the shortest sample needs at least {least * page} (prompt plus "
            "max_tokens, in pages); write auto, which takes what memory holds, or lower generation.max_tokens"
        )
