"""A server in a process of its own, asked as clients of OpenAI's API ask: answers are the model's, whatever else goes on."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from support import tiny_models
from support.double_precision import load_double
from support.running_server import TEMPLATE, Server
from tokenizers import Tokenizer

HI = {"role": "user", "content": "hi"}
LONG = {"model": "tiny", "prompt": "go on", "max_tokens": 480, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.add_tokenizer(tiny_models.build("llama", tmp_path_factory.mktemp("model")), TEMPLATE)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    started = Server(
        folder, "server.max_body=128K", "engine.hang_seconds=5", "server.max_request_tokens=20K", "server.max_waiting=100"
    )
    yield started
    children = started.descendants()
    with ThreadPoolExecutor() as pool:
        # What would take longer is broken off by the second signal.
        waiting = pool.submit(started.client.post, "/v1/completions", json={**LONG, "n": 40})
        started.wait_for("samples_unfinished", 40)
        started.process.send_signal(signal.SIGTERM)
        while "stopping" not in "".join(started.told):
            time.sleep(0.01)
        assert started.client.get("/health").status_code == 503
        refused = started.client.post("/v1/completions", json=LONG)
        assert refused.status_code == 503 and refused.headers["retry-after"]
        started.process.send_signal(signal.SIGTERM)
        assert started.process.wait(30) == 128 + signal.SIGTERM, "".join(started.told)
        assert isinstance(waiting.exception(), httpx.TransportError)
    assert not psutil.wait_procs(list(children.values()), timeout=30)[1]


@pytest.fixture(scope="module")
def greedy(folder: Path) -> Any:
    """transformers' own answer: ids and log-probabilities of the prompt and of what greedy decoding adds."""
    model, tokenizer = load_double(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))

    def complete(prompt: str, count: int) -> tuple[list[int], torch.Tensor, str]:
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        begin = len(ids)
        with torch.inference_mode():
            for _ in range(count):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == 2:
                    break
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return ids, logprobs, tokenizer.decode(ids[begin:], skip_special_tokens=True)

    return complete


