"""The body of a completions or chat request, read strictly: what the engine is to do, or the error that names the field.

A field that would change the answer and cannot be honoured is refused; one that asks for what happens anyway (`best_of: 1`),
and one that changes no answer (`user`), passes. Fields that other servers add (`top_k`, `min_p`, `stop_token_ids`) are read
as those servers read them. A null is a field that is not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from pydantic import ValidationError

from tokabatch.job import GenerationConfig
from tokabatch.job.fields import DECIDED_KWARGS
from tokabatch.job.refusals import refusals_of
from tokabatch.openai.errors import ApiError, unsupported
from tokabatch.openai.request_fields import SETTINGS, refuse_field

Url = Literal["/v1/completions", "/v1/chat/completions"]
COMPLETIONS: Url = "/v1/completions"
CHAT: Url = "/v1/chat/completions"
MOST_LOGPROBS = 20
DEFAULT_MAX_TOKENS = 16
"""Of a completions request, as the API has it; a chat request that does not say it is not bounded."""

Prompt = str | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """The content of one request. A chat request has `messages` and no `prompts`; a completions request has at least one
    prompt, each text or token ids, and its answer has `settings["n"]` choices for each."""

    url: Url
    model: str | None
    """None where the request names none: the model that is served then."""
    prompts: tuple[Prompt, ...] = ()
    messages: list[dict[str, Any]] | None = None
    chat: Mapping[str, Any] = field(default_factory=dict)
    """Of `tools`, `documents` and `chat_template_kwargs` those that are given: what the chat template gets beside messages."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the job's section `generation`, those alone that the request gives; `logprobs` among them."""
    echo: bool = False
    """Whether the answer begins with the prompt; of a completions request, where `max_tokens` may be 0 then."""
    stream: bool = False
    include_usage: bool = False
    """Whether a stream ends with the token counts (`stream_options`)."""

    @property
    def n(self) -> int:
        """Choices for each prompt."""
        return int(self.settings.get("n", 1))

    @property
    def logprobs(self) -> int | None:
        """How many most likely tokens to report beside the chosen one; None: no log-probabilities at all."""
        return self.settings.get("logprobs")

    @property
    def prompt_field(self) -> str:
        """The field that errors of the prompt name."""
        return "prompt" if self.messages is None else "messages"

    def rows(self) -> list[dict[str, Any]]:
        """A row for each prompt, with the columns that `PromptBuilder` reads."""
        settings = {"sampling_params": dict(self.settings)} if self.settings else {}
        if self.messages is not None:
            return [{"messages": self.messages, **self.chat, **settings}]
        columns = ("prompt" if isinstance(prompt, str) else "prompt_token_ids" for prompt in self.prompts)
        values = (prompt if isinstance(prompt, str) else list(prompt) for prompt in self.prompts)
        return [{column: value, **settings} for column, value in zip(columns, values, strict=True)]


