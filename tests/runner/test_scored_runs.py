"""Runs that score given texts: rows in, one row of figures out for each continuation, against transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support import tiny_models
from support.double_precision import load_double
from transformers import AutoTokenizer

from tokabatch import Job, plan, run
from tokabatch.errors import JobError, OutputError

ROWS: list[dict[str, Any]] = [
    {"prompt": "Once upon a time", "continuations": [" there was", " a", "<eos>"]},
    {"prompt": "Once upon a day ", "continuations": ["x"]},
    {"prompt": "The whole of this text is scored"},
    {"prompt": "Once upon", "continuations": [[5, 6, 7], [2]]},
    {"prompt": "Once", "continuations": []},
    {"prompt": "Once", "continuations": ["a", ""]},
    {"prompt": "Once", "continuations": [[97]]},
    {"prompt": "O"},
    {"prompt_token_ids": [10, 11, 12], "continuations": [[13, 14]]},
    {"prompt": "<eos>ends", "continuations": ["."]},
]
BAD = {4: "must hold a list of non-empty texts", 5: "must hold a list", 6: "token ids below 97", 7: "one token alone"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.add_tokenizer(tiny_models.build("llama", tmp_path_factory.mktemp("models") / "llama"))


def job(model: Path, folder: Path, rows: list[dict[str, Any]] = ROWS, **changes: Any) -> Job:
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Job.load(
        {
            "mode": "score",
            "model": {"path": str(model), "dtype": "float64"},
            "input": {"path": str(source)},
            "engine": {"device": "cpu", "page_size": 4},
            "output": {"path": str(folder / "out")},
            "errors": {"max_fraction": 1.0},
            **changes,
        }
    )


def samples(folder: Path) -> dict[tuple[int, int], dict[str, Any]]:
    table = pa.concat_tables(pq.read_table(shard) for shard in sorted((folder / "out" / "data").glob("*.parquet")))
    return {(row["row_index"], row["sample_index"]): row for row in table.to_pylist()}


def wanted(model: Path) -> dict[tuple[int, int], tuple[list[int], list[int]]]:
    """Prompt and given token ids of each text; a plain prompt's last spaces go in front of what follows."""
    encode = AutoTokenizer.from_pretrained(model).encode
    e = [3 + 1 + ord(char) - 32 for char in "<eos>"]
    return {
        (0, 0): (encode("Once upon a time"), encode(" there was")),
        (0, 1): (encode("Once upon a time"), encode(" a")),
        (0, 2): (encode("Once upon a time"), e),
        (1, 0): (encode("Once upon a day"), encode(" x")),
        (2, 0): (encode("T"), encode("he whole of this text is scored")),
        (3, 0): (encode("Once upon"), [5, 6, 7]),
        (3, 1): (encode("Once upon"), [2]),
        (8, 0): ([10, 11, 12], [13, 14]),
        # What a row spells of special tokens is text.
        (9, 0): ([*e, *encode("ends")], encode(".")),
    }


def test_each_continuation_is_a_row_with_its_figures(model: Path, tmp_path: Path) -> None:
    summary = run(job(model, tmp_path, generation={"logprobs": 0}))
    found, reference = samples(tmp_path), load_double(model)
    assert {row: each["error_message"] for (row, _), each in found.items() if each["status"] == "error"}.keys() == BAD.keys()
    for row, told in BAD.items():
        assert found[row, 0]["error_code"] == "bad_continuations" and told in found[row, 0]["error_message"]
    good = {key: each for key, each in found.items() if each["status"] == "ok"}
    assert good.keys() == wanted(model).keys()
    for key, (prompt, given) in wanted(model).items():
        each = good[key]
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + given])).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(given)[:, None])[:, 0]
        assert (each["token_ids"], each["num_output_tokens"]) == (given, len(given))
        assert (each["num_prompt_tokens"], each["finish_reason"], each["stop_reason"]) == (len(prompt), "scored", None)
        assert abs(each["cumulative_logprob"] - float(logprobs.sum())) < 1e-9
        assert each["perplexity"] == pytest.approx(math.exp(-float(logprobs.mean())), rel=1e-12)
        assert each["is_greedy"] == bool((logits.argmax(-1) == torch.tensor(given)).all())
        assert [token["logprob"] for token in each["logprobs"]] == pytest.approx(logprobs.tolist(), rel=1e-6)
    texts = {key: each["text"] for key, each in good.items()}
    assert (texts[0, 0], texts[1, 0], texts[9, 0]) == (" there was", " x", ".")
    assert texts[2, 0] == "The whole of this text is scored"
    assert (summary.ok, summary.errors, summary.output_tokens) == (9, 4, sum(len(given) for _, given in wanted(model).values()))


def test_a_run_goes_on_where_it_was_and_only_as_the_same_job(model: Path, tmp_path: Path) -> None:
    run(job(model, tmp_path))
    assert all(each["logprobs"] is None for each in samples(tmp_path).values())
    more = [*ROWS, {"prompt": "Once", "continuations": [" more", " less"]}]
    assert run(job(model, tmp_path, more)).earlier == 13
    assert samples(tmp_path)[10, 1]["status"] == "ok"
    other = [dict(row) for row in more]
    other[0]["continuations"] = [" there is", " a", "<eos>"]
    with pytest.raises(OutputError, match="row 0"):
        run(job(model, tmp_path, other))
    with pytest.raises(OutputError, match=r"job\.mode: \"score\" then, absent now"):
        run(job(model, tmp_path, more, mode="generate"))


