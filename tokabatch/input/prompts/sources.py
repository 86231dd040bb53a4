"""The text or token ids of one row's prompt, before tokenisation.

A prompt comes from a template, a column of chat messages, a column of token ids or, by default, from the first of the columns
`prompt` (text or messages), `messages` and `prompt_token_ids` that has a value in the row. The chat template applies to
messages always, and to text if `prompt.chat` is true, or auto and the tokenizer has one; token ids are taken as they are. All
words that are not the row's own pass through `blank`, which later identifies them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from tokabatch.errors import RowError
from tokabatch.input.kinds import kind_of
from tokabatch.input.missing import ROW, missing_field
from tokabatch.input.prompts.blanking import Blank, as_written
from tokabatch.input.prompts.chat import (
    arguments_as_object,
    arguments_as_text,
    decoded,
    normalise_messages,
    plain_values,
    read_kwargs,
    read_objects,
    refuse_left_out,
    refuse_roles,
    with_arguments,
    with_system,
)
from tokabatch.input.prompts.chat_template import (
    DOCUMENTS,
    TOOLS,
    blank_texts,
    choose_chat_template,
    refuse_missing_chat_template,
)
from tokabatch.input.prompts.columns import MESSAGES, PROMPT, TOKEN_IDS, PromptColumns
from tokabatch.input.prompts.few_shot import render_few_shot
from tokabatch.input.prompts.printing import NotText
from tokabatch.input.prompts.templates import compile_template
from tokabatch.job import PromptConfig
from tokabatch.number_text import counted

if TYPE_CHECKING:
    from tokabatch.input.tokenizer.tokenizer import Tokenizer

SAMPLING_PARAMS = "sampling_params"
TEMPLATE_KWARGS = "chat_template_kwargs"


@dataclass(frozen=True, slots=True)
class Draft:
    """A prompt before tokenisation."""

    text: str = ""
    token_ids: Sequence[int] | None = None
    add_special_tokens: bool = False


class PromptSource:
    """Makes a row's prompt as the job describes it, for a tokenizer whose ids end at `vocab_size`. In `typed` rows an object
    has every key that any row's object has; `now` is the time that chat templates see. If rows are requests (`of_requests`),
    tools and documents that no template reads are an error. Raises JobError or InputError for settings that cannot work."""

    def __init__(
        self,
        config: PromptConfig,
        tokenizer: Tokenizer,
        vocab_size: int,
        *,
        typed: bool,
        now: datetime,
        of_requests: bool = False,
    ) -> None:
        self._of_requests = of_requests
        self._config = config
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._typed = typed
        self._now = now
        self._chat_template = choose_chat_template(config, tokenizer.chat_templates, tokenizer.name)
        self._compile = cache(compile_template)
        self._render_examples = cache(render_few_shot)
        self.chat = self._chat_template is not None if config.chat == "auto" else config.chat
        if self._chat_template is None:
            refuse_missing_chat_template(config, tokenizer.name)
        self.own = PromptColumns(config, self._compile)
        # Columns read by the job's own template are not passed to the chat template.
        read = frozenset[str]() if self._chat_template is None else self._chat_template.names
        self._chat_columns = (frozenset((TOOLS, DOCUMENTS)) & read) - self.own.own_names
        self._kwargs_column = (frozenset[str]() if self._chat_template is None else {TEMPLATE_KWARGS}) - self.own.own_names
        self.few_shot()
        of_job = self.own.own_names | self.own.named.keys() | frozenset(self.own.defaults)
        self.columns = of_job | self._chat_columns | self._kwargs_column

    @property
    def chat_template(self) -> str:
        """The chat template that applies to rows without tools, empty if none does."""
        applied = self._chat_template if self.chat or self._config.messages else None
        return applied.source if applied else ""

    def describe(self, present: Collection[str]) -> tuple[str, ...]:
        """Return notes on columns that no chat template reads and on ambiguous names; `present` are the input's columns."""
        by_name = {name for template in self.own.templates.values() for name in template.by_name} & set(present)
        fields = [f"{ROW}[{name!r}]" for name in sorted(by_name - {ROW}) if ROW in present]
        twofold = [f"{', '.join(fields)}: a field of the column {ROW!r}, not a column; rename {ROW!r} to name columns so"]
        columns = set(present) - self.own.own_names
        if self._chat_template and (self.chat or self._config.messages or MESSAGES in present):
            unread = self._chat_template.describe(columns)
        else:
            unread = ("warning: the column 'tools' is not used: no chat template applies",) if TOOLS in columns else ()
        return (*(twofold if fields else ()), *unread)

    def draft(self, row: Mapping[str, Any], blank: Blank = as_written) -> Draft | RowError:
        """Return the prompt of a row; the sources of all templates, and the special texts around the row's text, pass through
        `blank`."""
        try:
            if self._config.template is not None:
                text = self._compile(blank(self._config.template), "prompt.template").render(row)
                return text if isinstance(text, RowError) else self._from_text(text, row, blank)
            if self._config.messages is not None:
                return self._from_messages(row, self._config.messages, blank)
            if self._config.token_ids is not None:
                return self._from_token_ids(row, self._config.token_ids)
            return self._from_defaults(row, blank)
        except NotText as error:
            return RowError("bad_type", str(error))

    def own_part(self, row: Mapping[str, Any]) -> str:
        """Return the row's own part of its prompt, without examples and the chat template: its text, or the last message of the
        user; empty for token ids and where there is none."""
        if self._config.template is not None:
            text = self._compile(self._config.template, "prompt.template").render(row)
            return "" if isinstance(text, RowError) else text
        column = self._config.messages or next((name for name in self.own.defaults if row.get(name) is not None), None)
        if column is None or self._config.token_ids is not None or column == TOKEN_IDS:
            return ""
        if isinstance(row[column], str) and self._config.messages is None and column != MESSAGES:
            return row[column]
        messages = normalise_messages(self._given(row[column]), column)
        of_user = [] if isinstance(messages, RowError) else [each for each in messages if each["role"] == "user"]
        return str(of_user[-1].get("content", "")) if of_user else ""

    def values(self, row: Mapping[str, Any]) -> Iterator[Any]:
        """Iterate over the values that a row's prompt is made of, with JSON text of messages, their tool calls, tools and
        documents parsed."""
        for name in self.columns & row.keys():
            structured = name in self._chat_columns | self._kwargs_column or name in (self._config.messages, MESSAGES)
            structured = structured or (name == PROMPT and isinstance(row[name], list))
            yield with_arguments(decoded(row[name]), arguments_as_object) if structured else row[name]

    def wraps(self, row: Mapping[str, Any]) -> bool:
        """Return whether a text of the row goes through the chat template."""
        return self.chat and (self._config.template is not None or isinstance(row.get(PROMPT), str))

    def few_shot(self, blank: Blank = as_written) -> str:
        """Return the examples in front of every prompt."""
        few_shot = self._config.few_shot
        return self._render_examples(few_shot.path, few_shot.k, blank(few_shot.template)) if few_shot else ""

    def _from_messages(self, row: Mapping[str, Any], column: str, blank: Blank) -> Draft | RowError:
        if row.get(column) is None:
            return missing_field(column, row)
        messages = normalise_messages(self._given(row[column]), column)
        return messages if isinstance(messages, RowError) else self._chat(messages, row, blank)

    def _from_token_ids(self, row: Mapping[str, Any], column: str) -> Draft | RowError:
        value = row.get(column)
        if value is None:
            return missing_field(column, row)
        if not isinstance(value, list) or not set(map(type, cast("list[Any]", value))) <= {int}:
            return RowError("bad_type", f"the column {column!r} must hold a list of token ids (whole numbers)")
        ids = cast("list[int]", value)
        if ids and not (min(ids) >= 0 and max(ids) < self._vocab_size):
            outside = next(token for token in ids if not 0 <= token < self._vocab_size)
            return RowError("bad_token_id", f"token id {outside} is outside the model's {counted(self._vocab_size, 'id')}")
        return Draft(token_ids=ids)

    def _from_defaults(self, row: Mapping[str, Any], blank: Blank) -> Draft | RowError:
        column = next((name for name in self.own.defaults if row.get(name) is not None), None)
        if column is None:
            return missing_field(next((name for name in self.own.defaults if name in row), self.own.defaults[0]), row)
        if column == TOKEN_IDS:
            return self._from_token_ids(row, column)
        value = row[column]
        if column == MESSAGES or (isinstance(value, list) and not self._config.few_shot):
            if self._chat_template is None:
                what = f"the column {column!r} holds messages, but the tokenizer has no chat template"
                return RowError("bad_messages", f"{what}; give one as prompt.chat_template")
            return self._from_messages(row, column, blank)
        if not isinstance(value, str):
            kind = "binary data that is not UTF-8" if isinstance(value, bytes) else kind_of(value)
            return RowError("bad_type", f"the column {column!r} must hold text, not {kind}")
        leading = "" if self.chat else self._tokenizer.prefix_text
        own = leading if leading and value.startswith(leading) else ""
        return self._from_text(value.removeprefix(own), row, blank, blank(own))

    def _from_text(self, text: str, row: Mapping[str, Any], blank: Blank, own_prefix: str = "") -> Draft | RowError:
        if not text.strip():
            return RowError("empty_prompt", "the prompt is empty")
        text = own_prefix + self.few_shot(blank) + text
        if not self.chat:
            return Draft(text, add_special_tokens=True)
        return self._chat([{"role": "user", "content": text}], row, blank)

    def _chat(self, messages: list[dict[str, Any]], row: Mapping[str, Any], blank: Blank) -> Draft | RowError:
        """Apply the chat template, which writes its own BOS: none is added."""
        assert self._chat_template is not None
        system = None
        if self._config.system is not None:
            system = self._compile(blank(self._config.system), "prompt.system").render(row)
        if isinstance(system, RowError):
            return system
        unread = next((name for name in (TOOLS, DOCUMENTS) if row.get(name) and name not in self._chat_columns), None)
        if unread is not None and self._of_requests:
            return RowError(f"unread_{unread}", f"{unread} is not used by the chat template; leave {unread} out")
        given = {name: read_objects(self._given(row.get(name)), name) for name in self._chat_columns}
        fault = next((each for each in given.values() if isinstance(each, RowError)), None)
        if fault:
            return fault
        own = read_kwargs(self._given(row.get(TEMPLATE_KWARGS) if self._kwargs_column else None), TEMPLATE_KWARGS)
        if isinstance(own, RowError):
            return own
        template = self._chat_template.source_for(given.get(TOOLS))
        if fault := refuse_roles(messages, template):
            return fault
        variables = blank_texts(self._chat_template.kwargs, blank) | own | given

        def render(convert: Callable[[Any], Any]) -> str | RowError:
            conversation = with_arguments(with_system(messages, system), convert)
            return self._tokenizer.apply_chat_template(conversation, template, variables, self._now, blank)

        text = render(arguments_as_object)
        if isinstance(text, RowError) and any(message.get("tool_calls") for message in messages):
            # A template that concatenates the arguments with text fails on an object.
            as_text = render(arguments_as_text)
            text = text if isinstance(as_text, RowError) else as_text
        if isinstance(text, RowError):
            return text
        return refuse_left_out(messages, template, text) or Draft(text)

    def _given(self, value: Any) -> Any:
        return plain_values(value) if self._typed else value
