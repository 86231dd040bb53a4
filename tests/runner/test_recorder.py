"""What a sample's own faults cost: a verifier that raises, its verdict; a value that cannot be written, its column."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.scripted_run import scripted_engine, scripted_job, scripted_run

from tokabatch import run
from tokabatch.input.store import columns
from tokabatch.input.tokenizer.tokenizer import Tokenizer
from tokabatch.output import joining, shard_writer
from tokabatch.output import schema as output
from tokabatch.runner import judging, preparation, recorder
from tokabatch.runner.waiting_samples import FinishedSample, WaitingSamples
from tokabatch.scoring.judge import Verdict

ROWS = 10
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def rows(**more: Callable[[int], Any]) -> Path:
        path = tmp_path / "rows.jsonl"
        lines = [{"question": f"What is {row}?", **{name: of(row) for name, of in more.items()}} for row in range(ROWS)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    return rows


def table(out: Path) -> list[dict[str, Any]]:
    rows = [row for path in sorted((out / "data").iterdir()) for row in pq.read_table(path).to_pylist()]
    return sorted(rows, key=lambda row: (row["row_index"], row["sample_index"]))


class Panic(BaseException):
    """What a library written in Rust raises for a bug of its own."""


def test_the_reasons_that_occur_most_are_told_first(write: Write, tmp_path: Path) -> None:
    judge = tmp_path / "judge.py"
    judge.write_text("def verify(text, row): raise ValueError('often' if int(row['answer']) else 'rare')")
    summary = scripted_run(write(answer=str), tmp_path / "out", verify={"kind": str(judge)})
    assert summary.unverified_reasons == ("ValueError: often in line 1 (18 samples)", "ValueError: rare in line 1 (2 samples)")


def test_how_many_reasons_are_not_shown_is_told(write: Write, tmp_path: Path) -> None:
    judge = tmp_path / "judge.py"
    judge.write_text("def verify(text, row): raise KeyError(min(int(row['answer']), 4))")
    summary = scripted_run(write(answer=str), tmp_path / "out", verify={"kind": str(judge)})
    assert summary.unverified_reasons[0] == "KeyError: 4 in line 1 (12 samples)" and len(summary.unverified_reasons) == 4
    assert summary.unverified_reasons[3] == "and 4 samples for 2 other reasons"


def test_reasons_beyond_those_that_are_kept_are_counted(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokabatch.runner.recorder.MAX_REASONS", 4)
    judge = tmp_path / "judge.py"
    judge.write_text("def verify(text, row): raise KeyError(row['answer'])")
    summary = scripted_run(write(answer=str), tmp_path / "out", verify={"kind": str(judge)})
    assert summary.unverified == 20 and len(summary.unverified_reasons) == 4
    assert summary.unverified_reasons[3] == "and 14 samples for more than 1 other reason"


def fails_for_row(monkeypatch: pytest.MonkeyPatch, row: int, whole: object = None) -> None:
    """The column `doc` of one row cannot be taken out of the input, whenever it is tried."""
    real = columns.JsonColumns.take

    def take(self: Any, rows: Any, names: Any) -> pa.Table:
        if row in rows.tolist() and "doc" in names:
            raise pa.ArrowInvalid("offset overflow")
        return real(self, rows, names)

    monkeypatch.setattr(columns.JsonColumns, "take", take)


def decodes_not(monkeypatch: pytest.MonkeyPatch, row: int, whole: list[dict[str, Any]]) -> None:
    """The tokens of one row cannot be decoded: the tokenizer's library panics."""
    of_row = [each["token_ids"] for each in whole if each["row_index"] == row]
    real = Tokenizer.decode_batch

    def decode(self: Tokenizer, batch: Any) -> list[str]:
        if any(list(ids) in (tokens, tokens[:-1]) for ids in batch for tokens in of_row):
            raise Panic("index out of bounds")
        return real(self, batch)

    monkeypatch.setattr(Tokenizer, "decode_batch", decode)


def cannot_be_encoded(monkeypatch: pytest.MonkeyPatch, row: int, whole: object) -> None:
    """PyArrow does not write the column `doc` of one row: with an OSError, as for whatever Parquet cannot hold."""
    real = recorder.write_parquet

    def write_parquet(written: pa.Table, file: Any, *identity: Any) -> None:
        if "doc" in written.column_names and f"doc {row}" in written["doc"].to_pylist():
            raise OSError("Unhandled type")
        real(written, file, *identity)

    monkeypatch.setattr("tokabatch.output.shards.write_parquet", write_parquet)
    monkeypatch.setattr(recorder, "write_parquet", write_parquet)


