"""Steps of long prompts through a whole model over tensor ranks: the part `prefill` of `benchmarks.gpu.ranks`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tokabatch.attention import choose_backend, create_backend
from tokabatch.engine.replica_sizes import ReplicaSizes, kv_shape
from tokabatch.engine.worker import Worker
from tokabatch.model.families import read_spec
from tokabatch.model.weights import load_decoder
from tokabatch.parallel.mesh import Mesh
from tokabatch.parallel.peer_memory import PeerSums
from tokabatch.runner.replica import scheduler_limits
from tokabatch.scheduling.contracts import Requests, SamplingParams
from tokabatch.scheduling.scheduler import Scheduler
from tokabatch.scheduling.stop_conditions import StopRules

PROMPTS = (1, 2, 4, 8, 16)
WARM_UPS, REPEATS = 2, 5


def prefill(mesh: Mesh, device: torch.device, show: Callable[..., None], folder: Path, dtype: torch.dtype) -> None:
    """The model's weights are in `folder`. Steps are launched kernel by kernel, as those of long prompts are."""
    spec, rng, prompt = read_spec(folder), np.random.default_rng(0), 2048 if device.type == "cuda" else 32
    most = PROMPTS[-1] * prompt
    sizes = ReplicaSizes(16, 2 * most // 16, 64, most, prompt // 16 + 2, 0, 1)
    backend, _ = choose_backend(device.type, dtype, spec.head_dim)
    decoder = load_decoder(folder, spec, dtype, device, mesh)
    if device.type == "cuda":
        decoder.peer_sums = PeerSums.meet(mesh, most, spec.hidden_size, dtype, device)
        decoder.measure_scattering(most)
    show(f"scattered from {decoder.scattering.overlapped if decoder.scattering else 'no size on'}")
    shape = kv_shape(spec, sizes.page_size, sizes.num_pages, sizes.max_running, sizes.max_pages_per_sequence, mesh)
    worker = Worker(decoder, create_backend(backend, shape, dtype, device, None), sizes)
    ways = {"scattered": decoder.scattering, "on every rank": None}
    for prompts in PROMPTS:
        tokens = rng.integers(3, 250, prompts * prompt).astype(np.int32)
        length = np.full(prompts, prompt, np.int32)
        requests = Requests(
            row_index=np.arange(prompts),
            tokens=tokens,
            start=np.arange(prompts, dtype=np.int64) * prompt,
            length=length,
            lcp=np.zeros(prompts, np.int32),
            params=np.zeros(prompts, np.int32),
            sampling=(SamplingParams(max_tokens=1),),
        )
        times: list[str] = []
        for name, scattering in ways.items():
            decoder.scattering = scattering
            taken: list[float] = []
            for _ in range(WARM_UPS + REPEATS):
                stops = StopRules(requests.sampling, [], spec.vocab_size, None)
                step = Scheduler(requests, scheduler_limits(sizes), stops).schedule()
                assert step is not None and step.num_tokens == len(tokens)
                begin = time.perf_counter()
                worker.run(step)
                taken.append(time.perf_counter() - begin)
            times.append(f"{name} {1e3 * float(np.median(taken[WARM_UPS:])):8.2f} ms")
        show(f"{len(tokens):6,} tokens ", *times)
