"""Choose the chat template of a job, and check it; nothing is rendered here.

`prompt.chat_template` (a file, the name of one of the tokenizer's templates, or Jinja text) comes first, then the tokenizer's
own: `default`, or `tool_use`, if it exists, for rows with tools. `prompt.chat_template_kwargs` and a row's columns `tools` and
`documents` reach the template as variables of these names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tokabatch.errors import JobError
from tokabatch.input.missing import did_you_mean, list_columns
from tokabatch.input.prompts.blanking import Blank
from tokabatch.job import PromptConfig

DEFAULT, TOOL_USE = "default", "tool_use"
TOOLS, DOCUMENTS = "tools", "documents"
GIVEN = frozenset(("messages", "add_generation_prompt", TOOLS, DOCUMENTS, "raise_exception", "strftime_now"))
"""Variables and functions passed to every template."""
_GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
"""A tag of transformers that marks the assistant's words and prints nothing."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The sources of a job's chat template: `source`, and `with_tools` for rows that bring tools."""

    source: str
    with_tools: str
    kwargs: Mapping[str, Any]
    names: frozenset[str]
    """The variables that the two sources read."""

    def source_for(self, tools: Any) -> str:
        """Return the template for a row with these tools, which may be None."""
        return self.source if tools is None else self.with_tools

    def describe(self, columns: Collection[str]) -> tuple[str, ...]:
        """Return notes on variables that the template does not read; `columns` are the input's."""
        own = [name for name in sorted(self.names - GIVEN) if not name.endswith("_token")]
        sentences = [
            f"warning: prompt.chat_template_kwargs: the chat template reads no {name!r}{did_you_mean(name, own)}; of its own "
            f"it reads {list_columns(own)}"
            for name in self.kwargs
            if name not in self.names
        ]
        if TOOLS in columns and TOOLS not in self.names:
            sentences.append("warning: the column 'tools' is not used: the chat template reads no tools")
        return tuple(sentences)


def choose_chat_template(config: PromptConfig, templates: Mapping[str, str], tokenizer: str) -> ChatTemplate | None:
    """Return the job's chat template, None if none applies; `templates` are the tokenizer's by name. Raises JobError for a
    template that does not exist or is not Jinja, and for an ambiguous choice."""
    sources = None if config.token_ids else _sources(config, templates, tokenizer)
    if sources is None:
        return None
    try:
        names = frozenset[str]().union(*(_variables(source, key) for key, source in sources.items()))
    except JobError:
        if config.chat is False:
            return None
        raise
    first, *others = sources.values()
    return ChatTemplate(first, others[0] if others else first, config.chat_template_kwargs, names)


def refuse_missing_chat_template(config: PromptConfig, tokenizer: str) -> None:
    """Raise JobError if the job needs a chat template; called where there is none."""
    instead = "remove prompt.chat: the model then continues the text of prompt.template"
    needs = {
        "prompt.messages": (config.messages, "write the prompt as prompt.template instead"),
        "prompt.system": (config.system, "put its text in front of prompt.template instead"),
        "prompt.chat: true": (config.chat is True, instead),
        "prompt.chat_template_kwargs": (config.chat_template_kwargs, "remove them"),
    }
    if key := next((key for key, (needed, _) in needs.items() if needed), None):
        raise JobError(
            f"{key} needs a chat template, but the tokenizer of {tokenizer!r} has none: base models have none, instruct models "
            f"do; give one as prompt.chat_template, or {needs[key][1]}"
        )


def blank_texts(value: Any, blank: Blank) -> Any:
    """Return the value with `blank` applied to the texts in it, at any depth."""
    if isinstance(value, str):
        return blank(value)
    if isinstance(value, Mapping):
        return {key: blank_texts(item, blank) for key, item in cast("Mapping[str, Any]", value).items()}
    return [blank_texts(item, blank) for item in cast("list[Any]", value)] if isinstance(value, list) else value


def chat_template_file(config: PromptConfig) -> Path | None:
    """Return the file that `prompt.chat_template` names; None if it names none."""
    given = config.chat_template
    return Path(given) if given and not is_jinja(given) and Path(given).is_file() else None


def _sources(config: PromptConfig, templates: Mapping[str, str], tokenizer: str) -> dict[str, str] | None:
    """Return the template's source by its name in messages, followed by the source for rows with tools if that differs."""
    chosen, file = config.chat_template, chat_template_file(config)
    if file is not None:
        return {f"prompt.chat_template {chosen!r}": _read(file)}
    if chosen is not None and is_jinja(chosen):
        return {"prompt.chat_template": chosen}
    if chosen is not None and chosen not in templates:
        held = f"has the templates {_listed(templates)}" if templates else "has no chat template of its own"
        raise JobError(f"prompt.chat_template: there is no file {chosen!r}, and the tokenizer of {tokenizer!r} {held}")
    name = chosen or DEFAULT
    if name in templates:
        wanted = [name] if chosen or TOOL_USE not in templates else [name, TOOL_USE]
        return {f"the chat template {each!r} of {tokenizer!r}": templates[each] for each in wanted}
    if templates and config.chat is not False:
        raise JobError(
            f"the tokenizer of {tokenizer!r} has the chat templates {_listed(templates)}, but none called default; write one "
            f"of them as prompt.chat_template, for example `chat_template: {min(templates)}`, or `chat: false` for none"
        )
    return None


def is_jinja(text: str) -> bool:
    """Return whether a text is a template, not the name of one or of a file."""
    return "{%" in text or "{{" in text


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise JobError(
            f"prompt.chat_template {str(file)!r} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise JobError(f"prompt.chat_template {str(file)!r} cannot be read: {error.strerror}") from error


def _variables(source: str, key: str) -> frozenset[str]:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    try:
        return frozenset(find_undeclared_variables(environment.parse(_GENERATION.sub("", source))))
    except TemplateSyntaxError as error:
        raise JobError(f"{key} is not a valid Jinja template: line {error.lineno}: {error.message}") from error
    except (TemplateError, RecursionError) as error:
        raise JobError(f"{key} is not a valid Jinja template: {error}") from error


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
