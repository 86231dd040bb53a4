"""Every job of the gallery runs, on the quickstart's model with few short samples; all of them in this process."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tokabatch import Job, RunSummary, plan, run
from tokabatch.batch.results import write_results
from tokabatch.report.page import render_page
from tokabatch.report.review import read_record

ROOT = Path(__file__).parents[2]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
SMALL = ("model.path=jobs/quickstart", "model.dtype=float32", "generation.max_tokens=8", "input.limit=3")
CHAT = f"prompt.chat_template='{TEMPLATE}'"
RUNS = {
    "chat": (CHAT, "prompt.chat_template_kwargs={}"),
    "code": (),
    "multiple_choice": (CHAT,),
    "own_data": (CHAT,),
    "openai_batch": (CHAT,),
    "scoring": ("generation=null",),
    "gsm8k": ("input.path=jobs/quickstart/problems.jsonl", "generation.n=2"),
    "quickstart": ("generation.n=2",),
}


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def complete(name: str, out: Path, *overrides: str) -> tuple[RunSummary, list[dict[str, Any]]]:
    summary = run(Job.load(f"jobs/{name}.yaml", *SMALL, *RUNS[name], f"output.path={out}", *overrides))
    assert (summary.exit_code, summary.errors) == (0, 0)
    table = pq.read_table(sorted((out / "data").glob("*.parquet"))).sort_by([("row_index", "ascending")])
    return summary, table.to_pylist()


def test_no_job_of_the_gallery_is_left_out() -> None:
    assert {path.stem for path in (ROOT / "jobs").glob("*.yaml")} == set(RUNS)
    page = (ROOT / "jobs" / "README.md").read_text()
    named = set(re.findall(r"^\| `([a-z_0-9]+\.(?:yaml|py|ipynb))`", page, re.MULTILINE))
    assert named == {path.name for path in (ROOT / "jobs").iterdir() if path.suffix in (".yaml", ".py", ".ipynb")}


@pytest.mark.parametrize("name", ["gsm8k", "quickstart"])
def test_verified_jobs_with_worked_examples(name: str, tmp_path: Path) -> None:
    summary, samples = complete(name, tmp_path / "out")
    assert list(summary.pass_at_k or ()) == [1, 2] and len(samples) == 6
    # The page shows the prompts, examples included, made again of the rows in the output.
    record = read_record(tmp_path / "out")
    assert set(record.prompts) == {0, 1, 2} and "Answer: " in record.prompts[0].text
    page = render_page(record)
    assert "<summary>Prompt, " in page and "Wrong samples" in page and "not shown" not in page
    assert record.prompts[0].text.endswith(own := record.prompts[0].own_part) and 0 < len(own) < len(record.prompts[0].text) / 2
    assert "<th>prompt template<td>" in page and "<th>examples in front<td>" in page and "<th>chat template" not in page
    assert "Hardest rows" in page and "Right samples by row" in page
    more, _ = complete(name, tmp_path / "out", "generation.n=4")  # A finished run is extended.
    assert (more.ok, more.earlier) == (12, 6)


def test_chat_with_a_system_prompt(tmp_path: Path) -> None:
    _, samples = complete("chat", tmp_path / "out")
    assert len(samples) == 6
    record = read_record(tmp_path / "out")
    assert [record.prompts[row].own_part for row in range(3)] == ["Why is the sky blue?", "A larger one?", "Good morning!"]
    facts = dict(record.facts)
    assert facts["system prompt"] == "You answer in one short sentence."
    assert "{{ m.role }}" in facts["chat template"] and facts["prompt from column"] == "messages"
    job = Job.load("jobs/chat.yaml", *SMALL, *RUNS["chat"], f"output.path={tmp_path / 'plan'}")
    assert "You answer in one short sentence." in _first_prompt(job)


def test_code_is_judged_by_the_tests_of_its_row(tmp_path: Path) -> None:
    _, samples = complete("code", tmp_path / "out", "generation.n=1")
    assert [sample["correct"] for sample in samples] == [False, False]
    assert all(sample["outcome"] for sample in samples) and samples[0]["task_id"] == "example/0"


def test_multiple_choice(tmp_path: Path) -> None:
    _, samples = complete("multiple_choice", tmp_path / "out")
    assert len(samples) == 3 and all(sample["correct"] is not None for sample in samples)
    assert "<div class=prompt>Prompt: Which planet is the largest? A. Mars" in render_page(read_record(tmp_path / "out"))
    job = Job.load("jobs/multiple_choice.yaml", *SMALL, CHAT, f"output.path={tmp_path / 'plan'}")
    assert "C. Jupiter\nD. Mercury\nAnswer with the letter alone." in _first_prompt(job)


def test_rows_with_settings_of_their_own(tmp_path: Path) -> None:
    _, samples = complete("own_data", tmp_path / "out")
    assert [sample["id"] for sample in samples] == ["colour"] * 4 + ["capital", "count"]
    assert [sample["hint"] for sample in samples[3:]] == ["not blue", None, None] and "name" not in samples[0]


def test_requests_of_a_batch_file(tmp_path: Path) -> None:
    _, samples = complete("openai_batch", tmp_path / "out")
    # Whole requests, whatever the limit.
    assert [sample["custom_id"] for sample in samples] == ["capital", *["colours"] * 3, *["texts"] * 2]
    job = Job.load("jobs/openai_batch.yaml", *SMALL, CHAT, f"output.path={tmp_path / 'all'}", "input.limit=null")
    assert (run(job).ok, run(job).exit_code) == (6, 0)
    written = write_results(tmp_path / "all", tmp_path / "results.jsonl")
    assert (written.results, written.errors) == (3, 1)
    results = [json.loads(line)["response"] for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [len(response["body"]["choices"]) for response in results] == [1, 3, 2]
    assert '"param":"modalities"' in (tmp_path / "results.errors.jsonl").read_text()


def test_scoring(tmp_path: Path) -> None:
    _, samples = complete("scoring", tmp_path / "out")
    assert [sample["row_index"] for sample in samples] == [0, 0, 0, 1, 1]
    assert all(sample["cumulative_logprob"] < 0 for sample in samples)
    assert {sample["text"] for sample in samples} >= {" Rome.", " 56."}
    record = read_record(tmp_path / "out")
    assert record.prompts[0].text.endswith("What is the capital of Italy? The answer is") and record.per_token is not None
    facts = dict(record.facts)
    assert (facts["mode"], facts["continuations from column"]) == ("score", "continuations")
    assert record.per_token.of_texts.shape == (5,) and len(record.samples_shown["lowest"]) == 2


def test_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(said):
        runpy.run_path(str(ROOT / "jobs" / "run_in_python.py"), run_name="__main__")
    assert said.getvalue().startswith("6 samples, 0 errors\n0 ") and len(said.getvalue().splitlines()) == 7


@pytest.mark.parametrize("folder", [".", "jobs"])
def test_in_a_notebook(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jupyter starts it in the folder of the notebook."""
    (tmp_path / "jobs").mkdir()
    for name in ("quickstart", "quickstart.yaml"):
        (tmp_path / "jobs" / name).symlink_to(ROOT / "jobs" / name)
    monkeypatch.chdir(tmp_path / folder)
    cells = json.loads((ROOT / "jobs" / "notebook.ipynb").read_text())["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]).replace('"generation.n=4"', '"generation.n=2", "generation.max_tokens=8"'), names)
    assert names["summary"].ok == 16 and len(names["samples"]) == 16
    assert "<table>" in names["summary"]._repr_html_()


def _first_prompt(job: Job) -> str:
    return plan(job).first_prompt
