"""The tokenised input that is kept comes back the same, and only where nothing of what it was made of or by has changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tokabatch.input.fingerprint import Fingerprint
from tokabatch.input.prompts.builder import Limits
from tokabatch.input.store.kept_input import INDEX, Origin, describe_origin, keep_input, load_kept
from tokabatch.input.store.tokenized_input import InputStore, ingest
from tokabatch.job import Job
from tokabatch.storage.atomic_files import DurableFiles

ROWS: list[Any] = [
    {"prompt": "a", "id": "x", "score": 1, "deep": {"a": [1, None]}, "sampling_params": {"stop": ["é"], "logprobs": 2}},
    {"prompt": "<|start|> b", "id": "y", "score": 2.5, "deep": {"b": "c"}, "tags": [], "sampling_params": {"n": 3}},
    b"{broken",
    {"prompt": "", "id": "z", "mixed": "t"},
    {"prompt": "c", "id": 7, "mixed": {"k": 1}, "big": 2**80, "sampling_params": {"stop_token_ids": [5, 6]}},
]


def job_of(path: Path, **changes: Any) -> Job:
    base: dict[str, Any] = {"model": {"path": "m"}, "input": {"path": str(path), "id_column": "id"}, "output": {"path": "out"}}
    return Job.load({name: {**base.get(name, {}), **changes.get(name, {})} for name in {**base, **changes}})


def origin_of(job: Job, settings: dict[str, str] | None = None, clock: str = "noon") -> Origin:
    origin = describe_origin(job, Fingerprint(settings or {}, {}), job.generation, Limits(4096, 330), clock)
    assert origin is not None
    return origin


@pytest.fixture
def keep(tmp_path, tokenizers) -> Callable[[Job], InputStore]:
    """Ingests a job's input and keeps it at `tmp_path / "kept"`."""

    def make(job: Job) -> InputStore:
        (tmp_path / "scratch").mkdir()
        origin = origin_of(job)
        store = ingest(job, tokenizers["chat"], tmp_path / "scratch", 4096, vocab_size=330)
        keep_input(store, origin, DurableFiles(), tmp_path / "scratch", tmp_path / "kept")
        return store

    return make


def same(there: InputStore, here: InputStore) -> bool:
    rows = np.arange(there.num_rows)
    arrays = ("tokens", "start", "length", "params")
    return (
        here.num_rows == there.num_rows
        and all(np.array_equal(getattr(there, name), getattr(here, name)) for name in arrays)
        and here.sampling == there.sampling
        and here.errors == there.errors
        and here.column_schema.equals(there.column_schema, check_metadata=True)
        and (here.chat, here.hidden_rows) == (there.chat, there.hidden_rows)
        and here.columns(rows).equals(there.columns(rows))
        and here.ids(rows).equals(there.ids(rows))
        and np.array_equal(here.digests.content, there.digests.content)
        and np.array_equal(here.digests.prompt, there.digests.prompt)
    )


def test_json_lines_come_back(keep, write_rows, tmp_path):
    job = job_of(write_rows(*ROWS))
    store = keep(job)
    found = load_kept(tmp_path / "kept", origin_of(job))
    assert found is not None and same(store, found) and store.hidden_rows == 1 and len(store.errors) == 2


