"""The output schema and the table of completions, checked value by value through plain Python."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokabatch.errors import JobError, RowError
from tokabatch.input.store.json_types import JSON_TEXTS_KEY
from tokabatch.output.schema import (
    VERDICT_FIELDS,
    FailedRow,
    build_table,
    cut_at_stop,
    input_names,
    output_schema,
    row_names,
    sample_keys,
    text_token_ids,
    verdict_fields,
)
from tokabatch.scheduling.contracts import NO_COUNTS, Completion

INPUTS = pa.schema([("question", pa.string()), ("level", pa.int8())])


def completion(row: int, sample: int, ids: list[int], top: int | None = None, **changes: object) -> Completion:
    fields: dict[str, object] = {"finish_reason": "length", "stop_reason": None, "num_prompt_tokens": 7}
    fields |= {"counts": replace(NO_COUNTS, cached_tokens=4), **changes}
    if top is not None:
        fields["logprobs"] = -np.arange(1, len(ids) + 1, dtype=np.float32)
        fields["top_ids"] = np.arange(len(ids) * top, dtype=np.int32).reshape(len(ids), top)
        fields["top_logprobs"] = -np.ones((len(ids), top), dtype=np.float32)
    return Completion(row_index=row, sample_index=sample, token_ids=np.array(ids, dtype=np.int32), **fields)  # type: ignore[arg-type]


def samples(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int32)


def columns(num_rows: int) -> pa.Table:
    return pa.table({"question": [f"q{i}" for i in range(num_rows)], "level": range(num_rows)}, schema=INPUTS)


def table(completions: list[Completion], failures: list[FailedRow] = [], **changes: object) -> pa.Table:  # noqa: B006
    num_rows = len(sample_keys(completions, failures)[0])
    fields = {
        "texts": [f"text {i}" for i in range(len(completions))],
        "ids": [f"id {i}" for i in range(num_rows)],
        "columns": columns(num_rows),
        **changes,
    }
    schema = output_schema(INPUTS, verdicts=VERDICT_FIELDS if "more" in changes else ())
    built = build_table(schema, completions, failures, **fields)  # type: ignore[arg-type]
    built.validate(full=True)
    assert built.schema.equals(schema)
    return built


def verdicts(correct: list[bool | None]) -> dict[str, list[Any]]:
    scores = [None if each is None else float(each) for each in correct]
    return {"correct": correct, "verify_score": scores, "verify_error": [None] * len(correct)}


def test_the_columns_are_those_promised_in_their_order() -> None:
    schema = output_schema(INPUTS, verdicts=VERDICT_FIELDS)
    assert schema.names == [
        *("id", "row_index", "sample_index", "status", "text", "token_ids", "finish_reason", "stop_reason"),
        *("num_prompt_tokens", "num_cached_tokens", "num_output_tokens", "cumulative_logprob", "logprobs"),
        *("error_code", "error_message", "correct", "verify_score", "verify_error", "question", "level"),
    ]
    assert schema.field("row_index").type == pa.int64()
    assert schema.field("sample_index").type == pa.int32()
    assert schema.field("token_ids").type == pa.list_(pa.int32())
    assert schema.field("cumulative_logprob").type == pa.float64()


def test_a_column_that_has_a_name_of_ours_gets_another() -> None:
    names = ["text", "question", "status", "input_status"]
    schema = output_schema(pa.schema([(name, pa.string()) for name in names]))
    renamed = ["input_text", "question", "input_input_status", "input_status"]
    assert schema.names[-4:] == renamed and input_names(schema) == dict(zip(renamed, names, strict=True))
    # As it is found in a file, it stays what it is.
    again = output_schema(pa.schema([schema.field(name) for name in renamed]))
    assert input_names(again) == input_names(schema)


def test_correct_is_ours_only_where_the_job_verifies() -> None:
    inputs = pa.schema([("correct", pa.string())])
    assert output_schema(inputs).field("correct").type == pa.string()
    assert input_names(output_schema(inputs, verdicts=VERDICT_FIELDS)) == {"input_correct": "correct"}


def test_the_id_column_may_be_called_id() -> None:
    inputs = pa.schema([("id", pa.string()), ("question", pa.string())])
    schema = output_schema(inputs, id_column="id")
    assert input_names(schema) == {"question": "question"}
    assert row_names(schema, "id") == {"id": "id", "question": "question"} and row_names(schema, None) == input_names(schema)
    assert input_names(output_schema(inputs, id_column="question")) == {"input_id": "id", "question": "question"}
    # Our `id` is text: what it does not stand for is carried besides.
    texts = inputs.with_metadata({JSON_TEXTS_KEY: json.dumps([["id"]])})
    for others in (texts, pa.schema([("id", pa.int64()), ("question", pa.string())])):
        repeated = output_schema(others, id_column="id")
        assert row_names(repeated, "id") == input_names(repeated) == {"input_id": "id", "question": "question"}


def test_a_completion_becomes_one_row() -> None:
    row = table([completion(3, 1, [5, 6, 2], finish_reason="stop", stop_reason=2)], more=verdicts([True])).to_pylist()[0]
    assert row == {
        "id": "id 0",
        "row_index": 3,
        "sample_index": 1,
        "status": "ok",
        "text": "text 0",
        "token_ids": [5, 6, 2],
        "finish_reason": "stop",
        "stop_reason": "2",
        "num_prompt_tokens": 7,
        "num_cached_tokens": 4,
        "num_output_tokens": 3,
        "cumulative_logprob": None,
        "logprobs": None,
        "error_code": None,
        "error_message": None,
        "correct": True,
        "verify_score": 1.0,
        "verify_error": None,
        "question": "q0",
        "level": 0,
    }


def test_a_failed_row_becomes_n_error_rows() -> None:
    failure = FailedRow(9, samples(3), RowError("empty_prompt", "the prompt has no tokens"))
    rows = table([completion(0, 0, [1])], [failure], more=verdicts([False])).to_pylist()
    assert [(row["row_index"], row["sample_index"], row["status"]) for row in rows] == [
        (0, 0, "ok"),
        *((9, sample, "error") for sample in range(3)),
    ]
    for row in rows[1:]:
        assert (row["error_code"], row["error_message"]) == ("empty_prompt", "the prompt has no tokens")
        assert all(row[name] is None for name in ("text", "token_ids", "num_prompt_tokens", "logprobs", "correct"))
        assert row["question"] is not None


def test_a_completion_with_an_error_keeps_only_the_prompts_counts() -> None:
    broken = completion(0, 0, [1, 2], top=2, error_code="nan_logits", error_message="no finite logits")
    first, second = table([broken, completion(0, 1, [8], top=1)], more=verdicts([True, True])).to_pylist()
    assert (first["status"], first["error_code"], first["correct"]) == ("error", "nan_logits", None)
    assert (first["num_prompt_tokens"], first["num_output_tokens"], first["token_ids"]) == (7, None, None)
    assert second["token_ids"] == [8]
    assert second["logprobs"] == [{"logprob": -1.0, "top_token_ids": [0], "top_logprobs": [-1.0]}]


def test_nothing_makes_an_empty_table() -> None:
    assert table([]).num_rows == 0


@st.composite
def mixed_completions(draw: st.DrawFn) -> list[Completion]:
    made = []
    for row in range(draw(st.integers(0, 8))):
        ids = draw(st.lists(st.integers(0, 2**31 - 1), max_size=5))
        top = draw(st.none() | st.integers(0, 3))
        error = draw(st.sampled_from([None, None, "nan_logits"]))
        made.append(completion(row, 0, ids, top, error_code=error))
    return made


@settings(max_examples=100, deadline=None)
@given(mixed_completions(), st.integers(0, 2))
def test_lists_equal_those_built_token_by_token(completions: list[Completion], num_failures: int) -> None:
    failures = [FailedRow(100 + i, samples(2), RowError("bad_json", "line 1")) for i in range(num_failures)]
    rows = table(completions, failures).to_pylist()
    assert len(rows) == len(completions) + 2 * num_failures
    for row, made in zip(rows, completions, strict=False):
        if made.error_code is not None:
            assert row["token_ids"] is row["logprobs"] is row["cumulative_logprob"] is None
            continue
        assert row["token_ids"] == made.token_ids.tolist()
        if made.logprobs is None:
            assert row["logprobs"] is row["cumulative_logprob"] is None
            continue
        assert math.isclose(row["cumulative_logprob"], sum(made.logprobs.tolist()))
        assert made.top_ids is not None and made.top_logprobs is not None
        assert row["logprobs"] == [
            {"logprob": logprob, "top_token_ids": top_ids, "top_logprobs": top_logprobs}
            for logprob, top_ids, top_logprobs in zip(
                made.logprobs.tolist(), made.top_ids.tolist(), made.top_logprobs.tolist(), strict=True
            )
        ]


@pytest.mark.parametrize(
    ("text", "stop_reason", "expected"),
    [
        ("a b\n\nQ", "\n\n", "a b"),
        ("STOP", "STOP", ""),
        ("one; two; three", ";", "one"),
        ("nothing here", "STOP", "nothing here"),
        ("ended by a token", 2, "ended by a token"),
        ("ended by length", None, "ended by length"),
    ],
)
def test_text_ends_in_front_of_the_stop_string(text: str, stop_reason: str | int | None, expected: str) -> None:
    assert cut_at_stop(text, stop_reason) == expected


def test_a_stop_string_that_ended_nothing_stays_in_the_text():
    assert cut_at_stop("a\n\nb\n\nc", "\n\n", behind=3) == "a\n\nb"
    # The first so many characters may hold a part of it.
    assert cut_at_stop("a\n\nb", "\n\n", behind=2) == "a"
    assert cut_at_stop("a\n\nb", "\n\n", behind=3) == "a\n\nb"


def test_the_stop_token_is_not_decoded() -> None:
    assert text_token_ids(completion(0, 0, [5, 6, 2], stop_reason=2)).tolist() == [5, 6]
    assert text_token_ids(completion(0, 0, [5, 6, 2], stop_reason="x")).tolist() == [5, 6, 2]
    assert text_token_ids(completion(0, 0, [5, 6, 2])).tolist() == [5, 6, 2]
    assert text_token_ids(completion(0, 0, [])).tolist() == []


def test_a_table_without_input_columns_takes_its_rows_from_the_samples() -> None:
    schema = output_schema(pa.schema([]))
    made = [completion(0, 0, [1]), completion(1, 0, [2, 3])]
    failed = [FailedRow(2, samples(2), RowError("bad_json", "why"))]
    built = build_table(schema, made, failed, texts=["a", "b"], ids=list("0122"), columns=pa.table({}))
    assert built.num_rows == 4 and built["row_index"].to_pylist() == [0, 1, 2, 2] and schema.names[-1] == "error_message"


def test_a_judge_s_column_may_not_be_called_as_one_of_the_output() -> None:
    assert [field.name for field in verdict_fields({"found": "string"})][-1] == "found"
    for name in ("text", "correct", "answer_text", "perplexity"):
        with pytest.raises(JobError, match=f"COLUMNS of its file names '{name}'.* give it another name"):
            verdict_fields({"found": "string", name: "string"})
