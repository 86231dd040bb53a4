"""The columns that prompts are made of, as far as the job alone determines them, without a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache

from tokabatch.errors import InputError, JobError
from tokabatch.input.missing import ROW, did_you_mean, list_columns, optional
from tokabatch.input.prompts.templates import Template, compile_template
from tokabatch.job import Job, PromptConfig
from tokabatch.number_text import first_counted

DEFAULTS = PROMPT, MESSAGES, TOKEN_IDS = "prompt", "messages", "prompt_token_ids"
"""The columns that a prompt is taken from if the job names none, the first that is there."""
FIRST_ROWS = 1000
"""If none of this many first rows has a column that every prompt needs, the rest of the input is not read."""


class PromptColumns:
    """`templates` are the job's own, compiled; `defaults` the columns searched for a prompt if the job names none. Raises
    JobError for a template that is not valid Jinja and for settings that exclude each other."""

    def __init__(self, config: PromptConfig, compile: Callable[[str, str], Template] | None = None) -> None:
        compile = compile or cache(compile_template)
        self._config = config
        given = (("prompt.template", config.template), ("prompt.system", config.system))
        self.templates = {key: compile(source, key) for key, source in given if source}
        self.own_names = frozenset(name for template in self.templates.values() for name in template.names)
        self.defaults = self._default_columns()
        self.named = {
            name: key for key, name in (("prompt.messages", config.messages), ("prompt.token_ids", config.token_ids)) if name
        }

    def missing(self, present: Collection[str]) -> dict[str, str]:
        """Return the columns that every prompt needs and that are not `present`, each with the job's key that names it."""
        needed = {name: key for key, each in self.templates.items() for name in each.required(present)} | self.named
        return {name: needed[name] for name in sorted(needed) if name not in present}

    def check(self, present: Collection[str], rows: int | None = None) -> None:
        """Raise InputError if a column that every prompt needs is not `present` in the whole input, or in its first `rows`
        rows."""
        has, its, later = "the input has", "its", ""
        if rows is not None:
            has, its = (f"the {first_counted(rows, 'row')} have", "their") if rows > 1 else ("the first row has", "its")
            later = ". If later rows have it, put one of them first"
        if missing := self.missing(present):
            near = {name: did_you_mean(name, present, template=name in self.own_names) for name in missing}
            remedy = f". A template reads one by its name: {ROW}[...]" if list(missing) == [ROW] else ""
            unlike = [name for name in missing if name in self.own_names and not near[name]]
            if unlike and not remedy:
                filtered = any(unlike[0] in template.filtered for template in self.templates.values())
                remedy = f"; {optional(unlike[0], filtered=filtered)}"
            raise InputError(
                f"{next(iter(missing.values()))}: {has} no column {', '.join(f'{name}{near[name]}' for name in missing)}; "
                f"{its} columns are {list_columns(present)}{later}{remedy}"
            )
        if self.defaults and not set(self.defaults) & set(present):
            raise InputError(
                f"{has} no column {' or '.join(self.defaults)}; {its} columns are {list_columns(present)}. "
                'Set prompt.template, for example "{{ column }}", or name a column of chat messages as prompt.messages'
            )

    def _default_columns(self) -> tuple[str, ...]:
        config = self._config
        if config.template or config.messages or config.token_ids:
            if config.messages and config.few_shot:
                raise JobError("prompt.few_shot goes in front of text, not of prompt.messages; use prompt.template")
            return ()
        if config.few_shot:
            return (PROMPT,)
        return (PROMPT, MESSAGES) if config.system else DEFAULTS


def check_columns(job: Job, prompt: PromptColumns, present: Collection[str]) -> None:
    """Run the same check for all columns that the job names, on the whole input."""
    prompt.check(present)
    named = {"input.id_column": job.input.id_column, "verify.answer": job.verify.answer if job.verify else None}
    wanted = [(key, name) for key, name in named.items() if name]
    if job.mode == "score" and job.prompt.continuations != PromptConfig.model_fields["continuations"].default:
        # An input of whole texts has no column of the default name.
        wanted.append(("prompt.continuations", job.prompt.continuations))
    wanted += [("output.columns", name) for name in (() if job.output.columns == "all" else job.output.columns)]
    for key, name in wanted:
        if name not in present:
            hint = did_you_mean(name, present)
            raise InputError(f"{key}: the input has no column {name!r}{hint}; its columns are {list_columns(present)}")


def check_first_rows(prompt: PromptColumns, present: Collection[str], rows: int) -> None:
    """Run the same check on the first `rows` rows, which have the columns `present`; fewer than 1,000 rows are not checked."""
    if rows >= FIRST_ROWS and present:
        prompt.check(present, rows)
