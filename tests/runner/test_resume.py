"""Continued runs: what exists is kept, what is missing is computed and equals what one undisturbed run would have drawn."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.dataset import dataset
from support import tiny_models

from tokabatch import Job, RunSummary, cli, plan, run
from tokabatch.errors import InputError, JobError, OutputError
from tokabatch.input import verifier_files
from tokabatch.input.store import kept_input
from tokabatch.input.tokenizer.tokenizer import Tokenizer
from tokabatch.model import file_digests
from tokabatch.output import existing_results as committed
from tokabatch.output import manifest as manifests
from tokabatch.output import same_job
from tokabatch.output.export import export
from tokabatch.output.integrity import check
from tokabatch.precheck import refuse_early
from tokabatch.report import review
from tokabatch.report.page import render_page
from tokabatch.report.progress import NullProgress
from tokabatch.runner import make_replica
from tokabatch.runner import run as runs
from tokabatch.scoring import pool
from tokabatch.scoring.judge import JudgeSpec
from tokabatch.storage.listing import Changed
from tokabatch.workload import prepare as preparation

ROWS = [{"question": f"What is {i}+{i * 7 % 5}?", "answer": str(i + i * 7 % 5)} for i in range(10)]
N = 3


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    return tiny_models.add_tokenizer(tiny_models.build("llama", folder))


@pytest.fixture
def rows(tmp_path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


Start = Callable[..., RunSummary]


@pytest.fixture
def go(model, rows, tmp_path) -> Start:
    """Runs the job into `tmp_path / "out"`, sections of it changed, at most `steps` steps of the engine."""

    def start(*, steps: int | None = None, progress: Any = None, out: str = "out", **changes: Any) -> RunSummary:
        asked: list[bool] = []

        def should_stop() -> bool:
            asked.append(True)
            return steps is not None and len(asked) >= steps

        flags = {name: changes.pop(name) for name in ("overwrite", "retry_errors") if name in changes}
        return run(job(model, rows, tmp_path / out, **changes), progress, should_stop, **flags)

    return start


def job(model: Path, rows: Path, out: Path, /, **changes: Any) -> Job:
    base: dict[str, Any] = {
        "model": {"path": str(model), "dtype": "float64"},
        "input": {"path": str(rows)},
        "prompt": {"template": "Q: {{ question }}\nA:"},
        "generation": {"n": N, "temperature": 0.8, "max_tokens": 10, "seed": 5},
        "engine": {"device": "cpu", "page_size": 8, "max_running": 4},
        "output": {"path": str(out), "rows_per_shard": 4},
        "errors": {"max_fraction": 1.0},
        "verify": {"kind": "gsm8k", "answer": "answer"},
    }
    for section, values in changes.items():
        base[section] = values and {**base.get(section, {}), **values}
    return Job.load(base)


def table(out: Path) -> list[dict[str, Any]]:
    """Return all committed samples by row and sample, without the one column that depends on scheduling."""
    samples = [row for shard in sorted((out / "data").glob("*.parquet")) for row in pq.read_table(shard).to_pylist()]
    for sample in samples:
        del sample["num_cached_tokens"]
    return sorted(samples, key=lambda row: (row["row_index"], row["sample_index"]))


class Messages(NullProgress):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture
def some_are_right(monkeypatch, tmp_path) -> None:
    """The tiny model is never right; here a sample's text decides by its length."""
    judge = tmp_path / "even.py"
    judge.write_text("def verify(text, row): return len(text) % 2 == 0\n")
    monkeypatch.setattr(pool, "judge_spec", lambda verify: JudgeSpec("gsm8k", str(judge), "verify"))


@pytest.fixture
def whole(go, tmp_path) -> list[dict[str, Any]]:
    """The table of one undisturbed run."""
    assert go(out="whole").exit_code == 0
    return table(tmp_path / "whole")


def test_stopped_again_and_again_it_ends_in_the_same_table(some_are_right, go, tmp_path, whole):
    engines = [{"page_size": 1}, {"page_size": 64, "hydragen": False}, {"max_running": 7, "max_step_tokens": 9}]
    codes, counts, pass_at_k = [], [], None
    for attempt in range(20):
        summary = go(steps=25, engine=engines[attempt % 3])
        codes.append(summary.exit_code)
        counts.append(len(table(tmp_path / "out")))
        assert counts[-1] == summary.ok >= summary.earlier
        assert summary.ok + summary.pending == summary.samples == 30
        pass_at_k = summary.pass_at_k
        if summary.exit_code == 0:
            break
    assert codes[-1] == 0 and len(codes) > 3 and set(codes[:-1]) == {130}
    assert counts == sorted(counts) and table(tmp_path / "out") == whole
    assert pass_at_k == go(out="again").pass_at_k


def test_a_finished_run_computes_nothing_again(some_are_right, go, tmp_path, whole, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("the engine was started")

    first = go()
    monkeypatch.setattr("tokabatch.runner.make_replica.executor_maker", lambda *_: refuse)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "data").iterdir()}
    summary = go()
    assert (summary.exit_code, summary.ok, summary.earlier, summary.output_tokens) == (0, 30, 30, 0)
    assert summary.pass_at_k == first.pass_at_k and 0 < first.pass_at_k[1] < 1
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "data").iterdir()} == before
    assert table(tmp_path / "out") == whole and (tmp_path / "out" / "_SUCCESS").exists()


