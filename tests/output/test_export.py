"""Exports against the same samples sorted in plain Python."""

from __future__ import annotations

import csv
import datetime
import decimal
import errno
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.shards import write_rows

from tokabatch.errors import OutputError, RowError
from tokabatch.output import export as export_module
from tokabatch.output.claim import Claim
from tokabatch.output.export import Selection, _check_shards, export
from tokabatch.output.folder import OutputFolder
from tokabatch.output.schema import VERDICT_FIELDS, FailedRow, build_table, output_schema, sample_keys
from tokabatch.output.shard_writer import ShardWriter
from tokabatch.scheduling.contracts import NO_COUNTS, Completion

UTC = datetime.timezone.utc


def completion(row: int, sample: int) -> Completion:
    ids = np.arange(row % 4 + 1, dtype=np.int32)
    logprobs = np.full(len(ids), -0.5, dtype=np.float32)
    top = np.tile(ids[:, None], 2)
    return Completion(row, sample, ids, "length", None, 3, NO_COUNTS, logprobs, top, top.astype(np.float32))


def write_output(
    out: Path, keys: list[tuple[int, int]], inputs: pa.Table, failures: tuple[FailedRow, ...] = (), rows_per_shard: int = 7
) -> None:
    """Commit samples in the order of `keys`, a few at a time; `inputs` has a row for each row index."""
    schema = output_schema(inputs.schema, verdicts=VERDICT_FIELDS[:1])
    with Claim(out) as claim:
        writer = ShardWriter(claim, schema, rows_per_shard=rows_per_shard, flush_seconds=1e9)
        for begin in range(0, len(keys), 5):
            chunk = [completion(*key) for key in keys[begin : begin + 5]]
            failed = failures if begin == 0 else ()
            rows, _ = sample_keys(chunk, failed)
            write_rows(
                writer,
                build_table(
                    schema,
                    chunk,
                    failed,
                    texts=[f"text of {made.row_index}" for made in chunk],
                    ids=[str(row) for row in rows],
                    columns=inputs.take(pa.array(rows)),
                    more={"correct": [made.sample_index == 1 for made in chunk]},
                ),
            )
        writer.close()


def shuffled_keys(num_rows: int, n: int) -> list[tuple[int, int]]:
    keys = [(row, sample) for row in range(num_rows) for sample in range(n)]
    random.Random(0).shuffle(keys)
    return keys


def questions(num_rows: int) -> pa.Table:
    return pa.table({"question": [f"frage {i} \u2028 ß" for i in range(num_rows)], "tags": [[i, i] for i in range(num_rows)]})


def lines(path: Path) -> list[dict[str, object]]:
    text = path.read_bytes().decode()
    assert text.endswith("\n")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.split("\n")[:-1]]


@pytest.fixture(
    params=[(1 << 30, 1 << 30), (1500, 1 << 30), (1, 1 << 30), (1500, 0), (1, 0)],
    ids=["one bucket", "some buckets", "a bucket a row", "buckets in parts", "a part a sample"],
)
def bucket_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """With the size above which a bucket is sorted in parts."""
    monkeypatch.setattr(export_module, "_BUCKET_BYTES", request.param[0])
    monkeypatch.setattr(export_module, "_WIDENED_BYTES", request.param[1])
    return request.param[0]


def test_a_row_that_one_record_does_not_hold_is_refused_with_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "_WIDENED_BYTES", 0)
    monkeypatch.setattr(export_module, "_COLUMN_BYTES", 100)
    write_output(tmp_path / "out", shuffled_keys(3, 30), questions(3))
    with pytest.raises(
        OutputError, match=r"samples of row 0 hold more than 100 bytes or entries in one column.*without --nested"
    ):
        export(tmp_path / "out", tmp_path / "all.jsonl", Selection(nested=True))


@pytest.mark.parametrize("nested", [True, False])
def test_samples_far_above_the_mean_are_taken_in_smaller_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nested: bool
) -> None:
    """Rows whose texts and lists fit alone, not beside each other, after many small ones."""
    monkeypatch.setattr(export_module, "_WIDENED_BYTES", 0)
    monkeypatch.setattr(export_module, "_COLUMN_BYTES", 100)
    tall = [row >= 40 for row in range(50)]
    inputs = pa.table(
        {
            "question": ["q" * (90 if large else 1) for large in tall],
            "entries": [["", "x"] * (40 if large else 1) for large in tall],
        }
    )
    write_output(tmp_path / "out", shuffled_keys(50, 1), inputs)
    export(tmp_path / "out", tmp_path / "all.jsonl", Selection(nested=nested))
    records = lines(tmp_path / "all.jsonl")
    assert [record["question"] for record in records] == inputs["question"].to_pylist()
    assert [record["entries"] for record in records] == inputs["entries"].to_pylist()