def interrupt(*given: Any) -> None:
    raise KeyboardInterrupt


def test_a_start_takes_over_what_was_tokenised(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Row {number} says", "continuations": [" this", f" that {number}"]} for number in range(40)]
    (tmp_path / "whole").mkdir()
    run(job(model, tmp_path / "whole", rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokabatch.runner.recorder.Recorder.add", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(job(model, tmp_path, rows))
    assert (tmp_path / "out" / "_input").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokabatch.workload.prepare.ingest", None)
        run(job(model, tmp_path, rows))
    ours, theirs = samples(tmp_path), samples(tmp_path / "whole")
    assert {key: each["cumulative_logprob"] for key, each in ours.items()} == {
        key: each["cumulative_logprob"] for key, each in theirs.items()
    }


def test_a_plan_counts_and_says_that_whole_texts_are_scored(model: Path, tmp_path: Path) -> None:
    whole = job(model, tmp_path, [{"prompt": "A text of its own"}, {"prompt": "and another"}])
    report = plan(Job.load(whole.to_dict()))
    assert report.samples == 2 and report.max_output_tokens == 26
    assert any("no column 'continuations' (prompt.continuations): each row's whole text" in note for note in report.notes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"generation": {"temperature": 0.5, "n": 2}},
            "these have no effect: n, temperature; remove them",
        ),
        ({"generation": {"logprobs": 3}}, "generation: logprobs is 3; mode: score reports given tokens alone: write 0"),
        ({"verify": {"kind": "regex", "stop": {"after_correct": 1}}}, "verify: has `stop`, which has no effect in mode: score"),
        ({"mode": "rank"}, "mode: got the text rank; accepts one of generate, score"),
    ],
)
def test_what_does_not_go_with_scoring_is_refused(model: Path, tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(JobError) as refused:
        job(model, tmp_path, **changes)
    assert told in str(refused.value)


def test_several_replicas_and_a_worker_apart_give_the_same(model: Path, tmp_path: Path) -> None:
    run(job(model, tmp_path))
    (tmp_path / "two").mkdir()
    run(job(model, tmp_path / "two", engine={"device": "cpu", "page_size": 8, "replicas": 2, "max_running": 3}))
    ours, theirs = samples(tmp_path), samples(tmp_path / "two")
    assert ours.keys() == theirs.keys()
    for key, each in ours.items():
        assert (each["error_code"], each["is_greedy"]) == (theirs[key]["error_code"], theirs[key]["is_greedy"])
        assert each["cumulative_logprob"] == pytest.approx(theirs[key]["cumulative_logprob"], abs=1e-9)


def test_choices_by_likelihood(model: Path, tmp_path: Path) -> None:
    """The most likely continuation is the row's choice; what was computed by two replicas, or by ranks, is the same."""
    options = [" there was", " a b", " B is odd", " b a"]
    rows: list[dict[str, Any]] = [{"prompt": f"Once upon {i}", "options": options[i % 3 :], "answer": i % 2} for i in range(9)]
    rows += [
        {"prompt": "Letters", "options": [" C", " A", " B"], "answer": 1},
        {"prompt": "Once", "options": [], "answer": 0},
    ]
    sections: dict[str, Any] = {
        "prompt": {"continuations": "options"},
        "verify": {"kind": "choice", "answer": "answer", "options": {"choices": "options"}},
    }
    found: list[tuple[dict[tuple[int, int], dict[str, Any]], Any]] = []
    for engine in ({}, {"replicas": 2}, {"tensor": 2}):
        folder = tmp_path / str(engine)
        folder.mkdir()
        summary = run(job(model, folder, rows, **sections, engine={"device": "cpu", "page_size": 4, **engine}))
        found.append((samples(folder), {each.name: each.value for each in summary.estimates}))
    (first, estimates), *others = found
    for (row, number), each in first.items():
        assert row == 10 or each["correct"] == (number == (rows[row]["answer"] if row < 9 else 1)), each
    chosen = {
        name: [
            max(
                range(len(rows[row]["options"])),
                key=lambda i: first[row, i]["cumulative_logprob"] / size(rows[row]["options"][i]),
            )
            for row in range(10)
        ]
        for name, size in (("accuracy", lambda text: 1), ("normalized accuracy", lambda text: len(text.strip())))
    }
    for name, choices in chosen.items():
        right = sum(choice == (1 if row == 9 else rows[row]["answer"]) for row, choice in enumerate(choices))
        assert estimates[name] == pytest.approx(right / 11), name
    for other, figures in others:
        assert figures == estimates and other.keys() == first.keys()
        for key, each in other.items():
            # The file of the rows is another one; what was there already depends on who computed it.
            varying = dict.fromkeys(("cumulative_logprob", "perplexity", "num_cached_tokens", "error_message"))
            assert {**each, **varying} == {**first[key], **varying}
            if each["status"] == "ok":
                assert abs(each["cumulative_logprob"] - first[key]["cumulative_logprob"]) < 1e-9
