"""A server under clients of all kinds: python -m benchmarks.soak MODEL [--requests 20000] [--connections 200] [--seed 0]

Every connection sends one request after the other: completions and chat, whole and streamed, several prompts and samples,
`echo`, `seed`, stop strings, log-probabilities; bodies of random bytes, or with random pieces replaced, cut short or doubled;
requests that are no HTTP; and clients that vanish, before their body is sent or while they wait for the answer. Ends with
status 1 where an answer is none of those expected, where a server error is not 503, where something is still running in the
end, or where a process's memory is more than --growth of what it was after a fifth of the requests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
import urllib.request
from collections import Counter
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from benchmarks.http_load import Server, serving

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
EXPECTED = {200, 400, 404, 405, 413, 422, 503}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
PATIENCE_SECONDS = 300.0


class Client:
    """All connections together: what was sent, and what came of it."""

    def __init__(self, server: Server, requests: int, seed: int) -> None:
        place = urlsplit(server.url)
        self.host, self.port = str(place.hostname), int(place.port or 80)
        self.server = server
        self.rng = random.Random(seed)
        self.left = self.requests = requests
        self.outcomes: Counter[str] = Counter()
        self.faults: list[str] = []
        self.memory: list[dict[str, float]] = []

    async def connection(self) -> None:
        """Send requests until all are sent; open it anew wherever it was closed."""
        streams = None
        while self.left > 0:
            self.left -= 1
            if self.left % max(1, self.requests // 20) == 0:
                self.memory.append(self.server.memory())
                told = ", ".join(f"{role} {size:.0f}" for role, size in self.memory[-1].items())
                print(f"{self.requests - self.left:,} requests, MB: {told}", flush=True)
            streams = streams or await asyncio.open_connection(self.host, self.port)
            try:
                stays = await asyncio.wait_for(self.exchange(*streams), PATIENCE_SECONDS)
            except (OSError, asyncio.IncompleteReadError) as error:
                self.outcomes[f"closed: {type(error).__name__}"] += 1
                stays = False
            except asyncio.TimeoutError:
                self.faults.append("a request was not answered")
                stays = False
            if not stays:
                streams[1].close()
                streams = None
        if streams is not None:
            streams[1].close()

    async def exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; whether the connection can be used again."""
        kind = self.rng.choices(("good", "fuzzed", "no http", "vanish early", "vanish"), (60, 18, 2, 5, 15))[0]
        if kind == "no http":
            writer.write(self.rng.randbytes(self.rng.randint(1, 200)) + b"\r\n\r\n")
            await writer.drain()
            await asyncio.wait_for(reader.read(4096), 60)
            self.outcomes[kind] += 1
            return False
        path, asked = self.body()
        content = json.dumps(asked).encode()
        if kind == "fuzzed":
            content = self.fuzzed(content)
        head = f"POST {path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Length: {len(content)}\r\n\r\n"
        if kind == "vanish early":
            writer.write((head.encode() + content)[: self.rng.randint(1, len(head) + len(content) - 1)])
            await writer.drain()
            self.outcomes[kind] += 1
            return False
        writer.write(head.encode() + content)
        await writer.drain()
        if kind == "vanish":
            with suppress(asyncio.TimeoutError, asyncio.IncompleteReadError):
                await asyncio.wait_for(reader.readexactly(self.rng.choice((1, 400, 4000))), self.rng.choice((0.02, 0.2, 1)))
            self.outcomes[kind] += 1
            return False
        answer = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        status = int(answer.split(" ", 2)[1])
        if "chunked" in answer.lower():
            body = b""
            while size := int((await reader.readline()).strip(), 16):
                body += await reader.readexactly(size + 2)
            await reader.readexactly(2)
            ended = b"[DONE]" in body
        else:
            length = re.search(r"content-length: (\d+)", answer, re.IGNORECASE)
            body = await reader.readexactly(int(length[1]) if length else 0)
            ended = bool(json.loads(body)) if body else True
        self.outcomes[f"{kind}: {status}"] += 1
        if status not in EXPECTED or not ended or (kind == "good" and status not in (200, 503)):
            self.faults.append(f"{kind}: {status} {body[:200]!r} to {content[:200]!r}")
        return "connection: close" not in answer.lower()

    def body(self) -> tuple[str, dict[str, Any]]:
        """A request that can be answered."""
        rng = self.rng
        text = f"Question {rng.randint(0, 999)}: how much is {rng.randint(0, 99)} plus {rng.randint(0, 99)}?\nAnswer:"
        body: dict[str, Any] = {"model": "m", "max_tokens": rng.randint(1, 16), "temperature": rng.choice((0, 1, 0.7))}
        for name, value in (
            ("n", rng.randint(1, 3)),
            ("seed", rng.randint(0, 10**9)),
            ("stop", ["\n", f"{rng.randint(0, 99)}"]),
            ("stream", True),
            ("top_p", 0.9),
            ("presence_penalty", 0.5),
            ("user", "someone"),
        ):
            if rng.random() < 0.25:
                body[name] = value
        if rng.random() < 0.3:
            body["messages"] = [{"role": "user", "content": text}]
            return CHAT, body | ({"logprobs": True, "top_logprobs": 2} if rng.random() < 0.3 else {})
        body["prompt"] = rng.choice((text, [text] * 3, [rng.randrange(4, 300) for _ in range(rng.randint(1, 60))]))
        if rng.random() < 0.2:
            body |= {"echo": True, "logprobs": rng.choice((None, 1))}
        return COMPLETIONS, body

    def fuzzed(self, content: bytes) -> bytes:
        """Random bytes, or the body with pieces replaced, cut out or doubled."""
        rng = self.rng
        if rng.random() < 0.2:
            return rng.randbytes(rng.choice((0, 1, 50, 100_000)))
        for _ in range(rng.randint(1, 4)):
            begin = rng.randrange(len(content) or 1)
            end = min(len(content), begin + rng.randint(0, 12))
            piece = rng.choice(
                (b"", b"null", b"-1", b"1e999", b'"', b"{", b"[[]]", b"\\ud800", rng.randbytes(3), content[begin:end] * 2)
            )
            content = content[:begin] + piece + content[end:]
        return content


