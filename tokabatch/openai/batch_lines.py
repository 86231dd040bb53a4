"""The lines of OpenAI's batch files: `{"custom_id": ..., "method": "POST", "url": ..., "body": {...}}`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokabatch.openai.errors import ApiError, unsupported
from tokabatch.openai.requests import Request, parse_request


@dataclass(frozen=True, slots=True)
class BatchLine:
    """A line as far as it can be read. `custom_id` and `url` are None where they are not there or no text."""

    custom_id: str | None
    url: str | None
    request: Request | ApiError


def is_batch_line(line: Mapping[str, Any]) -> bool:
    """Whether a JSON object is meant as one."""
    url = line.get("url")
    return "custom_id" in line and "body" in line and isinstance(url, str) and url.startswith("/v1/")


def read_line(line: Mapping[str, Any]) -> BatchLine:
    """Return the request on a line, or why it cannot be answered in a batch."""
    custom_id, url = (value if isinstance(value := line.get(name), str) and value else None for name in ("custom_id", "url"))
    request = ApiError("custom_id must be text that is not empty", "custom_id", "invalid_value")
    if custom_id is not None:
        method = line.get("method", "POST")
        request = ApiError(f"method must be POST, not {method!r}", "method", "invalid_value")
        if method == "POST":
            request = read_batch_request(line.get("url"), line.get("body"))
    return BatchLine(custom_id, url, request)


def read_batch_request(url: Any, body: Any) -> Request | ApiError:
    """The request of a body, or its error, where it may be of a kind that only a server answers, too."""
    request = parse_request(url, body) if isinstance(url, str) else ApiError("url must be text", "url", "invalid_type")
    if isinstance(request, Request) and request.echo:
        if request.logprobs is not None:
            return unsupported("echo", "with logprobs is not supported in batch files; score texts in a job of mode: score")
        if request.settings.get("max_tokens") == 0:
            return unsupported("max_tokens", "must be at least 1 in batch files")
    return request
