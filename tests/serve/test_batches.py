"""Files and batches of a server that is killed in the middle: every request has its answer, the one that a run gives."""

from __future__ import annotations

import asyncio
import fcntl
import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import numpy as np
import pytest
from support import tiny_models
from support import token_device as device
from support.running_server import Server

import tokabatch
from tokabatch.batch.job import batch_job
from tokabatch.batch.results import write_results
from tokabatch.errors import EngineError, UsageError
from tokabatch.scheduling.scheduler import SchedulerLimits
from tokabatch.serve.background_run import BackgroundReplica
from tokabatch.serve.batch_files import BatchFiles, InputLines
from tokabatch.serve.batches import Batches
from tokabatch.serve.settings import ServiceConfig
from tokabatch.serve.stored_files import StoredFiles, new_id

URL = "/v1/completions"


def line(number: int, **body: Any) -> dict[str, Any]:
    asked = {"model": "tiny", "prompt": f"number {number}", "max_tokens": 64, "ignore_eos": True, "seed": number, **body}
    return {"custom_id": f"r{number}", "method": "POST", "url": URL, "body": asked}


def upload(client: httpx.Client, lines: list[dict[str, Any]]) -> str:
    content = "".join(json.dumps(each) + "\n" for each in lines).encode()
    answer = client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("asked.jsonl", content)})
    assert answer.status_code == 200 and answer.json()["bytes"] == len(content), answer.text
    return answer.json()["id"]


