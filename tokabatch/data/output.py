"""The output schema, and completions as a table of it: one row a sample, the input columns behind ours.

This module does not decode, verify or write; it is handed texts and verdicts. Building is per sample, never per token:
list columns are made from concatenated arrays and offsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tokabatch.errors import OutputError, RowError
from tokabatch.messages import Bool, Completion, Int32, Int64

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
"""What every output has. An error row is null from `text` to `logprobs`, save for the prompt's counts where known."""
CORRECT = pa.field("correct", pa.bool_())
"""Follows when the job verifies; null where there is no sample to verify."""


@dataclass(frozen=True, slots=True)
class FailedRow:
    """A row that was never sampled. It takes an error row for each of `samples`, so that rows x n = ok + error holds."""

    row_index: int
    samples: Int32
    error: RowError

    @property
    def num_samples(self) -> int:
        return len(self.samples)


def output_schema(
    inputs: pa.Schema,
    *,
    columns: Literal["all"] | Sequence[str] = "all",
    id_column: str | None = None,
    verified: bool = False,
) -> pa.Schema:
    """Our columns, then those of the input that `columns` names, in the input's order.

    An input column `id` that is the id column is not repeated: our `id` carries it. Raises OutputError for a column that
    the input does not have and for a name that is ours.
    """
    ours = list(SAMPLE_SCHEMA) + [CORRECT] * verified
    own_names = {field.name for field in ours}
    if columns != "all":
        for name in columns:
            if name not in inputs.names:
                raise OutputError(_missing_column(name, inputs.names))
    chosen = [field for field in inputs if columns == "all" or field.name in columns]
    chosen = [field for field in chosen if not (field.name == "id" == id_column)]
    clashes = [field.name for field in chosen if field.name in own_names]
    if clashes:
        keep = [field.name for field in chosen if field.name not in own_names]
        raise OutputError(
            f"the input has {'a column' if len(clashes) == 1 else 'columns'} named {', '.join(clashes)}, "
            "which the output uses itself. Rename in the input, or leave out of the output with "
            f"output.columns=[{', '.join(keep)}]."
        )
    return pa.schema(ours + chosen, metadata=SAMPLE_SCHEMA.metadata)


def text_token_ids(completion: Completion) -> Int32:
    """The tokens to decode: without the stop token that ended the sample."""
    ids = completion.token_ids
    if isinstance(completion.stop_reason, int) and len(ids) and ids[-1] == completion.stop_reason:
        return ids[:-1]
    return ids


def cut_at_stop(text: str, stop_reason: str | int | None) -> str:
    """The text in front of the stop string that ended the sample; all of it where none did."""
    return text.partition(stop_reason)[0] if isinstance(stop_reason, str) and stop_reason else text


def sample_keys(completions: Sequence[Completion], failures: Sequence[FailedRow]) -> tuple[Int64, Int32]:
    """Row and sample index of each row of the table, in its order: completions, then failures expanded."""
    rows = [completion.row_index for completion in completions]
    samples = [completion.sample_index for completion in completions]
    for failure in failures:
        rows += [failure.row_index] * failure.num_samples
        samples += failure.samples.tolist()
    return np.array(rows, dtype=np.int64), np.array(samples, dtype=np.int32)


