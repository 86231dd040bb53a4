"""The output schema, and completions as a table of it: one row per sample, followed by the input columns.

Texts and verdicts are passed in; nothing is decoded, verified or written here. Work is per sample, never per token: list
columns are made from concatenated arrays and offsets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tokabatch.arrays import Bool, Int32, Int64
from tokabatch.errors import JobError, RowError
from tokabatch.input.store.json_types import json_texts
from tokabatch.scheduling.contracts import Completion

_TOKEN_LOGPROBS = pa.struct(
    [
        pa.field("logprob", pa.float32()),
        pa.field("top_token_ids", pa.list_(pa.int32())),
        pa.field("top_logprobs", pa.list_(pa.float32())),
    ]
)
SAMPLE_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("row_index", pa.int64(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("text", pa.string()),
        pa.field("token_ids", pa.list_(pa.int32())),
        pa.field("finish_reason", pa.string()),
        pa.field("stop_reason", pa.string()),
        pa.field("num_prompt_tokens", pa.int32()),
        pa.field("num_cached_tokens", pa.int32()),
        pa.field("num_output_tokens", pa.int32()),
        pa.field("cumulative_logprob", pa.float64()),
        pa.field("logprobs", pa.list_(_TOKEN_LOGPROBS)),
        pa.field("error_code", pa.string()),
        pa.field("error_message", pa.string()),
    ],
    metadata={b"tokabatch.schema_version": b"1"},
)
"""The columns of every output. `status` is `ok`, `error` or `cancelled`. An error row is null from `text` to `logprobs`, except
for the prompt's counts if they are known; one with the code `cannot_be_written` keeps whatever could be written, including its
verdict, so that a row stopped by it remains stopped after a crash. A sample cancelled by a stopped row is null in all of them
and has no error either."""
CANCELLED = "cancelled"
_MAX_ENTRIES = (1 << 31) - 1
"""Limit of the lists in one table, over all rows: their offsets are 32 bits wide."""
_OF_SAMPLE = {b"tokabatch.column": b"sample"}
REASONING_FIELDS = tuple(pa.field(name, pa.string(), metadata=_OF_SAMPLE) for name in ("reasoning_text", "answer_text"))
"""Appended if the job splits texts (`output.split_reasoning`); null where a text has no such part."""
_OF_VERDICT = {b"tokabatch.column": b"verdict"}
VERDICT_FIELDS = tuple(
    pa.field(name, kind, metadata=_OF_VERDICT)
    for name, kind in (("correct", pa.bool_()), ("verify_score", pa.float64()), ("verify_error", pa.string()))
)
"""Appended if the job verifies, followed by the judge's own columns; all null for a sample that is not judged. `verify_error`
is why a sample has no verdict. Field metadata marks these columns."""
CORRECT = VERDICT_FIELDS[0]

_OF_SCORE = {b"tokabatch.column": b"score"}
SCORE_FIELDS = tuple(
    pa.field(name, kind, metadata=_OF_SCORE) for name, kind in (("is_greedy", pa.bool_()), ("perplexity", pa.float64()))
)
"""Appended in mode score; the text's log-probability is in the column `cumulative_logprob`."""


_INPUT, _SOURCE = "input_", b"tokabatch.input"
"""The prefix of an input column with the name of one of ours; the metadata key of its name in the input."""


@dataclass(frozen=True, slots=True)
class UnsampledRow:
    """Samples without a text, which are rows of the output all the same, so that every sample is accounted for: error rows with
    the reason `error`, or cancelled ones if it is None, because their row stopped before them."""

    row_index: int
    samples: Int32
    error: RowError | None

    @property
    def num_samples(self) -> int:
        return len(self.samples)


@dataclass(frozen=True, slots=True)
class FailedRow(UnsampledRow):
    """A row that could not be sampled."""

    error: RowError


