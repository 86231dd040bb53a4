"""Launch times arrive with the results, and a trace holds exactly the requested steps, wherever the worker runs."""

from __future__ import annotations

import gzip
import json

import pytest
from support import tiny_models

from tokabatch.errors import UsageError
from tokabatch.job import Job
from tokabatch.report.progress import NullProgress
from tokabatch.runner.run import run


class Messages(NullProgress):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models.add_tokenizer(tiny_models.build("llama", tmp_path_factory.mktemp("models") / "llama"))


@pytest.fixture
def job(model, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "ab" * (i + 1)}) + "\n" for i in range(4)))

    def make(**sections) -> Job:
        values = {
            "model": {"path": str(model)},
            "input": {"path": str(rows)},
            "generation": {"max_tokens": 12, "ignore_eos": True},
            "output": {"path": str(tmp_path / "out")},
        }
        return Job.load(values | sections)

    return make


def recorded_steps(trace) -> list[int]:
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    named = {str(event.get("name", "")) for event in events if event.get("cat") == "user_annotation"}
    return sorted(int(name.removeprefix("step ")) for name in named if name.startswith("step "))


@pytest.mark.parametrize(
    ("process", "start", "steps", "expected"),
    [(False, 8, 3, [8, 9, 10]), (True, 8, 3, [8, 9, 10]), (False, 1, 2, [1, 2]), (True, 10, 50, [10, 11, 12])],
)
def test_the_profile_holds_the_requested_steps(job, tmp_path, process, start, steps, expected):
    trace = tmp_path / "deep" / "trace.json.gz"
    summary = run(job(trace={"path": str(trace), "start": start, "steps": steps}, engine={"process": process, "device": "cpu"}))
    assert summary.exit_code == 0
    assert recorded_steps(trace) == expected
    assert [file.name for file in trace.parent.iterdir()] == ["trace.json.gz"]


def test_a_run_too_short_for_its_profile_says_so(job, tmp_path):
    messages = Messages()
    run(job(trace={"path": str(tmp_path / "trace.json")}, engine={"device": "cpu"}), messages)
    assert any("trace.start is 50" in text for text in messages.texts)
    assert not (tmp_path / "trace.json").exists()


def test_any_replica_can_be_recorded(job, tmp_path):
    """Of two replicas the second."""
    trace, messages = tmp_path / "trace.json.gz", Messages()
    sections = {"trace": {"path": str(trace), "start": 3, "steps": 2, "replica": 1}, "engine": {"replicas": 2, "device": "cpu"}}
    assert run(job(**sections), messages).exit_code == 0
    assert recorded_steps(trace) == [3, 4] and not any("nothing was traced" in text for text in messages.texts)
    sections["trace"]["replica"] = 2
    with pytest.raises(UsageError, match=r"trace\.replica is 2, but the run has 2 replicas"):
        run(job(**sections), overwrite=True)


def test_launching_takes_time_that_the_summary_counts(job):
    summary = run(job(engine={"process": True, "device": "cpu"}))
    assert summary.launch_seconds > 0
