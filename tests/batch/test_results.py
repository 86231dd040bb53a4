"""A batch file answered by a model: the command killed and run again, and what its two files hold."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.forked_runs import ForkServer

from tokabatch import Job, run
from tokabatch.batch.job import batch_job
from tokabatch.batch.results import Written, describe, write_results
from tokabatch.cli import main
from tokabatch.errors import OutputError

ROOT = Path(__file__).parent.parent.parent
MODEL = str(ROOT / "jobs" / "quickstart")
TEMPLATE = "prompt.chat_template='{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:'"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def line(custom_id: str, url: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "gpt", **body}}


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def write(path: Path, *lines: dict[str, Any] | str) -> Path:
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_answers_of_both_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    requests = write(
        tmp_path / "requests.jsonl",
        line("texts", COMPLETIONS, prompt=["Sam has 3", "There are"], n=2, max_tokens=3, temperature=0.5, logprobs=2),
        line("ids", COMPLETIONS, prompt=[[5, 6, 7]], max_tokens=2, echo=True),
        line("chat", CHAT, messages=say("Name a fruit"), max_tokens=4, logprobs=True, top_logprobs=3, n=2),
        line("greedy", COMPLETIONS, prompt="Sam has 3", temperature=0),
        line("long", CHAT, messages=say("x"), max_tokens=10**6),
        line("field", CHAT, messages=say("x"), response_format={"type": "json_object"}),
        "not JSON",
    )
    results, errors = tmp_path / "results.jsonl", tmp_path / "results.errors.jsonl"
    job = batch_job(str(requests), MODEL, results, None, (TEMPLATE, "output.rows_per_shard=3"))
    summary = run(job)
    assert (summary.ok, summary.errors, summary.exit_code) == (8, 3, 3)
    written = write_results(Path(job.output.path), results)
    told = describe(written, results)
    assert f"{results}: 4 results; {errors}: 3 errors" in told and "5 requests name the model 'gpt'" in told
    good = {each["custom_id"]: each for each in read(results)}
    assert list(good) == ["texts", "ids", "chat", "greedy"]
    bodies = {name: each["response"]["body"] for name, each in good.items()}
    assert {each["response"]["status_code"] for each in good.values()} == {200}
    texts = bodies["texts"]
    assert [choice["index"] for choice in texts["choices"]] == [0, 1, 2, 3] and texts["model"] == MODEL
    for choice in texts["choices"]:
        logprobs = choice["logprobs"]
        assert "".join(logprobs["tokens"]) == choice["text"] and len(logprobs["token_logprobs"]) == 3
        assert all(2 <= len(top) <= 3 for top in logprobs["top_logprobs"])
    assert texts["usage"]["completion_tokens"] == 12 and texts["usage"]["prompt_tokens"] > 4
    assert bodies["ids"]["usage"] == {**bodies["ids"]["usage"], "prompt_tokens": 3, "completion_tokens": 2}
    chat = bodies["chat"]
    assert chat["object"] == "chat.completion" and len(chat["choices"]) == 2
    first = chat["choices"][0]
    assert first["message"]["role"] == "assistant" and first["finish_reason"] in ("stop", "length")
    tokens = [token for choice in chat["choices"] for token in choice["logprobs"]["content"]]
    assert len(tokens) == chat["usage"]["completion_tokens"] and {len(token["top_logprobs"]) for token in tokens} == {3}
    bad = read(errors)
    assert [each["custom_id"] for each in bad] == ["long", "field", None]
    faults = [each["response"]["body"]["error"] for each in bad]
    assert [
        (each["response"]["status_code"], fault["param"], fault["code"]) for each, fault in zip(bad, faults, strict=True)
    ] == [
        (400, "messages", "context_length_exceeded"),
        (400, "response_format", "unsupported_parameter"),
        (400, None, "invalid_json"),
    ]
    assert "requests.jsonl line 7" in faults[2]["message"] and len({each["id"] for each in (*bad, *good.values())}) == 7
    # Written again they are the same, wherever they go.
    apart = tmp_path / "apart"
    apart.mkdir()
    options = ["--format", "openai", "--to", str(tmp_path / "again.jsonl"), "--errors", str(apart / "bad.jsonl")]
    monkeypatch.setattr(sys, "argv", ["tokabatch", "export", job.output.path, *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0 and "4 results" in capsys.readouterr().out
    assert (tmp_path / "again.jsonl").read_bytes() == results.read_bytes()
    assert (apart / "bad.jsonl").read_bytes() == errors.read_bytes() and len(list(apart.iterdir())) == 1
    for wrong, told in (
        (["--nested"], "--nested, --columns and --where"),
        (["--columns", "text"], "--nested, --columns and --where"),
    ):
        monkeypatch.setattr(sys, "argv", ["tokabatch", "export", job.output.path, *options, *wrong])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2 and told in capsys.readouterr().err
    with pytest.raises(OutputError, match=r"--errors .*results\.jsonl is the file of the results"):
        write_results(Path(job.output.path), results, results)
    with pytest.raises(OutputError, match=r"name a file that ends in \.jsonl$"):
        batch_job(str(requests), MODEL, tmp_path / "results.csv")
    with pytest.raises(
        OutputError, match=r"--errors .*requests\.jsonl is or would be one of the files that the job reads \(input\.path "
    ):
        write_results(Path(job.output.path), results, requests)
    for given in (requests, tmp_path / "req*.jsonl"):
        with pytest.raises(
            OutputError,
            match=r"--to .* is or would be one of the files that the job reads .*; name a file elsewhere",
        ):
            batch_job(str(given), MODEL, requests, tmp_path / "bad.jsonl")
    assert batch_job(str(requests), MODEL, results).input.path == str(requests)


def test_counts_of_one_are_in_the_singular(tmp_path: Path) -> None:
    one = describe(Written(1, 1, 1, "ours", Counter(gpt=1)), tmp_path / "r.jsonl")
    assert "r.jsonl: 1 result; " in one and "r.errors.jsonl: 1 error\n" in one and "1 sample is not computed yet" in one
    assert "1 request names the model 'gpt'; ours answered it" in one
    none = describe(Written(0, 2_000, 2, "ours", Counter(gpt=3)), tmp_path / "r.jsonl")
    assert "0 results; " in none and "2,000 errors\n" in none and "2 samples are not" in none and "3 requests name" in none


def test_other_runs_have_no_results_files(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", {"prompt": "a"})
    sections = {"model": {"path": MODEL}, "input": {"path": str(rows)}, "output": {"path": str(tmp_path / "out")}}
    run(Job.load(sections, "generation.max_tokens=2"))
    with pytest.raises(OutputError, match=r"holds no run of an OpenAI batch file \(its samples have no column custom_id\)"):
        write_results(tmp_path / "out", tmp_path / "results.jsonl")
    assert not (tmp_path / "results.jsonl").exists()


def test_a_changed_batch_file_is_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    requests, results = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"

    def answer(*options: str) -> tuple[object, str]:
        command = ["tokabatch", "batch", str(requests), "--model", MODEL, "--to", str(results), "-q", *options]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, "".join(capsys.readouterr())

    write(requests, line("a", COMPLETIONS, prompt="Sam has 3", max_tokens=2))
    assert answer()[0] == 0
    write(requests, line("a", COMPLETIONS, prompt="Sam has 3", max_tokens=3))
    code, said = answer()
    assert code == 2 and "requests.jsonl line 1" in said and "--overwrite" in said
    assert answer("--overwrite")[0] == 0
    assert read(results)[0]["response"]["body"]["usage"]["completion_tokens"] == 3


def test_a_request_that_is_not_complete_is_in_neither_file(tmp_path: Path) -> None:
    lines = [line(f"r{i}", COMPLETIONS, prompt=[f"Sam has {i}", f"There are {i}"], n=2, max_tokens=1 + i) for i in range(12)]
    results = tmp_path / "results.jsonl"
    requests = write(tmp_path / "requests.jsonl", *lines)
    job = batch_job(str(requests), MODEL, results, None, ("engine.max_running=4", "generation.ignore_eos=true"))
    polls = iter(range(10**6))
    summary = run(job, None, lambda: next(polls) > 25)
    assert summary.exit_code in (75, 130) and 0 < summary.ok < 48
    written = write_results(Path(job.output.path), results)
    assert written.pending == 48 - summary.ok and 0 < written.results < 12 and written.errors == 0
    assert all(len(each["response"]["body"]["choices"]) == 4 for each in read(results))
    assert "not computed yet" in describe(written, results)
    assert run(job).exit_code == 0 and write_results(Path(job.output.path), results).results == 12


@pytest.mark.crash
def test_killed_twice_and_run_again_each_request_is_in_one_of_the_files(tmp_path: Path) -> None:
    """The engine is scripted, all else is the real thing."""
    lines: list[dict[str, Any]] = [
        line(f"r{number}", CHAT, messages=say(f"Count {number}"), max_tokens=12)
        if number % 2
        else line(f"r{number}", COMPLETIONS, prompt=f"Sam has {number}", max_tokens=12)
        for number in range(200)
    ]
    for number in range(10, 200, 40):
        lines[number]["body"]["reasoning_effort"] = "high"
    requests, results = write(tmp_path / "requests.jsonl", *lines), tmp_path / "results.jsonl"
    keys = (TEMPLATE, "output.flush_seconds=0.1", "engine.max_running=4", "engine.device=cpu", "errors.max_fraction=0.1")
    job = batch_job(str(requests), MODEL, results, None, keys)
    shards = Path(job.output.path) / "data"
    server, counts = ForkServer(tmp_path / "server.log"), list[int]()
    try:
        for kill in range(2):
            group = server.start(job.given(), step_seconds=0.004)
            ends = time.monotonic() + 60
            while len(list(shards.glob("part-*.parquet"))) < 2 * kill + 2 and time.monotonic() < ends:
                time.sleep(0.01)
            os.killpg(group, signal.SIGKILL)
            assert server.wait().signal == signal.SIGKILL
            counts.append(len(list(shards.glob("part-*.parquet"))))
        assert 2 <= counts[0] < counts[1]
        partly = write_results(Path(job.output.path), results)
        assert 0 < partly.results < 195 and partly.pending > 0
        ended = server.run(job.given())
        assert ended.code == 0, ended
    finally:
        server.close()
    written = write_results(Path(job.output.path), results)
    assert (written.results, written.errors, written.pending) == (195, 5, 0)
    good, bad = read(results), read(tmp_path / "results.errors.jsonl")
    assert Counter(each["custom_id"] for each in (*good, *bad)) == Counter(f"r{number}" for number in range(200))
    assert [each["custom_id"] for each in bad] == [f"r{number}" for number in range(10, 200, 40)]
    assert all(each["response"]["body"]["choices"][0]["finish_reason"] for each in good)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"requests.jsonl", "results.errors.jsonl", "results.jsonl", "results.jsonl.run", "server.log"}
