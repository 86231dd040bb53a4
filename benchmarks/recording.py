"""What it takes to record the finished samples of a fleet: python -m benchmarks.recording MODEL GSM8K [--samples 84416]

The experiment is that of `benchmarks.gpu.real`. Its samples are made up, text of the answers of GSM8K's training rows of 51
tokens on average, and come in messages of so many (`--message`), as members send them, as fast as main takes them, until all
are on the disk. What is printed is CPU time a sample: of a member, which packs them; of main's thread, and of its process; of
the processes that prepare samples (`--processes`; 0: main does that, as for a replica in its own process), and of the judges.
`--profile` prints where main's goes.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pickle
import pstats
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil

from benchmarks.gpu.real import job as experiment
from tokabatch import Job
from tokabatch.output.claim import Claim
from tokabatch.runner.preparers import num_preparers
from tokabatch.runner.recorder import Recorder
from tokabatch.runner.resume import Reuse, start
from tokabatch.scheduling.completion_batch import PackedOnTheWay
from tokabatch.scheduling.contracts import NO_COUNTS, Completion

MEAN_TOKENS = 51


def messages(recorded: list[list[int]], rows: int, samples: int, message: int) -> Iterator[PackedOnTheWay]:
    """Samples of all rows side by side, as they finish."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.geometric(1 / MEAN_TOKENS, samples), 320)
    places = rng.permutation(samples)
    for begin in range(0, samples, message):
        batch = PackedOnTheWay()
        for place, length in zip(
            places[begin : begin + message].tolist(), lengths[begin : begin + message].tolist(), strict=True
        ):
            text = recorded[place % len(recorded)]
            ids = np.array((text * (1 + length // len(text)))[:length], np.int32)
            batch.append(
                Completion(
                    row_index=place % rows,
                    sample_index=place // rows,
                    token_ids=ids,
                    finish_reason="length",
                    stop_reason=None,
                    num_prompt_tokens=1000,
                    counts=NO_COUNTS,
                )
            )
        yield batch


def cpu_of_children(processes: int) -> tuple[float, float]:
    """CPU seconds of the processes that prepare samples, which end by themselves by now, and of the judges, which are theirs
    if there are any, or else ours."""
    children, until = psutil.Process().children(), time.monotonic() + 10.0
    while processes and time.monotonic() < until and any(child.status() != psutil.STATUS_ZOMBIE for child in children):
        time.sleep(0.02)
    times = [child.cpu_times() for child in children]
    own = sum(each.user + each.system for each in times)
    return (own, sum(each.children_user + each.children_system for each in times)) if processes else (0.0, own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("gsm8k", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="job keys to change")
    parser.add_argument("--samples", type=int, default=84_416)
    parser.add_argument("--message", type=int, default=75)
    parser.add_argument("--processes", type=int, help="that prepare samples; as many as a run has for --replicas, if not given")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="tokabatch-recording-"))
    job = Job.load(experiment(arguments.model, arguments.gsm8k, scratch / "out"), "engine.device=cpu", *arguments.overrides)
    try:
        with Claim(scratch / "out") as claim:
            started = start(job, claim, lambda *_: None, Reuse(), print)
            workload = started.left
            answers = [json.loads(line)["answer"] for line in next(arguments.gsm8k.glob("train*.jsonl")).open()]
            texts = [list(each) for each in workload.tokenizer.encode_batch(answers, add_special_tokens=False)]
            batches = list(messages(texts, len(workload.requests), arguments.samples, arguments.message))
            packing = time.thread_time()
            sent = [pickle.dumps(batch, pickle.HIGHEST_PROTOCOL) for batch in batches]
            packing = time.thread_time() - packing
            processes = arguments.processes
            if processes is None:
                processes = num_preparers(job, arguments.replicas)
            recorder = Recorder(job, workload, claim, started.committed, processes=processes)
            profile = cProfile.Profile()
            begin, cpu, process = time.perf_counter(), time.thread_time(), time.process_time()
            if arguments.profile:
                profile.enable()
            for message in sent:
                recorder.add(pickle.loads(message))
            recorder.finish()
            profile.disable()
            seconds, cpu, process = time.perf_counter() - begin, time.thread_time() - cpu, time.process_time() - process
            preparing, judging = cpu_of_children(processes)
            recorder.close()
            micro = 1e6 / arguments.samples
            print(f"{arguments.samples:,} samples in {seconds:.2f} s; us of CPU a sample: member {micro * packing:.1f}, "
                  f"main's thread {micro * cpu:.1f} (its process {micro * process:.1f}), {processes} preparing "
                  f"{micro * preparing:.1f}, judges {micro * judging:.1f}")  # fmt: skip
            if arguments.profile:
                pstats.Stats(profile).sort_stats("tottime").print_stats(22)
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
