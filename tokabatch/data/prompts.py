"""Rows to prompts: the source that the job names is rendered, few-shot examples and chat template applied, and tokenised.

A prompt comes from a template, a column of chat messages, a column of token ids or, by default, from the first of the columns
`prompt` (text or messages), `messages` and `prompt_token_ids` that a row fills. The chat template applies to messages always,
to text where `prompt.chat` is true, or auto and the tokenizer has one; token ids are taken as they are. This module reads no
files but the few-shot examples, and knows no schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from tokabatch.data.chat import normalise_messages, with_system
from tokabatch.data.few_shot import render_few_shot
from tokabatch.data.missing import list_columns, missing_field
from tokabatch.data.rows import Row
from tokabatch.data.special_text import SpecialText
from tokabatch.data.stop_texts import refuse_special
from tokabatch.data.templates import Template, compile_template
from tokabatch.errors import InputError, JobError, RowError
from tokabatch.job import GenerationConfig, PromptConfig
from tokabatch.messages import Int32, SamplingParams

if TYPE_CHECKING:
    from tokabatch.data.tokenizer import Tokenizer

PROMPT, MESSAGES, TOKEN_IDS = "prompt", "messages", "prompt_token_ids"
SAMPLING_PARAMS = "sampling_params"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row, ready to be scheduled. `token_ids` has shape [length], at least one."""

    row_index: int
    token_ids: Int32
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Draft:
    """A prompt before tokenisation. `pieces` replaces `text` where the row spells a special token: (text, is special)."""

    text: str = ""
    pieces: Sequence[tuple[str, bool]] | None = None
    token_ids: Sequence[int] | None = None
    add_special_tokens: bool = False


@dataclass(frozen=True, slots=True)
class Limits:
    """Token counts of the model: its context, and the ids that it has embeddings for."""

    context_length: int
    vocab_size: int


