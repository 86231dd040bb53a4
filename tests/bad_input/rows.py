"""Rows that cannot be completed: the input line, the error code, and what the message must say.

The job takes the column `prompt` (text, or chat messages), `prompt_token_ids` and `sampling_params`; the model has 97 tokens, a
context of 512 and no chat template.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BadRow:
    name: str
    line: bytes
    code: str
    says: str
    """A regular expression that the message must match."""


def _row(**columns: Any) -> bytes:
    return json.dumps(columns).encode()


def _params(**settings: Any) -> bytes:
    return _row(prompt="fine", sampling_params=settings)


BAD_ROWS = [
    BadRow("cut off", b'{"prompt": "a', "bad_json", r"line \d+ \(byte \d+\).*Unterminated string"),
    BadRow("no JSON", b"hello", "bad_json", r"line \d+ \(byte \d+\): Expecting value.*hello"),
    BadRow("an array", b'["a"]', "bad_json", "a JSON object is expected, not an array"),
    BadRow("a number", b"7", "bad_json", "not a number"),
    BadRow("null", b"null", "bad_json", "not null"),
    BadRow("two objects", b'{"prompt": "a"} {"prompt": "b"}', "bad_json", "Extra data"),
    BadRow("single quotes", b"{'prompt': 'a'}", "bad_json", "double quotes"),
    BadRow("trailing comma", b'{"prompt": "a",}', "bad_json", r"line \d+"),
    BadRow("duplicate key", b'{"prompt": "a", "prompt": "b"}', "bad_json", "the key 'prompt' occurs twice"),
    BadRow("nested duplicate key", b'{"prompt": "a", "x": {"k": 1, "k": 1}}', "bad_json", "the key 'k' occurs twice"),
    BadRow("NaN", b'{"prompt": "a", "x": NaN}', "bad_json", "NaN is not JSON; write null or a number"),
    BadRow("Infinity", b'{"prompt": "a", "x": -Infinity}', "bad_json", "Infinity is not JSON"),
    BadRow("overflow", b'{"prompt": "a", "x": 1e999}', "bad_json", "too large for a 64-bit float"),
    BadRow("absurd nesting", b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "bad_json", "more than 100 levels"),
    BadRow("endless number", b'{"x": ' + b"9" * 10_000 + b"}", "bad_json", "digits"),
    BadRow("control character", b'{"prompt": "tab\there"}', "bad_json", "control character"),
    BadRow("invalid UTF-8", b'{"prompt": "\xff"}', "bad_utf8", r"invalid UTF-8: .*0xff"),
    BadRow("cut UTF-8", b'{"prompt": "\xe2\x82', "bad_utf8", "invalid UTF-8"),
    BadRow("encoded surrogate", b'{"prompt": "\xed\xa0\x80"}', "bad_utf8", "invalid UTF-8"),
    BadRow("lone surrogate", b'{"prompt": "\\ud83d"}', "bad_unicode", "half of a surrogate pair"),
    BadRow("lone surrogate in a key", b'{"prompt": "a", "\\udc00": 1}', "bad_unicode", "half of a surrogate pair"),
    BadRow("missing field", _row(other="a"), "missing_field", "'prompt' is missing in this row; it has other"),
    BadRow("null field", _row(prompt=None), "missing_field", "'prompt' is null in this row"),
    BadRow("empty object", b"{}", "missing_field", "'prompt' is missing in this row; it is empty"),
    BadRow("number for text", _row(prompt=3), "bad_type", "'prompt' must hold text, not the number 3"),
    BadRow("object for text", _row(prompt={"a": 1}), "bad_type", "'prompt' must hold text, not an object"),
    BadRow("empty prompt", _row(prompt=""), "empty_prompt", "the prompt is empty"),
    BadRow("blank prompt", _row(prompt=" \n\t "), "empty_prompt", "the prompt is empty"),
    BadRow("no token ids", _row(prompt_token_ids=[]), "empty_prompt", "no tokens"),
    BadRow("token id too large", _row(prompt_token_ids=[3, 97]), "bad_token_id", "token id 97 is outside the model's 97 ids"),
    BadRow("negative token id", _row(prompt_token_ids=[-1]), "bad_token_id", "token id -1"),
    BadRow("fractional token id", _row(prompt_token_ids=[1.5]), "bad_type", "list of token ids"),
    BadRow("true as a token id", _row(prompt_token_ids=[True]), "bad_type", "list of token ids"),
    BadRow("text as token ids", _row(prompt_token_ids="12"), "bad_type", "list of token ids"),
    BadRow(
        "messages without a chat template", _row(prompt=[{"role": "user", "content": "a"}]), "bad_messages", "chat template"
    ),
    BadRow("too long", _row(prompt="x" * 600), "prompt_too_long", "600 tokens and max_tokens is 3, together 603.* is 512"),
    BadRow("too long with max_tokens", _row(prompt="x" * 510), "prompt_too_long", "510 tokens.*together 513.* is 512"),
    BadRow("20 MB", _row(prompt="x" * 20_000_000), "prompt_too_long", "20,000,000 characters .* context is 512"),
    BadRow("n is 0", _params(n=0), "bad_sampling", "n: .*0"),
    BadRow("n is negative", _params(n=-3), "bad_sampling", "n: .*-3"),
    BadRow("n without end", _params(n=2_000_000_000), "bad_sampling", r"n: .*1,000,000 \(repeat the row"),
    BadRow("n is a text", _params(n="4"), "bad_sampling", "n: "),
    BadRow("top_p is 0", _params(top_p=0.0), "bad_sampling", "top_p: "),
    BadRow("top_p above 1", _params(top_p=1.5), "bad_sampling", r"top_p: .*1\.5"),
    BadRow("negative temperature", _params(temperature=-0.1), "bad_sampling", r"temperature: .*-0\.1"),
    BadRow("temperature is a text", _params(temperature="NaN"), "bad_sampling", "temperature: "),
    BadRow("max_tokens is 0", _params(max_tokens=0), "bad_sampling", "max_tokens: "),
    BadRow("max_tokens is a fraction", _params(max_tokens=2.5), "bad_sampling", "max_tokens: "),
    BadRow("unknown setting", _params(temprature=1.0), "bad_sampling", "temprature.*temperature"),
    BadRow("stop id beyond the model", _params(stop_token_ids=[97]), "bad_sampling", "stop_token_ids names 97"),
    BadRow(
        "a bias beyond the model",
        _params(logit_bias={"97": 1}),
        "bad_sampling",
        "logit_bias names 97.*end at 96",
    ),
    BadRow("a bias too large", _params(logit_bias={"7": 1000}), "bad_sampling", r"logit_bias: gives token 7 1000; write"),
    BadRow("a bad word beyond the model", _params(bad_words=[[3, 97]]), "bad_sampling", "bad_words names 97"),
    BadRow("bad words of numbers", _params(bad_words=[7]), "bad_sampling", "bad_words: holds 7; write texts, or lists"),
    BadRow(
        "no repetition at all", _params(repetition_penalty=0), "bad_sampling", "repetition_penalty: got the number 0; accepts"
    ),
    BadRow("more than the most tokens", _params(min_tokens=500), "bad_sampling", "params: min_tokens is 500, but"),
    BadRow("too many logprobs", _params(logprobs=98), "bad_sampling", "98"),
    BadRow("settings in a list", _row(prompt="a", sampling_params=[1]), "bad_sampling", "must be an object.*not a list"),
]
