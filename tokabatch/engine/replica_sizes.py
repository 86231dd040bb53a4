"""The sizes of a replica: running samples, tokens of a step and KV pages, from the device's memory and the needs of the job.

On a CPU the number of pages is computed from free memory less the weights. On a GPU this computation only rejects jobs that
cannot fit, before anything is loaded; the number of pages is measured when the worker has run its largest step (`memory`).
Sizes never exceed what the job can use, so that a small job allocates a small cache.
"""

from __future__ import annotations

import sys
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import psutil
import torch

from tokabatch.attention.base import KVShape
from tokabatch.errors import JobError
from tokabatch.job import EngineConfig
from tokabatch.job.engine_limits import least_pages, refuse_limits, refuse_small_cache
from tokabatch.model.partition import VocabularyShard, kv_heads, stage_layers
from tokabatch.model.spec import ModelSpec, layer_prefix, tensor_shapes
from tokabatch.number_text import counted
from tokabatch.parallel.mesh import Mesh
from tokabatch.scheduling.contracts import Alike

MOST_STEPS = 5
"""The most steps in flight on a worker with several pipeline stages: fewer than the sets of buffers of a GPU backend
(`RING`)."""
CGROUP = Path("/sys/fs/cgroup")
MIN_GROUP, MIN_PREFIX_TOKENS = 4, 32
REPORTED_GROWTH, HOST_SHARE = 1.5, 0.6
"""The ratio of the memory allocated for log-probabilities to their size (`scheduling.generated`), and the share of the host's
free memory that they may take if the cache is on a GPU."""
ABSENT_WORKING_BYTES, ABSENT_SHARE = 4 << 30, 0.9
"""For a GPU that is not present: the memory of a step beside weights and logits, and the share of the rest for the cache."""


@dataclass(frozen=True, slots=True)
class DeviceDefaults:
    """What `auto` means on a kind of device. `memory_share` is the share for the cache of the memory left after weights and
    working space; `max_running` and `prefill_tokens` apply to devices without a cost model."""

    max_running: int
    prefill_tokens: int
    memory_share: float


DEFAULTS = {
    "cpu": DeviceDefaults(max_running=512, prefill_tokens=1024, memory_share=0.6),
    "cuda": DeviceDefaults(max_running=8192, prefill_tokens=8192, memory_share=1.0),
}


@dataclass(frozen=True, slots=True)
class WorkloadFacts:
    """The needs of the job's prompts, in tokens and samples."""

    num_samples: int
    longest_sequence: int
    """The longest prompt plus its max_tokens."""
    shortest_sequence: int
    """The smallest such sum."""
    longest_output: int
    """The largest max_tokens."""
    num_prompts: int
    unique_prompt_tokens: int
    """Prompt tokens with every shared prefix counted once."""
    logprobs: int = -1
    """The most alternatives that a sample reports for each token; -1 if no log-probabilities are reported."""
    reported_bytes: int = 0
    """Bytes of the log-probabilities and alternatives of all samples if each reached its max_tokens."""
    is_alike: bool = False
    """Whether all samples have one given length, `longest_output`."""


@dataclass(frozen=True, slots=True)
class ReplicaSizes:
    """The sizes of a replica, as plain numbers, which are sent between processes."""

    page_size: int
    num_pages: int
    max_running: int
    max_step_tokens: int
    max_pages_per_sequence: int
    min_group: int
    """The fewest samples that attend to a prefix together; 0 turns Hydragen off."""
    min_prefix_pages: int
    useful_pages: int = 0
    """The most pages that the job can fill and whose log-probabilities fit in the host's memory."""
    least_pages: int = 1
    """The pages of the shortest sample."""
    asked_tokens: int | None = None
    """The job's engine.kv_cache_tokens; None for `auto`."""
    alike: Alike | None = None
    """See `SchedulerLimits`."""

    @property
    def needed_pages(self) -> int:
        """The pages that the longest sample needs: one more than its own, as the last page of its prompt is copied for it and
        the original kept."""
        return self.max_pages_per_sequence + 1