class PromptBuilder:
    """Holds what the job decides once for all rows. Raises JobError or InputError where that cannot work."""

    def __init__(self, config: PromptConfig, generation: GenerationConfig, tokenizer: Tokenizer, limits: Limits) -> None:
        self._config = config
        self._generation = generation
        self._params = generation.params()
        self._tokenizer = tokenizer
        self._limits = limits
        self._special = SpecialText(tokenizer.special_texts)
        self.chat = tokenizer.has_chat_template if config.chat == "auto" else config.chat
        self._refuse_missing_chat_template()
        self._template = compile_template(config.template, "prompt.template") if config.template else None
        self._system = compile_template(config.system, "prompt.system") if config.system else None
        self._few_shot = render_few_shot(config.few_shot) if config.few_shot else ""
        self._defaults = self._default_columns()
        self._draft = self._choose_source()
        self.columns = self._used_columns()
        self.hidden_rows = 0

    def check_columns(self, present: Collection[str]) -> None:
        """Raises InputError where the whole input lacks a column that every prompt needs."""
        guarded = (template for template in (self._template, self._system) if template)
        needed = {name for template in guarded for name in template.required}
        needed |= {name for name in (self._config.messages, self._config.token_ids) if name}
        missing = needed - set(present)
        if missing:
            raise InputError(
                f"prompt: the input has no column {list_columns(missing)}; its columns are {list_columns(present)}"
            )
        if self._defaults and not set(self._defaults) & set(present):
            raise InputError(
                f"the input has no column {' or '.join(self._defaults)}; its columns are {list_columns(present)}. "
                'Set prompt.template, for example "{{ column }}".'
            )

    def build(self, rows: Sequence[Row]) -> list[Prompt | RowError]:
        """One result a row, in order; all texts of the batch are tokenised in one call."""
        drafts = [row.error or self._safe_draft(row.columns or {}) for row in rows]
        plain = [draft for draft in drafts if isinstance(draft, Draft) and draft.token_ids is None and draft.pieces is None]
        encoded: dict[int, list[int]] = {}
        for special in (False, True):
            batch = [draft for draft in plain if draft.add_special_tokens is special]
            ids = self._tokenizer.encode_batch([draft.text for draft in batch], add_special_tokens=special) if batch else []
            encoded |= {id(draft): tokens for draft, tokens in zip(batch, ids, strict=True)}
        return [
            draft if isinstance(draft, RowError) else self._finish(row, self._token_ids(draft, encoded))
            for row, draft in zip(rows, drafts, strict=True)
        ]

    def _finish(self, row: Row, ids: Sequence[int] | RowError) -> Prompt | RowError:
        if isinstance(ids, RowError):
            return ids
        params = self._row_params(row.columns or {})
        if isinstance(params, RowError):
            return params
        if not ids:
            return RowError("empty_prompt", "the prompt has no tokens")
        if self._tokenizer.vocab_size > self._limits.vocab_size and (last := max(ids)) >= self._limits.vocab_size:
            return RowError(
                "bad_token_id",
                f"the prompt uses the token {self._tokenizer.token_text(last)!r} (id {last}), but the model has embeddings for "
                f"{self._limits.vocab_size} ids; leave it out of the row or the template, or use weights that have it",
            )
        if len(ids) + params.max_tokens > self._limits.context_length:
            return RowError(
                "prompt_too_long",
                f"the prompt has {len(ids)} tokens and max_tokens is {params.max_tokens}, together "
                f"{len(ids) + params.max_tokens}; the model's context is {self._limits.context_length}",
            )
        return Prompt(row.index, np.asarray(ids, dtype=np.int32), params)

    def _token_ids(self, draft: Draft, encoded: Mapping[int, list[int]]) -> Sequence[int] | RowError:
        if draft.token_ids is not None:
            return draft.token_ids
        if draft.pieces is not None:
            return self._tokenizer.encode_pieces(draft.pieces, draft.add_special_tokens)
        return encoded[id(draft)]

    def _row_params(self, row: Mapping[str, Any]) -> SamplingParams | RowError:
        given = row.get(SAMPLING_PARAMS)
        if given is None:
            return self._params
        if not isinstance(given, Mapping):
            return RowError("bad_sampling", f"{SAMPLING_PARAMS} must be an object of settings, not {type(given).__name__}")
        params = self._generation.row_params(cast("Mapping[str, Any]", given))
        if isinstance(params, SamplingParams):
            beyond = [token for token in params.stop_token_ids if token >= self._limits.vocab_size]
            if beyond or (params.logprobs or 0) > self._limits.vocab_size:
                asked = f"stop_token_ids names {beyond[0]}" if beyond else f"logprobs is {params.logprobs}"
                return RowError("bad_sampling", f"{asked}, but the model has {self._limits.vocab_size} tokens")
            if fault := refuse_special(params.stop, self._tokenizer.special_texts):
                return RowError("bad_sampling", f"{SAMPLING_PARAMS}.{fault}")
        return params

    def _safe_draft(self, row: Mapping[str, Any]) -> Draft | RowError:
        draft = self._draft(row)
        limit = self._limits.context_length
        if isinstance(draft, Draft) and self._tokenizer.exceeds(draft.text, limit):
            return RowError(
                "prompt_too_long",
                f"the prompt of {len(draft.text)} characters has more than {2 * limit} tokens; the model's context is {limit}",
            )
        return draft

    def _from_template(self, row: Mapping[str, Any]) -> Draft | RowError:
        assert self._template is not None
        used = self._used(row, self._template)
        if isinstance(used, RowError):
            return used
        values, hidden = used
        text = self._template.render(values)
        if isinstance(text, RowError):
            return text
        return self._from_text(text, values, hidden)

    def _from_messages(self, row: Mapping[str, Any], column: str) -> Draft | RowError:
        if row.get(column) is None:
            return missing_field(column, row)
        messages = normalise_messages(row[column], column)
        if isinstance(messages, RowError):
            return messages
        used = self._used({**row, column: messages}, None, column)
        if isinstance(used, RowError):
            return used
        values, hidden = used
        system = self._system.render(values) if self._system else None
        if isinstance(system, RowError):
            return system
        return self._chat(with_system(values[column], system), hidden)

    def _from_token_ids(self, row: Mapping[str, Any], column: str) -> Draft | RowError:
        value = row.get(column)
        if value is None:
            return missing_field(column, row)
        if not isinstance(value, list) or not all(type(item) is int for item in cast("list[Any]", value)):
            return RowError("bad_type", f"the column {column!r} must hold a list of token ids (whole numbers)")
        ids = cast("list[int]", value)
        outside = next((token for token in ids if not 0 <= token < self._limits.vocab_size), None)
        if outside is not None:
            return RowError("bad_token_id", f"token id {outside} is outside the model's {self._limits.vocab_size} ids")
        return Draft(token_ids=ids)

    def _from_defaults(self, row: Mapping[str, Any]) -> Draft | RowError:
        column = next((name for name in self._defaults if row.get(name) is not None), None)
        if column is None:
            return missing_field(next((name for name in self._defaults if name in row), self._defaults[0]), row)
        if column == TOKEN_IDS:
            return self._from_token_ids(row, column)
        value = row[column]
        if column == MESSAGES or (isinstance(value, list) and not self._few_shot):
            return self._from_messages(row, column) if self._tokenizer.has_chat_template else self._no_chat_template(column)
        if not isinstance(value, str):
            return RowError("bad_type", f"the column {column!r} must hold text, not {type(value).__name__}")
        leading = "" if self.chat else self._tokenizer.prefix_text
        own_prefix = leading if leading and value.startswith(leading) else ""
        used = self._used({**row, column: value.removeprefix(own_prefix)}, None, column)
        if isinstance(used, RowError):
            return used
        values, hidden = used
        return self._from_text(values[column], values, hidden, own_prefix)

    def _from_text(self, text: str, values: Mapping[str, Any], hidden: bool, own_prefix: str = "") -> Draft | RowError:
        if not text.strip():
            return RowError("empty_prompt", "the prompt is empty")
        text = own_prefix + self._few_shot + text
        if not self.chat:
            return Draft(text, self._special.cut(text) if hidden else None, add_special_tokens=True)
        system = self._system.render(values) if self._system else None
        if isinstance(system, RowError):
            return system
        return self._chat(with_system([{"role": "user", "content": text}], system), hidden)

    def _chat(self, messages: list[dict[str, Any]], hidden: bool) -> Draft | RowError:
        """The chat template writes its own BOS, so none is added."""
        text = self._tokenizer.apply_chat_template(messages)
        if isinstance(text, RowError):
            return text
        return Draft(text, self._special.cut(text) if hidden else None)

    def _used(
        self, row: Mapping[str, Any], template: Template | None, column: str | None = None
    ) -> tuple[dict[str, Any], bool] | RowError:
        """The values that reach the prompt, special tokens in them treated as the job says, and whether any are hidden."""
        names = {name for each in (template, self._system) if each for name in each.names} | {column}
        values = {name: value for name, value in row.items() if name in names}
        mode = self._config.special_tokens
        found = None if mode == "allow" else self._special.first_in(values)
        if found is None:
            return values, False
        if mode == "reject":
            return RowError("special_token", f"the row spells the special token {found!r} (prompt.special_tokens: reject)")
        self.hidden_rows += 1
        return self._special.hide(values), True

    def _no_chat_template(self, column: str) -> RowError:
        return RowError("bad_messages", f"the column {column!r} holds messages, but the tokenizer has no chat template")

    def _refuse_missing_chat_template(self) -> None:
        config, name = self._config, self._tokenizer.name
        wants = "prompt.chat: true" if config.chat is True else "prompt.messages" if config.messages else None
        wants = wants or ("prompt.system" if config.system else None)
        if wants and not self._tokenizer.has_chat_template:
            raise JobError(f"{wants} needs a chat template, but the tokenizer of {name!r} has none; use prompt.template alone")

    def _default_columns(self) -> tuple[str, ...]:
        config = self._config
        if config.template or config.messages or config.token_ids:
            if config.messages and config.few_shot:
                raise JobError("prompt.few_shot goes in front of text, not of prompt.messages; use prompt.template")
            return ()
        if self._few_shot:
            return (PROMPT,)
        return (PROMPT, MESSAGES) if self._system else (PROMPT, MESSAGES, TOKEN_IDS)

    def _choose_source(self) -> Callable[[Mapping[str, Any]], Draft | RowError]:
        messages, token_ids = self._config.messages, self._config.token_ids
        if self._template:
            return self._from_template
        if messages:
            return lambda row: self._from_messages(row, messages)
        if token_ids:
            return lambda row: self._from_token_ids(row, token_ids)
        return self._from_defaults

    def _used_columns(self) -> frozenset[str]:
        names = {name for template in (self._template, self._system) if template for name in template.names}
        names |= {name for name in (self._config.messages, self._config.token_ids) if name}
        return frozenset(names | set(self._defaults) | {SAMPLING_PARAMS})