@pytest.mark.parametrize(
    ("harm", "column"),
    [(fails_for_row, "doc"), (cannot_be_encoded, "doc"), (decodes_not, "text")],
    ids=["not taken from the input", "not encoded", "not decoded"],
)
def test_a_value_that_cannot_be_written_costs_its_column_and_nothing_else(
    harm: Callable[..., None], column: str, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(doc=lambda row: f"doc {row}")
    scripted_run(file, tmp_path / "whole")
    whole = table(tmp_path / "whole")
    with monkeypatch.context() as patch:
        harm(patch, 3, whole)
        summary = scripted_run(file, tmp_path / "out")
    assert (summary.exit_code, summary.ok, dict(summary.error_counts)) == (0, 18, {"cannot_be_written": 2})
    for found, expected in zip(table(tmp_path / "out"), whole, strict=True):
        if found["row_index"] != 3:
            assert {**found, "num_cached_tokens": 0} == {**expected, "num_cached_tokens": 0}
            continue
        assert (found["status"], found["error_code"], found[column]) == ("error", "cannot_be_written", None)
        assert found["token_ids"] == expected["token_ids"], "what was computed is gone"
        for part in ("row 3 ", repr(column), "--retry-errors", "output.columns"):
            assert part in found["error_message"]
    with scripted_engine():
        assert run(scripted_job(file, tmp_path / "out"), retry_errors=True).ok == 20
    assert [row["doc"] for row in table(tmp_path / "out")] == [row["doc"] for row in whole]


def test_little_is_left_to_write_after_the_last_result(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "FEW_ROWS", 3)
    monkeypatch.setattr(shard_writer, "EARLY_ROWS", 3)
    monkeypatch.setattr(recorder, "BATCH_SAMPLES", 3)
    monkeypatch.setattr(preparation, "BATCH_SAMPLES", 3)
    assert scripted_run(write(), tmp_path / "out", engine={"max_running": 2}).ok == 2 * ROWS
    sizes = [pq.read_metadata(path).num_rows for path in sorted((tmp_path / "out" / "data").iterdir())]
    assert sum(sizes) == 2 * ROWS and len(sizes) > 2 and sizes[0] >= ROWS and sizes[-1] <= 3, sizes


def test_errors_policy_stop_stops_at_a_sample_that_cannot_be_written(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "BATCH_SAMPLES", 1)
    monkeypatch.setattr(preparation, "BATCH_SAMPLES", 1)
    fails_for_row(monkeypatch, 3)
    summary = scripted_run(write(doc=str), tmp_path / "out", errors={"policy": "stop"}, engine={"max_running": 2})
    assert summary.exit_code == 75 and 0 < summary.ok + summary.errors < 20


def test_more_list_entries_than_a_column_holds_are_no_assertion(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if 2 ** 31 were 60: one table holds all samples, but not all of their alternatives."""
    monkeypatch.setattr(output, "_MAX_ENTRIES", 60)
    file = write()
    assert scripted_run(file, tmp_path / "out").ok == 20
    assert sum(len(row["token_ids"]) for row in table(tmp_path / "out")) > 60
    monkeypatch.setattr(output, "_MAX_ENTRIES", 3)
    summary = scripted_run(file, tmp_path / "few")
    long = [row for row in table(tmp_path / "few") if row["num_output_tokens"] > 3]
    assert dict(summary.error_counts) == {"cannot_be_written": len(long)}
    assert all(row["token_ids"] is None and row["text"] is not None and "'token_ids'" in row["error_message"] for row in long)


def test_a_sample_is_not_written_before_its_verdict(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a look at which samples are judged and what is written by it, a judge's thread sets another verdict."""
    judge, late = tmp_path / "judge.py", list[FinishedSample]()
    judge.write_text("import time\ndef verify(text, row):\n    time.sleep(0.05)\n    return True\n")
    real = WaitingSamples.ready_first

    def ready_first(self: WaitingSamples) -> Any:
        found = real(self)
        waiting = [each for each in self.finished if each.ticket is not None and each.verdict is None]
        for each in waiting[1:][-1:]:
            assert each.ticket is not None
            each.ticket.verdict = Verdict(True, 1.0)
            late.append(each)
        return found

    monkeypatch.setattr(WaitingSamples, "ready_first", ready_first)
    verify = {"kind": str(judge), "processes": 1}
    summary = scripted_run(write(), tmp_path / "out", verify=verify, output={"flush_seconds": 0.05})
    assert late and (summary.exit_code, summary.unverified) == (0, 0)
    assert all(row["correct"] for row in table(tmp_path / "out"))


@pytest.mark.parametrize("piece_bytes", [1, recorder.PIECE_BYTES])
def test_samples_that_wait_for_verdicts_are_looked_at_for_their_memory_but_not_at_every_step(
    piece_bytes: int, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, looks, waiting = tmp_path / "judge.py", list[int](), list[int]()
    judge.write_text("def verify(text, row): return True\n")
    add, is_ready = recorder.Recorder.add, FinishedSample.is_ready

    def looked(self: FinishedSample) -> bool:
        looks.append(1)
        return is_ready.__get__(self)

    def added(self: recorder.Recorder, completions: Any, *goes_on: Any) -> None:
        if piece_bytes > 1 or completions:
            before = len(looks)
            add(self, completions, *goes_on)
            assert completions or len(looks) == before, "a look where nothing had come in"
            waiting.append(self._preparing.num_waiting)  # pyright: ignore[reportPrivateUsage]

    monkeypatch.setattr(FinishedSample, "is_ready", property(looked))
    monkeypatch.setattr(recorder.Recorder, "add", added)
    monkeypatch.setattr(preparation, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(judging, "MOST_UNJUDGED", 0)
    sections: Any = {"verify": {"kind": str(judge)}, "engine": {"max_running": 2}, "output": {"flush_seconds": 3600.0}}
    assert scripted_run(write(), tmp_path / "out", **sections).pass_at_k == {1: 1.0, 2: 1.0}
    assert max(waiting) <= 2 if piece_bytes == 1 else len(waiting) > 2 * ROWS
