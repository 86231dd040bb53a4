"""The drivers of other engines: transformers for real, vLLM and SGLang against stand-ins of their public classes, the OpenAI
driver against a scripted server."""

from __future__ import annotations

import importlib
import json
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest

from benchmarks.engines import parse_settings
from benchmarks.gpu.workloads import make_gpu_workload
from benchmarks.peers import NotInstalledError, load_peer, openai_server, peer_keys, warm_up
from benchmarks.peers.__main__ import check, main


@pytest.fixture(scope="module")
def workload():
    """Unequal lengths, several samples a prompt, some of them of one length."""
    return make_gpu_workload("a-full", 640, 0.02)


def totals(workload) -> tuple[int, int]:
    return workload.num_samples, workload.num_output_tokens


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a module in the engine's place and imports the driver anew."""

    def install(key: str, **names: object) -> ModuleType:
        module = ModuleType(key)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, key, module)
        monkeypatch.delitem(sys.modules, f"benchmarks.peers.{key}", raising=False)
        driver = importlib.import_module(f"benchmarks.peers.{key}")
        monkeypatch.delitem(sys.modules, f"benchmarks.peers.{key}")
        return driver

    return install


def test_every_driver_is_known():
    assert set(peer_keys()) == {"openai_server", "sglang", "transformers", "vllm"}
    with pytest.raises(ValueError, match="there are openai_server, sglang"):
        load_peer("vlm")


def test_an_engine_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sglang", None)
    monkeypatch.delitem(sys.modules, "benchmarks.peers.sglang", raising=False)
    with pytest.raises(NotInstalledError, match="no module 'sglang'"):
        load_peer("sglang")


def test_transformers_serves_the_workload(tiny_folders, tmp_path, monkeypatch, capsys):
    workload = make_gpu_workload("a", 640, 0.02)
    workload.save(tmp_path / "workload.npz")
    arguments = ["transformers", str(tmp_path / "workload.npz"), "--model", str(tiny_folders["tiny"])]
    settings = ["--set", "max_requests=8", "--set", "max_batch_tokens=256", "--set", "device=cpu"]
    monkeypatch.setattr(sys, "argv", ["peers", *arguments, *settings, "--out", str(tmp_path / "figures.jsonl")])
    main()
    assert "of the roofline's" in capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.jsonl").read_text())
    assert (figures["samples"], figures["output_tokens"]) == totals(workload)
    assert figures["settings"]["max_requests"] == 8 and figures["seconds"] > 0


def test_vllm_gets_one_request_for_a_prompt_and_length(workload, stand_in, tmp_path):
    @dataclass
    class SamplingParams:
        n: int
        temperature: float
        max_tokens: int
        ignore_eos: bool

    @dataclass
    class Output:
        token_ids: list[int]

    @dataclass
    class Answer:
        outputs: list[Output]

    class LLM:
        made: ClassVar[list[Any]] = []

        def __init__(self, **settings: Any) -> None:
            self.settings = settings
            self.passes: list[tuple[list[Any], list[SamplingParams]]] = []
            LLM.made.append(self)

        def generate(self, prompts: list[Any], params: list[SamplingParams], use_tqdm: bool) -> list[Answer]:
            self.passes.append((prompts, params))
            return [Answer([Output([0] * one.max_tokens) for _ in range(one.n)]) for one in params]

    driver = stand_in("vllm", LLM=LLM, SamplingParams=SamplingParams)
    served = driver.serve(tmp_path, workload, driver.Settings(max_num_seqs=77))
    assert (served.samples, served.output_tokens) == totals(workload)
    (engine,) = LLM.made
    assert engine.settings["max_num_seqs"] == 77 and engine.settings["max_model_len"] > workload.longest
    (warm, _), (prompts, params) = engine.passes
    assert prompts[0]["prompt_token_ids"] == workload.prompts[0].tolist() != warm[0]["prompt_token_ids"]
    assert len(params) < workload.num_samples and all(one.ignore_eos and one.temperature == 0.6 for one in params)