def create(client: httpx.Client, file: str, **more: Any) -> dict[str, Any]:
    body = {"input_file_id": file, "endpoint": URL, "completion_window": "24h", **more}
    answer = client.post("/v1/batches", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def until(client: httpx.Client, batch: str, reached: Any) -> dict[str, Any]:
    end = time.monotonic() + 90
    while not reached(found := client.get(f"/v1/batches/{batch}").json()):
        assert time.monotonic() < end, found
        time.sleep(0.05)
    return found


def objects(client: httpx.Client, file: str) -> dict[str, dict[str, Any]]:
    lines = client.get(f"/v1/files/{file}/content").text.splitlines()
    return {each["custom_id"]: each for each in map(json.loads, lines)}


def test_a_batch_survives_the_end_of_its_server(tmp_path: Path) -> None:
    folder, kept = tiny_models.add_tokenizer(tiny_models.build("llama", tmp_path / "model")), tmp_path / "files"
    # Messages name files from the working folder on.
    settings = ("server.files=files", "server.flush_seconds=0.1", "generation.seed=1", "server.max_file=64K")
    asked = [
        line(number, n=1 + number % 2, prompt=[f"number {number}"] * (1 + number % 3), max_tokens=64 + 5 * number)
        for number in range(40)
    ]
    asked[7]["body"]["suffix"] = "no"
    with ThreadPoolExecutor() as pool:
        starting = pool.submit(Server, folder, *settings, cwd=tmp_path)
        # Meanwhile, what a run of the file gives.
        (tmp_path / "asked.jsonl").write_text("".join(json.dumps(each) + "\n" for each in asked))
        job = batch_job(str(tmp_path / "asked.jsonl"), str(folder), tmp_path / "to.jsonl", None, ["model.dtype=float64"])
        tokabatch.run(job)
        write_results(Path(job.output.path), tmp_path / "to.jsonl")
        server = starting.result()
    client = server.client
    file = upload(client, asked)
    batch = create(client, file, metadata={"of": "mine"})
    assert (batch["status"], batch["metadata"], batch["object"]) == ("validating", {"of": "mine"}, "batch")

    # Others wait their turn, or never have one.
    late, cancelled = create(client, file, completion_window="1s"), create(client, upload(client, [line(0)]))
    assert client.post(f"/v1/batches/{cancelled['id']}/cancel").json()["status"] == "cancelling"
    for found, code in ((cancelled, "batch_cancelled"), (late, "batch_expired")):
        found = until(client, found["id"], lambda each: each["status"] in ("cancelled", "expired", "completed"))
        assert code == f"batch_{found['status']}" and found["output_file_id"] is None
        assert {each["error"]["code"] for each in objects(client, found["error_file_id"]).values()} == {code}
    wrong, twice = (create(client, upload(client, [line(0), each])) for each in (line(1, model="other"), line(0)))
    assert client.post(f"/v1/batches/{cancelled['id']}/cancel").status_code == 400
    assert client.delete(f"/v1/files/{file}").json()["error"]["code"] == "file_in_use"
    bad = (
        {"endpoint": "/v1/x"},
        {"input_file_id": "file-1"},
        {"input_file_id": batch["id"]},
        {"completion_window": "9" * 400 + "d"},
    )
    for body in bad:
        assert client.post("/v1/batches", json={"input_file_id": file, "endpoint": URL, **body}).status_code == 400
    expiring = {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    assert client.post("/v1/files", data=expiring, files={"file": b"x"}).json()["error"]["param"] == "expires_after[anchor]"
    for form, content in (({"purpose": "assistants"}, b"x"), ({}, b"x"), ({"purpose": "batch"}, b"x" * 70000)):
        answer = client.post("/v1/files", data=form, files={"file": ("a.jsonl", content)})
        assert answer.status_code == (413 if len(content) > 9 else 400), answer.text
    assert client.post("/v1/files", content=b"x").status_code == 400
    assert client.get("/v1/files/file-../content").status_code == client.get("/v1/batches/batch-1").status_code == 404

    # A client's request passes the rows that wait.
    until(client, batch["id"], lambda each: each["request_counts"]["completed"] >= 8)
    assert server.texts(prompt="hello", max_tokens=2)
    run, end = kept / f"{batch['id']}.run", time.monotonic() + 60
    while not list(run.glob("data/part-*")) and time.monotonic() < end:
        time.sleep(0.01)
    assert until(client, batch["id"], lambda each: True)["request_counts"]["completed"] < 30
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    committed = {path.name for path in run.glob("data/part-*")}
    assert committed
    (kept / f"file-{0:024}.upload").write_bytes(b"half")
    (kept / "file-mine.jsonl").write_bytes(b"a user's")
    odd = {**batch, "id": f"batch-{'0' * 24}", "expires_at": 10**400, "input_file_id": "file-gone"}
    (kept / f"{odd['id']}.json").write_text(json.dumps(odd))
    (kept / f"batch-{'1' * 24}.json").write_text("{")
    server = Server(folder, *settings, cwd=tmp_path)
    client = server.client
    until(client, batch["id"], lambda each: each["status"] == "in_progress" and each["request_counts"]["completed"])
    assert committed <= {path.name for path in run.glob("data/part-*")}, "the run was begun anew"
    found = until(client, batch["id"], lambda each: each["status"] not in ("validating", "in_progress", "finalizing"))
    assert found["status"] == "completed" and found["request_counts"] == {"total": 40, "completed": 39, "failed": 1}
    assert all(found[f"{state}_at"] for state in ("created", "in_progress", "finalizing", "completed", "expires"))
    results, errors = objects(client, found["output_file_id"]), objects(client, found["error_file_id"])
    assert results.keys() | errors.keys() == {each["custom_id"] for each in asked} and errors.keys() == {"r7"}
    # The client's name of the file, not where it lies.
    assert errors["r7"]["response"]["body"]["error"]["message"].startswith("asked.jsonl line 8 (")

    assert client.get(f"/v1/files/{file}/content").content == (tmp_path / "asked.jsonl").read_bytes()
    for wanted in map(json.loads, (tmp_path / "to.jsonl").read_text().splitlines()):
        mine = results[wanted["custom_id"]]["response"]["body"]
        assert mine["model"] == "tiny" and mine["choices"] == wanted["response"]["body"]["choices"]

    found = until(client, wrong["id"], lambda each: each["status"] == "failed")
    assert found["errors"]["data"][0]["line"] == 2 and "'other'" in found["errors"]["data"][0]["message"]
    found = until(client, twice["id"], lambda each: each["status"] == "failed")
    message = found["errors"]["data"][0]["message"]
    assert "asked.jsonl line 2" in message and str(kept) not in message
    assert not (kept / f"file-{0:024}.upload").exists() and not run.exists()
    assert (kept / "file-mine.jsonl").exists()
    assert client.get(f"/v1/batches/{odd['id']}").json()["status"] == "failed"
    listed = client.get("/v1/batches", params={"limit": 2}).json()
    assert listed["has_more"] and len(listed["data"]) == 2
    more = client.get("/v1/batches", params={"after": listed["last_id"]}).json()
    assert {each["id"] for each in listed["data"] + more["data"]} >= {batch["id"], wrong["id"], late["id"]}
    assert client.delete(f"/v1/files/{file}").json()["deleted"] and client.get(f"/v1/files/{file}").status_code == 404
    assert client.get("/v1/files", params={"purpose": "batch_output"}).json()["data"]
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0, "".join(server.told)


def test_two_servers_do_not_share_a_folder(tmp_path: Path) -> None:
    first = StoredFiles(tmp_path)
    with pytest.raises(UsageError, match="another server uses"):
        StoredFiles(tmp_path)
    assert first.get("file-../../etc/passwd") is None


@pytest.mark.parametrize("defect", [None, "while it ends", "once it is over"])
def test_a_batch_that_is_cancelled_as_its_turn_comes_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, defect: str | None
) -> None:
    """It ends while its lines are looked through, and stays what it has become whatever is found there."""
    ran, ending, looked = list[str](), threading.Event(), threading.Event()

    def look(self: BatchFiles, batch: dict[str, Any]) -> InputLines:
        assert ending.wait(60)
        while batch["status"] != "cancelled" and defect != "while it ends":
            time.sleep(0.01)
        looked.set()
        if defect is not None:
            raise ZeroDivisionError(defect)
        return InputLines(np.zeros(0, np.int64))

    def write(self: BatchFiles, batch: dict[str, Any], code: str) -> Any:
        ending.set()
        if defect == "while it ends":
            looked.wait(60)
            time.sleep(0.1)
        return None, None, {}

    monkeypatch.setattr(BatchFiles, "look_through", look)
    monkeypatch.setattr(BatchFiles, "write_results", write)
    monkeypatch.setattr(Batches, "_run", lambda self, job, lines, batch: ran.append(batch["id"]))

    async def main() -> str:
        files = StoredFiles(tmp_path)
        name = new_id("file")
        files.path(name, ".upload").write_bytes(b"{}")
        files.put(name, "asked.jsonl", "batch", files.path(name, ".upload"))
        batches = Batches(files, mock.Mock(), mock.Mock(failure=None))
        batch = batches.create({"input_file_id": name, "endpoint": URL})
        batches.cancel(batch["id"])
        batches.begin(100, print)
        await asyncio.sleep(0.3)
        await batches.close()
        return f"{batch['status']} {batch['failed_at']}"

    assert asyncio.run(main()) == "cancelled None" and not ran


def test_a_batch_begun_under_another_name_of_the_model_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is often the model's path, which may be written in several ways; one that was not begun has failed."""
    monkeypatch.setattr("tokabatch.serve.batches.RETRY_SECONDS", 0.05)
    ran, told = list[str](), list[str]()

    def run(self: Batches, job: Any, lines: InputLines, batch: dict[str, Any]) -> Any:
        ran.append(batch["id"])
        return mock.Mock(pending=0)

    monkeypatch.setattr(Batches, "_run", run)
    monkeypatch.setattr(BatchFiles, "write_results", lambda self, batch, code: (None, None, {}))

    async def serve(name: str, *wanted: str) -> list[str]:
        files = StoredFiles(tmp_path)
        if not files.all():
            key = new_id("file")
            files.path(key, ".upload").write_text(json.dumps(line(0)))
            files.put(key, "asked.jsonl", "batch", files.path(key, ".upload"))
        config = ServiceConfig.load("model", f"server.name={name}")
        batches = Batches(files, config, mock.Mock(failure=None))
        if not batches.all():
            begun, _ = (batches.create({"input_file_id": files.all()[0].id, "endpoint": URL}) for _ in range(2))
            files.path(begun["id"], ".run").mkdir()
        batches.begin(100, told.append)
        end = time.monotonic() + 10
        while (found := sorted(batch["status"] for batch in batches.all())) != list(wanted) and time.monotonic() < end:
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.2)
        await batches.close()
        fcntl.flock(files._lock, fcntl.LOCK_UN)
        return found

    waits = ["failed", "validating"]
    assert asyncio.run(serve("other", *waits)) == waits and not ran
    assert any("'tiny' is not served here; this server has 'other'" in text for text in told)
    assert asyncio.run(serve("tiny", "completed", "failed")) == ["completed", "failed"] and len(ran) == 1