def test_jsonl_is_ordered_and_whole(tmp_path: Path, bucket_bytes: int) -> None:
    failure = FailedRow(30, np.arange(3, dtype=np.int32), RowError("bad_json", "line 31"))
    write_output(tmp_path / "out", shuffled_keys(30, 3), questions(31), (failure,))
    exported = export(tmp_path / "out", tmp_path / "all.jsonl")
    records = lines(tmp_path / "all.jsonl")
    assert [(record["row_index"], record["sample_index"]) for record in records] == [
        (row, sample) for row in range(31) for sample in range(3)
    ]
    assert (exported.rows, exported.samples, exported.bytes) == (31, 93, (tmp_path / "all.jsonl").stat().st_size)
    assert records[4]["question"] == "frage 1 \u2028 ß" and records[4]["tags"] == [1, 1]
    assert records[4]["logprobs"] == [
        {"logprob": -0.5, "top_token_ids": [0, 0], "top_logprobs": [0.0, 0.0]},
        {"logprob": -0.5, "top_token_ids": [1, 1], "top_logprobs": [1.0, 1.0]},
    ]
    assert (records[-1]["status"], records[-1]["error_code"], records[-1]["text"]) == ("error", "bad_json", None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.jsonl", "out"]


def test_parquet_is_the_shards_in_order(tmp_path: Path, bucket_bytes: int) -> None:
    write_output(tmp_path / "out", shuffled_keys(20, 4), questions(20))
    export(tmp_path / "out", tmp_path / "all.parquet")
    shards = pa.concat_tables(pq.read_table(path) for path in sorted((tmp_path / "out" / "data").iterdir()))
    expected = shards.sort_by([("row_index", "ascending"), ("sample_index", "ascending")])
    exported = pq.read_table(tmp_path / "all.parquet")
    assert exported.equals(expected)
    assert b"tokabatch.arrow_bytes" not in pq.read_schema(tmp_path / "all.parquet").metadata


def test_nested_has_one_record_a_row(tmp_path: Path, bucket_bytes: int) -> None:
    keys = [key for key in shuffled_keys(20, 4) if key != (3, 2)]
    write_output(tmp_path / "out", keys, questions(20))
    exported = export(tmp_path / "out", tmp_path / "all.jsonl", Selection(nested=True))
    export(tmp_path / "out", tmp_path / "all.parquet", Selection(nested=True))
    records = lines(tmp_path / "all.jsonl")
    assert exported.rows == 20 and exported.samples == 79
    assert [record["row_index"] for record in records] == list(range(20))
    assert list(records[0]) == ["id", "row_index", "question", "tags", "samples"]
    samples = records[3]["samples"]
    assert isinstance(samples, list)
    assert [sample["sample_index"] for sample in samples] == [0, 1, 3]
    assert [sample["correct"] for sample in samples] == [False, True, False]
    assert "question" not in samples[0] and samples[0]["token_ids"] == [0, 1, 2, 3]
    assert pq.read_table(tmp_path / "all.parquet").to_pylist() == records


def test_types_that_json_lacks(tmp_path: Path) -> None:
    zone = pa.timestamp("us", tz="UTC")
    nested = pa.struct([("at", pa.timestamp("ns")), ("price", pa.decimal128(10, 2))])
    inputs = pa.table(
        {
            "blob": pa.array([b"\x00\xff"], pa.binary()),
            "at": pa.array([1_234_567_890_123_456_789], pa.timestamp("ns")),
            "zoned": pa.array([datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)], zone),
            "day": pa.array([datetime.date(2026, 1, 2)]),
            "clock": pa.array([datetime.time(3, 4, 5)]),
            "price": pa.array([decimal.Decimal("1.10")]),
            "spans": pa.array([[5, None]], pa.list_(pa.duration("ns"))),
            "floats": pa.array([[1.5, float("nan"), float("inf"), None]]),
            "half": pa.array([np.float16(0.5)]),
            "kind": pa.array(["a"]).dictionary_encode(),
            "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int32())),
            "deep": pa.array([{"at": datetime.datetime(2026, 1, 2), "price": decimal.Decimal("2.00")}], nested),
            "big": pa.array([2**63 - 1]),
        }
    )
    write_output(tmp_path / "out", [(0, 0)], inputs)
    export(tmp_path / "out", tmp_path / "all.jsonl")
    record = lines(tmp_path / "all.jsonl")[0]
    assert {name: record[name] for name in inputs.column_names} == {
        "blob": "AP8=",
        "at": "2009-02-13 23:31:30.123456789",
        "zoned": "2026-01-02 03:04:05.000000Z",
        "day": "2026-01-02",
        "clock": "03:04:05.000000",
        "price": "1.10",
        "spans": ["PT0.000000005S", None],
        "floats": [1.5, None, None, None],
        "half": 0.5,
        "kind": "a",
        "map": [["k", 1]],
        "deep": {"at": "2026-01-02 00:00:00.000000000", "price": "2.00"},
        "big": 2**63 - 1,
    }


