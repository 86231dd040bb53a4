"""What ranks of a worker do together, on two GPUs or more of one host: python -m benchmarks.gpu.ranks PART... [--ranks 2]

    sums       sums over tensor ranks of a step's hidden states, by NCCL and through peers' memory, launched and captured
    overlap    products of a layer overlapped with the exchange of their tokens, and without
    sampling   draws from shards of the vocabulary against draws from all logits: the same tokens, and the time
    prefill    steps of long prompts through a whole model (--model), tokens scattered and products overlapped with their
               exchange where the table measured at start says so, and all tokens on every rank
    tokens     whole jobs, greedy, over --ranks in tensor and pipeline against one rank: how many tokens go by before the first
               that differs, and how far the log-probabilities before it are apart

Each part but the last is a world of processes of its own, ended after --timeout seconds. Times are medians on rank 0, in
microseconds, those of prefill in milliseconds. Several ranks add up in another order, so that `tokens` differ in a --dtype of
16 bits.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.gpu.__main__ import default_scratch, ensure_model
from benchmarks.gpu.prefill import prefill
from benchmarks.gpu.shapes import SHAPES
from tokabatch import Job
from tokabatch.engine.graphs import GraphRecorder
from tokabatch.model.partition import VocabularyShard
from tokabatch.model.sampling.sampler import sample
from tokabatch.model.sampling.slot_table import SlotTable, packed
from tokabatch.parallel.collectives import all_gather_last, all_reduce
from tokabatch.parallel.mesh import Mesh, Place
from tokabatch.parallel.peer_memory import PeerSums, measure_overlap
from tokabatch.report.progress import NullProgress
from tokabatch.runner.run import run
from tokabatch.scheduling.contracts import SlotInit

LAYERS = {"8B": SHAPES["llama-3.1-8b"].products, "70B": (("qkv", 8192, 10_240), ("o", 8192, 8192), ("gate_up", 8192, 57_344),
                                                        ("down", 28_672, 8192))}  # fmt: skip
"""Input and output features of a layer's products."""
WARM_UPS, REPEATS = 5, 20


def median_us(work: Callable[[], object]) -> float:
    """On the device, launches included."""
    for _ in range(WARM_UPS):
        work()
    torch.cuda.synchronize()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPEATS)]
    for begin, end in marks:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return 1000 * float(np.median([begin.elapsed_time(end) for begin, end in marks]))


def sums(mesh: Mesh, device: torch.device, show: Callable[..., None]) -> None:
    recorder = GraphRecorder()
    for columns in (2048, 4096, 8192):
        through_peers = PeerSums.meet(mesh, 8192, columns, torch.bfloat16, device)
        show(f"columns {columns}: peers' memory {'works' if through_peers else 'DOES NOT WORK'}")
        for rows in (1, 64, 512, 2048, 8192):
            given = torch.randn(rows, columns, device=device).bfloat16()
            expected = all_reduce(given.clone(), mesh).float()
            ways: dict[str, Callable[[], torch.Tensor]] = {"NCCL": lambda given=given: all_reduce(given, mesh)}
            if through_peers is not None:
                room = through_peers.room(rows)
                error = float((through_peers.sum(room.copy_(given)).float() - expected).abs().max())
                ways["peers"] = lambda room=room, sums=through_peers: sums.sum(room)
            else:
                error = float("nan")
            times = {name: median_us(work) for name, work in ways.items()}
            for name, work in ways.items():
                recorder.trial(work)
                graph, _ = recorder.capture(work)
                times[f"{name} captured"] = median_us(graph.replay)
            show(f"  {rows:5} rows ", *(f"{name} {us:8.1f}" for name, us in times.items()), f"largest difference {error:.3g}")


