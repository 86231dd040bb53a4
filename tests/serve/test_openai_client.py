"""A server as openai-python sees it: typed answers, typed errors, what it repeats by itself, pages of lists."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support import tiny_models
from support.running_server import TEMPLATE, Server

openai = pytest.importorskip("openai", reason="needs openai (`pip install -e .[dev]`)")

HI = [{"role": "user", "content": "hi"}]
Client = Any
Call = Callable[[Client], Any]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    model = tiny_models.add_tokenizer(tiny_models.build("llama", folder / "model"), TEMPLATE)
    limits = ("server.max_body=64K", "server.max_file=64K", "server.max_waiting=24")
    started = Server(model, "server.api_key=secret", f"server.files={folder / 'files'}", *limits)
    started.client.headers["Authorization"] = "Bearer secret"
    yield started
    started.process.kill()
    started.process.wait()


def connect(server: Server, kind: str = "OpenAI", **options: Any) -> Client:
    options = {"api_key": "secret", "max_retries": 0, "timeout": 60, **options}
    return getattr(openai, kind)(base_url=f"{server.client.base_url}/v1", **options)


@pytest.fixture(scope="module")
def client(server: Server) -> Client:
    return connect(server)


def complete(client: Client, **given: Any) -> Any:
    return client.completions.create(**{"model": "tiny", "prompt": "hello", "max_tokens": 4, **given})


def chat(client: Client, **given: Any) -> Any:
    return client.chat.completions.create(**{"model": "tiny", "messages": HI, "max_tokens": 4, **given})


def upload(client: Client, *lines: dict[str, Any]) -> Any:
    content = "".join(json.dumps(each) + "\n" for each in lines).encode()
    return client.files.create(file=("asked.jsonl", content), purpose="batch")


def batch(client: Client, file: str, **given: Any) -> Any:
    return client.batches.create(**{"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h", **given})


def test_answers_have_the_fields_of_their_types(client: Client) -> None:
    plain = complete(client, prompt=["one", "two"], n=2, logprobs=2, seed=3)
    talk = chat(client, n=2, logprobs=True, top_logprobs=2, seed=3)
    assert len(plain.choices) == 4 and talk.choices[0].message.role == "assistant"
    for answer in (plain, talk):
        assert type(answer).model_validate_json(answer.model_dump_json(), strict=True) == answer
        assert not answer.model_extra and not answer.choices[0].model_extra and not answer.usage.model_extra
    (model,) = client.models.list()
    assert model.id == client.models.retrieve("tiny").id == "tiny"


def test_streams_and_company_give_the_same_text(server: Server, client: Client) -> None:
    asked = {"max_tokens": 30, "temperature": 1.0, "seed": 7}
    whole = complete(client, **asked)
    texts = [part.choices[0].text for part in complete(client, stream=True, **asked)]
    assert "".join(texts) == whole.choices[0].text
    talk, *parts = chat(client, **asked), *chat(client, stream=True, stream_options={"include_usage": True}, **asked)
    assert "".join(part.choices[0].delta.content or "" for part in parts[:-1]) == talk.choices[0].message.content
    assert parts[-1].choices == [] and parts[-1].usage.total_tokens == talk.usage.total_tokens

    async def crowd() -> list[str]:
        async with connect(server, "AsyncOpenAI") as many:
            answers = await asyncio.gather(*(complete(many, **asked) for _ in range(20)))
        return [answer.choices[0].text for answer in answers]

    assert set(asyncio.run(crowd())) == {whole.choices[0].text}


@pytest.mark.parametrize(
    ("call", "kind", "status", "code", "param"),
    [
        (lambda c: complete(c.with_options(api_key="wrong")), "AuthenticationError", 401, "invalid_api_key", None),
        (lambda c: list(c.with_options(api_key="other").models.list()), "AuthenticationError", 401, "invalid_api_key", None),
        (lambda c: complete(c, model="other"), "NotFoundError", 404, "model_not_found", "model"),
        (lambda c: chat(c, model="other", stream=True), "NotFoundError", 404, "model_not_found", "model"),
        (lambda c: c.models.retrieve("other"), "NotFoundError", 404, "model_not_found", "model"),
        (lambda c: c.embeddings.create(model="tiny", input="x"), "NotFoundError", 404, "not_found", None),
        (lambda c: c.responses.create(model="tiny", input="x"), "NotFoundError", 404, "not_found", None),
        (lambda c: c.files.retrieve("file-1"), "NotFoundError", 404, "not_found", "file_id"),
        (lambda c: c.files.content("file-1"), "NotFoundError", 404, "not_found", "file_id"),
        (lambda c: c.files.delete("file-1"), "NotFoundError", 404, "not_found", "file_id"),
        (lambda c: c.batches.retrieve("batch-1"), "NotFoundError", 404, "not_found", "batch_id"),
        (lambda c: c.batches.cancel("batch-1"), "NotFoundError", 404, "not_found", "batch_id"),
        (lambda c: batch(c, "file-1"), "BadRequestError", 400, "not_found", "input_file_id"),
        (lambda c: complete(c, n=0), "BadRequestError", 400, "invalid_value", "n"),
        (lambda c: chat(c, temperature=-1, stream=True), "BadRequestError", 400, "invalid_value", "temperature"),
        (lambda c: complete(c, temperature=1e300), "BadRequestError", 400, "invalid_value", "temperature"),
        (
            lambda c: complete(c, extra_body={"repetition_penalty": 1e-40}),
            "BadRequestError",
            400,
            "invalid_value",
            "repetition_penalty",
        ),
        (lambda c: complete(c, extra_body={"min_tokens": 9}), "BadRequestError", 400, "invalid_value", "min_tokens"),
        (lambda c: complete(c, prompt=[[7, 10**6]]), "BadRequestError", 400, "invalid_value", "prompt"),
        (lambda c: complete(c, prompt="x" * 9000), "BadRequestError", 400, "context_length_exceeded", "prompt"),
        (lambda c: chat(c, messages=[None]), "BadRequestError", 400, "invalid_type", "messages[0]"),
        (lambda c: chat(c, tool_choice="required"), "BadRequestError", 400, "unsupported_parameter", "tool_choice"),
        (lambda c: c.files.list(order="up"), "BadRequestError", 400, "invalid_value", "order"),
        (lambda c: c.files.list(after="file-1"), "BadRequestError", 400, "not_found", "after"),
        (lambda c: c.batches.list(limit=0), "BadRequestError", 400, "invalid_value", "limit"),
        (lambda c: complete(c, prompt="x" * 70_000), "APIStatusError", 413, "body_too_large", None),
        (lambda c: upload(c, {"text": "x" * 70_000}), "APIStatusError", 413, "file_too_large", "file"),
    ],
)
def test_errors_are_typed(client: Client, call: Call, kind: str, status: int, code: str, param: str | None) -> None:
    with pytest.raises(openai.APIStatusError) as raised:
        call(client)
    error = raised.value
    assert (type(error).__name__, error.status_code, error.code, error.param) == (kind, status, code, param)
    assert error.type == "invalid_request_error" and error.body["message"] in error.message
    assert "column" not in error.message and "sampling_params" not in error.message


def test_a_full_server_is_tried_again_and_then_an_error(server: Server, client: Client) -> None:
    with ThreadPoolExecutor() as pool:
        hold = {"n": 20, "max_tokens": 480, "extra_body": {"ignore_eos": True}}
        waiting = pool.submit(complete, client.with_options(timeout=4.0), **hold)
        server.wait_for("samples_unfinished", 20)
        with pytest.raises(openai.InternalServerError) as raised:
            complete(client.with_options(max_retries=1), n=5)
        error = raised.value
        assert (error.status_code, error.code, error.response.headers["retry-after"]) == (503, "overloaded", "1")
        assert error.response.request.headers["x-stainless-retry-count"] == "1"
        # The first client gives up meanwhile, and makes room.
        assert len(complete(client.with_options(max_retries=9), n=5).choices) == 5
        assert isinstance(waiting.exception(), openai.APITimeoutError)
    assert 'tokabatch_responses_total{status="503"}' in server.client.get("/metrics").text


def test_files_and_batches(client: Client) -> None:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 3}
    lines = [{"custom_id": f"r{n}", "method": "POST", "url": "/v1/completions", "body": body} for n in range(4)]
    files = [upload(client, *lines, {"custom_id": "bad", "method": "GET", "url": "/v1/completions", "body": {}}, {"a": 1})]
    files += [upload(client, lines[0]) for _ in range(4)]
    made = [batch(client, file.id, metadata={"of": file.id}) for file in files]
    cancelled = client.batches.cancel(batch(client, files[1].id).id)
    assert cancelled.status == "cancelling"
    # Pages follow one another.
    assert [each.id for each in client.batches.list(limit=2)] == [each.id for each in (cancelled, *made[::-1])]
    known = {file.id for file in files}
    assert known <= {each.id for each in client.files.list(limit=2, order="asc")}
    end = time.monotonic() + 60
    for each in (*made, cancelled):
        while (found := client.batches.retrieve(each.id)).status not in ("completed", "cancelled"):
            assert time.monotonic() < end and found.status != "failed", found
            time.sleep(0.1)
        assert found.status == "completed" or each is cancelled
    first = client.batches.retrieve(made[0].id)
    assert (first.request_counts.completed, first.request_counts.failed) == (4, 2) and first.metadata == {"of": files[0].id}
    results = [json.loads(line) for line in client.files.content(first.output_file_id).text.splitlines()]
    assert {each["custom_id"] for each in results} == {"r0", "r1", "r2", "r3"}
    errors = [json.loads(line) for line in client.files.content(first.error_file_id).text.splitlines()]
    faults = {each["custom_id"]: each["response"]["body"]["error"] for each in errors}
    assert faults["bad"]["param"] == "method" and faults[None]["param"] == "custom_id"
    assert client.files.delete(files[0].id).deleted and client.files.retrieve(first.output_file_id).purpose == "batch_output"
