"""The types of the job's values: each a pydantic type with the words that describe it in a refusal.

`schema` composes these types; `refusals` and `keys` read the words back. Independent of sections and keys.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

MAX_INT32 = 2**31 - 1
MAX_INT64 = 2**63 - 1
DECIDED_KWARGS = frozenset(
    (
        *("messages", "conversation", "conversations", "tools", "documents", "chat_template", "tokenize", "tokenizer_kwargs"),
        *("add_generation_prompt", "continue_final_message", "sanitize_control_tokens", "padding", "truncation", "max_length"),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask"),
    )
)
"""Names that a chat template or its renderer receives from elsewhere."""
MAX_BIAS = 100
MOST_SAMPLES = 1_000_000
"""Limit of one row: a run keeps a flag for each sample of its rows, and the sample numbers of each open prompt."""


@dataclass(frozen=True)
class Accepts:
    """Part of a type's metadata. `what` completes "accepts …"; `example` is a value as it is written in YAML."""

    what: str
    example: str


_VARIABLE = re.compile(r"\$(?:[A-Z][A-Z0-9_]*|\{\w+\})")


def _path_text(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)  # pyright: ignore[reportUnknownArgumentType]
    if isinstance(value, str) and (found := _VARIABLE.search(value)):
        raise ValueError(f"variables such as {found[0]} are not replaced here: write the path out")
    if not isinstance(value, str) or not value.startswith("~") or os.path.lexists(value):
        return value
    if (expanded := os.path.expanduser(value)) == value:
        raise ValueError(f"{value.partition('/')[0]} is no user's folder here; write the path out, or ./{value} for that name")
    return expanded