@pytest.mark.parametrize(
    ("where", "chosen"), [("correct", [(0, 1), (1, 1)]), ("wrong", [(0, 0), (1, 0)]), ("ok", 4), ("error", [(2, 0), (2, 1)])]
)
def test_only_samples_that_are_so(tmp_path: Path, bucket_bytes: int, where: Any, chosen: Any) -> None:
    failure = FailedRow(2, np.arange(2, dtype=np.int32), RowError("bad_json", "line 3"))
    write_output(tmp_path / "out", [(0, 0), (1, 1), (0, 1), (1, 0)], questions(3), (failure,))
    exported = export(tmp_path / "out", tmp_path / "all.jsonl", Selection(where=where))
    keys = [(record["row_index"], record["sample_index"]) for record in lines(tmp_path / "all.jsonl")]
    assert keys == ([(0, 0), (0, 1), (1, 0), (1, 1)] if chosen == 4 else chosen)
    assert (exported.samples, exported.rows) == (len(keys), len({row for row, _ in keys}))


def test_columns_in_the_order_that_is_given(tmp_path: Path, bucket_bytes: int) -> None:
    write_output(tmp_path / "out", shuffled_keys(3, 2), questions(3))
    export(tmp_path / "out", tmp_path / "all.jsonl", Selection(columns=("text", "question", "id"), where="correct"))
    records = lines(tmp_path / "all.jsonl")
    assert [list(record) for record in records] == 3 * [["text", "question", "id"]]
    assert [record["id"] for record in records] == ["0", "1", "2"]
    export(tmp_path / "out", tmp_path / "all.jsonl", Selection(nested=True, columns=("question", "text")))
    assert lines(tmp_path / "all.jsonl")[1] == {
        "question": "frage 1 \u2028 ß", "samples": [{"text": "text of 1"}, {"text": "text of 1"}]
    }  # fmt: skip
    export(tmp_path / "out", tmp_path / "all.jsonl", Selection(nested=True, columns=("question",)))
    assert lines(tmp_path / "all.jsonl")[2] == {"question": "frage 2 \u2028 ß"}


