"""Errors as OpenAI's API states them: a message, the field at fault, a code, and the HTTP status that they come with."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from tokabatch.errors import RowError

_OF_REQUESTS = {
    "bad_request": "invalid_value",
    "prompt_too_long": "context_length_exceeded",
    "bad_sampling": "invalid_value",
    "bad_messages": "invalid_value",
    "bad_type": "invalid_type",
    "bad_token_id": "invalid_value",
    "empty_prompt": "invalid_value",
    "missing_field": "invalid_value",
    "special_token": "invalid_value",
    "template_too_large": "invalid_value",
    "unread_tools": "unsupported_parameter",
    "unread_documents": "unsupported_parameter",
    "bad_json": "invalid_json",
    "bad_utf8": "invalid_json",
    "bad_unicode": "invalid_json",
}
"""What the API calls the faults of a row that are its request's own; all others are the engine's."""
_FIELDS = {"unread_tools": "tools", "unread_documents": "documents"}
"""Those that are of one field."""
_SETTING = re.compile(r"sampling_params\.(\w+)")
"""How messages name the setting at fault, a field of the request."""
_COLUMN = re.compile(r"the column '(\w+)'")
"""How they name another field."""


@dataclass(frozen=True, slots=True)
class ApiError:
    """Why a request has no answer. `param` names the field; `status` is the HTTP status: below 500 the request is at fault,
    and to send it again would not help."""

    message: str
    param: str | None = None
    code: str | None = None
    status: int = 400

    @property
    def type(self) -> str:
        return "invalid_request_error" if self.status < 500 else "server_error"

    def body(self) -> dict[str, Any]:
        """The JSON object that the API answers with."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def unsupported(field: str, why: str) -> ApiError:
    """The refusal of a field that would change the answer, and which cannot be honoured."""
    return ApiError(f"{field} {why}", field, "unsupported_parameter")


def of_row(error: RowError, param: str | None = None) -> ApiError:
    """The error of a row that came from a request: 400 where the request is at fault, 500 where it is not. `param` is at fault
    unless the message names a setting."""
    if error.code in _OF_REQUESTS:
        if error.code == "bad_sampling" and (setting := _SETTING.search(error.message)):
            param = setting[1]
        message = _COLUMN.sub(r"\1", _SETTING.sub(r"\1", error.message))
        return ApiError(message, _FIELDS.get(error.code, param), _OF_REQUESTS[error.code])
    return ApiError(error.message, None, error.code, 500)