def test_more_samples_extend_a_finished_run(go, tmp_path):
    go(generation={"n": 2})
    summary = go(generation={"n": 5})
    assert (summary.samples, summary.earlier, summary.exit_code) == (50, 20, 0)
    reasons = Counter(sample["finish_reason"] for sample in table(tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert written["finish_reasons"] == dict(summary.finish_reasons) == reasons, "of all starts"
    assert written["this_start"]["output_tokens"] == summary.output_tokens
    go(generation={"n": 5}, out="whole")
    assert table(tmp_path / "out") == table(tmp_path / "whole")
    assert summary.output_tokens == sum(
        sample["num_output_tokens"] for sample in table(tmp_path / "out") if sample["sample_index"] >= 2
    )
    with pytest.raises(
        OutputError, match=r"sample \d of row \d.*generation\.n may be raised but not lowered: write generation\.n=\d+"
    ):
        go(generation={"n": 4})
    assert (tmp_path / "out" / "_SUCCESS").exists()


def test_rows_at_the_end_extend_a_finished_run(go, rows, tmp_path):
    write_rows(rows, ROWS[:6])
    go()
    write_rows(rows, ROWS)
    summary = go()
    assert (summary.rows, summary.samples, summary.earlier, summary.exit_code) == (10, 30, 18, 0)
    assert table(tmp_path / "out") == (go(out="whole"), table(tmp_path / "whole"))[1]
    summary = go(generation={"n": 4})
    assert (summary.samples, summary.earlier) == (40, 30)
    write_rows(rows, ROWS[:9])
    with pytest.raises(OutputError, match="10 rows then, 9 now"):
        go()


def test_rows_behind_a_blank_line_extend_a_finished_run(go, rows, tmp_path):
    write_rows(rows, ["", *ROWS[:3], "", *ROWS[3:6], ""])
    go()
    write_rows(rows, ["", *ROWS[:3], "", *ROWS[3:6], "", "", *ROWS[6:]])
    summary = go()
    assert (summary.rows, summary.samples, summary.earlier, summary.errors) == (10, 30, 18, 0)
    write_rows(rows, ROWS)
    assert go().earlier == 30, "blank lines are no part of the rows"
    assert table(tmp_path / "out") == (go(out="whole"), table(tmp_path / "whole"))[1]


def test_rows_of_parquet_may_be_added_in_place_or_in_a_further_file(go, model, tmp_path):
    folder = tmp_path / "input"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS[:4]), folder / "a.parquet")
    changes = {"input": {"path": str(folder)}}
    go(**changes)
    pq.write_table(pa.Table.from_pylist(ROWS[:7]), folder / "a.parquet", row_group_size=2)
    assert go(**changes).earlier == 12
    pq.write_table(pa.Table.from_pylist(ROWS[7:]), folder / "b.parquet")
    summary = go(**changes)
    assert (summary.earlier, summary.samples, summary.exit_code) == (21, 30, 0)
    assert table(tmp_path / "out") == (go(out="whole"), table(tmp_path / "whole"))[1]
    pq.write_table(pa.Table.from_pylist(ROWS[1:]), folder / "a.parquet")
    with pytest.raises(OutputError, match=r"(?s)not the same any more.*a\.parquet: [\d,]+ bytes then, [\d,]+ bytes now"):
        go(**changes)


CHANGES = [
    ({"generation": {"temperature": 0.7}}, "generation.temperature: 0.8 then, 0.7 now"),
    ({"generation": {"seed": 6}}, "generation.seed: 5 then, 6 now"),
    ({"generation": {"max_tokens": 11}}, "generation.max_tokens: 10 then, 11 now"),
    ({"prompt": {"template": "Q: {{ question }}\nB:"}}, 'prompt.template: "Q: '),
    ({"model": {"dtype": "float32"}}, 'model.dtype: "float64" then, "float32" now'),
    ({"output": {"columns": ["question"]}}, 'output.columns: "all" then, ["question"] now'),
    ({"input": {"id_column": "question"}}, 'input.id_column: null then, "question" now'),
]


@pytest.mark.parametrize(("changes", "difference"), CHANGES, ids=lambda value: None if isinstance(value, dict) else value[:22])
def test_a_change_of_what_decides_the_output_is_refused_and_shown(changes, difference, go, model, rows, tmp_path):
    go(steps=20)
    before = everything(tmp_path / "out")
    for attempt in (lambda: go(**changes), lambda: plan(job(model, rows, tmp_path / "out", **changes))):
        with pytest.raises(OutputError) as caught:
            attempt()
        assert difference in str(caught.value) and "--overwrite" in str(caught.value) and caught.value.exit_code == 2
        assert str(caught.value).count(" then, ") == 1
    assert everything(tmp_path / "out") == before


def refusal(job: Job, **how: bool) -> str:
    """What is said before the input and the tokenizer are there; empty if nothing is."""
    try:
        refuse_early(job, **how)
    except OutputError as error:
        return str(error)
    return ""


def test_what_needs_neither_input_nor_tokenizer_is_refused_early_in_the_same_words(go, model, rows, tmp_path):
    go()
    out = tmp_path / "out"
    assert refusal(job(model, rows, out)) == refusal(job(model, rows, out, generation={"n": N + 1})) == ""
    retyped = shutil.copytree(model, tmp_path / "other")
    (retyped / "generation_config.json").write_text('{"top_p": 0.5}')
    others = [{"model": {"path": str(retyped)}}, {"generation": {"n": N - 1}}, {"verify": None}]
    for changes in (*(changes for changes, _ in CHANGES), *others):
        with pytest.raises(OutputError) as caught:
            go(**changes)
        assert refusal(job(model, rows, out, **changes)) == str(caught.value), changes
        assert refusal(job(model, rows, out, **changes), overwrite=True) == ""
    with pytest.raises(OutputError) as caught:
        go(input={"limit": 9})
    limited = job(model, rows, out, input={"limit": 9})
    assert refusal(limited) == str(caught.value) and "10 rows then, 9 now" in refusal(limited)
    assert refusal(limited, overwrite=True) == refusal(job(model, rows, out, input={"limit": 10})) == ""
    given = json.loads((out / "manifest.json").read_text())["fingerprint"]["settings"]
    assert "" not in given.values(), "what is written is known"


