"""Whole runs in this process: a job in, shards out, checked with plain pyarrow and with transformers."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from support import tiny_models
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokabatch import Job, plan, run
from tokabatch.engine.executor import InProcessExecutor
from tokabatch.engine.worker import WorkerSpec
from tokabatch.errors import JobError, UsageError
from tokabatch.report.progress import NullProgress, ProgressSnapshot
from tokabatch.runner.shared import Shared
from tokabatch.storage.atomic_files import DurableFiles

HEADER = "Each line adds two numbers: 1+1=2, 2+5=7, 3+4=7, 8+1=9.\n"
ROWS = [{"question": f"What is {i}+{i * 7 % 5}?", "answer": str(i + i * 7 % 5), "extra": {"i": i}} for i in range(12)]


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "qwen3"
    return tiny_models.add_tokenizer(tiny_models.build("qwen3", folder))


@pytest.fixture
def rows(tmp_path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def job(model: Path, rows: Path, out: Path, **changes: Any) -> Job:
    base: dict[str, Any] = {
        "model": {"path": str(model), "dtype": "float64"},
        "input": {"path": str(rows)},
        "prompt": {"template": HEADER + "Q: {{ question }}\nA:"},
        "generation": {"n": 3, "temperature": 0.8, "max_tokens": 10, "seed": 5},
        "engine": {"device": "cpu", "page_size": 8},
        "output": {"path": str(out)},
    }
    for section, values in changes.items():
        base[section] = {**base.get(section, {}), **values}
    return Job.load(base)


def read(out: Path) -> list[dict[str, Any]]:
    """All committed samples by row and sample; every shard is read, and nothing else."""
    samples = [row for shard in sorted((out / "data").glob("*.parquet")) for row in pq.read_table(shard).to_pylist()]
    return sorted(samples, key=lambda row: (row["row_index"], row["sample_index"]))


def drawn(out: Path) -> list[tuple[int, int, list[int]]]:
    return [(row["row_index"], row["sample_index"], row["token_ids"]) for row in read(out)]


def test_nothing_that_is_still_open_or_mapped_is_removed(model, rows, tmp_path, monkeypatch):
    """NFS would keep it under another name, and its folder with it."""
    removed, in_use, remove = list[str](), list[str](), DurableFiles.remove_tree

    def watched(files: DurableFiles, path: Path) -> None:
        used = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
        used += [os.path.realpath(handle) for handle in Path("/proc/self/fd").iterdir()]
        removed.append(path.name)
        in_use.extend(each for each in used if each.startswith(f"{path}/") and not os.path.isdir(each))
        remove(files, path)

    monkeypatch.setattr(DurableFiles, "remove_tree", watched)
    # The second one finds a run without units, which it looks at alone first.
    for shared in (None, Shared()):
        assert run(job(model, rows, tmp_path / "out"), shared=shared).exit_code == 0
    assert run(job(model, rows, tmp_path / "shared"), shared=Shared()).exit_code == 0
    assert {"_tmp", "_input"} <= set(removed) and not in_use


def test_greedy_text_is_that_of_transformers(model, rows, tmp_path):
    summary = run(job(model, rows, tmp_path / "out", generation={"n": 2, "temperature": 0.0}))
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(model)
    samples = read(tmp_path / "out")
    assert [(s["row_index"], s["sample_index"]) for s in samples] == [(r, s) for r in range(len(ROWS)) for s in range(2)]
    for sample in samples:
        prompt = HEADER + f"Q: {ROWS[sample['row_index']]['question']}\nA:"
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.inference_mode():
            out = reference.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=2, pad_token_id=0)
        expected = out[0, ids.shape[1] :].tolist()
        assert sample["token_ids"] == expected
        assert sample["text"] == tokenizer.decode(expected, skip_special_tokens=True)
        assert sample["finish_reason"] == ("stop" if expected[-1] == 2 else "length")
        assert sample["num_prompt_tokens"] == ids.shape[1]
        assert sample["question"] == ROWS[sample["row_index"]]["question"]
        assert sample["extra"] == ROWS[sample["row_index"]]["extra"]
    assert (summary.exit_code, summary.ok, summary.errors) == (0, 24, 0)
    assert summary.prompt_tokens == sum(s["num_prompt_tokens"] for s in samples)
    assert summary.cached_tokens == sum(s["num_cached_tokens"] for s in samples) > 0.8 * summary.cacheable_tokens
    assert summary.output_tokens == sum(s["num_output_tokens"] for s in samples)


ENGINES = [
    {"page_size": 1},
    {"page_size": 64},
    {"hydragen": False},
    {"hydragen_min_group": 2, "hydragen_min_prefix": 1, "max_running": 5},
    {"max_running": 2, "max_step_tokens": 7},
    {"kv_cache_tokens": 200, "queue_depth": 3},
    {"process": True, "queue_depth": 2},
    {"tensor": 2},
    {"pipeline": 2},
]


@pytest.fixture(scope="session")
def undisturbed(model, tmp_path_factory) -> list[tuple[int, int, list[int]]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run(job(model, file, folder / "out"))
    return drawn(folder / "out")


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: ",".join(f"{k}={v}" for k, v in engine.items()))
def test_engine_settings_do_not_change_what_is_drawn(engine, model, rows, tmp_path, undisturbed):
    assert run(job(model, rows, tmp_path / "out", engine=engine)).exit_code == 0
    assert drawn(tmp_path / "out") == undisturbed


def test_more_samples_begin_with_the_same_ones(model, rows, tmp_path, undisturbed):
    run(job(model, rows, tmp_path / "few", generation={"n": 4}))
    run(job(model, rows, tmp_path / "many", generation={"n": 16}))
    few, many = drawn(tmp_path / "few"), drawn(tmp_path / "many")
    assert [sample for sample in many if sample[1] < 4] == few
    assert [sample for sample in few if sample[1] < 3] == undisturbed


def test_a_row_alone_is_drawn_as_in_company(model, rows, tmp_path, undisturbed):
    run(job(model, rows, tmp_path / "out", input={"limit": 1}))
    assert drawn(tmp_path / "out") == [sample for sample in undisturbed if sample[0] == 0]


def test_bad_rows_cost_one_row_each_and_the_books_close(model, tmp_path):
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps(row).encode() for row in ROWS]
    lines[2] = b'{"question": "unfinished'
    lines[5] = b'{"question": null, "answer": "1"}'
    lines[7] = b'{"question": "' + b"x" * 600 + b'", "answer": "1"}'
    lines[9] = b'{"question": "\xff", "answer": "1"}'
    file.write_bytes(b"\n".join(lines) + b"\n")
    out = tmp_path / "out"
    summary = run(job(model, file, out))
    samples = read(out)
    assert len(samples) == 36
    errors = {s["row_index"]: s["error_code"] for s in samples if s["status"] == "error"}
    assert errors == {2: "bad_json", 5: "missing_field", 7: "prompt_too_long", 9: "bad_utf8"}
    assert all(s["error_message"] and s["text"] is None for s in samples if s["status"] == "error")
    assert (summary.ok, summary.errors, summary.exit_code) == (24, 12, 3)
    assert json.loads((out / "_SUCCESS").read_text())["samples"] == 36
    good = [s for s in samples if s["status"] == "ok"]
    run(job(model, file, tmp_path / "again", errors={"max_fraction": 0.5}, generation={"n": 1}))
    first = [(s["row_index"], s["token_ids"]) for s in good if s["sample_index"] == 0]
    assert [(s["row_index"], s["token_ids"]) for s in read(tmp_path / "again") if s["status"] == "ok"] == first


def test_policy_stop_samples_nothing_after_an_error(model, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "a"}\n{broken\n')
    summary = run(job(model, file, tmp_path / "out", errors={"policy": "stop"}))
    assert (summary.exit_code, summary.ok, summary.errors, summary.pending) == (75, 0, 3, 3)
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def test_an_input_of_bad_rows_only(model, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": null}\n' * 3)
    summary = run(job(model, file, tmp_path / "out"))
    assert (summary.samples, summary.errors, summary.exit_code) == (9, 9, 3)


def test_stop_strings_ids_and_logprobs(model, rows, tmp_path):
    out = tmp_path / "out"
    plain = drawn_texts(model, rows, tmp_path / "plain")
    common = max("eaonrst0123456789,.", key=lambda char: sum(char in text for text in plain.values()))
    stop_id = 3 + 1 + ord("q") - 32
    run(job(model, rows, out, generation={"stop": [common], "stop_token_ids": [stop_id], "max_tokens": 40, "logprobs": 2}))
    reasons = set()
    for sample in read(out):
        reasons.add(sample["stop_reason"])
        assert common not in sample["text"]
        assert len(sample["logprobs"]) == len(sample["token_ids"]) == sample["num_output_tokens"]
        assert sample["cumulative_logprob"] == pytest.approx(sum(p["logprob"] for p in sample["logprobs"]), abs=1e-4)
        for position in sample["logprobs"]:
            assert len(position["top_token_ids"]) == len(position["top_logprobs"]) == 2
            assert position["top_logprobs"][0] >= position["top_logprobs"][1] >= -100
        if sample["stop_reason"] == str(stop_id):
            assert sample["token_ids"][-1] == stop_id and "q" not in sample["text"]
        if sample["stop_reason"] == common:
            assert sample["finish_reason"] == "stop"
    assert common in reasons


def drawn_texts(model: Path, rows: Path, out: Path) -> dict[tuple[int, int], str]:
    run(job(model, rows, out, generation={"max_tokens": 40}))
    return {(s["row_index"], s["sample_index"]): s["text"] for s in read(out)}


def test_a_row_may_say_how_it_is_sampled(model, tmp_path):
    file = tmp_path / "rows.jsonl"
    changes = [
        {},
        {"sampling_params": {"n": 5, "temperature": 0.0}},
        {"sampling_params": {"max_tokens": 2, "ignore_eos": True}},
    ]
    file.write_text("".join(json.dumps({"prompt": "Say it", **change}) + "\n" for change in changes))
    run(job(model, file, tmp_path / "out", prompt={"template": None}))
    by_row = {r: [s for s in read(tmp_path / "out") if s["row_index"] == r] for r in range(3)}
    assert [len(by_row[r]) for r in range(3)] == [3, 5, 3]
    assert len({tuple(s["token_ids"]) for s in by_row[1]}) == 1
    assert all(s["num_output_tokens"] == 2 for s in by_row[2])


def test_verified_runs_report_pass_at_k(model, rows, tmp_path):
    summary = run(job(model, rows, tmp_path / "out", verify={"kind": "gsm8k", "answer": "answer"}))
    samples = read(tmp_path / "out")
    assert {type(s["correct"]) for s in samples} == {bool}
    assert summary.pass_at_k is not None and list(summary.pass_at_k) == [1, 2, 3]
    assert summary.pass_at_k[1] == pytest.approx(sum(s["correct"] for s in samples) / len(samples))


class Watcher(NullProgress):
    """Looks into the output folder during the run, after every step."""

    interval = 0.0

    def __init__(self, out: Path) -> None:
        self.out = out
        self.seen: list[int] = []

    def update(self, snapshot: ProgressSnapshot) -> None:
        if snapshot.phase == "generating":
            self.seen.append(sum(pq.read_metadata(shard).num_rows for shard in (self.out / "data").glob("*.parquet")))


@pytest.mark.parametrize("output", [{"flush_seconds": 0.001}, {"rows_per_shard": 1}], ids=["by time", "by rows"])
def test_shards_appear_while_the_run_goes_on(output, model, rows, tmp_path, monkeypatch):
    for module in ("preparation", "recorder"):
        monkeypatch.setattr(f"tokabatch.runner.{module}.BATCH_SAMPLES", 1 if "rows_per_shard" in output else 10_000)
    watcher = Watcher(tmp_path / "out")
    run(job(model, rows, tmp_path / "out", output=output, engine={"max_running": 4}), watcher)
    assert 0 < watcher.seen[len(watcher.seen) // 2] < watcher.seen[-1]


@pytest.mark.parametrize("process", [False, True])
def test_a_prompt_that_does_not_fit_the_kv_cache_costs_its_row(model, tmp_path, process):
    rows = [{"question": "x" * 300}, {"question": "a"}, {"question": "b" * 30}, {"question": "b" * 30}]
    rows[2]["sampling_params"] = {"max_tokens": 60}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    engine = {"kv_cache_tokens": 64, "process": process}
    changes = {"engine": engine, "prompt": {"template": "{{ question }}"}, "generation": {"n": 2, "max_tokens": 3}}
    summary = run(job(model, tmp_path / "rows.jsonl", tmp_path / "out", **changes))
    samples = read(tmp_path / "out")
    assert [s["status"] for s in samples] == ["error", "error", "ok", "ok", "error", "error", "ok", "ok"]
    assert dict(summary.error_counts) == {"kv_cache_overflow": 4} and (summary.ok, summary.exit_code) == (4, 3)
    assert "max_tokens is 60" in samples[4]["error_message"] and "the cache holds 64" in samples[4]["error_message"]
    # More memory, and the rows are run again; a cache that holds none of what is left is refused.
    with pytest.raises(JobError, match="shortest sample needs"):
        run(job(model, tmp_path / "rows.jsonl", tmp_path / "out", **changes), retry_errors=True)
    engine["kv_cache_tokens"] = 512
    summary = run(job(model, tmp_path / "rows.jsonl", tmp_path / "out", **changes), retry_errors=True)
    assert (summary.ok, summary.errors, summary.exit_code) == (8, 0, 0)


class Counter(NullProgress):
    """Counts the snapshots that it gets."""

    def __init__(self, interval: float | None) -> None:
        self.interval = interval
        self.phases: list[str] = []

    def update(self, snapshot: ProgressSnapshot) -> None:
        self.phases.append(snapshot.phase)


def test_a_display_gets_what_it_can_show_and_one_that_shows_nothing_costs_nothing(model, rows, tmp_path, monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr(
        "tokabatch.runner.make_replica.Scheduler.expected_tokens_left", lambda self, waiting: asked.append(waiting) or 1
    )
    often, seldom = Counter(0.0), Counter(3600.0)
    run(job(model, rows, tmp_path / "often"), often)
    run(job(model, rows, tmp_path / "seldom"), seldom)
    assert often.phases.count("generating") > 5
    assert [phase for phase in seldom.phases if phase != "reading"] == ["loading", "generating", "writing"]
    asked.clear()
    run(job(model, rows, tmp_path / "quiet"), Counter(None))
    run(job(model, rows, tmp_path / "none"))
    assert not asked


def test_shards_have_the_size_asked_for(model, rows, tmp_path):
    run(job(model, rows, tmp_path / "out", output={"rows_per_shard": 7}))
    counts = [pq.read_metadata(shard).num_rows for shard in sorted((tmp_path / "out" / "data").glob("*.parquet"))]
    assert counts == [7, 7, 7, 7, 7, 1]


def test_a_stopped_run_commits_what_is_finished(model, rows, tmp_path):
    asked: list[bool] = []

    def should_stop() -> bool:
        asked.append(True)
        return len(asked) == 25

    summary = run(job(model, rows, tmp_path / "out", engine={"max_running": 3}), should_stop=should_stop)
    samples = read(tmp_path / "out")
    assert summary.exit_code == 130
    assert 0 < len(samples) == summary.ok < 36
    assert summary.pending == 36 - len(samples)
    kept = sum(len(sample["token_ids"]) for sample in samples)
    assert summary.kept_tokens == kept < summary.output_tokens
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def test_stopping_while_the_input_is_read_leaves_nothing(model, rows, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(job(model, rows, tmp_path / "out"), should_stop=lambda: True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [{}, {"verify": {"kind": "gsm8k", "answer": "answer"}}, {"output": {"columns": []}}])
def test_an_input_that_does_not_parse_is_all_error_rows(changes, model, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("{broken\n" * 2)
    summary = run(job(model, file, tmp_path / "out", **changes))
    assert (summary.errors, summary.exit_code) == (6, 3)
    assert {s["error_code"] for s in read(tmp_path / "out")} == {"bad_json"}


def test_references_that_cannot_be_compared_are_reported(model, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "a", "answer": "no number"}\n{"question": "b", "answer": "3"}\n')
    summary = run(job(model, file, tmp_path / "out", verify={"kind": "gsm8k", "answer": "answer"}))
    assert summary.unverified == 3 and summary.unverified_reasons
    assert [s["correct"] for s in read(tmp_path / "out") if s["row_index"] == 0] == [None] * 3


def test_the_manifest_holds_what_was_used(model, rows, tmp_path):
    folder = tmp_path / "with-defaults"
    shutil.copytree(model, folder)
    (folder / "generation_config.json").write_text('{"top_p": 0.5, "eos_token_id": 2}')
    run(job(folder, rows, tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["job"]["generation"]["top_p"] == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": {"kv_cache_tokens": 64}}, "engine.kv_cache_tokens"),
        ({"engine": {"max_running": 8, "max_step_tokens": 4}}, "engine.max_step_tokens"),
        ({"generation": {"logprobs": 98}}, "generation.logprobs"),
        ({"generation": {"max_tokens": 512}}, "generation.max_tokens"),
        ({"generation": {"stop_token_ids": [97]}}, "generation.stop_token_ids"),
    ],
)
def test_a_job_that_cannot_fit_is_refused_with_the_key(changes, message, model, rows, tmp_path):
    with pytest.raises(JobError, match=message):
        run(job(model, rows, tmp_path / "out", **changes))


def test_plan_counts_what_run_then_does(model, rows, tmp_path):
    planned = plan(job(model, rows, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    summary = run(job(model, rows, tmp_path / "out"))
    assert planned.prompt_tokens == summary.prompt_tokens
    assert planned.shared_tokens == summary.cacheable_tokens
    assert planned.samples == summary.samples
    assert planned.first_prompt == HEADER + f"Q: {ROWS[0]['question']}\nA:"
    assert summary.output_tokens <= planned.max_output_tokens
    written = read(tmp_path / "out")
    assert planned.host.output_bytes > sum(
        len((each["text"] or "").encode()) + 4 * len(each["token_ids"] or ()) for each in written
    )
    assert planned.host.waiting_bytes <= planned.host.output_bytes and planned.host.input_bytes > 0
    assert planned.replica.weight_bytes >= 4 * planned.model.parameters and planned.replica.pages > 0
    assert planned.least_seconds is not None and planned.least_seconds[0] > 0


def test_a_display_that_raises_costs_nothing_but_the_display(model, rows, tmp_path):
    class Broken(NullProgress):
        interval = 0.0

        def update(self, snapshot: ProgressSnapshot) -> None:
            raise BrokenPipeError(32, "Broken pipe")

        def message(self, text: str) -> None:
            raise RuntimeError("closed")

    assert run(job(model, rows, tmp_path / "out"), Broken()).exit_code == 0
    assert len(read(tmp_path / "out")) == 36


@pytest.mark.parametrize(("value", "may_overlap"), [("auto", True), (True, True), (False, False)])
def test_async_tp_reaches_the_worker(value, may_overlap, model, rows, tmp_path, monkeypatch):
    specs: list[WorkerSpec] = []
    monkeypatch.setattr(
        "tokabatch.runner.make_replica.InProcessExecutor", lambda spec: specs.append(spec) or InProcessExecutor(spec)
    )
    run(job(model, rows, tmp_path / "out", engine={"kv_cache_tokens": 4096, "async_tp": value}))
    assert [spec.async_tp for spec in specs] == [may_overlap]


def test_an_override_is_not_taken_for_a_display():
    with pytest.raises(UsageError, match=r"write run\(Job\.load\(\.\.\., 'generation\.n=2'\)\)"):
        run("jobs/quickstart.yaml", "generation.n=2")  # pyright: ignore[reportArgumentType]