def build_table(
    schema: pa.Schema,
    completions: Sequence[Completion],
    failures: Sequence[FailedRow],
    *,
    texts: Sequence[str],
    ids: pa.Array | pa.ChunkedArray | Sequence[str],
    columns: pa.Table,
    correct: Sequence[bool | None] | None = None,
) -> pa.Table:
    """A table of `schema` with a row for each completion, then `num_samples` for each failure.

    `texts` and `correct` have an entry for each completion; `correct` is given exactly when the schema holds it. `ids`
    and `columns` have one for each row of the table (see `sample_keys`); of `columns`, those in the schema are taken. A
    completion with an `error_code` becomes an error row; its text and verdict are not used.
    """
    assert len(texts) == len(completions) and (correct is not None) == (CORRECT.name in schema.names)
    row_index, sample_index = sample_keys(completions, failures)
    # A table without columns has no rows either, whatever it was taken from.
    assert len(ids) == len(row_index) and (columns.num_rows == len(row_index) or not columns.num_columns)
    missing = len(row_index) - len(completions)
    good = np.array([completion.error_code is None for completion in completions], dtype=np.bool_)
    own: dict[str, Any] = {
        "id": ids,
        "row_index": row_index,
        "sample_index": sample_index,
        "status": np.where(np.append(good, np.zeros(missing, np.bool_)), "ok", "error"),
        **_scalars(completions, texts, missing),
        **_token_lists(completions, good, missing),
        **_errors(completions, failures),
    }
    if correct is not None:
        own["correct"] = [value if ok else None for value, ok in zip(correct, good, strict=True)] + [None] * missing
    arrays = [_as_column(own[field.name] if field.name in own else columns[field.name], field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def _as_column(values: Any, type_: pa.DataType) -> pa.Array | pa.ChunkedArray:
    if isinstance(values, (pa.Array, pa.ChunkedArray)):
        return values if values.type == type_ else values.cast(type_)
    return pa.array(values, type_)


def _scalars(completions: Sequence[Completion], texts: Sequence[str], missing: int) -> dict[str, list[Any]]:
    ok = [completion.error_code is None for completion in completions]
    nothing = [None] * missing
    return {
        "text": [text if good else None for text, good in zip(texts, ok, strict=True)] + nothing,
        "finish_reason": [c.finish_reason if good else None for c, good in zip(completions, ok, strict=True)] + nothing,
        "stop_reason": [
            str(c.stop_reason) if good and c.stop_reason is not None else None for c, good in zip(completions, ok, strict=True)
        ]
        + nothing,
        "num_prompt_tokens": [c.num_prompt_tokens for c in completions] + nothing,
        "num_cached_tokens": [c.num_cached_tokens for c in completions] + nothing,
        "num_output_tokens": [len(c.token_ids) if good else None for c, good in zip(completions, ok, strict=True)] + nothing,
    }


def _errors(completions: Sequence[Completion], failures: Sequence[FailedRow]) -> dict[str, list[Any]]:
    codes = [completion.error_code for completion in completions]
    messages = [completion.error_message for completion in completions]
    for failure in failures:
        codes += [failure.error.code] * failure.num_samples
        messages += [failure.error.message] * failure.num_samples
    return {"error_code": codes, "error_message": messages}


def _token_lists(completions: Sequence[Completion], good: Bool, missing: int) -> dict[str, Any]:
    kept = [completion for completion, ok in zip(completions, good, strict=True) if ok]
    nulls = np.append(~good, np.ones(missing, np.bool_))
    scored = [completion for completion in kept if completion.logprobs is not None]
    unscored = nulls.copy()
    unscored[: len(completions)] |= np.array([c.logprobs is None for c in completions], dtype=np.bool_)
    totals = np.zeros(len(nulls), dtype=np.float64)
    totals[~unscored] = [_float_sum(completion) for completion in scored]
    return {
        "token_ids": _list_column([c.token_ids for c in kept], nulls, pa.int32()),
        "cumulative_logprob": pa.array(totals, mask=unscored),
        "logprobs": _logprob_column(scored, unscored),
    }


def _float_sum(completion: Completion) -> float:
    return 0.0 if completion.logprobs is None else float(completion.logprobs.sum(dtype=np.float64))


def _logprob_column(scored: Sequence[Completion], nulls: Bool) -> pa.ListArray:
    lengths = [len(completion.token_ids) for completion in scored]
    num_top = [0 if completion.top_ids is None else completion.top_ids.shape[1] for completion in scored]
    top_per_token = np.repeat(np.array(num_top, dtype=np.int64), lengths)
    top_offsets = _offsets(top_per_token)
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


def _list_column(values: Sequence[npt.NDArray[Any]], nulls: Bool, type_: pa.DataType) -> pa.ListArray:
    flat = pa.array(_concatenate(values, np.int32), type_)
    return _nullable_list(flat, [len(value) for value in values], nulls)


def _nullable_list(flat: pa.Array, lengths: Sequence[int], nulls: Bool) -> pa.ListArray:
    """A list for each row that `nulls` does not mark, of `lengths` in their order."""
    all_lengths = np.zeros(len(nulls), dtype=np.int64)
    all_lengths[~nulls] = lengths
    return pa.ListArray.from_arrays(_offsets(all_lengths), flat, mask=pa.array(nulls))


def _offsets(lengths: Int64) -> pa.Array:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    assert offsets[-1] < 2**31, "too many tokens for one table; build smaller ones"
    return pa.array(offsets.astype(np.int32))


def _concatenate(arrays: Sequence[npt.NDArray[Any]], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    return np.concatenate([np.empty(0, dtype), *arrays], dtype=dtype)


def _missing_column(name: str, names: Sequence[str]) -> str:
    nearest = get_close_matches(name, names, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"it has {', '.join(names) or 'no columns'}."
    return f"output.columns names {name!r}, which the input does not have; {hint}"
