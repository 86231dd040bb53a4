"""Each bad row alone, and all of them among 10,000 good ones: each costs itself, and no other row changes."""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad_input.rows import BAD_ROWS, BadRow
from support import tiny_models

from tokabatch import Job, run
from tokabatch.report.summary import RunSummary

GOOD_ROWS = 10_000
ENDINGS = ["plain", "\u2028 is no line end", "neither \x85 nor \x0c", "é 漢 😀", "<eos> spelled out"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.add_tokenizer(tiny_models.build("llama", tmp_path_factory.mktemp("models") / "llama"))


def complete(model: Path, file: Path, out: Path, n: int = 1) -> RunSummary:
    values: dict[str, Any] = {
        "model": {"path": str(model), "dtype": "float64"},
        "input": {"path": str(file)},
        "generation": {"n": n, "temperature": 0.9, "max_tokens": 3, "seed": 1},
        "engine": {"device": "cpu"},
        "output": {"path": str(out), "columns": []},
        "errors": {"max_fraction": 1.0},
    }
    return run(Job.load(values))


def read(out: Path) -> list[dict[str, Any]]:
    tables = [pq.read_table(shard) for shard in (out / "data").glob("*.parquet")]
    return sorted(pa.concat_tables(tables).to_pylist(), key=lambda sample: (sample["row_index"], sample["sample_index"]))


def check(sample: dict[str, Any], bad: BadRow) -> None:
    assert (sample["status"], sample["error_code"], sample["text"]) == ("error", bad.code, None), bad.name
    assert re.search(bad.says, sample["error_message"]), f"{bad.name}: {sample['error_message']}"
    assert len(sample["error_message"]) <= 500


def test_there_are_enough_of_them():
    assert len(BAD_ROWS) >= 40 and len({bad.name for bad in BAD_ROWS}) == len(BAD_ROWS)


@pytest.mark.parametrize("bad", BAD_ROWS, ids=lambda bad: bad.name)
def test_alone(bad, model, tmp_path):
    file = tmp_path / "rows.jsonl"
    # An input without the column at all would be refused as a whole.
    file.write_bytes(bad.line + b'\n{"prompt": null}\n')
    summary = complete(model, file, tmp_path / "out", n=2)
    samples = read(tmp_path / "out")
    assert [(s["row_index"], s["sample_index"]) for s in samples] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for sample in samples[:2]:
        check(sample, bad)
    assert (summary.samples, summary.ok, summary.errors, summary.exit_code) == (4, 0, 4, 0)


def test_among_ten_thousand_good_rows(model, tmp_path):
    good = [json.dumps({"prompt": f"row {i}: {ENDINGS[i % 5]}"}, ensure_ascii=False).encode() for i in range(GOOD_ROWS)]
    # Every bad row takes the place of a good one, so that the others keep their numbers.
    places = {97 + 160 * i: bad for i, bad in enumerate(BAD_ROWS)}
    mixed = [places[i].line if i in places else line for i, line in enumerate(good)]
    (tmp_path / "good.jsonl").write_bytes(b"\n".join(good) + b"\n")
    (tmp_path / "mixed.jsonl").write_bytes(b"\n".join(mixed) + b"\n")
    clean = complete(model, tmp_path / "good.jsonl", tmp_path / "clean")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    summary = complete(model, tmp_path / "mixed.jsonl", tmp_path / "out")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000  # KiB; a row of 20 MB is among them
    assert (clean.ok, clean.errors) == (GOOD_ROWS, 0)
    assert (summary.ok, summary.errors, summary.samples) == (GOOD_ROWS - len(places), len(places), GOOD_ROWS)
    codes: dict[str, int] = {}
    for bad in BAD_ROWS:
        codes[bad.code] = codes.get(bad.code, 0) + 1
    assert dict(summary.error_counts) == codes
    undisturbed, samples = read(tmp_path / "clean"), read(tmp_path / "out")
    assert [s["row_index"] for s in samples] == list(range(GOOD_ROWS))
    for row, sample in enumerate(samples):
        if row in places:
            check(sample, places[row])
        else:
            expected = undisturbed[row]
            assert (sample["status"], sample["token_ids"], sample["text"]) == ("ok", expected["token_ids"], expected["text"])
    lines = [int(re.search(r"line (\d+)", s["error_message"])[1]) for s in samples if s["error_code"] == "bad_json"]
    assert lines == [row + 1 for row, bad in sorted(places.items()) if bad.code == "bad_json"]
