"""A row's messages, tools and documents, checked and in the shape that chat templates expect.

A conversation that ends with an assistant's text is continued in that text. Messages, tools, documents and the arguments of a
tool call may be JSON text. Text given in parts is joined; keys of a message that are null are dropped, as in transformers;
other keys pass through. In rows of typed columns (Parquet) an object has every key that any row's object has, null where it has
no value: such nulls are dropped at any depth. Values without a JSON type print as in a job's template: a date in ISO 8601, a
decimal number as text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, cast

from tokabatch.errors import RowError
from tokabatch.input.files.strict_json import parse_object
from tokabatch.input.kinds import kind_of
from tokabatch.input.prompts.printing import text_of, to_json
from tokabatch.job.fields import DECIDED_KWARGS

Message = dict[str, Any]
CALLS = ("tool_calls", "function_call", "function")
"""Keys of messages that hold tool calls."""
ROLES = ("system", "user", "assistant", "tool")
_OTHER_ROLES = ("function", "developer")
_ROLES_ELSEWHERE = {
    **{"human": "user", "sys": "system"},
    **dict.fromkeys(("gpt", "bot", "chatbot", "chatgpt", "ai", "model"), "assistant"),
}


def normalise_messages(value: Any, column: str) -> list[Message] | RowError:
    """Return the conversation in `value`, or an error `bad_type`, `bad_messages`, `missing_field` or `empty_prompt`."""
    value = decoded(value)
    if not isinstance(value, list):
        is_json = isinstance(value, str) and value.lstrip().startswith("[")
        what = "text that is not valid JSON" if is_json else kind_of(value)
        remedy = f'; a text is taken as `template: "{{{{ {column} }}}}"`' if isinstance(value, str) and not is_json else ""
        return RowError("bad_type", f"the column {column!r} must hold a list of messages, not {what}{remedy}")
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
    calls = next((key for key in ("tool_calls", "function_call") if messages[-1].get(key)), None)
    if messages[-1]["role"] == "assistant" and (calls or "content" not in messages[-1]):
        what = f"{calls}, and" if calls else "no content, and"
        return RowError(
            "bad_messages",
            f"the last message of the column {column!r} is an assistant's with {what} only its text can be continued; "
            "end with the tool's answer or a user's message, or give it content alone",
        )
    return messages


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """Put a system message in front, unless the conversation has its own."""
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def refuse_roles(messages: Sequence[Message], template: str) -> RowError | None:
    """Return the error `bad_messages` of a role that the chat template does not name and that is another one misspelt, or has
    the name that other tools give it. Any other role is the template's to print, since many print what they are given."""
    for position, message in enumerate(messages):
        if message["role"] not in ROLES and (meant := _meant_role(message["role"], template)):
            return RowError("bad_messages", f"message {position} has the role {message['role']!r}; write {meant}")
    return None


def refuse_left_out(messages: Sequence[Message], template: str, text: str) -> RowError | None:
    """Return the error `bad_messages` of a message that is missing in the prompt because the chat template does not know its
    role."""
    for position, message in enumerate(messages):
        role, content = message["role"], message.get("content")
        unknown = role not in ROLES and not _names(template, role)
        # Word by word, as a template may write a text as JSON, or otherwise change it.
        words = re.findall(r"\w+", content) if unknown and isinstance(content, str) else ()
        if words and not any(word in text for word in words):
            what = f"message {position} has the role {role!r}, and the chat template leaves it out"
            known = "system" if role == "developer" else "user"
            return RowError("bad_messages", f"{what}; write a role that the template prints, such as {known}")
    return None


def read_objects(value: Any, column: str) -> list[dict[str, Any]] | RowError | None:
    """Return the tools or documents in `value`, a list of objects; None if there are none, `bad_type` for anything else."""
    found = decoded(value)
    if found is None or found == [] or (isinstance(found, str) and found.strip() in ("", "null")):
        return None
    if not isinstance(found, list) or not all(isinstance(item, Mapping) for item in cast("list[Any]", found)):
        return RowError(
            "bad_type",
            f"the column {column!r} goes to the chat template and must hold a list of objects, not {kind_of(value)}; "
            "rename it if it is something else",
        )
    return cast("list[dict[str, Any]]", found)