async def soak(server: Server, requests: int, connections: int, seed: int) -> Client:
    client = Client(server, requests, seed)
    await asyncio.gather(*(client.connection() for _ in range(connections)))
    return client


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--connections", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--growth", type=float, default=1.15)
    chosen = parser.parse_args()
    sizes = ("engine.kv_cache_tokens=16K", "server.max_body=64K", "server.max_request_tokens=4K", "server.max_waiting=400")
    sizes += (f"prompt.chat_template={TEMPLATE}",)
    with serving(chosen.model, *sizes) as server:
        began = time.monotonic()
        client = asyncio.run(soak(server, chosen.requests, chosen.connections, chosen.seed))
        print(f"{chosen.requests:,} requests in {time.monotonic() - began:.0f} s: {dict(sorted(client.outcomes.items()))}")
        for _ in range(200):
            metrics = urllib.request.urlopen(f"{server.url}/metrics", timeout=30).read().decode()
            open_samples = [float(x) for x in re.findall(r"^tokabatch_samples_(?:unfinished|running)\S* (\S+)$", metrics, re.M)]
            if not any(open_samples):
                break
            time.sleep(0.1)
        else:
            client.faults.append(f"samples are still there: {open_samples}")
        print(metrics)
        early, last = client.memory[len(client.memory) // 5], server.memory()
        for role, size in last.items():
            print(f"{role}: {early.get(role, 0.0):.0f} MB after a fifth, {size:.0f} MB in the end")
            if size > chosen.growth * early.get(role, 0.0):
                client.faults.append(f"the memory of {role} grew from {early.get(role, 0.0):.0f} to {size:.0f} MB")
    print("\n".join(client.faults[:20]) or "no faults")
    sys.exit(bool(client.faults))


if __name__ == "__main__":
    main()