def test_arrow_columns_come_back(keep, tmp_path):
    table = pa.table(
        {
            "id": [str(number) for number in range(3000)],
            "prompt": ["p"] * 3000,
            "when": pa.array(range(3000), pa.timestamp("ns", "UTC")),
            "nested": pa.array([[{"a": number}] for number in range(3000)]),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=1000)
    job = job_of(tmp_path / "rows.parquet", output={"columns": ["nested", "when"]})
    store = keep(job)
    found = load_kept(tmp_path / "kept", origin_of(job))
    assert found is not None and same(store, found) and found.columns(np.array([2999, 5])).num_rows == 2


def test_every_byte_counts(keep, write_rows, tmp_path):
    path = write_rows(*ROWS)
    job = job_of(path)
    keep(job)
    assert not (tmp_path / "scratch").exists()
    victims = [path, *sorted((tmp_path / "kept").iterdir())]
    assert len(victims) > 8
    for victim in victims:
        content = victim.read_bytes()
        changes = [b"", content[:-1], content + b"\n"]
        if content:
            changes += [bytes([content[0] ^ 1]) + content[1:], content[:-1] + bytes([content[-1] ^ 1])]
        for changed in changes:
            if changed != content:
                victim.write_bytes(changed)
                assert load_kept(tmp_path / "kept", origin_of(job)) is None, victim
        victim.unlink()
        if victim != path:
            assert load_kept(tmp_path / "kept", origin_of(job)) is None, victim
        victim.write_bytes(content)
    assert load_kept(tmp_path / "kept", origin_of(job)) is not None


def test_an_index_of_another_form_is_none(keep, write_rows, tmp_path):
    job = job_of(write_rows(*ROWS))
    keep(job)
    index = tmp_path / "kept" / INDEX
    document = json.loads(index.read_bytes().partition(b"\n")[2])
    index.write_text(json.dumps(document))
    assert load_kept(tmp_path / "kept", origin_of(job)) is None
    assert load_kept(tmp_path / "nothing", origin_of(job)) is None


CHANGES: list[dict[str, Any]] = [
    {"prompt": {"template": "{{ prompt }}!"}},
    {"prompt": {"special_tokens": "allow"}},
    {"generation": {"n": 2}},
    {"generation": {"max_tokens": 9}},
    {"input": {"id_column": None}},
    {"output": {"columns": ["score"]}},
    {"verify": {"kind": "exact", "answer": "score"}},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_another_job_makes_its_own(changes, keep, write_rows, tmp_path):
    path = write_rows(*ROWS)
    keep(job_of(path))
    assert load_kept(tmp_path / "kept", origin_of(job_of(path, **changes))) is None


def test_another_tokenizer_model_clock_or_version_makes_its_own(keep, write_rows, tmp_path, monkeypatch):
    job = job_of(write_rows(*ROWS))
    keep(job)
    origin = origin_of(job)
    for changed in (
        origin_of(job, {"tokenizer/tokenizer.json": "1 bytes"}),
        origin_of(job, clock="midnight"),
        describe_origin(job, Fingerprint({}, {}), job.generation, Limits(4095, 330), "noon"),
        describe_origin(job, Fingerprint({}, {}), job.generation, Limits(4096, 331), "noon"),
    ):
        assert changed is not None and load_kept(tmp_path / "kept", changed) is None
    assert load_kept(tmp_path / "kept", origin_of(job, {"model/model.safetensors": "other"})) is not None
    monkeypatch.setattr("tokabatch.input.store.kept_input.version", lambda name: "0")
    assert load_kept(tmp_path / "kept", origin_of(job)) is None
    assert load_kept(tmp_path / "kept", origin) is not None


def test_an_input_that_is_written_to_meanwhile_is_not_kept(write_rows, tokenizers, tmp_path):
    path = write_rows(*ROWS)
    job = job_of(path)
    (tmp_path / "scratch").mkdir()
    origin = origin_of(job)
    store = ingest(job, tokenizers["chat"], tmp_path / "scratch", 4096, vocab_size=330)
    with path.open("ab") as file:
        file.write(b'{"prompt": "d", "id": "late"}\n')
    keep_input(store, origin, DurableFiles(), tmp_path / "scratch", tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_what_is_kept_gives_way_to_another_or_to_nothing(keep, write_rows, tmp_path, tokenizers):
    job = job_of(write_rows(*ROWS))
    keep(job)
    for origin, stays in ((origin_of(job, clock="later"), True), (None, False)):
        (tmp_path / "scratch").mkdir(exist_ok=True)
        for path in (tmp_path / "scratch").iterdir():
            path.unlink()
        store = ingest(job, tokenizers["chat"], tmp_path / "scratch", 4096, vocab_size=330)
        keep_input(store, origin, DurableFiles(), tmp_path / "scratch", tmp_path / "kept")
        assert (tmp_path / "kept").exists() is stays
        assert load_kept(tmp_path / "kept", origin_of(job)) is None


def test_input_that_is_not_local_or_cut_short_is_not_compared(write_rows, tmp_path):
    path = write_rows(*ROWS)
    for given in ({"path": "hf://datasets/a/b"}, {"path": str(path), "limit": 2}):
        job = job_of(path, input=given)
        assert describe_origin(job, Fingerprint({}, {}), job.generation, Limits(1, 1), "") is None
    origin = origin_of(job_of(path))
    assert replace(origin, marks=()).unchanged() is False and origin.unchanged()
