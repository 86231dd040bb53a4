"""The pages that users read: their jobs load, their links lead somewhere, and the commands and options they name exist."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer
import yaml

import tokabatch
from tokabatch import Job
from tokabatch.cli import app, main
from tokabatch.cli.plan import all_sections
from tokabatch.output.schema import REASONING_FIELDS, SAMPLE_SCHEMA, SCORE_FIELDS, VERDICT_FIELDS
from tokabatch.report import key_reference

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / name for name in ("README.md", "jobs/README.md", "jobs/operations.md", "tokabatch/README.md", "benchmarks/README.md")
]
COMMANDS = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_options_exist(page):
    for name, rest in re.findall(r"\btokabatch ([a-z]+)\b([^\n`#]*)", "\n".join(_code(page.read_text()))):
        assert name in COMMANDS, f"tokabatch {name}"
        known = {option for parameter in COMMANDS[name].params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {option for option in re.findall(r"--[a-z-]+", rest)} <= known, f"tokabatch {name}{rest}"


def test_files_of_the_map_exist():
    text = (ROOT / "tokabatch" / "README.md").read_text()
    named = re.findall(r"`([a-z_0-9/]+(?:\.py|/))`", text)
    rooms = re.findall(r"^\| `([a-z_/]+/)` \|", text, re.MULTILINE)
    places = [ROOT, ROOT / "tokabatch", *(ROOT / "tokabatch" / room for room in rooms)]
    assert len(named) > 40 and [name for name in named if not any((place / name).exists() for place in places)] == []


def test_jobs_load():
    jobs = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert [Job.load(yaml.safe_load(job)).generation.n for job in jobs] == [16]


def test_the_reference_of_keys_is_that_of_the_schema():
    text = (ROOT / "jobs" / "README.md").read_text()
    expected = key_reference.markdown(all_sections())
    remedy = "replace what stands under `## Every key` by the output of `tokabatch keys --markdown`"
    assert text.endswith(f"\n\n{expected}\n"), remedy


def test_the_table_of_output_columns_is_that_of_the_schema():
    text = (ROOT / "jobs" / "README.md").read_text()
    section = text[text.index("## Output columns") : text.index("## OpenAI's batch files")]
    fields = (*SAMPLE_SCHEMA, *SCORE_FIELDS, *REASONING_FIELDS, *VERDICT_FIELDS)
    types = {"list<struct>": "list<item: struct<logprob", "list<int32>": "list<item: int32"}
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| \S", section, re.MULTILINE)
    assert [name for name, _ in rows] == [field.name for field in fields]
    assert all(str(field.type).startswith(types.get(kind, kind)) for (_, kind), field in zip(rows, fields, strict=True))


def _code(text: str) -> list[str]:
    return re.findall(r"```bash\n(.*?)```", text, re.DOTALL) + re.findall(r"`(tokabatch [^`]+)`", text)


def test_the_readme_s_first_job_runs_as_it_is_written(tmp_path, monkeypatch, capsys):
    """Its commands one after another and its Python, on the quickstart's model and a few rows of its problems."""
    text = (ROOT / "README.md").read_text()
    section = text[text.index("## A first job") : text.index("## What it does")]
    (job,), (commands,), (program,) = (
        re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL) for language in ("yaml", "bash", "python")
    )
    monkeypatch.chdir(tmp_path)
    named = Path("Qwen/Qwen2.5-0.5B-Instruct")
    assert str(named) in job
    named.parent.mkdir()
    named.symlink_to(ROOT / "jobs" / "quickstart")
    Path("job.yaml").write_text(job.replace("max_tokens: 1024", "max_tokens: 8"))
    problems = (ROOT / "jobs" / "quickstart" / "problems.jsonl").read_text().splitlines(keepends=True)
    Path("problems.jsonl").write_text("".join(problems[:2]))
    Path("judge.py").write_text("def verify(text, row):\n    return row['answer'] in text\n")
    said = {}
    for command in map(shlex.split, (line.partition("#")[0] for line in commands.splitlines())):
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0, capsys.readouterr().err
        said.setdefault(command[1], []).append(capsys.readouterr().out)
    assert "First prompt" in said["plan"][0] and "32 = 32 ok" in said["run"][0] and "128 = 128 ok" in said["run"][1]
    assert "complete" in said["status"][0] and "no error rows" in said["errors"][0] and "generation.n" in said["keys"][0]
    names = {}
    exec(program, names)
    assert len(names["samples"]) == 128
    in_python = re.search(r"From Python: `(.*?)`", section)
    assert in_python is not None
    exec(in_python[1], names)
    assert names["summary"].ok == 128 and 1 in names["summary"].pass_at_k and names["summary"].dataset().count_rows() == 128