def test_a_completion_is_the_models_in_every_form(server, greedy):
    prompts = ["hello", "what is 3 + 4?", "hello world"]
    wanted = [greedy(prompt, 12) for prompt in prompts]
    assert server.texts(prompt=prompts, max_tokens=12, temperature=0) == [text for *_, text in wanted]
    ids = [ids[: len(prompt)] for prompt, (ids, *_) in zip(prompts, wanted, strict=True)]
    answer = server.post("/v1/completions", prompt=ids, max_tokens=12, temperature=0, n=2, logprobs=3)
    assert [c["index"] for c in answer["choices"]] == list(range(6))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts)) and answer["object"] == "text_completion"
    for choice in answer["choices"]:
        (all_ids, logprobs, text), begin = wanted[choice["index"] // 2], len(prompts[choice["index"] // 2])
        assert choice["text"] == text
        drawn = all_ids[begin:]
        own = logprobs[range(begin - 1, len(all_ids) - 1), drawn]
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(own.tolist(), abs=1e-4)
        assert len(choice["logprobs"]["top_logprobs"][0]) in (3, 4)
        assert choice["finish_reason"] == ("stop" if drawn[-1] == 2 else "length")
    assert server.post("/v1/completions", prompt="a<eos>b", max_tokens=1)["usage"]["prompt_tokens"] == 3
    context = server.client.get("/v1/models").json()["data"][0]["max_model_len"]
    chat = server.post("/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], ignore_eos=True)
    assert chat["usage"]["total_tokens"] == context and chat["choices"][0]["finish_reason"] == "length"
    stop = wanted[0][2][3:5]
    assert server.texts(prompt=prompts[0], max_tokens=12, temperature=0, stop=[stop])[0] == wanted[0][2].partition(stop)[0]


def test_echo_scores_the_prompt_and_draws_behind_it(server, greedy):
    prompts = ["the first one", "another, longer prompt with more of it"]
    for drawn, n, alternatives in ((1, 1, 1), (0, 1, 1), (3, 2, 2), (1, 1, 0)):
        answer = server.post(
            "/v1/completions", prompt=prompts, max_tokens=drawn, n=n, temperature=0, logprobs=alternatives, echo=True, seed=1
        )
        assert answer["usage"]["completion_tokens"] == drawn * n * len(prompts)
        for choice in answer["choices"]:
            prompt = prompts[choice["index"] // n]
            ids, logprobs, text = greedy(prompt, drawn)
            assert choice["text"] == prompt + text
            own = logprobs[range(len(ids) - 1), ids[1:]].tolist()
            found = choice["logprobs"]
            assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
            assert found["token_logprobs"][1:] == pytest.approx(own, abs=1e-4)
            assert "".join(found["tokens"]) == choice["text"]
            for place, (value, top) in enumerate(zip(found["token_logprobs"][1:], found["top_logprobs"][1:], strict=True)):
                is_greedy = int(logprobs[place].argmax()) == ids[place + 1]
                assert (value == max(top.values())) is (is_greedy or not alternatives)
    assert server.texts(prompt="plain", max_tokens=0, echo=True) == ["plain"]
    unnamed = server.client.post("/v1/completions", json={"prompt": "plain", "max_tokens": 0, "echo": True}).json()
    assert (unnamed["model"], unnamed["choices"][0]["text"]) == ("tiny", "plain")
    ids, _, text = greedy(prompts[0], 1)
    asked = {"prompt": prompts[0], "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    for setting in ({"stop_token_ids": [ids[-1]]}, {"stop": [text]}):
        assert server.post("/v1/completions", **asked, **setting)["choices"][0]["finish_reason"] == "stop"


def test_the_same_seed_is_the_same_answer_alone_and_in_company(server):
    asked = {"prompt": ["draw", "draw again"], "max_tokens": 20, "temperature": 1.5, "n": 3, "seed": 7}
    alone = server.texts(**asked)
    assert len(set(alone)) == 6
    with ThreadPoolExecutor(16) as pool:
        others = [
            pool.submit(server.texts, prompt=f"other {i}", max_tokens=5 + i, temperature=1.0, logprobs=i % 3) for i in range(30)
        ]
        same = [pool.submit(server.texts, **asked) for _ in range(4)]
        assert all(each.result() == alone for each in same) and all(each.result() for each in others)
    unseeded = [server.texts(prompt="draw", max_tokens=20, temperature=1.5)[0] for _ in range(3)]
    assert len(set(unseeded)) == 3


def test_a_stream_is_the_same_answer_in_parts(server):
    asked = {"max_tokens": 30, "temperature": 1.0, "seed": 11, "n": 2, "stop": ["e", "qq"]}
    whole = server.post("/v1/completions", prompt=["one", "two"], logprobs=1, **asked)
    parts = server.events("/v1/completions", prompt=["one", "two"], logprobs=1, stream_options={"include_usage": True}, **asked)
    assert parts[-1]["usage"] == whole["usage"] and parts[-1]["choices"] == []
    for choice in whole["choices"]:
        mine = [part["choices"][0] for part in parts[:-1] if part["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in mine) == choice["text"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"] and all(p["finish_reason"] is None for p in mine[:-1])
        told = [part["logprobs"] for part in mine if part["logprobs"]]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [value for each in told for value in each[name]] == choice["logprobs"][name]
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 30, "seed": 5}
    whole = server.post("/v1/chat/completions", logprobs=True, top_logprobs=2, **chat)
    assert whole["choices"][0]["message"]["role"] == "assistant" and whole["object"] == "chat.completion"
    parts = server.events("/v1/chat/completions", logprobs=True, top_logprobs=2, **chat)
    assert parts[0]["choices"][0]["delta"]["role"] == "assistant" and parts[0]["object"] == "chat.completion.chunk"
    text = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
    assert text == whole["choices"][0]["message"]["content"]
    content = [entry for part in parts for entry in (part["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert content == whole["choices"][0]["logprobs"]["content"]
    prompt = server.post("/tokenize", messages=chat["messages"], add_special_tokens=None, return_token_strs=False)
    assert server.post("/detokenize", tokens=prompt["tokens"])["prompt"] == "user: hi\nbot: "
    echoed = server.events("/v1/completions", prompt="one", echo=True, max_tokens=0)
    assert echoed[0]["choices"][0]["text"] == "one"


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/completions", {"prompt": "x", "model": "other"}, 404, "model"),
        ("/v1/completions", {"prompt": "x", "logit_bias": {"5000": 1}}, 400, "logit_bias"),
        ("/v1/completions", {"prompt": "x", "response_format": {"type": "json_object"}}, 400, "response_format"),
        ("/v1/completions", {"prompt": [[5000]]}, 400, "prompt"),
        ("/v1/completions", {"prompt": "x" * 600}, 400, "prompt"),
        ("/v1/completions", {"prompt": "x", "n": 1000, "max_tokens": 100}, 400, "max_tokens"),
        ("/v1/completions", {"prompt": "x", "n": 101, "max_tokens": 1}, 400, "n"),
        ("/v1/completions", {"prompt": "x" * 70000}, 400, "prompt"),
        ("/v1/completions", {"prompt": "x" * 140000}, 413, None),
        ("/v1/completions", {"prompt": "x", "bad_words": [f"w{i}" for i in range(301)]}, 400, "bad_words"),
        ("/v1/completions", {"prompt": "x", "stop": [f"w{i}" for i in range(301)]}, 400, "stop"),
        ("/v1/completions", {"prompt": "x", "stop": "w" * 1001}, 400, "stop"),
        ("/v1/completions", {"prompt": "x", "bad_words": ["one word of very many tokens"]}, 400, "bad_words"),
        ("/v1/chat/completions", {"messages": [HI], "tools": [{"type": "function"}]}, 400, "tools"),
        ("/v1/chat/completions", {"messages": [HI], "documents": [{"text": "x"}]}, 400, "documents"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/nothing", {}, 404, None),
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "model": "other"}, 404, "model"),
        ("/tokenize", {"prompt": "x", "return_token_strs": True}, 400, "return_token_strs"),
        ("/tokenize", {"messages": [HI], "add_generation_prompt": False}, 400, "add_generation_prompt"),
        ("/detokenize", {"tokens": [5], "skip_special_tokens": True}, 400, "skip_special_tokens"),
    ],
)
def test_what_cannot_be_answered_is_told_as_the_api_does(server, path, body, status, param):
    response = server.client.post(path, json={"model": "tiny", **body})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["param"] == param and error["message"] and error["type"]


def test_bodies_that_are_no_objects_are_refused(server):
    for body in (b"", b"{", b"[1]", b"\xff", b'{"a":1,"a":2}', b"[" * 50_000, b'{"prompt": "\\ud800"}'):
        assert server.client.post("/v1/completions", content=body).status_code == 400
    compressed = server.client.post("/v1/completions", content=b"{}", headers={"Content-Encoding": "gzip"})
    assert compressed.status_code == 415 and "gzip" in compressed.json()["error"]["message"]
    wrong = server.client.get("/v1/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["code"] == "method_not_allowed"
    wrong = server.client.post("/completions", json={})
    assert wrong.status_code == 404 and wrong.json()["error"]["code"] == "not_found"
    assert "/completions is not served; the paths are /health, /v1/completions, /v1/chat" in wrong.json()["error"]["message"]
    for body, told in ((b" ", "is empty"), (b"null", "not null"), (b'{"seed":' + b"9" * 5000 + b"}", "thousands of digits")):
        assert told in server.client.post("/v1/completions", content=body).json()["error"]["message"]
    assert server.client.get("/version").json()["version"]
    assert server.client.get("/v1/models/tiny").json()["id"] == "tiny" and server.client.get("/health").status_code == 200
    assert server.client.get("/tokenizer_info").json()["eos_token"] == "<eos>"


def test_a_client_that_goes_takes_its_samples_along(server):
    before = server.metric("samples_cancelled_total")
    long = {"model": "tiny", "prompt": "go on", "max_tokens": 480, "ignore_eos": True, "n": 12}
    with pytest.raises(httpx.ReadTimeout):
        server.client.post("/v1/completions", json=long, timeout=httpx.Timeout(60, read=0.3))
    with server.client.stream("POST", "/v1/completions", json={**long, "stream": True}) as response:
        next(response.iter_lines())
    server.wait_for("samples_unfinished", 0)
    assert server.metric("samples_cancelled_total") > before + 12
    server.wait_for("samples_running", 0)


def test_lost_processes_are_replaced_and_their_requests_computed_again(server):
    asked = {"prompt": "survive", "max_tokens": 400, "ignore_eos": True, "temperature": 1.0, "seed": 3, "n": 4}
    whole = server.texts(**asked)
    for which, number in (("worker", signal.SIGKILL), ("scheduler", signal.SIGKILL), ("scheduler", signal.SIGSTOP)):
        with ThreadPoolExecutor() as pool:
            running = pool.submit(server.texts, **asked)
            while server.metric("samples_unfinished") < 4:
                time.sleep(0.01)
            time.sleep(0.1)
            server.descendants()[which].send_signal(number)
            assert running.result() == whole
    assert server.metric("scheduler_restarts_total") == 2
    assert any("was killed by signal 9" in line for line in server.told)
    assert any("gave no sign of life for" in line for line in server.told)


def test_a_server_with_a_key_finishes_what_runs_when_it_is_stopped(folder):
    page = "https://page.example"
    server = Server(
        folder, "server.api_key=sécret", f"server.allow_origins={page}", "engine.kv_cache_tokens=512", "generation.n=2"
    )
    asking = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    for origin, status in ((page, 200), ("https://other.example", 400)):
        asked = server.client.options("/v1/completions", headers={"Origin": origin, **asking})
        assert (asked.status_code, asked.headers.get("access-control-allow-origin") == page) == (status, status == 200)
    assert server.client.get("/v1/models", headers={"Origin": page}).headers["access-control-allow-origin"] == page
    assert server.client.get("/v1/models").status_code == 401
    assert server.client.get("/v1/models").json()["error"]["code"] == "invalid_api_key"
    assert server.client.get("/v1/models", headers={"Authorization": "bearer sécret".encode()}).status_code == 200
    server.client.headers["Authorization"] = "Bearer sécret"
    parts = server.events("/v1/completions", prompt=["one", "two"], max_tokens=2)
    assert {part["choices"][0]["index"] for part in parts} == {0, 1, 2, 3}
    context = server.client.get("/v1/models").json()["data"][0]["max_model_len"]
    assert context == 512 - 16 and any("may have 496 tokens" in line for line in server.told)
    chat = server.post("/v1/chat/completions", messages=[HI], n=1, ignore_eos=True)
    assert chat["usage"]["total_tokens"] == context
    url = str(server.client.base_url)
    pinged = [sys.executable, "-m", "tokabatch", "ping", "hello", "--url", url, "--api-key", "sécret", "--max-tokens", "5"]
    assert subprocess.run(pinged, capture_output=True, text=True, check=True).stdout.strip()
    assert any(f"tokabatch ping --url {url} --api-key KEY --chat " in line for line in server.told)
    with ThreadPoolExecutor() as pool:
        running = pool.submit(server.texts, prompt="last", max_tokens=400, ignore_eos=True, n=1)
        while server.metric("samples_unfinished") < 1:
            time.sleep(0.01)
        children = server.descendants()
        slow = socket.create_connection((server.client.base_url.host, server.client.base_url.port))
        slow.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer s\xc3\xa9cret\r\nContent-Length: 9\r\n\r\n{"
        )
        server.process.send_signal(signal.SIGTERM)
        assert len(running.result()) == 1
    assert server.process.wait(30) == 0 and not any("Traceback" in line for line in server.told)
    slow.close()
    assert not any(child.is_running() for child in children.values())