def test_a_wrong_column_is_named_before_what_differs_from_the_run_in_the_folder(go, model, rows, tmp_path):
    go()
    with pytest.raises(InputError, match=r"no column qestion \(did you mean 'question'\?\)"):
        refuse_early(job(model, rows, tmp_path / "out", prompt={"template": "{{ qestion }}"}))


def test_rows_that_cannot_be_judged_are_refused_early_only_if_all_are_read(model, tmp_path):
    unjudged, judged = {"question": "1 + 1", "answer": "two"}, {"question": "1 + 1", "answer": ["2"]}
    own = tmp_path / "judge.py"
    own.write_text("def check(row): row['later']\ndef verify(text, row): return True\n")
    for rows, verify in (
        ([unjudged] * 1100 + [judged], {"kind": "gsm8k"}),
        ([unjudged, judged], {"kind": "gsm8k"}),
        # Where the job is prepared, rows have the columns of later ones.
        ([unjudged], {"kind": str(own)}),
    ):
        refuse_early(job(model, write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out", verify=verify))
    with pytest.raises(JobError, match=r"no row can be judged, row 0 .* because the reference answer 'two' holds no number"):
        refuse_early(job(model, write_rows(tmp_path / "rows.jsonl", [unjudged] * 3), tmp_path / "out"))


def test_an_empty_table_is_refused_early(model, tmp_path):
    pq.write_table(pa.table({"question": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    with pytest.raises(InputError, match="holds no rows"):
        refuse_early(job(model, tmp_path / "empty.parquet", tmp_path / "out", verify=None))


def test_a_smaller_n_is_refused_though_files_change_while_they_are_read(go, model, rows, tmp_path, monkeypatch):
    go()
    read, asked = same_job.read_committed, 0

    def changing(*given: Any, **options: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise Changed
        return read(*given, **options)

    monkeypatch.setattr(same_job, "read_committed", changing)
    assert "generation.n" in refusal(job(model, rows, tmp_path / "out", generation={"n": N - 1})) and asked == 2


def test_rows_with_an_n_of_their_own_may_be_more_than_the_job_says(go, model, rows, tmp_path):
    write_rows(rows, [{**row, "sampling_params": {"n": N}} for row in ROWS])
    go()
    assert refusal(job(model, rows, tmp_path / "out", generation={"n": 1})) == ""
    assert go(generation={"n": 1}).earlier == N * len(ROWS)


def test_auto_is_the_dtype_that_it_comes_to(go, model, tmp_path):
    """On a CPU, float32 whether the job says so or not; where a GPU would make it another, the run is another."""
    go(steps=20, model={"path": str(model), "dtype": "auto"})
    assert go(steps=2, model={"path": str(model), "dtype": "float32"}).earlier > 0
    with pytest.raises(OutputError, match=r'(?s)model.dtype: "float32" then, "bfloat16" now.*model.dtype=float32 that run'):
        go(steps=2, model={"path": str(model), "dtype": "bfloat16"})


def everything(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_other_weights_tokenizers_and_rows_are_refused(go, model, rows, tmp_path):
    copy = tmp_path / "model"
    copy.mkdir()
    for path in model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    changes = {"model": {"path": str(copy)}}
    go(steps=20)
    assert go(steps=2, **changes).earlier > 0, "the same files elsewhere are the same model"
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    unread = mock.Mock(side_effect=AssertionError("the input was read"))
    with (
        mock.patch.multiple(preparation, ingest=unread, load_kept=unread),
        pytest.raises(OutputError, match=r"model/model\.safetensors has changed \([\d,]+ bytes\)\n"),
    ):
        go(**changes)
    weights.write_bytes((model / "model.safetensors").read_bytes())
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**config, "clean_up": True}))
    with pytest.raises(OutputError, match=r"tokenizer/tokenizer_config\.json"):
        go(**changes)
    write_rows(rows, [*ROWS[:3], {**ROWS[3], "answer": "0"}, *ROWS[4:]])
    with pytest.raises(OutputError, match="not the same any more in its first 10 rows, the first that differs is"):
        go()


def test_a_chat_template_is_known_by_its_text(go, model, rows, tmp_path):
    files = [tmp_path / name for name in ("chat.jinja", "moved.jinja")]
    for file in files:
        file.write_text("{% for m in messages %}{{ m.content }}{% endfor %}!")
    go(steps=20, prompt={"chat_template": str(files[0])})
    assert go(steps=2, prompt={"chat_template": str(files[1])}).earlier > 0
    for keys, message in (
        ({"prompt": {"chat_template": str(tmp_path / "none.jinja")}}, r"prompt\.chat_template: there is no file"),
        ({"engine": {"profile": str(tmp_path / "none.json")}}, r"engine\.profile: there is no file"),
    ):
        with pytest.raises(JobError, match=message):
            refuse_early(job(model, rows, tmp_path / "out", generation={"seed": 9}, **keys))
    files[1].write_text("{% for m in messages %}{{ m.content }}{% endfor %}?")
    with pytest.raises(OutputError, match=r"prompt\.chat_template has changed \([\d,]+ bytes\)\n"):
        go(prompt={"chat_template": str(files[1])})
    with pytest.raises(OutputError, match=r"prompt\.chat_template_kwargs: absent then, .*thinking.* now"):
        go(prompt={"chat_template": str(files[0]), "chat_template_kwargs": {"thinking": True}})


def test_files_that_are_not_read_decide_nothing(go, model, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    changes = {"model": {"path": str(copy)}}
    go(steps=20, **changes)
    for name in (
        "tokenizer.json~", "tokenizer.json.bak", ".tokenizer.json.swp", "#tokenizer.json#", ".DS_Store", "tokenizer copy.json",
        "vocab.old", "chat_template.jinja.orig", "config.json.bak", "other.safetensors", "model.safetensors.index.json",
    ):  # fmt: skip
        (copy / name).write_bytes(b"{}")
    assert go(steps=2, **changes).earlier > 0
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(OutputError, match=r"tokenizer/chat_template\.jinja: absent then, 14 bytes"):
        go(**changes)


def test_large_weights_are_sampled_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr("tokabatch.model.file_digests._WHOLE_BYTES", 1000)
    monkeypatch.setattr("tokabatch.model.file_digests._PIECES", 16)
    monkeypatch.setattr("tokabatch.model.file_digests._PIECE_BYTES", 64)
    path = tmp_path / "big.safetensors"
    content = bytearray(os.urandom(10_000))
    path.write_bytes(content)
    mark = file_digests.file_mark(path)
    for place in (0, 5, 9_999):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert file_digests.file_mark(path) != mark
    path.write_bytes(content)
    assert file_digests.file_mark(path) == mark and "sampled" in mark


def test_overwrite_starts_afresh_and_says_what_it_deletes(go, tmp_path, whole):
    go(generation={"seed": 1})
    told = Messages()
    summary = go(overwrite=True, progress=told)
    assert any("--overwrite: deleting 8 files" in text for text in told.texts)
    assert (summary.earlier, summary.exit_code) == (0, 0) and table(tmp_path / "out") == whole
    with pytest.raises(OutputError, match=r"--overwrite.*--retry-errors"):
        go(overwrite=True, retry_errors=True)


def test_overwrite_keeps_the_results_of_a_job_that_cannot_work(go, tmp_path):
    go()
    before = everything(tmp_path / "out")
    with pytest.raises(Exception, match="no_such_column"):
        go(overwrite=True, prompt={"template": "{{ no_such_column }}"})
    assert everything(tmp_path / "out") == before


@pytest.fixture
def spoilt(go) -> RunSummary:
    """A complete run with error rows, of an engine whose logits are broken in some steps."""
    real = make_replica.executor_maker

    class Spoiling:
        def __init__(self, inner: Any) -> None:
            self.inner, self.steps = inner, 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def collect(self) -> Any:
            result = self.inner.collect()
            self.steps += 1
            if self.steps % 9 < 5:
                result.finite[: len(result.finite) // 2] = False
            return result

    with mock.patch.object(make_replica, "executor_maker", lambda *given: lambda: Spoiling(real(*given)())):
        summary = go()
    assert summary.errors > 2 and dict(summary.error_counts) == {"nan_logits": summary.errors}
    return summary


def test_retry_errors_runs_error_rows_again_and_only_those(spoilt, go, tmp_path, whole):
    again = go()
    assert (again.errors, again.output_tokens) == (spoilt.errors, 0), "without the flag error rows are final"
    good = [row for row in table(tmp_path / "out") if row["status"] == "ok"]
    told = Messages()
    summary = go(retry_errors=True, progress=told)
    assert any(f"running {spoilt.errors} error rows again" in text for text in told.texts)
    assert (summary.earlier, summary.errors, summary.exit_code) == (30 - spoilt.errors, 0, 0)
    assert table(tmp_path / "out") == whole and [row for row in whole if row in good] == good
    assert check(tmp_path / "out").exit_code == 0


def test_the_summary_in_a_moved_folder_counts_what_is_there(model, rows, tmp_path):
    """Whatever lies in its old place."""
    out, away = tmp_path / "out", tmp_path / "away"

    def move() -> bool:
        if list(out.glob("data/part-*")):
            out.rename(away)
        elif not away.exists():
            time.sleep(0.02)  # Otherwise a slow machine may finish all samples before it commits the first.
        return False

    summary = run(job(model, rows, out, output={"flush_seconds": 0.001}), None, move)
    told = json.loads((away / "summary.json").read_text())
    assert (summary.exit_code, told["ok"]) == (75, summary.ok) and sum(told["finish_reasons"].values()) == summary.ok > 0


def test_the_steps_of_a_killed_start_are_missed_though_samples_were_computed_again(spoilt, go, tmp_path):
    """Those of the error rows make up for them in the sums."""
    out = tmp_path / "out"
    with mock.patch.object(runs, "_write_record"):
        assert 0 < go(retry_errors=True, steps=12).pending < spoilt.errors
    assert not (out / "summary.json").exists()
    for start in (go, lambda: go(generation={"n": N + 1})):
        assert start().pending == 0
        record = review.read_record(out)
        assert sum(record.steps["finished"]) >= record.ok, "what is counted says nothing"
        assert not record.whole and "all starts" not in render_page(record)
    go(overwrite=True, steps=12)
    go(steps=12)
    assert go().pending == 0 and review.read_record(out).whole
    assert "all starts" in render_page(review.read_record(out))


def test_bad_rows_are_recorded_once_however_often_the_run_is_continued(go, rows, tmp_path):
    write_rows(rows, [*ROWS[:4], "{broken", *ROWS[4:], '{"question": null}'])
    for _ in range(20):
        if go(steps=30).exit_code == 0:
            break
    samples = table(tmp_path / "out")
    assert [(s["row_index"], s["sample_index"]) for s in samples] == [(row, n) for row in range(12) for n in range(N)]
    assert {s["row_index"]: s["error_code"] for s in samples if s["error_code"]} == {4: "bad_json", 11: "missing_field"}
    summary = go(generation={"n": 4})
    assert (summary.errors, summary.ok) == (8, 40)


def replaced(number: int, row: Any) -> list[Any]:
    return [*ROWS[:number], row, *ROWS[number + 1 :]]


def test_a_repaired_row_is_run_again_and_held_to_nothing_it_was(go, rows, tmp_path, whole):
    write_rows(rows, replaced(4, "{broken"))
    assert go().errors == N
    write_rows(rows, ROWS)
    told = Messages()
    summary = go(progress=told)
    assert (summary.earlier, summary.errors, summary.output_tokens) == (30, N, 0), "without the flag error rows are final"
    assert "1 error row changed in the input; --retry-errors runs error rows again" in told.texts
    summary = go(retry_errors=True)
    assert (summary.earlier, summary.errors, summary.exit_code) == (27, 0, 0) and table(tmp_path / "out") == whole
    write_rows(rows, replaced(4, {**ROWS[4], "answer": "0"}))
    with pytest.raises(OutputError, match=r"the first that differs is row 4 .*line 5"):
        go(retry_errors=True)


def test_a_repaired_row_may_ask_for_fewer_samples_and_a_bad_last_row_may_go(go, rows, tmp_path):
    write_rows(rows, [*replaced(2, {"question": None, "sampling_params": {"n": 2}}), "{broken"])
    assert go().errors == 2 * N
    write_rows(rows, replaced(2, {**ROWS[2], "sampling_params": {"n": 1}}))
    with pytest.raises(OutputError, match=r"error sample .* of row \d+, which is no longer part of.*--retry-errors"):
        go()
    summary = go(retry_errors=True)
    assert (summary.rows, summary.samples, summary.errors, summary.exit_code) == (10, 28, 0, 0)
    assert check(tmp_path / "out").exit_code == 0
    write_rows(rows, replaced(2, {**ROWS[2], "sampling_params": {"n": 1}})[:-1])
    with pytest.raises(OutputError, match="10 rows then, 9 now"):
        go(retry_errors=True)


def test_a_repair_that_was_broken_off_may_be_repaired_again(go, rows, tmp_path, whole):
    write_rows(rows, replaced(4, "{broken"))
    go()
    write_rows(rows, replaced(4, {"question": "half repaired"}))
    assert go(retry_errors=True, steps=3).pending == N
    write_rows(rows, ROWS)
    with pytest.raises(OutputError, match=r"differs is row 4 .*line 5"):
        go()
    assert go(retry_errors=True).exit_code == 0 and table(tmp_path / "out") == whole


def test_other_tokens_of_the_same_rows_are_refused_with_the_versions(go, rows, tmp_path, monkeypatch):
    """Whatever made the prompts come out otherwise: here a library that cuts a text elsewhere."""
    go(steps=20)
    before = everything(tmp_path / "out")
    real = Tokenizer.encode_batch

    def encode(self, texts, add_special_tokens):
        return [
            [*ids, ids[-1]] if "9+" in text else ids
            for text, ids in zip(texts, real(self, texts, add_special_tokens), strict=True)
        ]

    for module in (manifests, kept_input):
        monkeypatch.setattr(module, "version", lambda name: f"{name}-0.0.1")
    assert go(steps=2).earlier > 0, "another version alone is no other prompt"
    monkeypatch.undo()
    monkeypatch.setattr(Tokenizer, "encode_batch", encode)
    with pytest.raises(
        OutputError,
        match=r"(?s)tokens of 1 of 10 rows .*the first is row 9 \([^\n]* line 10\)\n.*tokenizers-0.0.1 then",
    ):
        go()
    write_rows(rows, [*ROWS, ROWS[0]])
    with pytest.raises(OutputError, match=r"the first is row 9"):
        go(retry_errors=True)
    monkeypatch.undo()
    write_rows(rows, ROWS)
    assert everything(tmp_path / "out").keys() >= before.keys() and go().exit_code == 0


def test_another_verifier_is_another_job(go, tmp_path, monkeypatch):
    source = tmp_path / "gsm8k.py"
    source.write_bytes(verifier_files.verifier_path("gsm8k").read_bytes())
    monkeypatch.setattr(verifier_files, "verifier_path", lambda kind: source)
    go(steps=20)
    assert go(steps=2).earlier > 0
    source.write_text(source.read_text() + "\n# edited")
    with pytest.raises(
        OutputError,
        match=r"that another verifier judged:\n  verify\.kind: gsm8k has changed \([\d,]+ bytes then, [\d,]+ bytes now\)\n",
    ):
        go()


def test_a_run_that_was_not_judged_is_told_from_one_that_another_verifier_judged(go):
    go(verify=None)
    with pytest.raises(OutputError, match=r"holds a run that was not judged:\n  verify\.kind: absent then"):
        go()


def test_without_the_digests_of_rows_only_unchanged_rows_continue(go, rows, tmp_path, whole):
    write_rows(rows, replaced(4, "{broken"))
    go()
    digests = tmp_path / "out" / "row_digests.parquet"
    digests.write_bytes(b"PAR1 torn")
    write_rows(rows, ROWS)
    with pytest.raises(OutputError, match=r"row_digests\.parquet, which identifies the rows, is missing or damaged"):
        go(retry_errors=True)
    digests.unlink()
    write_rows(rows, replaced(4, "{broken"))
    assert go().exit_code == 0 and digests.exists(), "written anew where nothing has changed"
    write_rows(rows, ROWS)
    assert go(retry_errors=True).exit_code == 0 and table(tmp_path / "out") == whole


def test_the_tokenised_input_is_made_once_while_the_run_is_not_complete(go, rows, tmp_path, whole, monkeypatch):
    kept = tmp_path / "out" / "_input"
    write_rows(rows, [*ROWS[:9], "{broken"])
    go(steps=20)
    assert kept.is_dir()
    made: list[Path] = []
    real = preparation.ingest
    monkeypatch.setattr(preparation, "ingest", lambda job, *given, **named: made.append(rows) or real(job, *given, **named))
    told = Messages()
    assert go(steps=12, progress=told).earlier > 0 and not made and kept.is_dir()
    with (kept / "tokens.bin").open("r+b") as file:
        file.write(b"\xff")
    go(steps=12)
    assert len(made) == 1, "a damaged one is made anew"
    go(steps=12)
    assert len(made) == 1
    write_rows(rows, [*ROWS[:9], "{broken", ROWS[9]])
    go(steps=12, generation={"n": N})
    assert len(made) == 2, "further rows are read"
    assert go().exit_code == 0 and len(made) == 2 and not kept.exists()
    go()
    assert not kept.exists()
    assert [row for row in table(tmp_path / "out") if row["status"] == "ok" and row["row_index"] < 9] == whole[:-N]


def test_a_run_that_starts_afresh_takes_over_nothing(go, tmp_path):
    go(steps=20)
    (tmp_path / "out" / "_input" / "index.json").write_bytes(b"")
    go(steps=20, overwrite=True, generation={"seed": 1})
    assert (tmp_path / "out" / "_input" / "index.json").stat().st_size


def test_policy_stop_stops_at_the_first_error_row_and_continues_after_it(go, rows, tmp_path):
    write_rows(rows, ["{broken", *ROWS[:3], "{broken again", *ROWS[3:]])
    told = Messages()
    stop = {"errors": {"policy": "stop"}}
    for errors, row in ((3, 0), (6, 4)):
        summary = go(progress=told, **stop)
        assert (summary.exit_code, summary.errors, summary.ok) == (75, errors, 0)
        assert told.texts[-1].startswith(f"error: row {row} is an error row (bad_json")
    assert go(**stop).exit_code == 0
    assert len(table(tmp_path / "out")) == 36


@pytest.mark.parametrize(("max_fraction", "code"), [(1.0, 0), (0.0, 3)])
def test_policy_stop_at_the_last_row_missing_leaves_a_complete_run(go, rows, tmp_path, max_fraction, code):
    stop = {"errors": {"policy": "stop", "max_fraction": max_fraction}}
    write_rows(rows, ROWS)
    assert go(**stop).exit_code == 0
    write_rows(rows, [*ROWS, "{broken"])
    told = Messages()
    assert go(progress=told, **stop).exit_code == code and (tmp_path / "out" / "_SUCCESS").exists()
    assert "It was the last one missing" in told.texts[-1] and "again" not in told.texts[-1]
    assert go(**stop).exit_code == code


def test_a_stop_that_comes_with_the_last_sample_leaves_a_complete_run(model, rows, tmp_path):
    """Without a verifier: how often a run looks for a stop while it waits for judges depends on the load."""
    asked: list[int] = []
    run(job(model, rows, tmp_path / "calm", verify=None), None, lambda: bool(asked.append(0)))
    last = len(asked)
    for count, code in ((last - 1, 130), (last, 0)):
        asked.clear()
        out = tmp_path / f"stopped at {count}"
        summary = run(job(model, rows, out, verify=None), None, lambda count=count: asked.append(0) or len(asked) >= count)
        assert summary.exit_code == code
        assert (out / "_SUCCESS").exists() == (code == 0)


FEW = [{"question": f"{number}?", "answer": "1"} for number in range(4)]
WIDENINGS: list[tuple[list[Any], list[Any], pa.DataType]] = [
    ([1, 2], [2.5, None], pa.float64()),
    ([1, 2], ["n/a", 3], pa.string()),
    ([None, None], ["x", {"k": 1}], pa.string()),
    ([None, None], [1, None], pa.int64()),
    (["t", None], [{"k": 1}, "u"], pa.string()),
    ([1, 2], [2**70, 0], pa.string()),
    ([2**60, 1], [0.5, 1], pa.string()),
    ([[], []], [["t"], [1]], pa.list_(pa.string())),
    ([[1], None], [[1.5], []], pa.list_(pa.float64())),
    ([{"a": 1}, {}], [{"b": [True]}, {"a": None}], pa.struct({"a": pa.int64(), "b": pa.list_(pa.bool_())})),
    (
        [{"a": {"b": 1}}, None],
        [{"a": {"b": "x", "c": 0}}, None],
        pa.struct({"a": pa.struct({"b": pa.string(), "c": pa.int64()})}),
    ),
    ([True, False], [0, 1], pa.string()),
]


@pytest.mark.parametrize(("narrow", "wide", "kind"), WIDENINGS, ids=lambda value: str(value)[:30])
def test_rows_that_widen_a_column_extend_the_schema(narrow, wide, kind, go, rows, tmp_path):
    def write(*values: Any) -> None:
        write_rows(rows, [{**row, "score": value} for row, value in zip(FEW, values, strict=False)])

    write(*narrow)
    assert go().exit_code == 0
    write(*narrow, *wide)
    told = Messages()
    summary = go(progress=told)
    assert (summary.earlier, summary.samples, summary.exit_code) == (6, 12, 0)
    assert any(re.search(r"the new rows change the columns \(score.*\): rewriting 2 files", text) for text in told.texts)
    data = tmp_path / "out" / "data"
    found = dataset(data).to_table()
    assert found.schema.field("score").type.equals(kind) and found.num_rows == 12
    assert len(pandas.read_parquet(data)) == 12
    assert table(tmp_path / "out") == (go(out="whole"), table(tmp_path / "whole"))[1]
    assert check(tmp_path / "out").exit_code == 0
    assert export(tmp_path / "out", tmp_path / "all.jsonl").samples == 12
    before = everything(data)
    assert go().earlier == 12 and everything(data) == before, "nothing is rewritten twice"


def test_rows_with_another_column_add_it(go, rows, tmp_path):
    go()
    write_rows(rows, [*ROWS, {"question": "a", "answer": "1", "extra": 1, "correct too": "x"}])
    assert go(generation={"n": N}).exit_code == 0
    assert [row["extra"] for row in table(tmp_path / "out")] == [None] * 30 + [1] * N
    assert table(tmp_path / "out") == (go(out="whole"), table(tmp_path / "whole"))[1]


def test_a_further_parquet_file_may_widen_a_column(go, tmp_path):
    folder = tmp_path / "input"
    folder.mkdir()
    first = {"question": ["a", "b"], "answer": ["1", "2"], "score": pa.array([1, None], pa.int32()), "note": pa.nulls(2)}
    pq.write_table(pa.table(first), folder / "a.parquet")
    changes = {"input": {"path": str(folder)}}
    printing = {"out": "printed", "prompt": {"template": "{{ score | default('none', true) }}{{ question }}"}}
    assert go(**changes).exit_code == 0 and go(**changes, **printing).exit_code == 0
    second = {"question": ["c"], "answer": ["3"], "score": [2.5], "note": [{"k": "v"}], "new": ["only here"]}
    pq.write_table(pa.table(second), folder / "b.parquet")
    assert (go(**changes).exit_code, len(table(tmp_path / "out"))) == (0, 9)
    found = table(tmp_path / "out")
    assert [row["score"] for row in found[::N]] == [1.0, None, 2.5] and found[-1]["note"] == {"k": "v"}
    assert found == (go(out="whole", **changes), table(tmp_path / "whole"))[1]
    with pytest.raises(OutputError, match="the tokens of 1 of 2 rows that are the same are not, the first is row 0"):
        go(**changes, **printing)


def test_a_widening_that_is_broken_off_is_finished_by_the_next_start(go, rows, tmp_path, monkeypatch):
    write_rows(rows, [{**row, "score": number} for number, row in enumerate(ROWS[:6])])
    go()
    write_rows(rows, [*({**row, "score": number} for number, row in enumerate(ROWS[:6])), {**ROWS[6], "score": "x"}])
    real, calls = committed.write_shard, iter(range(99))

    def write(*given: Any) -> Any:
        if next(calls) == 2:
            raise OSError(5, "Input/output error")
        return real(*given)

    monkeypatch.setattr(committed, "write_shard", write)
    with pytest.raises(OutputError, match="Input/output error"):
        go()
    assert not (tmp_path / "out" / "_SUCCESS").exists() and len(table(tmp_path / "out")) == 18
    told = Messages()
    assert go(progress=told).exit_code == 0 and any("rewriting 3 files" in text for text in told.texts)
    assert table(tmp_path / "out") == (go(out="whole"), table(tmp_path / "whole"))[1]


def test_columns_of_ours_in_another_version_are_refused_with_the_real_reason_alone(go, tmp_path):
    go(steps=20)
    for shard in shards(tmp_path / "out"):
        found = pq.read_table(shard).replace_schema_metadata(None)
        place, counts = found.schema.get_field_index("num_output_tokens"), found["num_output_tokens"]
        pq.write_table(found.set_column(place, "num_output_tokens", counts.cast(pa.int64())), shard)
    (tmp_path / "out" / "commits.jsonl").unlink()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest = {key: value for key, value in manifest.items() if key != "sha256"}
    (tmp_path / "out" / "manifest.json").write_text(json.dumps({**manifest, "run": ""}))
    with pytest.raises(
        OutputError, match=r"that this version writes differently: num_output_tokens \(int64 there, int32 now\)\. Use"
    ):
        go()


def test_samples_without_a_manifest_belong_to_no_run(go, model, rows, tmp_path):
    go()
    (tmp_path / "out" / "manifest.json").unlink()
    for attempt in (go, lambda: plan(job(model, rows, tmp_path / "out"))):
        with pytest.raises(OutputError, match=r"8 file.*no manifest\.json.*--overwrite"):
            attempt()
    assert go(overwrite=True).exit_code == 0


@pytest.mark.parametrize("retry_errors", [False, True])
def test_a_run_of_error_rows_alone_gives_way_to_a_corrected_job(retry_errors, model, rows, go, tmp_path, monkeypatch):
    fault = {"template": "{{ question.no_such_field }}"}
    assert go(prompt=fault).ok == 0
    corrected = job(model, rows, tmp_path / "out")
    refuse_early(corrected, retry_errors=retry_errors)
    with pytest.raises(OutputError, match="holds the run of another job"):
        refuse_early(corrected, shared=True)
    planned = plan(corrected)
    assert "holds only error rows, of a job that differs (prompt.template: " in planned.notes[-1]
    told = Messages()
    summary = go(progress=told, retry_errors=retry_errors)
    assert (summary.ok, summary.errors, summary.exit_code) == (len(ROWS) * N, 0, 0)
    assert any("holds only error rows, of a job that differs" in text for text in told.texts)
    assert check(tmp_path / "out").exit_code == 0
    # One good sample is worth keeping, and no shard is read to see that.
    monkeypatch.setattr(same_job, "sampled_rows", lambda *_: pytest.fail("a shard was read"))
    with pytest.raises(OutputError, match="holds the run of another job"):
        go(prompt=fault)


def test_a_copied_shard_is_found(go, tmp_path):
    go(steps=20)
    shard = tmp_path / "out" / "data" / "part-00000.parquet"
    (shard.parent / "part-00077.parquet").write_bytes(shard.read_bytes())
    with pytest.raises(OutputError, match=r"part-00077\.parquet holds sample \d of row \d a second time.*Move the copy away"):
        go()
    found = check(tmp_path / "out")
    assert [(fault.file, fault.problem) for fault in found.faults] == [
        ("data/part-00077.parquet", "holds 4 samples a second time")
    ]
    assert found.remedy is not None and "part-00077" in found.remedy and "part-00000" not in found.remedy


def test_plan_says_what_is_there_already(go, model, rows, tmp_path):
    done = go(steps=20).ok
    notes = plan(job(model, rows, tmp_path / "out")).notes
    assert any(f"holds {done} of these samples; a run computes the other {30 - done}" in note for note in notes)


class TestVerify:
    def test_a_whole_run(self, go, tmp_path):
        go(steps=20)
        assert (check(tmp_path / "out").exit_code, check(tmp_path / "out").remedy) == (75, None)
        go()
        found = check(tmp_path / "out")
        assert (found.exit_code, found.faults, found.books.ok, len(found.shards)) == (0, (), 30, len(shards(tmp_path / "out")))

    @pytest.mark.parametrize("harm", ["flip", "truncate", "empty", "remove", "swap", "trade"])
    def test_damage_is_named_and_the_command_recomputes_only_it(self, harm, go, tmp_path, whole, monkeypatch):
        out = tmp_path / "out"
        go()
        victim = shards(out)[2]
        content = bytearray(victim.read_bytes())
        if harm == "flip":
            content[len(content) // 3] ^= 4
            victim.write_bytes(content)
        elif harm == "truncate":
            victim.write_bytes(content[:-20])
        elif harm == "empty":
            victim.write_bytes(b"")
        elif harm == "remove":
            victim.unlink()
        elif harm == "swap":  # A good file, but not the one that was written.
            changed = pq.read_table(victim)
            text = pa.array(["other"] * changed.num_rows)
            pq.write_table(changed.set_column(changed.schema.get_field_index("text"), "text", text), victim)
        else:
            pq.write_table(pq.read_table(victim).slice(1), victim)
        found = check(out)
        assert found.exit_code == 4 and [fault.file for fault in found.faults] == [f"data/{victim.name}"]
        assert found.remedy is not None
        kept = {path: path.read_bytes() for path in shards(out) if path != victim}
        command = shlex.split(found.remedy)
        assert command[:2] == ["tokabatch", "run"]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
        assert {path: path.read_bytes() for path in kept} == kept
        assert table(out) == whole and check(out).exit_code == 0

    def test_a_flipped_bit_is_seen_before_the_run_is_complete(self, go, tmp_path):
        go(steps=40)
        victim = shards(tmp_path / "out")[0]
        content = bytearray(victim.read_bytes())
        with pq.ParquetFile(victim) as file:
            column = file.metadata.row_group(0).column(file.schema_arrow.names.index("text"))
            begin = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
        # The last bytes of a column are data: checksums cover no page headers.
        content[begin + column.total_compressed_size - 2] ^= 1
        victim.write_bytes(content)
        found = check(tmp_path / "out")
        assert found.exit_code == 4 and [fault.file for fault in found.faults] == [f"data/{victim.name}"]

    def test_a_damaged_shard_stops_a_run_with_the_way_out(self, go, tmp_path):
        go()
        shards(tmp_path / "out")[0].write_bytes(b"PAR1 torn")
        with pytest.raises(OutputError, match=r"part-00000\.parquet is damaged.*`tokabatch check"):
            go()

    def test_a_success_that_counts_otherwise(self, go, tmp_path):
        go()
        success = tmp_path / "out" / "_SUCCESS"
        success.write_text(success.read_text().replace('"ok": 30', '"ok": 29'))
        found = check(tmp_path / "out")
        assert (found.exit_code, [fault.file for fault in found.faults]) == (4, ["_SUCCESS"])

    def test_no_run(self, tmp_path):
        with pytest.raises(OutputError, match="no run has written here"):
            check(tmp_path)


def shards(out: Path) -> list[Path]:
    return sorted((out / "data").glob("*.parquet"))
