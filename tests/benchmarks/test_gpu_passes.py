"""The command from end to end on a CPU, with tiny models: what it prints, what it keeps, and how it fails."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import default_scratch, ensure_model, main, parse_part, run_child
from benchmarks.gpu.jobs import check_output
from benchmarks.gpu.trace import describe_trace, read_trace
from benchmarks.gpu.whole_pass import Watch
from benchmarks.gpu.workloads import make_gpu_workload
from tokabatch import Job, run
from tokabatch.report.progress import ProgressSnapshot

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def command(monkeypatch, capfd):
    """Runs the command in this process, its children in theirs; returns the exit code, standard output and error."""

    def start(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", *arguments])
        code = None
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        told = capfd.readouterr()
        return code, told.out, told.err

    return start


def test_the_command(command, tmp_path):
    """Two parts, the second of which fails: the first one's figures still appear beside its roofline."""
    code, told, errors = command(
        "a:prompts=2", "b:engine.page_size=31", "--model", "tiny", "--scale", "0.02", "--profile",
        "--out", str(tmp_path / "out"), "--scratch", str(tmp_path),
    )  # fmt: skip
    assert code == 1, told + errors
    assert "FAILED" in told and "a power of two" in errors
    for words in ("whole pass", "of the roofline's", "steady state", "to the first step", "host CPU", "trace "):
        assert words in told
    records = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    own, found = records[0]["figures"], records[1]["profile"]
    assert (own["output_tokens"], own["exit_code"]) == (2 * 10 * 4, 0)
    assert own["steps"] >= 4
    assert 0 < own["read_seconds"] + own["load_seconds"] < own["start_seconds"]
    assert 0 < sum(own["first_steps_ms"]) / 1e3 < own["whole_seconds"]
    assert own["schedule_seconds"] > 0 and own["launch_cpu_seconds"] > 0
    assert records[0]["roofline_rate"] > own["output_tokens"] / own["whole_seconds"]
    assert 0 < found["busy_ms"] <= found["span_ms"] and found["kernels"]
    assert not (tmp_path / "out" / "completions").exists()


def test_steps_of_long_prompts_over_ranks(tmp_path):
    keys = ("prefill", "--model", "tiny", "--device", "cpu", "--dtype", "float32", "--scratch", str(tmp_path))
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.ranks", *keys],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    shown = [line for line in result.stdout.splitlines() if " tokens " in line]
    assert [line.split()[0] for line in shown] == ["32", "64", "128", "256", "512"]
    assert all("scattered" in line and "on every rank" in line for line in shown)


def test_names_carry_job_keys():
    part = parse_part("a-full:prompts=4,engine.hydragen=false,model.dtype=float16")
    assert (part.workload, part.prompts, part.hydragen) == ("a-full", 4, False)
    assert part.overrides == ("engine.hydragen=false", "model.dtype=float16")
    assert parse_part("c").hydragen
    with pytest.raises(SystemExit, match="no workload 'z'"):
        parse_part("z")


def test_a_child_that_hangs_is_ended():
    with pytest.raises(subprocess.TimeoutExpired):
        run_child(["http.server", "0", "--bind", "127.0.0.1"], timeout_s=1.0)


def test_a_model_is_written_once(tmp_path, capsys):
    folder = ensure_model("tiny", tmp_path)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert ensure_model("tiny", tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert capsys.readouterr().out.count("random weights") == 1
    assert default_scratch("tiny").name == "tokabatch-gpu-models"


def test_an_output_of_other_lengths_is_refused(tiny_folders, tmp_path):
    rows = [{"prompt_index": index, "prompt_token_ids": [5 + index, 6]} for index in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(
        Job.load(
            {
                "model": {"path": str(tiny_folders["tiny"])},
                "input": {"path": str(tmp_path / "rows.jsonl")},
                "generation": {"max_tokens": 3, "ignore_eos": True},
                "engine": {"device": "cpu"},
                "output": {"path": str(tmp_path / "out"), "columns": ["prompt_index"]},
            }
        )
    )
    workload = make_gpu_workload("b", 640, 0.01).take(2)
    with pytest.raises(ValueError, match="2 samples of 6 tokens"):
        check_output(tmp_path / "out", workload)


def test_the_steady_state_is_the_longest_full_stretch():
    watch = Watch(None)
    running = [10, 100, 100, 50, 95, 100, 92, 100, 30]
    for second, now in enumerate(running):
        watch.update(ProgressSnapshot("generating", float(second), tokens_out=1000 * second, running=now))
    watch.results = [0.25 * quarter for quarter in range(36)]
    steady = watch.steady()
    assert steady is not None
    assert (steady.seconds, steady.rate, steady.median_step_ms) == (3.0, 1000.0, 250.0)
    assert steady.running == pytest.approx((95 + 100 + 92 + 100) / 4)


def test_a_trace_distinguishes_busy_from_idle(tmp_path):
    def event(kind: str, name: str, begin: float, length: float) -> dict[str, object]:
        return {"ph": "X", "cat": kind, "name": name, "ts": begin, "dur": length}

    events = [
        event("kernel", "void gemm<float>(int)", 0, 400),
        event("kernel", "void gemm<float>(int)", 300, 300),
        event("gpu_memcpy", "Memcpy DtoH", 500, 50),
        event("kernel", "softmax", 800, 200),
        event("cuda_runtime", "cudaLaunchKernel", 0, 5000),
        {"ph": "M", "name": "process_name"},
    ]
    file = tmp_path / "trace.json.gz"
    file.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    found = read_trace(file)
    assert (found.on_device, found.span_ms, found.busy_ms) == (True, 1.0, pytest.approx(0.8))
    assert found.idle_share == pytest.approx(0.2)
    assert [(kernel.name, kernel.calls) for kernel in found.kernels] == [
        ("gemm<float>(int)", 2), ("softmax", 1), ("Memcpy DtoH", 1),
    ]  # fmt: skip
    assert "idle 0.2 ms (20.0%)" in describe_trace(found, steps=1)[0]


def test_the_real_experiment(command, tmp_path):
    """Three rows in GSM8K's form, on the quickstart's model: samples end by themselves, and what they took is printed."""
    rows = [{"question": f"What is {n} plus 2?", "answer": f"#### {n + 2}"} for n in range(9)]
    for name in ("test.jsonl", "train.jsonl"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    keys = "input.limit=3,generation.n=2,generation.max_tokens=12,model.dtype=float32,engine.device=cpu"
    code, told, errors = command(f"real:{keys}", "--model-folder", str(ROOT / "jobs/quickstart"), "--gsm8k", str(tmp_path))
    assert not code, told + errors
    for words in ("of 6 samples", "output tokens/s", "tail ", "launching", "pass@1", "running "):
        assert words in told
    assert "--model-folder" in str(command("real", "--gsm8k", str(tmp_path))[0])
