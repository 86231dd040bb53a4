"""Which chat template a job uses, and what is said where something given to it is not read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tokabatch.errors import JobError
from tokabatch.input.prompts.chat_template import ChatTemplate, chat_template_file, choose_chat_template
from tokabatch.job import PromptConfig

ONE = "{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}"
TWO = "{% generation %}{{ tools | tojson }}{%- endgeneration -%}{% if enable_thinking is defined %}think{% endif %}"


def choose(templates: dict[str, str], **prompt: Any) -> ChatTemplate | None:
    return choose_chat_template(PromptConfig(**prompt), templates, "model")


def test_the_tokenizer_s_own() -> None:
    assert choose({}) is None
    chosen = choose({"default": ONE})
    assert chosen and (chosen.source_for(None), chosen.source_for([])) == (ONE, ONE)
    chosen = choose({"default": ONE, "tool_use": TWO, "rag": "{{ rag }}"})
    assert chosen and (chosen.source_for(None), chosen.source_for([{}])) == (ONE, TWO)
    assert chosen.names == {"messages", "eos_token", "tools", "enable_thinking"}


def test_a_named_one() -> None:
    chosen = choose({"tool_use": TWO, "rag": ONE}, chat_template="rag")
    assert chosen and (chosen.source_for(None), chosen.source_for([{}])) == (ONE, ONE)
    with pytest.raises(JobError, match="no file 'tools', and the tokenizer of 'model' has the templates rag, tool_use"):
        choose({"tool_use": TWO, "rag": ONE}, chat_template="tools")
    with pytest.raises(JobError, match="no file 'tools', and the tokenizer of 'model' has no chat template of its own"):
        choose({}, chat_template="tools")


def test_several_of_which_none_is_the_default() -> None:
    with pytest.raises(JobError, match=r"has the chat templates rag, tool_use, but none called default.*chat_template: rag"):
        choose({"tool_use": TWO, "rag": ONE})
    assert choose({"tool_use": TWO, "rag": ONE}, chat=False) is None
    assert choose({"tool_use": TWO, "rag": ONE}, token_ids="ids") is None


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(TWO)
    config = PromptConfig(chat_template=str(file))
    assert chat_template_file(config) == file and chat_template_file(PromptConfig(chat_template="rag")) is None
    for templates in ({}, {"default": ONE}, {"tool_use": ONE, "rag": ONE}):
        chosen = choose(templates, chat_template=str(file))
        assert chosen and (chosen.source_for(None), chosen.source_for([{}])) == (TWO, TWO)
    file.write_bytes(b"\xef\xbb\xbf" + TWO.encode())
    chosen = choose({}, chat_template=str(file))
    assert chosen and chosen.source_for(None) == TWO, "an editor's mark of UTF-8 is not text"
    file.write_text("{% if x %}\n{{ y")
    with pytest.raises(JobError, match=r"prompt\.chat_template '.*chat\.jinja' is not a valid Jinja template: line 2"):
        choose({}, chat_template=str(file))
    file.write_bytes(b"\xff")
    with pytest.raises(JobError, match=r"chat\.jinja' is not UTF-8 text"):
        choose({}, chat_template=str(file))


def test_jinja_text() -> None:
    chosen = choose({"default": ONE}, chat_template=TWO)
    assert chosen and (chosen.source_for(None), chosen.source_for([{}])) == (TWO, TWO)
    assert choose({}, chat_template=TWO * 1000)
    with pytest.raises(JobError, match=r"prompt\.chat_template is not a valid Jinja template: line 1"):
        choose({}, chat_template="{{ x")


def test_a_faulty_one_of_the_tokenizer_matters_only_where_it_applies() -> None:
    with pytest.raises(JobError, match="the chat template 'default' of 'model' is not a valid Jinja template"):
        choose({"default": "{{"})
    assert choose({"default": "{{"}, chat=False) is None and choose({"default": "{{"}, token_ids="ids") is None


def test_what_the_template_does_not_read_is_noted() -> None:
    chosen = choose({"default": ONE, "tool_use": TWO}, chat_template_kwargs={"enable_thinking": False})
    assert chosen and chosen.describe(["tools", "messages"]) == ()
    chosen = choose({"default": TWO}, chat_template_kwargs={"enable_thinkin": False})
    assert chosen
    (sentence,) = chosen.describe(["tools"])
    assert "reads no 'enable_thinkin' (did you mean 'enable_thinking'?); of its own it reads enable_thinking" in sentence
    chosen = choose({"default": ONE})
    assert chosen and chosen.describe(["tools"]) == (
        "warning: the column 'tools' is not used: the chat template reads no tools",
    )