def test_sglang_gets_every_sample(workload, stand_in, tmp_path):
    class Engine:
        made: ClassVar[list[Any]] = []

        def __init__(self, **settings: Any) -> None:
            self.settings, self.calls = settings, []
            Engine.made.append(self)

        def generate(self, input_ids: list[list[int]], sampling_params: list[dict[str, Any]]) -> list[dict[str, Any]]:
            self.calls.append(("generate", input_ids))
            assert all(one["ignore_eos"] for one in sampling_params)
            return [{"output_ids": [0] * one["max_new_tokens"]} for one in sampling_params]

        def flush_cache(self) -> None:
            self.calls.append(("flush", None))

        def shutdown(self) -> None:
            self.calls.append(("shutdown", None))

    driver = stand_in("sglang", Engine=Engine)
    served = driver.serve(tmp_path, workload, driver.Settings())
    assert (served.samples, served.output_tokens) == totals(workload)
    (engine,) = Engine.made
    assert [name for name, _ in engine.calls] == ["generate", "flush", "generate", "shutdown"]
    assert len(engine.calls[2][1]) == workload.num_samples


@dataclass
class ScriptedServer:
    """Answers completions as Tokasaurus does, the body in chunks; records its requests and how many were open at once."""

    refuse: bool = False
    bodies: list[dict[str, Any]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0

    def __enter__(self) -> ScriptedServer:
        script, lock, all_open = self, threading.Lock(), threading.Event()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.answer(200, {"data": [{"id": "served-model"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    script.bodies.append(body)
                    script.at_once += 1
                    script.most_at_once = max(script.most_at_once, script.at_once)
                    if script.at_once >= 2:
                        all_open.set()
                all_open.wait(0.5)
                if script.refuse:
                    self.answer(400, {"detail": "ignore_eos is not allowed"})
                else:
                    choices = [{"index": index, "text": "x"} for index in range(body["n"])]
                    self.answer(200, {"choices": choices, "usage": {"completion_tokens": body["n"] * body["max_tokens"]}})
                with lock:
                    script.at_once -= 1

            def answer(self, status: int, value: object) -> None:
                content = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for part in (content[:7], content[7:]):
                    self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
                self.wfile.write(b"0\r\n\r\n")

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def settings(self) -> openai_server.Settings:
        return openai_server.Settings(url=f"http://127.0.0.1:{self._server.server_port}", connections=64)


def test_a_server_gets_all_requests_at_once(tmp_path):
    workload = make_gpu_workload("a", 640, 0.02).take(2)
    with ScriptedServer() as server:
        served = openai_server.serve(tmp_path, workload, server.settings)
    assert (served.samples, served.output_tokens) == totals(workload)
    assert len(server.bodies) == 4, "one request a prompt, warm-up included"
    body = server.bodies[-1]
    assert (body["model"], body["n"], body["max_tokens"], body["ignore_eos"]) == ("served-model", workload.n, 4, True)
    assert sorted(tuple(body["prompt"]) for body in server.bodies[2:]) == sorted(tuple(p.tolist()) for p in workload.prompts)
    assert server.most_at_once == 2


def test_what_a_server_refuses_is_reported(tmp_path):
    one_request = make_gpu_workload("a", 640, 0.02).take(1)
    with ScriptedServer(refuse=True) as server, pytest.raises(ConnectionError, match=r"400: .*ignore_eos is not allowed"):
        openai_server.serve(tmp_path, one_request, server.settings)


def test_a_missing_server_is_reported(workload, tmp_path):
    with pytest.raises(ConnectionError, match=r"no server answers at http://127\.0\.0\.1:9"):
        openai_server.serve(tmp_path, workload, openai_server.Settings(url="http://127.0.0.1:9"))


def test_warm_up_has_the_same_lengths_and_other_tokens(workload):
    warm = warm_up(workload)
    assert np.array_equal(warm.output_length_PN, workload.output_length_PN)
    for ours, theirs in zip(warm.prompts, workload.prompts, strict=True):
        assert len(ours) == len(theirs) and (ours != theirs).all()
        assert ours.min() >= 4 and ours.max() < 640
    assert warm.common_prefix() == workload.common_prefix()


def test_other_lengths_are_void(workload):
    samples, tokens = totals(workload)
    served = load_peer("openai_server")
    assert served is openai_server
    check(openai_server.Served(1.0, 1.0, samples, tokens), workload)
    with pytest.raises(SystemExit, match="void"):
        check(openai_server.Served(1.0, 1.0, samples, tokens - 1), workload)


def test_settings_take_their_fields_types():
    settings = parse_settings("openai_server", openai_server.Settings, ["connections=5", "url=http://host:1"])
    assert settings == openai_server.Settings(url="http://host:1", connections=5)
    with pytest.raises(SystemExit, match="no setting 'port'"):
        parse_settings("openai_server", openai_server.Settings, ["port=5"])
