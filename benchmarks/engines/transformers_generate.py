"""transformers `generate` in static batches, as well as a careful user can drive it.

Samples are sorted by prompt length (a user knows no output length beforehand), left-padded and run in batches
of a tuned size; a batch runs until its longest sample is done, each row ended by a stopping criterion of its
own. The n samples of a prompt are rows of their own, which is what `num_return_sequences` makes of them before
its prefill.

`prefix=header` goes beyond what `generate` does by itself: the prefix common to all prompts is computed once by
hand and its cache copied into every batch. It is reported as a line of its own where asked for.

Shape legend: B rows of a batch, W padded prompt width.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoModelForCausalLM, CompileConfig, DynamicCache, GenerationConfig, StoppingCriteria

from benchmarks.engines import Axis, Int32, Result
from benchmarks.workloads import Workload

WARM_UP_TOKENS = 3


@dataclass(frozen=True, slots=True)
class Settings:
    batch_size: int = 32
    cache: Literal["dynamic", "static"] = "dynamic"
    prefix: Literal["none", "header"] = "none"
    compile: bool = False


SWEEP = (
    Axis("batch_size", (32, 64, 128, 256)),
    Axis("batch_size", (32, 16, 8)),
    Axis("cache", ("static",), ordered=False),
)


class OutputLengths(StoppingCriteria):
    """A row is done when it has its own number of new tokens."""

    def __init__(self, prompt_width: int, length_B: torch.Tensor) -> None:
        self.prompt_width = prompt_width
        self.length_B = length_B

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.length_B <= input_ids.shape[1] - self.prompt_width


@dataclass(frozen=True, slots=True)
class Batch:
    """`sample_B` are sample numbers. Padding stands between the common prefix (which may be empty) and the row's own
    tokens."""

    sample_B: list[int]
    token_ids_BW: torch.Tensor
    mask_BW: torch.Tensor
    length_B: torch.Tensor


@torch.inference_mode()
def generate(folder: Path, workload: Workload, settings: Settings) -> Result:
    if settings.prefix == "header" and settings.cache == "static":
        raise ValueError("prefix=header needs cache=dynamic")
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="sdpa").eval()
    prefix = workload.common_prefix() if settings.prefix == "header" else 0
    batches = static_batches(workload, settings.batch_size, prefix)
    for batch in (batches[0], batches[-1]):
        limited = Batch(batch.sample_B, batch.token_ids_BW, batch.mask_BW, batch.length_B.clamp(max=WARM_UP_TOKENS))
        run_batch(model, limited, settings, workload, header_cache(model, workload, prefix))
    started, cpu_started = time.perf_counter(), time.process_time()

    outputs: list[Int32 | None] = [None] * workload.num_samples
    header = header_cache(model, workload, prefix)
    for batch in batches:
        sequence_BL = run_batch(model, batch, settings, workload, header).numpy()
        new_BL = sequence_BL[:, batch.token_ids_BW.shape[1] :].astype(np.int32)
        for row, (sample, length) in enumerate(zip(batch.sample_B, batch.length_B.tolist(), strict=True)):
            outputs[sample] = new_BL[row, :length].copy()
    finished, cpu_finished = time.perf_counter(), time.process_time()

    return Result(
        outputs=tuple(output for output in outputs if output is not None),
        seconds=finished - started,
        cpu_seconds=cpu_finished - cpu_started,
        load_seconds=started - began,
        computed_prefill_tokens=prefix + sum((b.token_ids_BW.shape[1] - prefix) * len(b.sample_B) for b in batches),
        computed_decode_tokens=sum(int(b.length_B.max()) * len(b.sample_B) for b in batches),
    )


def static_batches(workload: Workload, batch_size: int, prefix: int) -> list[Batch]:
    """Longest prompts first, so that the peak of memory comes at once."""
    samples = sorted(range(workload.num_samples), key=lambda sample: -len(workload.prompts[sample // workload.n]))
    return [padded_batch(workload, samples[start : start + batch_size], prefix) for start in range(0, len(samples), batch_size)]


def padded_batch(workload: Workload, samples: list[int], prefix: int) -> Batch:
    prompts = [workload.prompts[sample // workload.n] for sample in samples]
    width = max(len(prompt) for prompt in prompts)
    token_ids_BW = np.zeros((len(samples), width), dtype=np.int64)
    mask_BW = np.zeros((len(samples), width), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        own = len(prompt) - prefix
        for target_W, values in ((token_ids_BW[row], prompt), (mask_BW[row], np.ones_like(prompt))):
            target_W[:prefix] = values[:prefix]
            target_W[width - own :] = values[prefix:]
    lengths = workload.output_length_PN.reshape(-1)[samples]
    return Batch(
        sample_B=samples,
        token_ids_BW=torch.from_numpy(token_ids_BW),
        mask_BW=torch.from_numpy(mask_BW),
        length_B=torch.from_numpy(lengths.astype(np.int64)),
    )


def header_cache(model: Any, workload: Workload, prefix: int) -> DynamicCache | None:
    """Keys and values of the common prefix, for one row."""
    if not prefix:
        return None
    cache = DynamicCache(config=model.config)
    model(torch.from_numpy(workload.prompts[0][:prefix]).long()[None], past_key_values=cache, logits_to_keep=1)
    return cache


def expanded(header: DynamicCache, rows: int, config: Any) -> DynamicCache:
    cache = DynamicCache(config=config)
    for index, layer in enumerate(header.layers):
        cache.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), index)
    return cache


def run_batch(model: Any, batch: Batch, settings: Settings, workload: Workload, header: DynamicCache | None) -> torch.Tensor:
    sampling = {"do_sample": True, "temperature": workload.temperature, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(
        max_new_tokens=int(batch.length_B.max()),
        use_cache=True,
        pad_token_id=0,
        disable_compile=not settings.compile,
        **(sampling if workload.temperature else {"do_sample": False}),
    )
    if settings.compile:
        config.compile_config = CompileConfig(mode="default", dynamic=True, fullgraph=False)
        config.compile_config._compile_all_devices = True
    if header is not None:
        cache = {"past_key_values": expanded(header, len(batch.sample_B), model.config)}
    else:
        cache = {"cache_implementation": "static"} if settings.cache == "static" else {}
    return model.generate(
        batch.token_ids_BW,
        attention_mask=batch.mask_BW,
        generation_config=config,
        stopping_criteria=[OutputLengths(batch.token_ids_BW.shape[1], batch.length_B)],
        **cache,
    )
