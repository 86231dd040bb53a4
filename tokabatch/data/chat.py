"""A row's chat messages, checked and in the one shape that chat templates expect: role and text.

Text given in parts becomes one text; keys that are null (as Parquet fills structs up) are dropped; other keys, such as tool
calls, pass through.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from tokabatch.errors import RowError

Message = dict[str, Any]


def normalise_messages(value: Any, column: str) -> list[Message] | RowError:
    """The conversation in `value`, or `bad_type` / `empty_prompt`."""
    if not isinstance(value, list):
        return RowError("bad_type", f"the column {column!r} must hold a list of messages, not {type(value).__name__}")
    if not value:
        return RowError("empty_prompt", f"the column {column!r} holds no message")
    messages: list[Message] = []
    for position, given in enumerate(cast("list[Any]", value)):
        message = _message(given, f"message {position} of the column {column!r}")
        if isinstance(message, RowError):
            return message
        messages.append(message)
    if messages[-1]["role"] == "user" and not str(messages[-1].get("content", "")).strip():
        return RowError("empty_prompt", f"the last message of the column {column!r} is empty")
    return messages


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """A system message in front, unless the conversation brings its own."""
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _message(given: Any, place: str) -> Message | RowError:
    if not isinstance(given, Mapping):
        return RowError("bad_type", f"{place} must be an object with role and content, not {type(given).__name__}")
    message = {key: value for key, value in cast("Mapping[str, Any]", given).items() if value is not None}
    if not isinstance(message.get("role"), str):
        return RowError("bad_type", f"{place} has no role (system, user or assistant)")
    content = message.get("content")
    if isinstance(content, list):
        text = _joined_parts(cast("list[Any]", content))
        if text is None:
            return RowError("bad_type", f"{place} has content parts that are no text; only text can be completed")
        return {**message, "content": text}
    if content is None and message.keys() - {"role", "name"}:
        return message
    if not isinstance(content, str):
        kind = "null or missing" if content is None else type(content).__name__
        return RowError("bad_type" if content is not None else "missing_field", f"the content of {place} is {kind}, not text")
    return message


def _joined_parts(parts: list[Any]) -> str | None:
    texts: list[str] = []
    for part in parts:
        text = cast("Mapping[str, Any]", part).get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            return None
        texts.append(text)
    return "".join(texts)