def test_csv_is_read_back(tmp_path: Path, bucket_bytes: int) -> None:
    inputs = pa.table({"question": ['a "quoted", line\nand another', "ß"], "at": pa.array([0, None], pa.timestamp("s"))})
    inputs = inputs.append_column("blob", pa.array([b"xyz", None])).append_column("tags", pa.array([[1, 2], None]))
    write_output(tmp_path / "out", shuffled_keys(2, 2), inputs)
    export(
        tmp_path / "out", tmp_path / "all.csv", Selection(columns=("row_index", "question", "at", "blob", "tags", "correct"))
    )
    with (tmp_path / "all.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["row_index", "question", "at", "blob", "tags", "correct"]
    assert rows[1] == ["0", 'a "quoted", line\nand another', "1970-01-01 00:00:00.000", "eHl6", "[1,2]", "false"]
    assert rows[4] == ["1", "ß", "", "", "", "true"]
    export(tmp_path / "out", tmp_path / "none.csv", Selection(where="error", columns=("id",)))
    assert (tmp_path / "none.csv").read_text() == '"id"\n'


def test_a_stream_takes_json_lines(tmp_path: Path) -> None:
    write_output(tmp_path / "out", shuffled_keys(3, 2), questions(3))
    stream = io.BytesIO()
    export(tmp_path / "out", stream, Selection(columns=("row_index",)))
    assert stream.getvalue() == b"".join(b'{"row_index":%d}\n' % row for row in (0, 0, 1, 1, 2, 2))


def test_a_selection_that_cannot_be_names_the_remedy(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_output(out, [(0, 0)], questions(1))
    with pytest.raises(OutputError, match="--columns: the output has no column qestion; did you mean question"):
        export(out, tmp_path / "all.jsonl", Selection(columns=("qestion",)))
    schema = output_schema(questions(1).schema)
    with Claim(tmp_path / "plain") as claim:
        writer = ShardWriter(claim, schema, rows_per_shard=9, flush_seconds=1e9)
        write_rows(writer, pa.Table.from_pylist([{"row_index": 0, "sample_index": 0, "status": "ok"}], schema))
        writer.close()
    with pytest.raises(OutputError, match=r"--where correct: the run was not verified.* use ok"):
        export(tmp_path / "plain", tmp_path / "all.jsonl", Selection(where="correct"))


def test_refusals_name_the_remedy(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError, match=r"holds no committed samples.*check the path"):
        export(out, tmp_path / "all.jsonl")
    # A run that has begun and committed nothing yet.
    out.mkdir()
    (out / "manifest.json").touch()
    with pytest.raises(OutputError, match=r"holds no committed samples.*every output\.flush_seconds; `tokabatch status`"):
        _check_shards(OutputFolder(out), (), Selection())
    (out / "manifest.json").unlink()
    write_output(out, [(0, 0)], pa.table({"samples": [1]}))
    os.mkfifo(pipe := tmp_path / "pipe.jsonl")
    for target, message in [
        (tmp_path / "all.txt", r"ends in \.jsonl, \.csv or \.parquet"),
        (tmp_path / "no" / "all.jsonl", "does not exist; create it"),
        (out / "data" / "all.parquet", "among the run's own shards"),
        (pipe, "is not a regular file, and is not replaced; name another file"),
    ]:
        with pytest.raises(OutputError, match=message):
            export(out, target)
    with pytest.raises(OutputError, match="a column named 'samples'"):
        export(out, tmp_path / "all.jsonl", Selection(nested=True))
    assert export(out, tmp_path / "all.jsonl").samples == 1


def test_a_damaged_shard_is_named_and_the_target_kept(tmp_path: Path) -> None:
    write_output(tmp_path / "out", shuffled_keys(20, 4), questions(20))
    (tmp_path / "all.jsonl").write_text("before")
    shard = tmp_path / "out" / "data" / "part-00001.parquet"
    content = shard.read_bytes()
    for damage in (content[:-20], b"", content[:300] + bytes([content[300] ^ 1]) + content[301:]):
        shard.write_bytes(damage)
        with pytest.raises(OutputError, match=r"part-00001\.parquet is damaged"):
            export(tmp_path / "out", tmp_path / "all.jsonl")
    assert (tmp_path / "all.jsonl").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.jsonl", "out"]


def test_foreign_shards_are_refused(tmp_path: Path) -> None:
    write_output(tmp_path / "out", [(0, 0)], questions(1))
    pq.write_table(pa.table({"row_index": [1]}), tmp_path / "out" / "data" / "part-00001.parquet")
    with pytest.raises(OutputError, match=r"part-00001\.parquet has other columns"):
        export(tmp_path / "out", tmp_path / "all.jsonl")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_memory_does_not_grow_with_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokabatch.output.shards._ROW_GROUP_BYTES", 2 << 20)
    num_rows, size = 4000, 50_000
    blob = pa.table({"blob": [f"{i:09d}" * (size // 9) for i in range(num_rows)]})
    write_output(tmp_path / "out", shuffled_keys(num_rows, 1), blob, rows_per_shard=500)
    # Not ru_maxrss: it survives exec, so a child would report this process's peak.
    program = (
        "import re, sys; from pathlib import Path; from tokabatch.output import export as e\n"
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "e._BUCKET_BYTES = 4 << 20\n"
        "before = peak()\n"
        "e.export(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "print(peak() - before)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "out"), str(tmp_path / "all.jsonl")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert (tmp_path / "all.jsonl").stat().st_size > num_rows * size * 0.9
    assert grown < 300_000, "KiB over the start, for 200 MB of samples"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("fails", ["mkdtemp", "fsync", "write"])
def test_a_disk_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, suffix: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    write_output(tmp_path / "out", [(0, 0), (1, 0)], pa.table({"q": ["a", "b"]}))
    place = {"mkdtemp": "tempfile.mkdtemp", "fsync": "os.fsync", "write": "tokabatch.output.export._deal"}[fails]
    monkeypatch.setattr(place, fail)
    target = tmp_path / f"all{suffix}"
    with pytest.raises(
        OutputError, match=r"--to .*all.* cannot be written: No space left on device\. Make room there, or name"
    ):
        export(tmp_path / "out", target)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.EROFS, "Read-only file system. Mount it writable, or name"),
        (errno.ENOENT, "No such file or directory. Name a"),
    ],
)
def test_what_a_target_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, advice: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    write_output(tmp_path / "out", [(0, 0)], pa.table({"q": ["a"]}))
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OutputError) as caught:
        export(tmp_path / "out", tmp_path / "all.jsonl")
    assert advice in str(caught.value) and str(caught.value).endswith("file elsewhere.")
