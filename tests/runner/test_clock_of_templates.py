"""A chat template that reads the clock sees the run's first start, however often the run is continued."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from support import tiny_models

from tokabatch import Job, plan, run
from tokabatch.input.tokenizer.tokenizer import Tokenizer

CLOCK = "{{ strftime_now('%d %H:%M:%S') }} {% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[datetime]:
    """What each prompt's clock showed."""
    times: list[datetime] = []
    apply = Tokenizer.apply_chat_template

    def noted(self: Any, messages: Any, template: str, variables: Any, now: datetime, *rest: Any) -> Any:
        times.append(now)
        return apply(self, messages, template, variables, now, *rest)

    monkeypatch.setattr(Tokenizer, "apply_chat_template", noted)
    return times


def test_a_chat_template_sees_the_first_start(tmp_path: Path, seen: list[datetime]) -> None:
    model = tiny_models.add_tokenizer(tiny_models.build("llama", tmp_path / "model"), CLOCK)
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"

    def job(*questions: str | None, n: int = 2) -> Job:
        rows.write_text("".join(json.dumps({"prompt": each}) + "\n" for each in questions))
        given = {"model": {"path": str(model)}, "input": {"path": str(rows)}, "output": {"path": str(out)}}
        return Job.load(
            given
            | {"generation": {"n": n, "max_tokens": 3, "seed": 1}, "engine": {"device": "cpu"}, "errors": {"max_fraction": 1.0}}
        )

    asked: list[None] = []
    assert run(job("a", None), should_stop=lambda: asked.append(None) or len(asked) > 1).exit_code == 130
    first = datetime.fromisoformat(json.loads((out / "manifest.json").read_text())["started"]).replace(tzinfo=None)
    assert abs((datetime.now() - first).total_seconds()) < 60
    time.sleep(1.1)
    shown = plan(job("a", None)).first_prompt
    assert shown == f"{first:%d %H:%M:%S} a"
    assert run(job("a", None)).ok == 2
    assert run(job("a", None, "c")).ok == 4
    assert run(job("a", None, "c", n=3)).ok == 6
    assert run(job("a", "b", "c", n=3), retry_errors=True).ok == 9
    assert len(seen) > 5 and set(seen) == {first}
    assert plan(job("a", "b", "c", n=3)).first_prompt == shown
    run(job("a", "b", "c", n=3), overwrite=True)
    assert seen[-1] > first


def test_a_run_that_takes_the_place_of_error_rows_alone_has_a_clock_of_its_own(tmp_path: Path, seen: list[datetime]) -> None:
    model = tiny_models.add_tokenizer(tiny_models.build("llama", tmp_path / "model"), CLOCK)
    rows, manifest = tmp_path / "rows.jsonl", tmp_path / "out" / "manifest.json"
    rows.write_text('{"prompt": "a"}\n')
    given = {"model": {"path": str(model)}, "input": {"path": str(rows)}, "output": {"path": str(manifest.parent)}}
    given |= {"generation": {"max_tokens": 3}, "engine": {"device": "cpu"}, "errors": {"max_fraction": 1.0}}
    fault = Job.load(given, "prompt.template={{ prompt.no_such_field }}")
    assert run(fault).ok == 0
    then = json.loads(manifest.read_text())["started"]
    time.sleep(1.1)
    plan(Job.load(given))
    assert run(Job.load(given)).ok == 1
    started = json.loads(manifest.read_text())["started"]
    assert started > then
    first = datetime.fromisoformat(then).replace(tzinfo=None)
    assert len(seen) >= 2 and min(seen) > first and seen[-1] == datetime.fromisoformat(started).replace(tzinfo=None)