@pytest.mark.parametrize("how", ["cancelled", "expired"])
def test_a_batch_begun_under_another_name_ends_there_when_cancelled_or_expired(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokabatch.serve.batches.RETRY_SECONDS", 0.05)
    monkeypatch.setattr(BatchFiles, "write_results", lambda self, batch, code: (None, None, {}))

    async def main() -> str:
        files, told, key = StoredFiles(tmp_path), list[str](), new_id("file")
        files.path(key, ".upload").write_text(json.dumps(line(0)))
        files.put(key, "asked.jsonl", "batch", files.path(key, ".upload"))
        batches = Batches(files, ServiceConfig.load("model", "server.name=other"), mock.Mock(failure=None))
        batch = batches.create({"input_file_id": key, "endpoint": URL})
        files.path(batch["id"], ".run").mkdir()
        batches.begin(100, told.append)
        end = time.monotonic() + 10
        while not told and time.monotonic() < end:
            await asyncio.sleep(0.02)
        if how == "cancelled":
            batches.cancel(batch["id"])
        else:
            batch["expires_at"] = int(time.time()) - 1
        while batch["status"] != how and time.monotonic() < end:
            await asyncio.sleep(0.02)
        await batches.close()
        return batch["status"]

    assert asyncio.run(main()) == how


@pytest.mark.parametrize(
    ("status", "ends", "counts", "code"),
    [
        ("validating", "expired", (5, 0, 5), "batch_expired"),
        ("cancelling", "cancelled", (5, 0, 5), "batch_cancelled"),
        # All answers were there in time.
        ("finalizing", "completed", (0, 0, 0), None),
    ],
)
def test_a_batch_that_ends_before_its_turn_counts_every_line(
    status: str, ends: str, counts: tuple[int, int, int], code: str | None, tmp_path: Path
) -> None:
    """Those without a custom_id, and those that are no JSON, too; a request of two prompts is one."""
    asked = [*map(json.dumps, (line(0), line(1, prompt=["a", "b"]), {**line(2), "custom_id": None}, {"url": URL})), "{half"]

    async def main() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        files, key = StoredFiles(tmp_path), new_id("file")
        files.path(key, ".upload").write_text("\n".join(asked))
        files.put(key, "asked.jsonl", "batch", files.path(key, ".upload"))
        config = ServiceConfig.load("model")
        batch = Batches(files, config, mock.Mock(failure=None)).create(
            {"input_file_id": key, "endpoint": URL, "completion_window": "1m"}
        )
        # What a server leaves that was killed then.
        files.write_record(batch["id"], {**batch, "status": status, "expires_at": batch["created_at"]})
        batches = Batches(files, config, mock.Mock(failure=None))
        batch, end = batches.get(batch["id"]), time.monotonic() + 10
        while batch["status"] == status and time.monotonic() < end:
            await asyncio.sleep(0.02)
        written = files.path(batch["error_file_id"]).read_text().splitlines() if batch["error_file_id"] else []
        return batch, [json.loads(each) for each in written]

    batch, errors = asyncio.run(main())
    assert batch["status"] == ends
    assert batch["request_counts"] == dict(zip(("total", "completed", "failed"), counts, strict=True))
    assert [each["custom_id"] for each in errors] == (["r0", "r1", None, None, None] if code else [])
    assert {each["error"]["code"] for each in errors} == ({code} if code else set())
    assert len({each["id"] for each in errors}) == len(errors)


def test_the_records_of_files_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = StoredFiles(tmp_path)
    for number in range(3):
        first.path(f"file-{number:024}", ".upload").write_bytes(b"x")
        first.put(f"file-{number:024}", "a", "batch", first.path(f"file-{number:024}", ".upload"))
    fcntl.flock(first._lock, fcntl.LOCK_UN)
    (tmp_path / f"file-{'9' * 24}.jsonl").write_bytes(b"without a record")
    (tmp_path / f"file-{'8' * 24}.json").write_text("[]")
    again = StoredFiles(tmp_path)
    assert not (tmp_path / f"file-{'9' * 24}.jsonl").exists()
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} is read"))
    assert [file.id for file in again.all()] == [f"file-{number:024}" for number in range(3)]
    with monkeypatch.context() as full:
        full.setattr(Path, "unlink", mock.Mock(side_effect=OSError("no")))
        with pytest.raises(OSError, match="no"):
            again.delete("file-" + "0" * 24)
    assert again.get("file-" + "0" * 24) is not None, "it is still on the disk"
    again.delete("file-" + "0" * 24)
    assert again.get("file-" + "0" * 24) is None and len(again.all()) == 2


@pytest.mark.parametrize("where", ["feed", "draw"])
def test_a_defect_beside_the_run_ends_the_run(where: str) -> None:
    """Otherwise the batch would stand still for ever."""

    class Broken:
        failure, spare, eased = None, 8, asyncio.Event()

        def work(self, *prompts: Any, **options: Any) -> Any:
            raise ZeroDivisionError("a defect")

    async def check() -> None:
        requests = device.make_requests([[3], [4]])
        engine: Any = Broken() if where == "draw" else object()
        limits, loop = SchedulerLimits(4, 64, 8, 64, 16, None), asyncio.get_running_loop()
        replica = BackgroundReplica(engine, loop, requests, limits, (4096, 4096), lambda row, failed: None)
        with pytest.raises(EngineError, match="engine failed"):
            await asyncio.wait_for(asyncio.to_thread(lambda: list(replica.run())), 60)

    asyncio.run(check())
