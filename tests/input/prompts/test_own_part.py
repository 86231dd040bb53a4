"""The row's own part of its prompt, which people see beside its samples."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from tokabatch.input.prompts.sources import PromptSource
from tokabatch.input.tokenizer.tokenizer import Tokenizer
from tokabatch.job import PromptConfig

TURNS = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "1"}, {"role": "user", "content": "two"}]


@pytest.mark.parametrize(
    ("config", "row", "own"),
    [
        ({"template": "Q: {{ q }}", "system": "be brief"}, {"q": "why"}, "Q: why"),
        ({}, {"prompt": "[plain]", "messages": TURNS}, "[plain]"),
        ({}, {"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}, "ab"),
        ({"messages": "turns"}, {"turns": TURNS}, "two"),
        ({"messages": "turns"}, {"turns": '[{"role": "user", "content": "as JSON"}]'}, "as JSON"),
        ({}, {"messages": [*TURNS, {"role": "assistant", "content": "It is"}]}, "two"),
        ({}, {"messages": [{"role": "system", "content": "s"}]}, ""),
        ({}, {"prompt_token_ids": [5, 6]}, ""),
        ({"token_ids": "ids"}, {"ids": [5, 6]}, ""),
    ],
)
def test_own_part(config: dict[str, Any], row: dict[str, Any], own: str, tokenizers: dict[str, Tokenizer]) -> None:
    source = PromptSource(PromptConfig(**config), tokenizers["chat"], 1000, typed=False, now=datetime.min)
    assert source.own_part(row) == own
    assert bool(source.chat_template) == ("token_ids" not in config)
