"""OpenAI's batch files as rows: their settings, faults, ids and prompts."""

from __future__ import annotations

import json

import pytest

from tokabatch.errors import InputError, JobError
from tokabatch.input.batch_files import settle_format
from tokabatch.job import Job

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "Hello"}]


def line(custom_id, url=COMPLETIONS, **body):
    given = {"model": "m", **({"messages": USER} if url == CHAT else {"prompt": "fox"}), **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": given}


def test_lines_of_both_urls_are_rows_with_their_settings(ingest_job, write_rows, texts, tokenizers):
    path = write_rows(
        line("a", n=2, temperature=0, max_tokens=5, stop=["x"]),
        line("b", CHAT, max_completion_tokens=7, seed=3, logprobs=True, top_logprobs=2),
        line("c", prompt=["the quick", "brown", [70, 71]], echo=True),
        {**line("d", CHAT), "answer": "12"},
        line("e", prompt="<|start|>user"),
        line("f", CHAT, messages=[{"role": "user", "content": "<|end|>"}]),
    )
    store = ingest_job(path, tokenizer="bos_chat", context=100)
    bos = "<|bos|>"
    chat = f"{bos}<|start|>user\nHello<|end|>\n<|start|>assistant\n"
    of_ids = tokenizers["bos_chat"].decode_batch([[70, 71]])[0]
    prompts = texts(store, "bos_chat")
    assert prompts[:6] == [f"{bos}fox", chat, f"{bos}the quick", f"{bos}brown", of_ids, chat]
    assert store.ids(range(8)).to_pylist() == ["a", "b", "c", "c[1]", "c[2]", "d", "e", "f"]
    # A client's plain prompt may spell special tokens; what a message spells is text.
    specials = [set(tokenizers["bos_chat"].special_by_id) & set(store.prompt(row).tolist()) for row in (6, 7)]
    starts = [store.prompt(row).tolist().count(tokenizers["bos_chat"].encode_batch(["<|end|>"], False)[0][0]) for row in (6, 7)]
    assert len(specials[0]) == 2 and starts == [0, 1]
    first, second, third, *_, fifth, _, _ = (store.sampling[number] for number in store.params)
    assert (first.n, first.temperature, first.max_tokens, first.stop) == (2, 0, 5, ("x",))
    assert (second.max_tokens, second.seed, second.logprobs) == (7, 3, 2)
    assert third.max_tokens == 16 and fifth.max_tokens == 100 - len(store.prompt(5))
    columns = store.columns(range(8)).to_pylist()
    assert [row["custom_id"] for row in columns] == ["a", "b", "c", "c", "c", "d", "e", "f"]
    assert [row["prompt_index"] for row in columns] == [0, 0, 0, 1, 2, 0, 0, 0]
    assert [row["body"] is None for row in columns] == [False, False, False, True, True, False, False, False]
    assert json.loads(columns[1]["body"])["seed"] == 3 and columns[5]["answer"] == "12" and columns[0]["url"] == COMPLETIONS
    assert set(store.column_schema.names) == {"id", "custom_id", "url", "body", "prompt_index", "answer"}


def test_a_bad_line_is_an_error_row_that_says_where_it_stands(ingest_job, write_rows):
    path = write_rows(
        line("a"),
        b'{"custom_id": "b"',
        line("c", response_format={"type": "json_object"}),
        {**line("d"), "method": "GET"},
        {key: value for key, value in line("e").items() if key != "custom_id"},
        line("f", "/v1/embeddings"),
        line("g", echo=True, logprobs=1),
        line("h", CHAT, chat_template_kwargs={"tools": []}),
        line("i", CHAT, max_tokens=10_000),
        {"custom_id": "j", "url": COMPLETIONS},
        line("k", prompt=[10**6]),
    )
    store = ingest_job(path, tokenizer="chat", context=100)
    assert list(store.errors) == list(range(1, 11))
    codes = [error.code for error in store.errors.values()]
    assert codes == ["bad_json", *["bad_request"] * 6, "prompt_too_long", "bad_request", "bad_token_id"]
    for row, named in (
        (1, "character"),
        (2, "response_format"),
        (3, "method"),
        (4, "custom_id"),
        (5, "url"),
        (6, "echo"),
        (9, "body"),
    ):
        message = store.errors[row].message
        assert f"{path} line {row + 1} (byte " in message and named in message
    assert "custom_id 'c': " in store.errors[2].message and "chat_template_kwargs.tools" in store.errors[7].message
    kept = store.columns(range(11)).to_pylist()
    assert [row["custom_id"] for row in kept] == ["a", None, "c", "d", None, "f", "g", "h", "i", "j", "k"]
    assert store.ids([1, 2, 4]).to_pylist() == [None, "c", None]


def test_a_custom_id_that_occurs_twice_is_refused_with_both_lines(ingest_job, write_rows):
    path = write_rows(line("a", prompt=["x", "y"]), line("b"), line("b"), line("a"))
    with pytest.raises(InputError) as refused:
        ingest_job(path)
    assert str(refused.value) == (
        f"each custom_id must be unique, but some occur twice: 'b' ({path} line 2 and {path} line 3), "
        f"'a' ({path} line 1 and {path} line 4). Rename one of each pair."
    )


def test_the_first_readable_line_decides_the_format(write_rows, tmp_path):
    batch = write_rows(b"nonsense", line("a"), name="batch.jsonl")
    rows = write_rows({"custom_id": "a", "prompt": "x"}, line("b"), name="rows.jsonl")

    def settle(path, **more):
        return settle_format(Job.load({"model": {"path": "m"}, "output": {"path": "o"}, "input": {"path": str(path)}, **more}))

    found = settle(batch)
    assert (found.input.format, found.input.id_column, found.prompt.chat) == ("openai", "id", False)
    assert found.generation.max_tokens == "context" and settle_format(found) == found
    said = settle(
        batch, generation={"max_tokens": 9}, prompt={"chat": True}, input={"path": str(batch), "id_column": "custom_id"}
    )
    assert (said.generation.max_tokens, said.prompt.chat, said.input.id_column) == (9, True, "custom_id")
    assert settle(rows).input.format == "rows" and settle(rows).generation.max_tokens == 256
    assert settle(batch, input={"path": str(batch), "format": "rows"}).prompt.chat == "auto"
    other = write_rows({"prompt": "x"}, {"prompt": "y"}, name="other.jsonl")
    with pytest.raises(InputError, match=r"other\.jsonl' is not a batch file: none of its first 2 lines has custom_id, a url"):
        settle(other, input={"path": str(other), "format": "openai"})
    with pytest.raises(JobError, match=r"mode is score, but input\.path"):
        settle(batch, mode="score")
    (tmp_path / "rows.parquet").touch()
    with pytest.raises(InputError, match=r"input\.format is openai, but input\.path .*rows\.parquet' is not a \.jsonl"):
        settle(batch, input={"path": str(tmp_path / "rows.parquet"), "format": "openai"})


def test_a_file_of_bad_requests_alone_is_all_error_rows(ingest_job, write_rows):
    store = ingest_job(write_rows(line("a", n=0), line("b", n=0)), tokenizer="chat")
    assert store.num_rows == len(store.errors) == 2


def test_a_limit_takes_whole_requests_and_ids_of_further_prompts_are_unique(ingest_job, write_rows):
    lines = [line("a", prompt=["x", "y", "z"]), line("a[1]"), line("a[1][0]", prompt=["x", "y"]), line("b", prompt=["x", "y"])]
    path = write_rows(*lines)
    ids = ["a", "a[1]", "a[2]", "a[1][0]", "a[1][0][0]", "a[1][0][1]", "b", "b[1]"]
    for limit, rows in ((1, 3), (2, 4), (3, 6), (9, 8)):
        store = ingest_job(path, input={"path": str(path), "limit": limit})
        assert store.ids(range(store.num_rows)).to_pylist() == ids[:rows]


def test_tools_that_the_chat_template_does_not_read_are_an_error_of_the_request(ingest_job, write_rows):
    tool = {"type": "function", "function": {"name": "f"}}
    path = write_rows(line("a", CHAT, tools=[tool]), line("b", CHAT, documents=[{"text": "x"}]), line("c", CHAT, tools=[]))
    store = ingest_job(path, tokenizer="chat", context=100)
    assert {row: error.code for row, error in store.errors.items()} == {0: "unread_tools", 1: "unread_documents"}
    assert "leave tools out" in store.errors[0].message