def overlap(mesh: Mesh, device: torch.device, show: Callable[..., None]) -> None:
    for shape, products in LAYERS.items():
        for tokens in (4096, 8192, 16_384):
            for name, inputs, outputs in products:
                is_column = name in ("qkv", "gate_up")
                own = (inputs, outputs // mesh.tensor_size) if is_column else (inputs // mesh.tensor_size, outputs)
                weight_t = (torch.randn(own[1], own[0], device=device) / own[0] ** 0.5).bfloat16().t()
                found = measure_overlap(weight_t, is_column, tokens, mesh)
                times = (found.overlapped, found.scattered, found.whole)
                show(f"{shape} {tokens:6} {name:8} overlapped, scattered, whole:", *(f"{1000 * each:8.0f}" for each in times))


def sampling(mesh: Mesh, device: torch.device, show: Callable[..., None]) -> None:
    vocab = 128_256
    shard = VocabularyShard.of(vocab, mesh)
    kinds: dict[str, dict[str, Any]] = {
        "random": {},
        "greedy": {"temperature": 0.0},
        "logprobs": {"logprobs": 0},
        "top_p": {"top_p": 0.9},
    }
    for rows in (256, 2048, 8192):
        # The same on every rank.
        logits = torch.randn(rows, vocab, generator=torch.Generator(device).manual_seed(rows), device=device).mul_(2).bfloat16()
        own = torch.zeros(rows, shard.width, dtype=logits.dtype, device=device)
        own[:, : len(shard.tokens)] = logits[:, shard.tokens.start : shard.tokens.stop]
        for name, params in kinds.items():
            if name == "top_p" and rows > 2048:
                continue
            inputs = inputs_of(rows, device, **params)
            equal = torch.equal(sample(own, inputs, shard=shard).packed, sample(logits, inputs).packed)
            whole = median_us(lambda inputs=inputs, logits=logits: sample(logits, inputs))
            sharded = median_us(lambda inputs=inputs, own=own: sample(own, inputs, shard=shard))
            gathered = median_us(lambda inputs=inputs, own=own: sample(all_gather_last(own, mesh)[:, :vocab], inputs))
            show(
                f"{rows:5} rows {name:9} {'equal to the last bit' if equal else 'DIFFERENT'}; all logits here {whole:8.0f}, "
                f"from shards {sharded:8.0f}, logits gathered first {gathered:8.0f}"
            )


def inputs_of(rows: int, device: torch.device, temperature: float = 1.0, top_p: float = 1.0, logprobs: int = -1) -> Any:
    places = np.arange(rows)
    zero, one = np.zeros(rows, np.int32), np.ones(rows, np.float32)
    inits = SlotInit(
        slot=places.astype(np.int32),
        row=places.astype(np.int64),
        sample=zero,
        seed=zero.astype(np.int64),
        temperature=one * np.float32(temperature),
        top_p=one * np.float32(top_p),
        top_k=zero,
        min_p=one * np.float32(0.0),
        logprobs=zero + np.int32(logprobs),
    )
    table = SlotTable(rows, device)
    table.open(*packed(inits))
    on_device = torch.arange(rows, device=device)
    return table.inputs(places.astype(np.int32), on_device.int(), on_device.int())


def layouts_of(ranks: int) -> dict[str, dict[str, int]]:
    """One rank, and so many in every way to multiply tensor and pipeline."""
    found: dict[str, dict[str, int]] = {"one rank": {}}
    for tensor in range(ranks, 0, -1):
        if ranks % tensor == 0 and ranks > 1:
            found[f"tensor {tensor} x pipeline {ranks // tensor}"] = {"tensor": tensor, "pipeline": ranks // tensor}
    return found


def tokens(model: Path, ranks: int, device: str, dtype: str) -> None:
    """64 prompts of random tokens, half of them with a common header, 8 samples each."""
    rng = np.random.default_rng(3)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        header = rng.integers(3, 250, 100).tolist()
        rows = [
            {"ids": header[: row % 2 * 100] + rng.integers(3, 250, int(rng.integers(5, 200))).tolist()} for row in range(64)
        ]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        first: dict[tuple[int, int], tuple[list[int], list[dict[str, float]]]] = {}
        for name, layout in layouts_of(ranks).items():
            out = folder / name.replace(" ", "-")
            values: dict[str, Any] = {
                "model": {"path": str(model), "dtype": dtype},
                "input": {"path": str(folder / "rows.jsonl")},
                "prompt": {"token_ids": "ids"},
                "generation": {"n": 8, "temperature": 0.0, "max_tokens": 32, "ignore_eos": True, "logprobs": 0},
                "engine": {"device": device, "process": True, "replicas": 1, "max_restarts": 1, **layout},
                "output": {"path": str(out), "columns": []},
            }
            try:
                run(Job.load(values), NullProgress())
            except Exception as error:
                print(f"{name:21} FAILED: {error}", flush=True)
                continue
            columns = ["row_index", "sample_index", "token_ids", "logprobs"]
            table = pa.concat_tables([pq.read_table(file, columns=columns) for file in (out / "data").glob("*.parquet")])
            found = {
                (each["row_index"], each["sample_index"]): (each["token_ids"], each["logprobs"]) for each in table.to_pylist()
            }
            first = first or found
            alike, apart = [], []
            for key, (ids, logprobs) in found.items():
                equal = np.array(ids) == np.array(first[key][0])
                alike.append(len(equal) if equal.all() else int(equal.argmin()))
                apart += [abs(a["logprob"] - b["logprob"]) for a, b in zip(logprobs, first[key][1], strict=True)][: alike[-1]]
            at_all, whole = np.mean(np.array(alike) > 0), np.mean(np.array(alike) == 32)
            print(
                f"{name:21} {len(alike)} samples: alike for {np.mean(alike):.1f} of 32 tokens, {at_all:.0%} in the first, "
                f"{whole:.0%} to the end; log-probabilities {np.mean(apart):.2g} apart on average, "
                f"{np.max(apart, initial=0.0):.2g} at most",
                flush=True,
            )


PARTS: dict[str, Callable[[Mesh, torch.device, Callable[..., None]], None]] = {
    "sums": sums,
    "overlap": overlap,
    "sampling": sampling,
}


def serve(place: Place, part: str, on: str, folder: Path, dtype: str) -> None:
    device = torch.device(on, place.rank) if on == "cuda" else torch.device(on)
    mesh = Mesh.join(place, device)

    def show(*words: str) -> None:
        if place.rank == 0:
            print(*words, flush=True)

    try:
        with torch.inference_mode():
            if part == "prefill":
                prefill(mesh, device, show, folder, getattr(torch, dtype))
            else:
                PARTS[part](mesh, device, show)
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "prefill", "tokens"])
    parser.add_argument("--model", default="llama-3.2-1b", choices=list(SHAPES), help="of prefill and tokens")
    parser.add_argument("--device", default="cuda", help="of prefill and tokens")
    parser.add_argument("--dtype", default="bfloat16", help="of prefill and tokens")
    parser.add_argument(
        "--scratch", type=Path, help="folder for the model of prefill and tokens (default: memory, or a temporary one)"
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds that a part may take")
    arguments = parser.parse_args()
    context, failed = multiprocessing.get_context("spawn"), False
    for part in arguments.parts:
        print(f"== {part}", flush=True)
        if part == "tokens":
            scratch = arguments.scratch or default_scratch(arguments.model)
            tokens(ensure_model(arguments.model, scratch), arguments.ranks, arguments.device, arguments.dtype)
            continue
        with tempfile.TemporaryDirectory() as folder:
            scratch = arguments.scratch or default_scratch(arguments.model)
            model = ensure_model(arguments.model, scratch) if part == "prefill" else Path(folder)
            places = [Place(rank, arguments.ranks, 1, Path(folder) / "meeting") for rank in range(arguments.ranks)]
            more = part, arguments.device, model, arguments.dtype
            ranks = [context.Process(target=serve, args=(place, *more)) for place in places]
            for rank in ranks:
                rank.start()
            end = time.monotonic() + arguments.timeout
            for rank in ranks:
                rank.join(max(0.0, end - time.monotonic()))
            ended = [rank.exitcode for rank in ranks]
            for rank in ranks:
                rank.kill()
                rank.join()
            if ended != [0] * arguments.ranks:
                failed = True
                print(f"{part} FAILED: exit codes {ended} (None: not done after {arguments.timeout:.0f} s)", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