def _local_path(value: Any) -> Any:
    if isinstance(value, str) and (found := re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", value)):
        if found[1].lower() == "file":
            raise ValueError(f"is a URL; write the path itself: {value[found.end() :]}")
        raise ValueError("is a URL, and results are written to a local folder; name one, and copy it once the run is complete")
    return value


def _tuple(value: Any) -> Any:
    # A YAML list arrives as a Python list, which strict types refuse; its items stay strict.
    return tuple(value) if isinstance(value, list) else value  # pyright: ignore[reportUnknownArgumentType]


def _texts(value: Any) -> Any:
    return (value,) if isinstance(value, str) else _tuple(value)


def _token_ids(value: Any) -> Any:
    return (value,) if isinstance(value, int) and not isinstance(value, bool) else _tuple(value)


def _logit_bias(value: Any) -> Any:
    # A Parquet map arrives as pairs; keys in YAML and JSON are text; structs have a null for each key without a value.
    pairs = dict(value) if isinstance(value, list) and all(isinstance(each, tuple) for each in value) else value  # pyright: ignore
    if not isinstance(pairs, Mapping):
        return value
    biases: dict[Any, float] = {}
    for key, bias in cast("Mapping[Any, Any]", pairs).items():
        token = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key
        if not _is_token(token):
            raise ValueError(f"names {key!r}, which is not a token id; write whole numbers >= 0, such as {{128009: -100}}")
        if bias is not None:
            if isinstance(bias, bool) or not isinstance(bias, int | float) or not -MAX_BIAS <= bias <= MAX_BIAS:
                raise ValueError(
                    f"gives token {token} {bias!r}; write a number from -{MAX_BIAS} to {MAX_BIAS} (bad_words rules a token out)"
                )
            biases[token] = float(bias)
    return biases


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_INT32


def _bad_words(value: Any) -> Any:
    if not isinstance(value, str | list | tuple):
        return value
    words = cast("Sequence[Any]", [value] if isinstance(value, str) else value)
    for word in words:
        ids = cast("Sequence[Any]", word if isinstance(word, list | tuple) else ())
        if not (ids and all(map(_is_token, ids))) and not (isinstance(word, str) and word):
            raise ValueError(f'holds {word!r}; write texts, or lists of token ids >= 0, such as ["sorry", [128009]]')
    return tuple(word if isinstance(word, str) else tuple(word) for word in words)


def _options(value: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError):
        raise ValueError("holds values that JSON does not have; write text, numbers, lists and so on") from None
    return value


def _template_kwargs(value: dict[str, Any]) -> dict[str, Any]:
    decided = next((name for name in value if name in DECIDED_KWARGS), None)
    if decided in ("tools", "documents"):
        raise ValueError(f"holds `{decided}`, which the template gets from the rows' column of that name; put it there")
    if decided:
        raise ValueError(f"holds `{decided}`, which the run decides itself; remove it")
    return _options(value)


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise PydanticCustomError("power_of_two", "not a power of two")
    return value


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise PydanticCustomError("finite", "not finite")
    return value


Auto = Literal["auto"]
_Tuple = BeforeValidator(_tuple)
_Text = Annotated[str, Field(min_length=1)]
_Count = Annotated[int, Field(ge=1, le=MAX_INT32)]
_Finite = Annotated[float, AfterValidator(_finite)]

_Path = Annotated[_Text, BeforeValidator(_path_text)]

ModelPath = Annotated[_Path, Accepts("a Hugging Face id or a local folder", "meta-llama/Llama-3.2-1B-Instruct")]
InputPath = Annotated[_Path, Accepts("a file, folder, glob or URL, or hf://datasets/OWNER/NAME", "data/*.jsonl")]
FilePath = Annotated[_Path, Accepts("a path", "data/examples.jsonl")]
Verifier = Annotated[_Path, Accepts("a verifier's name, or FILE.py, FILE.py:FUNCTION or MODULE:FUNCTION", "exact")]
FolderPath = Annotated[_Path, BeforeValidator(_local_path), Accepts("a folder's path", "out/first")]
OptionalFile = Annotated[_Text | None, BeforeValidator(_path_text), Accepts("a path, or null", "profile.json")]
OptionalText = Annotated[_Text | None, Accepts("text, or null", "name")]
OptionalModelPath = Annotated[
    _Text | None,
    BeforeValidator(_path_text),
    Accepts("a Hugging Face id or a local folder, or null", "meta-llama/Llama-3.2-1B-Instruct"),
]
Text = Annotated[_Text, Accepts("text", "name")]
Column = Annotated[_Text, Accepts("a column's name", "name")]
OptionalColumn = Annotated[_Text | None, Accepts("a column's name, or null", "name")]
MessagesColumn = Annotated[
    _Text | None,
    Accepts("a column's name, or null (messages that all rows have are written as prompt.system and prompt.template)", "name"),
]
Template = Annotated[_Text, Accepts("text (a Jinja template)", '"Question: {{ question }}\\nAnswer:"')]
OptionalTemplate = Annotated[_Text | None, Accepts("text (a Jinja template), or null", '"Question: {{ question }}\\nAnswer:"')]

OptionalChatTemplate = Annotated[
    _Text | None,
    BeforeValidator(_path_text),
    Accepts("a file, the name of one of the tokenizer's templates, Jinja text, or null", "chat.jinja"),
]
TemplateKwargs = Annotated[
    dict[str, Any],
    AfterValidator(_template_kwargs),
    Accepts("a mapping of the chat template's variables", "{enable_thinking: false}"),
]

Tags = Annotated[
    Literal["auto"] | tuple[_Text, _Text] | None,
    _Tuple,
    Accepts("auto, the begin and the end tag, or null", '["<think>", "</think>"]'),
]
Options = Annotated[dict[str, Any], AfterValidator(_options), Accepts("a mapping of names to values", "{strict: true}")]
Flag = Annotated[bool, Accepts("true or false", "true")]
AutoFlag = Annotated[Auto | bool, Accepts("auto, true or false", "auto")]

Count = Annotated[_Count, Accepts("a whole number >= 1", "4")]
Samples = Annotated[
    int, Field(ge=1, le=MOST_SAMPLES), Accepts(f"a whole number from 1 to {MOST_SAMPLES:,} (repeat the row for more)", "4")
]
Index = Annotated[Annotated[int, Field(ge=0, le=MAX_INT32)], Accepts("a whole number >= 0", "0")]
OptionalCount = Annotated[_Count | None, Accepts("a whole number >= 1, or null", "100")]
MostTokens = Annotated[
    Literal["context"] | _Count,
    Accepts("a whole number >= 1, or context (all that the prompt leaves free)", "256"),
]
AutoCount = Annotated[Auto | _Count, Accepts("auto, or a whole number >= 1", "auto")]
AutoTokens = Annotated[Auto | Annotated[int, Field(ge=1, le=MAX_INT64)], Accepts("auto, or a whole number >= 1", "64K")]
AutoGroup = Annotated[Auto | Annotated[_Count, Field(ge=2)], Accepts("auto, or a whole number >= 2", "auto")]
PageSize = Annotated[_Count, AfterValidator(_power_of_two), Accepts("a power of two >= 1", "16")]
OptionalTopK = Annotated[
    Annotated[int, Field(ge=0, le=MAX_INT32)] | None, Accepts("a whole number >= 1, or null or 0 for off", "50")
]
OptionalLogprobs = Annotated[
    Annotated[int, Field(ge=0, le=MAX_INT32)] | None, Accepts("a whole number >= 0, or null for none", "5")
]
Seed = Annotated[int, Field(ge=0, le=MAX_INT64), Accepts("a whole number from 0 to 2^63 - 1", "0")]

Temperature = Annotated[_Finite, Field(ge=0, le=1e6), Accepts("a number from 0 to 1,000,000 (0 is greedy)", "0.7")]
TopP = Annotated[_Finite, Field(gt=0, le=1), Accepts("a number above 0 and at most 1", "0.95")]
MinP = Annotated[_Finite, Field(ge=0, lt=1), Accepts("a number from 0 to below 1", "0.05")]
Repetition = Annotated[
    _Finite, Field(ge=0.01, le=100), Accepts("a number from 0.01 to 100 (1 is off, more avoids repetition)", "1.1")
]
Penalty = Annotated[_Finite, Field(ge=-2, le=2), Accepts("a number from -2 to 2 (0 is off)", "0.5")]
LeastTokens = Annotated[int, Field(ge=0, le=MAX_INT32), Accepts("a whole number >= 0", "10")]
LogitBias = Annotated[
    dict[int, float],
    BeforeValidator(_logit_bias),
    Accepts(f"a mapping of token ids to numbers from -{MAX_BIAS} to {MAX_BIAS}", "{128009: -100}"),
]
BadWords = Annotated[
    tuple[_Text | tuple[int, ...], ...],
    BeforeValidator(_bad_words),
    Accepts("a text, or a list of texts and lists of token ids", '["sorry", [128009]]'),
]
Fraction = Annotated[_Finite, Field(ge=0, le=1), Accepts("a number from 0 to 1", "0.01")]
Number = Annotated[_Finite, Accepts("a finite number", "0.5")]
Bytes = Annotated[int, Field(ge=1 << 26, le=MAX_INT64), Accepts("a number of bytes, 64M or more", "4G")]
Seconds = Annotated[_Finite, Field(gt=0), Accepts("a number of seconds above 0", "30")]

Texts = Annotated[tuple[_Text, ...], BeforeValidator(_texts), Accepts("a non-empty text, or a list of them", '["\\n\\n"]')]
TokenIds = Annotated[
    tuple[Annotated[int, Field(ge=0, le=MAX_INT32)], ...],
    BeforeValidator(_token_ids),
    Accepts("a token id (a whole number >= 0), or a list of them", "[128009]"),
]
Columns = Annotated[Literal["all"] | tuple[_Text, ...], _Tuple, Accepts("all, or a list of column names", "[id, question]")]