def output_schema(
    inputs: pa.Schema,
    *,
    id_column: str | None = None,
    verdicts: Sequence[pa.Field[Any]] = (),
    reasoning: bool = False,
    scored: bool = False,
) -> pa.Schema:
    """Return our columns including `verdicts`, REASONING_FIELDS if texts are split and SCORE_FIELDS if they are scored, then
    `inputs`, the input columns that the output carries.

    An input column `id` of texts that is the id column is not repeated: our `id` holds it. One with the name of ours, such as
    `text`, becomes `input_text`.
    """
    ours = [*SAMPLE_SCHEMA, *(SCORE_FIELDS if scored else ()), *(REASONING_FIELDS if reasoning else ()), *verdicts]
    own_names = {field.name for field in ours}
    texts = [field.name for field in inputs if pa.types.is_string(field.type) and (field.name,) not in json_texts(inputs)]
    chosen = [field for field in inputs if not (field.name == "id" == id_column and field.name in texts)]
    taken = own_names | {field.name for field in chosen}
    for place, field in enumerate(chosen):
        if field.name in own_names:
            name = f"{_INPUT}{field.name}"
            while name in taken:
                name = f"{_INPUT}{name}"
            taken.add(name)
            source = (field.metadata or {}).get(_SOURCE, field.name.encode())
            chosen[place] = field.with_name(name).with_metadata({**(field.metadata or {}), _SOURCE: source})
    return pa.schema(ours + chosen, metadata={**(inputs.metadata or {}), **(SAMPLE_SCHEMA.metadata or {})})


def verdict_fields(columns: Mapping[str, str]) -> tuple[pa.Field[Any], ...]:
    """Return the verdict columns of a judge with these columns of its own, by name and Arrow type. Raises JobError for a name
    that the output has already."""
    ours = {*SAMPLE_SCHEMA.names, *(field.name for field in (*SCORE_FIELDS, *REASONING_FIELDS, *VERDICT_FIELDS))}
    if twice := sorted(columns.keys() & ours):
        raise JobError(
            f"verify.kind: COLUMNS of its file names {twice[0]!r}, a column that the output has already; give it another name"
        )
    own = [pa.field(name, pa.type_for_alias(kind), metadata=_OF_VERDICT) for name, kind in columns.items()]
    return (*VERDICT_FIELDS, *own)


def own_names(schema: pa.Schema) -> list[str]:
    """Return the columns of `schema` that are not the input's."""
    marked = [field.name for field in schema if b"tokabatch.column" in (field.metadata or {})]
    known = dict.fromkeys((*SAMPLE_SCHEMA.names, *marked, *verdict_names(schema)))
    return [name for name in known if name in schema.names]


def input_names(schema: pa.Schema) -> dict[str, str]:
    """Return the columns of `schema` that are the input's, each with its name there."""
    own = set(own_names(schema))
    return {
        field.name: (field.metadata or {}).get(_SOURCE, field.name.encode()).decode()
        for field in schema
        if field.name not in own
    }


def row_names(schema: pa.Schema, id_column: str | None) -> dict[str, str]:
    """Return the columns of `schema` that make up a row of the input, each with its name there: the input's, and our `id` if it
    stands for the input's column of that name, which is the `id_column` then."""
    names = input_names(schema)
    return {"id": "id", **names} if id_column == "id" and "id" not in names.values() else names


def verdict_names(schema: pa.Schema) -> list[str]:
    """Return the columns of `schema` made by a judge."""
    return [field.name for field in schema if (field.metadata or {}).items() >= _OF_VERDICT.items()]


def text_token_ids(completion: Completion) -> Int32:
    """Return the tokens to decode: without the stop token that ended the sample."""
    ids = completion.token_ids
    if isinstance(completion.stop_reason, int) and len(ids) and ids[-1] == completion.stop_reason:
        return ids[:-1]
    return ids


def cut_at_stop(text: str, stop_reason: str | int | None, behind: int = 0) -> str:
    """Return the text before the stop string that ended the sample, its first occurrence that ends after `behind` characters;
    all of it if none did."""
    if not isinstance(stop_reason, str) or not stop_reason:
        return text
    found = text.find(stop_reason, max(0, behind - len(stop_reason) + 1))
    return text if found < 0 else text[:found]


