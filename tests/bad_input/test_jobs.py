"""Each bad job is refused with exit code 2 before any worker starts, with a message that says what and where; `plan` and `run`
alike. Nothing is written, and no code of the model's folder runs."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from bad_input.jobs import BAD_JOBS
from support import tiny_models

from tokabatch import Job, plan, run
from tokabatch.errors import UsageError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.add_tokenizer(tiny_models.build("llama", tmp_path_factory.mktemp("models") / "llama"))


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("a worker was started")


@pytest.mark.parametrize("command", [run, plan], ids=["run", "plan"])
@pytest.mark.parametrize("bad", BAD_JOBS, ids=lambda bad: bad.name)
def test_refused(bad, command, model, tmp_path, monkeypatch):
    monkeypatch.setattr("tokabatch.runner.make_replica.ProcessExecutor", never)
    monkeypatch.setattr("tokabatch.runner.make_replica.InProcessExecutor", never)
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"id": i, "prompt": f"row {i}"}) + "\n" for i in range(3)))
    base: dict[str, Any] = {
        "model": {"path": str(tmp_path / "model")},
        "input": {"path": str(tmp_path / "rows.jsonl")},
        "generation": {"max_tokens": 3},
        "engine": {"device": "cpu"},
        "output": {"path": str(tmp_path / "out")},
    }
    if bad.name == "duplicate ids":
        base["input"]["id_column"] = "id"
    spoilt = bad.spoil(tmp_path)
    began = time.monotonic()
    with pytest.raises(UsageError) as refusal:
        if isinstance(spoilt, str):
            (tmp_path / "job.yaml").write_text(spoilt)
            command(Job.load(tmp_path / "job.yaml"))
        else:
            for section, values in (spoilt or {}).items():
                base[section] = {**base.get(section, {}), **values}
            command(Job.load(base))
    assert refusal.value.exit_code == 2
    assert re.search(bad.says, str(refusal.value)), str(refusal.value)
    assert time.monotonic() - began < 20
    assert not (tmp_path / "out").exists() and not (tmp_path / "RAN").exists()