class _Fault(Exception):
    """Carries the error to `parse_request`."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.message)
        self.error = error


def parse_request(url: str, body: Any) -> Request | ApiError:
    """The request in `body`, the parsed JSON that is sent to `url`."""
    try:
        return _parse(url, body)
    except _Fault as fault:
        return fault.error


def _parse(url: str, body: Any) -> Request:
    if url not in (COMPLETIONS, CHAT):
        raise _Fault(ApiError(f"the url {url!r} is not served; use {COMPLETIONS} or {CHAT}", "url", "invalid_value", 404))
    if not isinstance(body, dict):
        raise _Fault(ApiError(f"the body must be a JSON object, not {_kind(body)}", None, "invalid_type"))
    given = {name: value for name, value in cast("dict[str, Any]", body).items() if value is not None}
    for name, value in given.items():
        if fault := refuse_field(name, value, url == CHAT):
            raise _Fault(fault)
    model = given.get("model")
    if model is not None and not isinstance(model, str):
        raise _wrong_type("model", model, "text")
    stream, options = _flag(given, "stream"), given.get("stream_options", {})
    if isinstance(options, dict):
        options = {name: value for name, value in cast("dict[str, Any]", options).items() if value is not None}
    if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation", "continuous_usage_stats"}:
        raise _Fault(ApiError("stream_options accepts include_usage", "stream_options", "invalid_value"))
    if options.get("continuous_usage_stats"):
        field = "stream_options.continuous_usage_stats"
        raise _Fault(unsupported(field, "is not supported; include_usage: true gives the usage at the end"))
    if options and not stream:
        raise _Fault(ApiError("stream_options needs stream: true", "stream_options", "invalid_value"))
    usage = _flag(options, "include_usage", "stream_options.include_usage")
    common: dict[str, Any] = {"url": url, "model": model, "stream": stream, "include_usage": usage}
    if url == CHAT:
        return _chat(given, common)
    echo = _flag(given, "echo")
    logprobs = given.get("logprobs")
    if logprobs is not None:
        _check_logprobs("logprobs", logprobs)
    prompts = _prompts(given)
    settings = _settings(given, given.get("max_tokens", DEFAULT_MAX_TOKENS), logprobs, 0 if echo else 1)
    return Request(**common, prompts=prompts, settings=settings, echo=echo)


def _chat(given: Mapping[str, Any], common: Mapping[str, Any]) -> Request:
    messages = given.get("messages")
    if messages is None:
        raise _Fault(ApiError("messages is missing", "messages", "missing_required_parameter"))
    _check_objects("messages", messages)
    if not messages:
        raise _Fault(ApiError("messages is empty", "messages", "invalid_value"))
    for place, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise _Fault(ApiError(f"messages[{place}] has no role", f"messages[{place}].role", "missing_required_parameter"))
    resumed = messages[-1]["role"] == "assistant"
    for name, wanted in (("continue_final_message", resumed), ("add_generation_prompt", not resumed)):
        if name in given and _flag(given, name) is not wanted:
            why = "a conversation that ends with an assistant's message is continued in it, any other gets an answer"
            raise _Fault(ApiError(f"{name} must be {str(wanted).lower()} here: {why}", name, "unsupported_value"))
    if _flag(given, "echo"):
        raise _Fault(unsupported("echo", f"belongs to {COMPLETIONS} only; leave it out"))
    chat: dict[str, Any] = {}
    for name in ("tools", "documents"):
        if name in given:
            _check_objects(name, given[name])
            chat |= {name: given[name]} if given[name] else {}
    if (choice := given.get("tool_choice", "auto")) not in ("auto", "none"):
        raise _Fault(unsupported("tool_choice", f"{choice!r} cannot be enforced; write auto or none, or leave it out"))
    kwargs = given.get("chat_template_kwargs", {})
    if not isinstance(kwargs, dict):
        raise _wrong_type("chat_template_kwargs", kwargs, "an object")
    if decided := next((name for name in kwargs if name in DECIDED_KWARGS), None):
        raise _Fault(unsupported(f"chat_template_kwargs.{decided}", "is decided by the request's other fields; leave it out"))
    chat |= {"chat_template_kwargs": kwargs} if kwargs else {}
    logprobs = None
    if _flag(given, "logprobs"):
        logprobs = given.get("top_logprobs", 0)
        _check_logprobs("top_logprobs", logprobs)
    elif given.get("top_logprobs"):
        raise _Fault(ApiError("top_logprobs needs logprobs: true", "top_logprobs", "invalid_value"))
    most, older = given.get("max_completion_tokens"), given.get("max_tokens")
    if None not in (most, older) and most != older:
        raise _Fault(ApiError("max_tokens and max_completion_tokens differ; give one of them", "max_tokens", "invalid_value"))
    name = "max_tokens" if most is None else "max_completion_tokens"
    settings = _settings(given, older if most is None else most, logprobs, 1, name)
    return Request(**common, messages=cast("list[dict[str, Any]]", messages), chat=chat, settings=settings)


def _prompts(given: Mapping[str, Any]) -> tuple[Prompt, ...]:
    prompt = given.get("prompt")
    if prompt is None:
        raise _Fault(ApiError("prompt is missing", "prompt", "missing_required_parameter"))
    if isinstance(prompt, str):
        return (prompt,)
    if not isinstance(prompt, list):
        raise _wrong_type("prompt", prompt, "text, token ids, or a list of them")
    listed = cast("list[Any]", prompt)
    if not listed:
        raise _Fault(ApiError("prompt is an empty list", "prompt", "invalid_value"))
    if all(type(item) is int for item in listed):
        return (_token_ids(listed, "prompt"),)
    prompts: list[Prompt] = []
    for place, item in enumerate(listed):
        if isinstance(item, list):
            prompts.append(_token_ids(cast("list[Any]", item), f"prompt[{place}]"))
        elif isinstance(item, str):
            prompts.append(item)
        else:
            raise _wrong_type(f"prompt[{place}]", item, "text or a list of token ids")
    return tuple(prompts)


def _token_ids(value: list[Any], name: str) -> tuple[int, ...]:
    if not value or not all(type(token) is int and token >= 0 for token in value):
        raise _Fault(ApiError(f"{name} must hold at least one token id, whole numbers >= 0", name, "invalid_value"))
    return tuple(value)


def _settings(
    given: Mapping[str, Any], max_tokens: Any, logprobs: int | None, least_tokens: int, called: str = "max_tokens"
) -> dict[str, Any]:
    """The request's settings, checked as a row's are; `called` is the field that gives `max_tokens`, which may be 0 where
    `least_tokens` is."""
    settings = {name: given[name] for name in SETTINGS if name in given and name != "max_tokens"}
    if type(settings.get("top_k")) is int and settings["top_k"] == -1:
        settings["top_k"] = 0
    if max_tokens is not None:
        settings["max_tokens"] = max_tokens
    if logprobs is not None:
        settings["logprobs"] = logprobs
    best_of = given.get("best_of", settings.get("n", 1))
    if best_of != settings.get("n", 1):
        raise _Fault(unsupported("best_of", "is not supported where it differs from n; leave it out"))
    none_drawn = type(max_tokens) is int and max_tokens == least_tokens == 0
    checked = {name: value for name, value in settings.items() if not (none_drawn and name == "max_tokens")}
    # The job's value for the other of the two is not known here.
    if "min_tokens" in checked and "max_tokens" not in checked and type(checked["min_tokens"]) is int:
        checked["max_tokens"] = max(1, checked["min_tokens"])
    try:
        GenerationConfig.model_validate(checked)
    except ValidationError as error:
        refusal = next(refusals_of(GenerationConfig, error, checked))
        # The one rule about two settings is that of min_tokens.
        name = called if refusal.key == "max_tokens" else refusal.key or "min_tokens"
        raise _Fault(ApiError(f"{f'{name}: ' if refusal.key else ''}{refusal.message}", name, "invalid_value")) from None
    return settings


def _check_logprobs(name: str, value: Any) -> None:
    if type(value) is not int or not 0 <= value <= MOST_LOGPROBS:
        raise _Fault(ApiError(f"{name} accepts a whole number from 0 to {MOST_LOGPROBS}", name, "invalid_value"))


def _check_objects(name: str, value: Any) -> None:
    if not isinstance(value, list):
        raise _wrong_type(name, value, "a list of objects")
    for place, item in enumerate(cast("list[Any]", value)):
        if not isinstance(item, dict):
            raise _wrong_type(f"{name}[{place}]", item, "an object")


def _flag(given: Mapping[str, Any], name: str, called: str | None = None) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise _wrong_type(called or name, value, "true or false")
    return value


def _wrong_type(name: str, value: Any, accepted: str) -> _Fault:
    return _Fault(ApiError(f"{name} must be {accepted}, not {_kind(value)}", name, "invalid_type"))


def _kind(value: Any) -> str:
    names: dict[type, str] = {
        list: "a list",
        str: "text",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        dict: "an object",
    }
    return names.get(type(value), "null")