def test_the_python_of_the_page_of_jobs_runs_as_it_is_written(tmp_path, monkeypatch, capsys):
    text = (ROOT / "jobs" / "README.md").read_text()
    section = text[text.index("## From Python") : text.index("## Rows")]
    (program,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    job = yaml.safe_load((ROOT / "jobs" / "quickstart.yaml").read_text())
    Path("jobs").symlink_to(ROOT / "jobs")
    job["input"]["limit"], job["generation"] = 2, {"n": 2, "max_tokens": 8}
    Path("job.yaml").write_text(yaml.safe_dump(job))
    names = {}
    exec(program, names)
    said = capsys.readouterr().out
    assert "First prompt" in said and "8 = 8 ok + 0 errors" in said and "0 8 0 0\n0.0\n" in said
    assert len(names["samples"]) == 8
    exec(program.replace('"generation.n=4"', '"generation.n=2"').replace("print(plan(job))", ""), names)
    assert re.search("nothing was computed: .*generation.n", capsys.readouterr().out, re.DOTALL)
    errors = re.findall(r"`(\w+Error|Stopped)`", section)
    assert len(errors) == 9 and all(hasattr(tokabatch, name) for name in errors)
    fields = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`[a-z].*?) \|", section, re.MULTILINE)))
    assert len(fields) > 20 and all(hasattr(names["summary"], name) for name in fields)


WORDS = {
    "OUT": "out",
    "JOB": "job.yaml",
    "JOB.yaml": "job.yaml",
    "MODEL": "jobs/quickstart",
    "SECTION": "generation",
    "out/gsm8k": "out",
}
ELSEWHERE = re.compile(
    r"tokabatch (serve|ping|run jobs/)|.*(\.\.\.|out/quickstart|out/problems| job\.yaml)|tokabatch [a-z]+( --[a-z]+)?$"
)
"""What tests of the server, the gallery and the first job run; and names of commands without what they are given."""


def test_the_other_commands_of_the_pages_run(tmp_path, monkeypatch, capsys):
    """On a small run of the quickstart, in the order of the pages."""
    monkeypatch.chdir(tmp_path)
    Path("jobs").symlink_to(ROOT / "jobs")
    job = yaml.safe_load((ROOT / "jobs" / "quickstart.yaml").read_text())
    job["input"]["limit"], job["generation"] = 2, {"n": 2, "max_tokens": 8}
    Path("job.yaml").write_text(yaml.safe_dump({**job, "output": {"path": "out"}}))
    body = {"model": "m", "prompt": "Question: 1 + 1?", "max_tokens": 4}
    Path("requests.jsonl").write_text(json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}))
    pages = [line.partition("#")[0].strip() for page in PAGES for code in _code(page.read_text()) for line in code.splitlines()]
    commands = [line for line in dict.fromkeys(pages) if line.startswith("tokabatch ") and not ELSEWHERE.match(line)]
    lines = [" ".join(WORDS.get(word, word) for word in line.split(" ")) for line in commands]
    export = "tokabatch export out --format openai --to results.jsonl"
    assert len(lines) > 8 and export in lines, lines
    lines[lines.index(export)] = export.replace(" out ", " results.jsonl.run ")
    for line in ("tokabatch run job.yaml --quiet", *sorted(lines, key=lambda line: line.split()[1] not in ("run", "batch"))):
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        try:
            main()
        except SystemExit as ended:
            assert ended.code in (0, None), (line, capsys.readouterr().err)
    assert Path("gsm8k.sbatch").exists() and Path("p.json").exists() and Path("out/report.html").exists()


def test_the_readme_says_how_to_get_and_install_it_in_under_a_thousand_words():
    text = (ROOT / "README.md").read_text()
    install = text[text.index("## Install") : text.index("## A first job")]
    assert len(text.split()) < 1000 and "git clone" in install and "CPU build" in install and "CUDA" in install
