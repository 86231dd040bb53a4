"""One prompt to a running server, from the shell."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from tokabatch.errors import EngineError, UsageError


def ping(url: str, prompt: str, *, chat: bool, max_tokens: int, api_key: str | None, timeout: float) -> str:
    """The text that the server at `url` answers a prompt with. Raises UsageError where there is no server or it refuses, and
    EngineError where it fails."""
    base = url.rstrip("/").removesuffix("/v1")
    try:
        model: str = _call(f"{base}/v1/models", None, api_key, timeout)["data"][0]["id"]
        body: dict[str, Any] = {"model": model, "max_tokens": max_tokens, "temperature": 0}
        if chat:
            body["messages"] = [{"role": "user", "content": prompt}]
            return _call(f"{base}/v1/chat/completions", body, api_key, timeout)["choices"][0]["message"]["content"]
        return _call(f"{base}/v1/completions", {**body, "prompt": prompt}, api_key, timeout)["choices"][0]["text"]
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        try:
            text = json.loads(text)["error"]["message"]
        except (ValueError, LookupError, TypeError):
            text = "not as a server of OpenAI's API does; check --url"
        kind = EngineError if error.code >= 500 else UsageError
        raise kind(f"{base} answers with status {error.code}: {text}") from error
    except OSError as error:
        reason = getattr(error, "reason", None) or error
        raise UsageError(
            f"no server at {base}: {reason}; start one with `tokabatch serve MODEL`, or give its address with --url"
        ) from error
    except (ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{base} does not answer as a server of OpenAI's API does") from error


def _call(url: str, body: dict[str, Any] | None, api_key: str | None, timeout: float) -> Any:
    headers = {"Content-Type": "application/json"}
    if api_key is not None:
        # http.client writes Latin-1, in which every byte is a character.
        headers["Authorization"] = f"Bearer {api_key}".encode().decode("latin-1")
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=timeout) as response:
        return json.load(response)
