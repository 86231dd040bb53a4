"""Split a sample's text into reasoning and answer, at the model's own end-of-thinking marker."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from tokabatch.errors import JobError


@dataclass(frozen=True, slots=True)
class ReasoningTags:
    """The tags around a model's reasoning; `begin` may be at the end of the prompt instead."""

    begin: str
    end: str


KNOWN_TAGS = (
    ReasoningTags("<think>", "</think>"),
    ReasoningTags("[THINK]", "[/THINK]"),
    ReasoningTags("<reasoning>", "</reasoning>"),
    ReasoningTags("<thought>", "</thought>"),
)
"""Tags of reasoning models: Qwen3, QwQ and DeepSeek-R1 write the first, Magistral the second."""


def choose_tags(
    setting: str | Sequence[str], *, templates: Iterable[str], is_token: Callable[[str], bool], special: Collection[str]
) -> ReasoningTags:
    """Return the tags for `output.split_reasoning`: those given or, for `auto`, the known ones whose end tag is one of the
    tokenizer's tokens or in a chat template. Raises JobError if there are none, or if decoded texts lack them."""
    if setting == "auto":
        written = "\n".join(templates)
        found = next((tags for tags in KNOWN_TAGS if tags.end in written or is_token(tags.end)), None)
        if found is None:
            known = ", ".join(tags.end for tags in KNOWN_TAGS)
            raise JobError(
                f"output.split_reasoning is auto, but the tokenizer has none of {known}; write the model's own tags, such as "
                "['<think>', '</think>'], or remove the key"
            )
    else:
        begin, end = setting
        found = ReasoningTags(begin, end)
    if found.end in special:
        raise JobError(
            f"output.split_reasoning: {found.end} is a special token of this tokenizer, which texts are written without; "
            "remove the key and split by token_ids"
        )
    return found


def split_reasoning(text: str, tags: ReasoningTags, *, begun: bool) -> tuple[str | None, str | None]:
    """Return the reasoning and the answer, stripped of white space, each None if it is missing. `begun` means that the prompt
    ended with the begin tag. A text that ends within its reasoning has no answer; one without tags is an answer."""
    before, marker, after = text.partition(tags.end)
    opened = before.lstrip().startswith(tags.begin)
    if not marker and not opened and not begun:
        return None, text
    thinking = before.lstrip().removeprefix(tags.begin).strip()
    return thinking, after.strip() if marker else None
