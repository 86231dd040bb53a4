"""Mistakes of a first hour: each ends in a message that says what to write instead, without a traceback, and writes nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tokabatch import cli

ROOT = Path(__file__).parent.parent
Q = "jobs/quickstart.yaml"
JOB = "model: {path: jobs/quickstart}\ninput: {path: jobs/quickstart/problems.jsonl}\n"
FILES = {
    "array.jsonl": '[{"question": "a"}]\n',
    "data.csv": "question,answer\na,1\n",
    "data.json": json.dumps([{"question": "a"}]),
    "tabs.yaml": "model:\n\tpath: m\n",
    "list.yaml": "- model\n",
    "jinja.yaml": "model: {path: m}\ninput: {path: x}\noutput: {path: o}\nprompt:\n  template: {{ question }}\n",
    "twice.yaml": "model: {path: m}\nmodel: {path: n}\ninput: {path: x}\noutput: {path: o}\n",
    "empty.yaml": "",
    "typo.yaml": f"{JOB}prompt: {{chat: false,\n  template: '{{{{ qestion }}}}'}}\noutput: {{path: o}}\n",
    "curly.yaml": f"{JOB}prompt: {{template: '{{{{ a }}'}}\noutput: {{path: o}}\n",
    "long.jsonl": '{"a": 1}\n' * 3000,
    "rows.jsonl": '{"question": "a", "answer": "1"}\n',
    "model/config.json": '{"model_type": "mamba"}',
    "nothing/readme.txt": "",
}
MISTAKES = [
    (("run",), "JOB.yaml is missing; for example `tokabatch run jobs/quickstart.yaml`"),
    (("run", "nope.yaml"), "no such file"),
    (("run", "."), "is a folder; name the job file inside it"),
    (("run", "rows.jsonl"), "plain text|not valid YAML|a job file is a mapping|unknown key"),
    (("run", "tabs.yaml"), "indent with spaces, not tabs"),
    (("run", "list.yaml"), "holds a list; a job file is a mapping of sections"),
    (("run", "empty.yaml"), "holds nothing; a job file is a mapping of sections"),
    (("run", "jinja.yaml"), "quote"),
    (("run", "twice.yaml"), "given twice, first on line 1; keep one"),
    (("run", Q, "--generation.n=4"), r"written without dashes: generation\.n=4"),
    (("run", Q, "generation.n", "4"), r"write key=value, for example generation\.n=4"),
    (("run", Q, "n=4"), r"did you mean `generation\.n=4`\?"),
    (("run", Q, "generation.n=four"), r"accepts a whole number.*for example `generation\.n=4`"),
    (("run", Q, "generation.n=0"), "accepts a whole number from 1"),
    (("run", Q, "generation.temperature=-1"), "accepts a finite number >= 0"),
    (("run", Q, "generation.top_p=2"), "accepts a number above 0 and at most 1"),
    (("run", Q, "generation.max_tokens=1.5"), "accepts a whole number"),
    (("run", Q, "generation.stop=[a"), "close every quote and bracket"),
    (("run", Q, "engine.device=gpu"), "accepts one of auto, cpu, cuda"),
    (("run", Q, "model.dtype=fp16"), "accepts one of auto, float64, float32, bfloat16, float16"),
    (("run", Q, "verify.kind=gsm"), r"did you mean `gsm8k`\?"),
    (("run", Q, "verify.answer=reslt"), "answer"),
    (("run", Q, "prompt.messages=messages"), "keep one, remove the rest"),
    (("run", Q, "prompt.template={{ qestion }}"), r"did you mean 'question'\?"),
    (("run", "typo.yaml"), r"typo\.yaml:4: prompt\.template: the input has no column qestion \(did you mean 'question'\?\)"),
    (("run", "curly.yaml"), r"curly\.yaml:3: prompt\.template is no valid Jinja template: line 1: unexpected '}'"),
    (("run", Q, "input.path=data.csv"), "`input.path=data.csv`: .*pandas|jsonl"),
    (("run", Q, "prompt.few_shot={path:x}"), "write a space behind the colon: `path: x`"),
    (("run", Q, "verify.kind=./judge.py"), r"there is no file judge\.py in /.*; check the path"),
    (("run", Q, "model.path=models/mine"), r"no such folder in /.*not in the hub cache.*tokabatch download"),
    (
        ("run", Q, "input.path=long.jsonl"),
        r"the first 1,024 rows have no column question; their columns are a\. If later rows have it, put",
    ),
    (("run", Q, "input.path=data.json"), "jq|jsonl"),
    (("run", Q, "input.path=nothing"), r"holds no \.jsonl or \.parquet file"),
    (("run", Q, "input.path=rows.json"), r"does not exist"),
    (("run", Q, "input.path=s3://bucket/rows.jsonl"), "`pip install s3fs`"),
    (("run", Q, "input.path=https://example.org/rows.jsonl"), "`pip install aiohttp requests`"),
    (("run", Q, "model.path=model"), "llama.*qwen2.*qwen3|mamba"),
    (("run", Q, "model.path=nothing"), "config.json"),
    (("run", Q, "output.columns=[qestion]"), r"did you mean 'question'\?"),
    (("run", Q, "output.path=rows.jsonl"), "Choose another output.path"),
    (("run", Q, "output.path=/proc/nowhere/out"), r"no folder can be created in /proc \(.*Choose another output.path"),
    (
        ("run", Q, "prompt.template={% if context %}{{ context }}{% endif %}{{ qestion }}"),
        r"no column context, qestion \(did you mean 'question'\?\); .* for an optional column write {{ context \| default",
    ),
    (("run", Q, "model.path=./mine"), r"\./mine: no such folder \(looked in /.*hub id like"),
    (("plan", Q, "engine.kv_cache_tokens=8"), r"engine\.kv_cache_tokens allows 8; set engine\.kv_cache_tokens to at least \d+"),
    (("run", Q, "input.path=nothing", "output.path=nothing/out"), "choose an output.path outside of that folder"),
    (("plan", Q, "--device", "h200"), "belong to --simulate; add it"),
    (("plan", Q, "--simulate", "--device", "b300"), "h200"),
    (("plan", Q, "--simulate", "--lengths", "long"), "write max, MEAN, MEAN:SIGMA"),
    (("keys", "sampling"), "there is no section or key sampling; (did you mean|there are)"),
    (("status", "nothing"), "no run has written here; give the folder that the job names as output.path"),
    (("errors", "out"), "no run has written here; give the folder"),
    (("export", "nothing", "--to", "a.jsonl"), "holds no committed samples"),
    (("export", "nothing", "--to", "a.xlsx"), r"ends in \.jsonl, \.csv or \.parquet, or - for standard output"),
    (("export", "nothing", "--to", "a.jsonl", "--where", "right"), "accepts correct, wrong, ok, error or cancelled"),
    (("report", "nothing"), "no run has written here"),
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.mark.parametrize(("arguments", "remedy"), MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_the_message_says_what_to_do(
    arguments: tuple[str, ...], remedy: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(here.rglob("*"))
    quiet = ("--quiet",) if arguments[0] == "run" and len(arguments) > 1 else ()
    monkeypatch.setattr(sys, "argv", ["tokabatch", *arguments, *quiet])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, ""), said
    assert "Traceback" not in said.err and re.search(remedy, said.err, re.DOTALL), said.err
    assert sorted(here.rglob("*")) == before


SLOW = ("torch", "transformers", "tokenizers")
EARLY = ("input.path", "model.path", "prompt.template", "prompt.few_shot", "output.", "verify.", "engine.device", ".yaml")


def test_what_the_job_and_its_first_rows_show_is_refused_before_anything_slow_is_imported(here: Path) -> None:
    early = [arguments for arguments, _ in MISTAKES if arguments[0] == "run" and any(k in " ".join(arguments) for k in EARLY)]
    program = f"""
import sys
from tokabatch import cli
for arguments in {early!r}:
    sys.argv = ["tokabatch", *arguments]
    try:
        cli.main()
    except SystemExit as ended:
        assert ended.code == 2, arguments
    assert not set({SLOW!r}) & sys.modules.keys(), arguments
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=here, capture_output=True, text=True, check=False)
    assert ended.returncode == 0 and len(early) > 20, ended.stderr
