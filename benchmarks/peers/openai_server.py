"""Any server with OpenAI's /v1/completions that takes token ids and `ignore_eos`: Tokasaurus, vLLM, SGLang.

The server runs already, with the model; its address is a setting. The samples of a prompt that have one length are one request
with n, and all requests are open at once, as the server schedules them. Plain HTTP/1.1, one connection a request.
"""

from __future__ import annotations

import asyncio
import io
import json
import resource
import time
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.peers import Served, warm_up
from benchmarks.workloads import Workload


@dataclass(frozen=True, slots=True)
class Settings:
    """`model` is the name that the server gives it; empty: the first that it lists."""

    url: str = "http://127.0.0.1:10210"
    model: str = ""
    connections: int = 8192


def serve(folder: Path, workload: Workload, settings: Settings) -> Served:
    """`folder` is the server's business. Raises ConnectionError where no server answers or one refuses."""
    began = time.perf_counter()
    _allow_files(settings.connections)
    client = Client(settings.url, settings.model or first_model(settings.url))
    asyncio.run(client.complete(client.bodies(warm_up(workload)), settings.connections))
    bodies = client.bodies(workload)
    started = time.perf_counter()
    answers = asyncio.run(client.complete(bodies, settings.connections))
    finished = time.perf_counter()
    samples = sum(len(answer["choices"]) for answer in answers)
    tokens = sum(int(answer["usage"]["completion_tokens"]) for answer in answers)
    return Served(started - began, finished - started, samples, tokens)


@dataclass(frozen=True, slots=True)
class Client:
    """Sends completions to one server."""

    url: str
    model: str

    async def complete(self, bodies: list[dict[str, Any]], connections: int) -> list[dict[str, Any]]:
        """The server's answer to each request, so many open at once."""
        open_connections = asyncio.Semaphore(connections)

        async def one(body: dict[str, Any]) -> dict[str, Any]:
            async with open_connections:
                return await request(self.url, "POST", "/v1/completions", body)

        return await asyncio.gather(*(one(body) for body in bodies))

    def bodies(self, workload: Workload) -> list[dict[str, Any]]:
        """The requests of all samples."""
        return [
            {
                "model": self.model,
                "prompt": workload.prompts[group.prompt].tolist(),
                "n": group.samples,
                "max_tokens": group.output_length,
                "temperature": workload.temperature,
                "ignore_eos": True,
            }
            for group in workload.groups()
        ]


def first_model(url: str) -> str:
    return str(asyncio.run(request(url, "GET", "/v1/models", None))["data"][0]["id"])


async def request(url: str, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
    """One exchange. Raises ConnectionError with the server's words."""
    address = urlsplit(url)
    content = b"" if body is None else json.dumps(body).encode()
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    try:
        reader, writer = await asyncio.open_connection(address.hostname, address.port or 80)
    except OSError as error:
        raise ConnectionError(f"no server answers at {url} ({error}); start it, or set openai_server's url") from error
    try:
        writer.write(head.encode() + content)
        await writer.drain()
        received = await reader.read(-1)
    finally:
        writer.close()
    response = HTTPResponse(_Received(received))  # type: ignore[arg-type]
    response.begin()
    text = response.read()
    if response.status != 200:
        raise ConnectionError(f"{url}{path} answers {response.status}: {text[:500].decode(errors='replace')}")
    return json.loads(text)


class _Received:
    """Bytes that have arrived, as the socket that `HTTPResponse` reads from."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self._content)


def _allow_files(connections: int) -> None:
    """As many open files as that takes, where the system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 256
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