def decide_sizes(
    config: EngineConfig,
    spec: ModelSpec,
    dtype: torch.dtype,
    facts: WorkloadFacts,
    device: str = "cpu",
    *,
    prefill_tokens: int | None = None,
    running_samples: int | None = None,
    absent_memory: int | None = None,
    replicas: int = 1,
    fp8: bool = False,
) -> ReplicaSizes:
    """Return the sizes of a replica.

    `prefill_tokens` and `running_samples` are the cost model's values for the device, if there is one. `absent_memory` is the
    memory in bytes of a GPU that is not present, whose number of pages is only an estimate. The host's memory is divided
    equally between `replicas`. `fp8` is whether the weights of the layers are stored in fp8. Raises JobError, with the numbers
    and the key to change, if not even the shortest sample fits.
    """
    page = config.page_size
    refuse_limits(config, spec.context_length)
    defaults = DEFAULTS[device]
    worth = defaults.max_running if running_samples is None else running_samples
    wanted = worth if config.max_running == "auto" else config.max_running
    max_running = max(1, min(wanted, facts.num_samples))
    prefill = defaults.prefill_tokens if prefill_tokens is None else prefill_tokens
    step = prefill + max_running if config.max_step_tokens == "auto" else config.max_step_tokens
    if step < max_running:
        raise JobError(
            f"engine.max_step_tokens is {step}, less than the {counted(max_running, 'sample')} that may run at once; "
            f"write at least {max_running}, or lower engine.max_running"
        )
    per_sequence = -(-facts.longest_sequence // page)
    # The most that the job can fill: every prompt page once, and for each running sample its output and a copied page.
    prompt_pages = min(facts.unique_prompt_tokens // page + 2 * facts.num_prompts, max_running * per_sequence)
    prefix = MIN_PREFIX_TOKENS if config.hydragen_min_prefix == "auto" else config.hydragen_min_prefix
    group = MIN_GROUP if config.hydragen_min_group == "auto" else config.hydragen_min_group
    sizes = ReplicaSizes(
        page_size=page,
        num_pages=0,
        max_running=max_running,
        max_step_tokens=step,
        max_pages_per_sequence=per_sequence,
        min_group=0 if config.hydragen is False else group,
        min_prefix_pages=max(1, -(-prefix // page)),
        useful_pages=prompt_pages + max_running * (-(-facts.longest_output // page) + 2) + per_sequence + 1,
        least_pages=least_pages(facts.shortest_sequence, page),
        asked_tokens=None if config.kv_cache_tokens == "auto" else config.kv_cache_tokens,
        alike=_alike(facts, page, replicas) if config.max_running == "auto" else None,
    )
    available = available_memory()
    host = available // replicas

    def pages_of(share: int) -> int:
        """Return how many pages fit where the host's memory is divided between so many replicas."""
        return _fitting_pages(config, spec, dtype, facts, device, max_running, available // share, absent_memory, fp8)

    fitting = pages_of(replicas)
    if device == "cuda" and absent_memory is None:
        # Only the worker can measure what fits on the GPU; the log-probabilities on the host are limited here.
        reported = pages_reported(facts, max_running, page, int(host * HOST_SHARE))
        sizes = replace(sizes, useful_pages=min(sizes.useful_pages, reported))
        fitting = min(fitting, reported)
    refuse_small_cache(config, sizes.least_pages)
    if device == "cpu" and fitting < sizes.least_pages <= pages_of(1):
        # The largest number of replicas that fits: the first in this order that does not follows it.
        most = bisect(range(1, replicas), False, key=lambda share: pages_of(share) < sizes.least_pages)
        raise JobError(
            f"engine.replicas is {replicas}: each gets 1/{replicas} of the memory, which is too little for the weights and the "
            f"KV cache; write a smaller number, at most about {most}"
        )
    return settle_pages(sizes, fitting)


def _alike(facts: WorkloadFacts, page_size: int, replicas: int) -> Alike | None:
    """Return what a replica draws, if all samples have one given length. A sample fills its part of the prompts' pages, its
    output, and half of two further pages."""
    if not facts.is_alike:
        return None
    pages = (facts.unique_prompt_tokens / facts.num_samples + facts.longest_output) / page_size + 1
    return Alike(-(-facts.num_samples // replicas), pages)


def settle_pages(sizes: ReplicaSizes, fitting: int) -> ReplicaSizes:
    """Return the sizes with the number of pages, given that `fitting` pages fit in memory: the most that the job can fill, or
    what engine.kv_cache_tokens says. Samples that need more pages become error rows (`Scheduler.settle_pages`). Raises JobError
    if not even the shortest sample fits, or if engine.kv_cache_tokens exceeds the memory."""
    page, needed, least, asked = sizes.page_size, sizes.needed_pages, sizes.least_pages, sizes.asked_tokens
    if asked is None:
        budget = fitting
    else:
        # A small job does not fill the configured size.
        budget = min(asked // page, max(sizes.useful_pages, needed))
        if least <= budget and fitting < budget:
            raise JobError(
                f"engine.kv_cache_tokens is {asked}, but memory holds about {fitting * page} beside the weights; write auto or "
                "at most that"
            )
    if budget < least:
        # One that the job asks for is refused before (`engine_limits.refuse_small_cache`).
        if budget <= 0:
            raise JobError(
                "model.path: beside the weights, the workspace and other processes, no memory is left for the KV cache; use a "
                "smaller model, end other processes on the device, lower generation.logprobs or engine.max_running if they "
                "are high, or use a machine with more memory (`tokabatch plan JOB --simulate --device h100` plans for a device "
                "that this machine does not have)"
            )
        raise JobError(
            f"the shortest sample needs {counted(least * page, 'token')} of KV cache (prompt plus max_tokens), but "
            f"{budget * page} fit; use a machine with more memory, lower generation.logprobs or engine.max_running where they "
            "are high, or lower generation.max_tokens"
        )
    num_pages = min(budget, max(sizes.useful_pages, needed))
    return replace(sizes, num_pages=num_pages, max_pages_per_sequence=min(sizes.max_pages_per_sequence, num_pages))


def _fitting_pages(
    config: EngineConfig,
    spec: ModelSpec,
    dtype: torch.dtype,
    facts: WorkloadFacts,
    device: str,
    max_running: int,
    host_memory: int,
    absent_memory: int | None,
    fp8: bool,
) -> int:
    """Return the number of pages that fit in the device's memory beside the weights. On a GPU it is an upper bound, without the
    memory of a step; on an absent GPU of `absent_memory` bytes, the memory of a step is estimated."""
    share = DEFAULTS[device].memory_share
    ranks = ranks_of(config)
    if device == "cpu":
        left = host_memory - sum(weight_bytes(spec, dtype, head_apart=True, mesh=mesh) for mesh in ranks)
        return pages_reported(facts, max_running, config.page_size, int(left * share), page_bytes(config, spec, dtype, ranks))
    if absent_memory is not None:
        share, free = ABSENT_SHARE, absent_memory - logits_bytes(max_running, spec, dtype) - ABSENT_WORKING_BYTES
    else:
        free = _free_gpu_memory()
    # Every rank holds its part of the same pages: the rank with the least memory left determines their number.
    return min(
        int((free - weight_bytes(spec, dtype, False, mesh, fp8=fp8)) * share) // page_bytes(config, spec, dtype, [mesh])
        for mesh in ranks
    )


def ranks_of(config: EngineConfig) -> list[Mesh]:
    """Return the ranks of a worker, each with its position in the mesh."""
    return [Mesh(rank, config.tensor, config.pipeline) for rank in range(config.tensor * config.pipeline)]


def pages_reported(facts: WorkloadFacts, max_running: int, page_size: int, memory: int, page_bytes: int = 0) -> int:
    """Return how many pages of `page_bytes` bytes fit in `memory` bytes together with the log-probabilities of the samples in
    them. Those are bounded by the tokens in the cache, by the longest outputs of the running samples, and by the whole
    job's."""
    token = reported_token_bytes(facts.logprobs)
    most = int(REPORTED_GROWTH * min(max_running * facts.longest_output * token, facts.reported_bytes))
    each = int(page_bytes + REPORTED_GROWTH * page_size * token)
    if not each or (memory >= most and not page_bytes):
        return sys.maxsize
    return max(memory // each, (memory - most) // page_bytes if memory >= most else 0)


def reported_token_bytes(logprobs: int) -> int:
    """Return the bytes of a token's log-probability and `logprobs` alternatives; -1 means that none are reported."""
    return 4 + 8 * logprobs if logprobs >= 0 else 0


def page_bytes(config: EngineConfig, spec: ModelSpec, dtype: torch.dtype, ranks: Sequence[Mesh] | None = None) -> int:
    """Return the bytes of a page, keys and values of all layers, on `ranks` together; None means all ranks of the worker."""
    kept = torch.float8_e4m3fn if config.kv_cache_dtype == "fp8" else dtype
    ranks = ranks_of(config) if ranks is None else ranks
    return sum(kv_shape(spec, config.page_size, 1, 1, 1, mesh).bytes_per_page(kept) for mesh in ranks)


def _free_gpu_memory() -> int:
    """Return the free bytes of the GPU, or its total if NVML is not available.

    The query needs no CUDA context, which would take several hundred megabytes of the GPU for the lifetime of this process:
    only the worker needs one.
    """
    total = int(torch.cuda.get_device_properties(0).total_memory)
    try:
        return total - int(torch.cuda.device_memory_used())
    except Exception:  # of NVML's bindings, which are no dependency: missing, of another version, or without permission
        return total


def available_memory() -> int:
    """Return the bytes of host memory that this process may still allocate: the machine's, or the container's if that is
    less."""
    available = int(psutil.virtual_memory().available)
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):
        return available
    return min(available, limit - used)


def weight_bytes(spec: ModelSpec, dtype: torch.dtype, head_apart: bool, mesh: Mesh | None = None, *, fp8: bool = False) -> int:
    """Return the bytes of the weights of a rank, or of all if `mesh` is None.

    With `head_apart`, tied embeddings count twice, as a CPU keeps the head in a layout of its own. With `fp8`, the matrices of
    the layers take one byte for each element and a float32 scale for each output.
    """
    mesh = mesh or Mesh.single()
    own = replace(
        spec,
        num_layers=len(stage_layers(spec, mesh)),
        num_heads=len(mesh.shard(spec.num_heads)),
        num_kv_heads=len(kv_heads(spec, mesh)),
        intermediate_size=len(mesh.shard(spec.intermediate_size)),
        vocab_size=VocabularyShard.of(spec.vocab_size, mesh).width,
    )
    shapes = tensor_shapes(own)
    numbers, vocabulary = sum(map(prod, shapes.values())), own.vocab_size * own.hidden_size
    # With tied embeddings the last stage holds the embedding as its head.
    held = mesh.is_first_stage + mesh.is_last_stage
    if spec.tied_embeddings:
        numbers += vocabulary * (min(held, 1 + head_apart) - 1)
    else:
        numbers += vocabulary * (held - 2)
    if not fp8:
        return numbers * dtype.itemsize
    rounded = [
        shape for name, shape in shapes.items() if name.startswith(layer_prefix(0).removesuffix("0.")) and len(shape) == 2
    ]
    in_fp8 = sum(map(prod, rounded))
    return (numbers - in_fp8) * dtype.itemsize + in_fp8 + 4 * sum(shape[0] for shape in rounded)


def logits_bytes(max_running: int, spec: ModelSpec, dtype: torch.dtype) -> int:
    """Return the bytes of the logits of `max_running` samples: in `dtype` as computed, and in float32 for the sampler."""
    return max_running * spec.vocab_size * (dtype.itemsize + 4)


def kv_shape(
    spec: ModelSpec, page_size: int, num_pages: int, num_slots: int, max_pages: int, mesh: Mesh | None = None
) -> KVShape:
    """Return the shape of one rank's cache: the layers of its stage and its own heads."""
    mesh = mesh or Mesh.single()
    return KVShape(
        num_layers=len(stage_layers(spec, mesh)),
        num_heads=len(mesh.shard(spec.num_heads)),
        num_kv_heads=len(kv_heads(spec, mesh)),
        head_dim=spec.head_dim,
        page_size=page_size,
        num_pages=num_pages,
        num_slots=num_slots,
        max_pages=max_pages,
    )
