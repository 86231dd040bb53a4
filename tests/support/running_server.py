"""A server in a process of its own, with a tiny model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from support.processes import started_with

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}bot: {% endif %}"
)
SETTINGS = [
    "model.dtype=float64",
    "engine.kv_cache_tokens=4K",
    "engine.max_running=16",
    "server.port=0",
    "server.name=tiny",
    "server.files=null",
]


class Server:
    """`client` is where it listens."""

    def __init__(self, folder: Path, *settings: str, cwd: Path | None = None) -> None:
        command = [sys.executable, "-m", "tokabatch", "serve", str(folder), *SETTINGS, *settings]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=cwd)
        self.told: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.told.append(line)
            if found := re.search(r"(http://.*)/v1;", line):
                break
        else:
            raise AssertionError("".join(self.told))
        threading.Thread(target=lambda: self.told.extend(self.process.stderr or ()), daemon=True).start()
        self.client = httpx.Client(base_url=found[1], timeout=60, limits=httpx.Limits(max_connections=None))

    def post(self, path: str, **body: Any) -> Any:
        response = self.client.post(path, json={"model": "tiny", **body})
        assert response.status_code == 200, response.text
        return response.json()

    def texts(self, **body: Any) -> list[str]:
        return [choice["text"] for choice in self.post("/v1/completions", **body)["choices"]]

    def events(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The parts of a streamed response, which end as the API says."""
        with self.client.stream("POST", path, json={"model": "tiny", "stream": True, **body}) as response:
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    def metric(self, name: str) -> float:
        return float(re.search(rf"^tokabatch_{name}\S* (\S+)$", self.client.get("/metrics").text, re.MULTILINE)[1])

    def wait_for(self, name: str, value: float) -> None:
        end = time.monotonic() + 30
        while self.metric(name) != value:
            assert time.monotonic() < end, self.client.get("/metrics").text
            time.sleep(0.05)

    def descendants(self) -> dict[str, psutil.Process]:
        """The scheduler's process and the worker's, by what started them."""
        scheduler, *_ = started_with("spawn_main", psutil.Process(self.process.pid).children())
        worker, *_ = started_with("spawn_main", scheduler.children())
        return {"scheduler": scheduler, "worker": worker}