def sample_texts(
    completions: Sequence[Completion], least: Sequence[int], decode: Callable[[Sequence[Int32]], list[str]]
) -> list[str]:
    """Return the text of each sample, without what ended it; `least` are their `min_tokens`, `decode` is the tokenizer's."""
    texts = decode([text_token_ids(completion) for completion in completions])
    if not any(least):
        return [cut_at_stop(text, c.stop_reason) for text, c in zip(texts, completions, strict=True)]
    # Nothing within the first `min_tokens` tokens ends a sample.
    passed = decode([c.token_ids[:count] for c, count in zip(completions, least, strict=True)])
    cut = zip(texts, completions, passed, strict=True)
    return [cut_at_stop(text, completion.stop_reason, len(before)) for text, completion, before in cut]


def sample_keys(completions: Sequence[Completion], failures: Sequence[UnsampledRow]) -> tuple[Int64, Int32]:
    """Return row and sample index of each row of the table, in order: completions, then failures expanded."""
    rows = [completion.row_index for completion in completions]
    samples = [completion.sample_index for completion in completions]
    for failure in failures:
        rows += [failure.row_index] * failure.num_samples
        samples += failure.samples.tolist()
    return np.array(rows, dtype=np.int64), np.array(samples, dtype=np.int32)


def build_table(
    schema: pa.Schema,
    completions: Sequence[Completion],
    failures: Sequence[UnsampledRow],
    *,
    texts: Sequence[str],
    ids: pa.Array | pa.ChunkedArray | Sequence[str],
    columns: pa.Table,
    more: Mapping[str, Sequence[Any]] = MappingProxyType({}),
) -> pa.Table:
    """Return a table of `schema`, which may be a part of an output's, with a row for each completion, then `num_samples` for
    each failure.

    `texts` and each of `more`, split texts and verdicts by column, have an entry for each completion. `ids` and `columns` have
    one for each row of the table (see `sample_keys`); of `columns`, those in the schema are taken. A completion with an
    `error_code` becomes an error row; its text and verdict are not used.
    """
    row_index, sample_index = sample_keys(completions, failures)
    good = np.array([completion.error_code is None for completion in completions], dtype=np.bool_)
    missing = len(row_index) - len(completions)
    nulls = np.append(~good, np.ones(missing, np.bool_))
    kept = [completion for completion, ok in zip(completions, good, strict=True) if ok]

    def of_good(values: Sequence[Any] | None) -> list[Any]:
        assert values is not None
        return [value if ok else None for value, ok in zip(values, good, strict=True)] + [None] * missing

    def of_all(values: Sequence[Any]) -> list[Any]:
        return [*values, *[None] * missing]

    def of_errors(ours: Sequence[Any], theirs: Callable[[RowError], Any], none: str | None = None) -> list[Any]:
        values = [none if failure.error is None else theirs(failure.error) for failure in failures]
        return [*ours, *(each for each, failure in zip(values, failures, strict=True) for _ in range(failure.num_samples))]

    own: dict[str, Callable[[], Any]] = {
        "id": lambda: ids,
        "row_index": lambda: row_index,
        "sample_index": lambda: sample_index,
        "status": lambda: of_errors(np.where(good, "ok", "error").tolist(), lambda error: "error", CANCELLED),
        "text": lambda: of_good(texts),
        "token_ids": lambda: _nullable_list(
            pa.array(_concatenate([c.token_ids for c in kept], np.int32)), [len(c.token_ids) for c in kept], nulls
        ),
        "finish_reason": lambda: of_good([c.finish_reason for c in completions]),
        "stop_reason": lambda: of_good([None if c.stop_reason is None else str(c.stop_reason) for c in completions]),
        "num_prompt_tokens": lambda: of_all([c.num_prompt_tokens for c in completions]),
        "num_cached_tokens": lambda: of_all([c.counts.cached_tokens for c in completions]),
        "num_output_tokens": lambda: of_good([len(c.token_ids) for c in completions]),
        "cumulative_logprob": lambda: of_good([_logprob(c) for c in completions]),
        "logprobs": lambda: _logprob_column(completions, nulls),
        "error_code": lambda: of_errors([c.error_code for c in completions], lambda error: error.code),
        "error_message": lambda: of_errors([c.error_message for c in completions], lambda error: error.message),
        **{name: lambda values=values: of_good(values) for name, values in more.items()},
    }
    if any(field.metadata == _OF_SCORE for field in schema):
        own["is_greedy"] = lambda: of_good([c.score and c.score.greedy for c in completions])
        own["perplexity"] = lambda: of_good([_perplexity(c) for c in completions])
    arrays: list[pa.Array | pa.ChunkedArray] = []
    sources = input_names(schema)
    for field in schema:
        values = own[field.name]() if field.name in own else columns[sources[field.name]]
        made = values if isinstance(values, (pa.Array, pa.ChunkedArray)) else pa.array(values, field.type)
        arrays.append(made if made.type == field.type else made.cast(field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def _logprob(completion: Completion) -> float | None:
    """Return the log-probability of all tokens together."""
    if completion.score is not None:
        return completion.score.logprob
    return None if completion.logprobs is None else float(completion.logprobs.sum(dtype=np.float64))


def _perplexity(completion: Completion) -> float | None:
    """Return exp of the mean negative log-probability of a token."""
    if completion.score is None:
        return None
    with np.errstate(over="ignore"):
        return float(np.exp(-completion.score.logprob / len(completion.token_ids)))


def _logprob_column(completions: Sequence[Completion], nulls: Bool) -> pa.ListArray:
    """Return the column `logprobs`; `nulls` marks the error rows. Samples without logprobs are null as well."""
    nulls = nulls.copy()
    nulls[: len(completions)] |= np.array([c.logprobs is None for c in completions], dtype=np.bool_)
    scored = [c for c, null in zip(completions, nulls, strict=False) if not null]
    lengths = [len(completion.token_ids) for completion in scored]
    num_top = [0 if completion.top_ids is None else completion.top_ids.shape[1] for completion in scored]
    top_offsets = _offsets(np.repeat(np.array(num_top, dtype=np.int64), lengths))
    top_ids = _concatenate([c.top_ids.ravel() for c in scored if c.top_ids is not None], np.int32)
    top_logprobs = _concatenate([c.top_logprobs.ravel() for c in scored if c.top_logprobs is not None], np.float32)
    tokens = pa.StructArray.from_arrays(
        [
            pa.array(_concatenate([c.logprobs for c in scored if c.logprobs is not None], np.float32)),
            pa.ListArray.from_arrays(top_offsets, pa.array(top_ids)),
            pa.ListArray.from_arrays(top_offsets, pa.array(top_logprobs)),
        ],
        fields=list(_TOKEN_LOGPROBS),
    )
    return _nullable_list(tokens, lengths, nulls)


def _nullable_list(flat: pa.Array, lengths: Sequence[int], nulls: Bool) -> pa.ListArray:
    """Return a list for each row that `nulls` does not mark, with `lengths` in their order."""
    all_lengths = np.zeros(len(nulls), dtype=np.int64)
    all_lengths[~nulls] = lengths
    return pa.ListArray.from_arrays(_offsets(all_lengths), flat, mask=pa.array(nulls))


def _offsets(lengths: Int64) -> pa.Array:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    if offsets[-1] > _MAX_ENTRIES:
        raise OverflowError(f"{offsets[-1]:,} entries are more than a list column holds; ask for fewer generation.logprobs")
    return pa.array(offsets.astype(np.int32))


def _concatenate(arrays: Sequence[npt.NDArray[Any]], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    return np.concatenate([np.empty(0, dtype), *arrays], dtype=dtype)