def read_kwargs(value: Any, column: str) -> dict[str, Any] | RowError:
    """Return the row's own variables for the chat template; `bad_type` for anything but an object, and for variables that the
    run sets."""
    found = decoded(value)
    if found is None or (isinstance(found, str) and not found.strip()):
        return {}
    if not isinstance(found, Mapping):
        return RowError("bad_type", f"the column {column!r} must hold an object of variables, not {kind_of(value)}")
    variables = dict(cast("Mapping[str, Any]", found))
    if decided := next((name for name in variables if name in DECIDED_KWARGS), None):
        return RowError("bad_type", f"the column {column!r} holds {decided!r}, which the run decides itself; remove it")
    return variables


def decoded(value: Any) -> Any:
    """Parse a value, or the items of a list, that is JSON text; leave any other text, and JSON that no row may hold, as it
    is."""
    if isinstance(value, list):
        return [decoded(item) for item in cast("list[Any]", value)]
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        row = parse_object(b'{"value":' + value.encode() + b"}")
        return row["value"] if isinstance(row, dict) and len(row) == 1 else value
    return value


def with_arguments(value: Any, convert: Callable[[Any], Any]) -> Any:
    """Return the messages in `value` with `convert` applied to the arguments of each tool call."""
    if isinstance(value, list):
        return [with_arguments(item, convert) for item in cast("list[Any]", value)]
    if not isinstance(value, Mapping):
        return value
    given = cast("Mapping[str, Any]", value).items()
    return {
        key: convert(item) if key == "arguments" else with_arguments(item, convert) if key in CALLS else item
        for key, item in given
    }


def arguments_as_object(value: Any) -> Any:
    """Return arguments as an object, which most chat templates expect. OpenAI's API sends JSON text; text that is not JSON is
    kept."""
    found = decoded(value or "{}") if isinstance(value, str) else value
    return found if isinstance(found, Mapping) else value


def arguments_as_text(value: Any) -> Any:
    """Return arguments as JSON text, which some chat templates expect."""
    return to_json(value) if isinstance(value, Mapping) else value


def plain_values(value: Any) -> Any:
    """Convert a value of a typed column to what JSON would have brought. Raises NotText for binary data."""
    if isinstance(value, Mapping):
        given = cast("Mapping[str, Any]", value)
        return {key: plain_values(item) for key, item in given.items() if item is not None}
    if isinstance(value, list):
        items = cast("list[Any]", value)
        if items and all(isinstance(item, tuple) for item in items):  # Arrow's map
            return plain_values(dict(items))
        return [plain_values(item) for item in items]
    return (
        value
        if value is None or isinstance(value, str | int | float)
        else text_of(value, place="a value for the chat template")
    )


@lru_cache(maxsize=256)
def _meant_role(role: str, template: str) -> str | None:
    word = role.strip().lower()
    if role in _OTHER_ROLES or _names(template, role):
        return None
    near = get_close_matches(word, (*ROLES, *_OTHER_ROLES), n=1, cutoff=0.85) if word.isalpha() else ()
    return _ROLES_ELSEWHERE.get(word) or next(iter(near), None)


def _names(template: str, role: str) -> bool:
    return f"'{role}'" in template or f'"{role}"' in template


def _message(given: Any, place: str) -> Message | RowError:
    if not isinstance(given, Mapping):
        return RowError("bad_type", f"{place} must be an object with role and content, not {kind_of(given)}")
    message = {key: value for key, value in cast("Mapping[str, Any]", given).items() if value is not None}
    if not isinstance(message.get("role"), str):
        sharegpt = "; write `from` as role (human: user, gpt: assistant), `value` as content" if "from" in message else ""
        return RowError("bad_type", f"{place} has no role (system, user or assistant){sharegpt}")
    content = message.get("content")
    if isinstance(content, list):
        parts = cast("list[Any]", content)
        texts: list[Any] = [
            cast("Mapping[str, Any]", part).get("text") if isinstance(part, Mapping) else part for part in parts
        ]
        if not all(isinstance(text, str) for text in texts):
            return RowError("bad_type", f"{place} has content parts that are not text; only text can be completed")
        return {**message, "content": "".join(texts)}
    if content is None and message.keys() - {"role", "name"}:
        return message
    if not isinstance(content, str):
        kind = "null or missing" if content is None else kind_of(content)
        return RowError("bad_type" if content is not None else "missing_field", f"the content of {place} is {kind}, not text")
    return message
