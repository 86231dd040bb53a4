"""A model and its tokenizer, opened and checked without weights: files, device and dtype, generation defaults, end tokens.

User errors in these surface here, within seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tokabatch.attention import choose_backend
from tokabatch.errors import JobError, ModelError
from tokabatch.input.generation_defaults import EndTokens, effective_generation, find_end_tokens
from tokabatch.input.prompts.row_settings import refuse_beyond, refuse_beyond_context
from tokabatch.input.tokenizer.files import TOKENIZER_JSON
from tokabatch.input.tokenizer.loading import load_tokenizer
from tokabatch.input.tokenizer.stop_texts import refuse_special
from tokabatch.input.tokenizer.tokenizer import Tokenizer
from tokabatch.job import FP8_NEEDS, GenerationConfig, Job, Setting, fp8_key
from tokabatch.model.checkpoint import Checkpoint, has_weights, preflight
from tokabatch.model.config import read_config
from tokabatch.model.families import read_spec
from tokabatch.model.file_digests import ModelFile, known_files
from tokabatch.model.foreign_files import refuse_pointer
from tokabatch.model.partition import check_mesh
from tokabatch.model.resolve import resolve_model
from tokabatch.model.spec import ModelSpec
from tokabatch.model.weights import named_dtype, resolve_dtype
from tokabatch.parallel.layout import Layout, decide_layout, visible_devices
from tokabatch.parallel.mesh import Mesh

FP8_CAPABILITY = (8, 9)
"""The first NVIDIA compute capability with e4m3."""


@dataclass(frozen=True)
class OpenModel:
    """A model and its tokenizer, read and checked, without its weights."""

    folder: Path
    files: tuple[ModelFile, ...]
    """The model's and the tokenizer's files, as they were read."""
    spec: ModelSpec
    device: str
    layout: Layout
    dtype: torch.dtype
    tokenizer: Tokenizer
    eos_token_ids: tuple[int, ...]
    generation: GenerationConfig
    settings: tuple[Setting, ...]


def open_model(job: Job) -> OpenModel:
    """Open the job's model and tokenizer; download what is missing. Raises UsageError for whatever cannot work."""
    model, _, checkpoint = open_without_weights(job)
    return model if checkpoint else with_weights(job, model)


def open_without_weights(
    job: Job, *, weights: bool = True, absent_gpu: bool = False
) -> tuple[OpenModel, EndTokens, Checkpoint | None]:
    """Open them without downloading weights; the checkpoint is None if weights are still on the hub or, with `weights` False,
    nowhere."""
    device = "cuda" if absent_gpu else pick_device(job)
    layout = decide_layout(job.engine, device, None if absent_gpu else visible_devices())
    folder = resolve_model(job.model.path, job.model.revision, weights=False)
    tokenizer_folder = _tokenizer_folder(job, folder)
    # Recorded before they are read: a change in between is noticed when the weights load.
    files = known_files(folder, tokenizer_folder)
    spec = read_spec(folder)
    check_mesh(spec, Mesh(0, layout.tensor, layout.pipeline))
    local = Path(job.model.path).expanduser().is_dir()
    checkpoint = preflight(folder, spec) if local and (weights or has_weights(folder)) else None
    dtype = _choose_dtype(job, device, folder, checkpoint)
    if not absent_gpu:
        _check_fp8(job, device, dtype, spec)
    refuse_pointer(tokenizer_folder / TOKENIZER_JSON)
    key = "path" if job.model.tokenizer is None else "tokenizer"
    tokenizer = load_tokenizer(job.model.model_copy(update={key: str(tokenizer_folder)}))
    if tokenizer.own_vocab_size > spec.vocab_size:
        raise ModelError(
            f"the tokenizer of {tokenizer.name!r} has ids up to {tokenizer.own_vocab_size - 1}, but the model in {folder} has "
            f"embeddings for {spec.vocab_size} only (config.json: vocab_size). Use the tokenizer that belongs to these weights."
        )
    generation, settings = effective_generation(job, folder)
    _check_generation(generation, spec, tokenizer)
    ends = find_end_tokens(folder, tokenizer)
    model = OpenModel(
        folder=folder,
        files=files,
        spec=spec,
        device=device,
        layout=layout,
        dtype=dtype,
        tokenizer=tokenizer,
        eos_token_ids=ends.ids,
        generation=generation,
        settings=settings,
    )
    return model, ends, checkpoint


def _tokenizer_folder(job: Job, folder: Path) -> Path:
    """Return the tokenizer's folder; `folder` is the model's."""
    return folder if job.model.tokenizer is None else resolve_model(job.model.tokenizer, weights=False, key="model.tokenizer")


def with_weights(job: Job, model: OpenModel) -> OpenModel:
    """Download the weights and complete the model with what depends on them."""
    checkpoint = preflight(resolve_model(job.model.path, job.model.revision), model.spec)
    dtype = _choose_dtype(job, model.device, model.folder, checkpoint)
    return replace(model, dtype=dtype, files=known_files(model.folder, _tokenizer_folder(job, model.folder)))


def _choose_dtype(job: Job, device: str, folder: Path, checkpoint: Checkpoint | None) -> torch.dtype:
    """Resolve the dtype: `auto` is float32 on a CPU and the checkpoint's own elsewhere, taken from its config if the weights
    are not downloaded yet."""
    stated = "float32" if job.model.dtype == "auto" and device == "cpu" else job.model.dtype
    if stated == "auto" and checkpoint is None:
        values = read_config(folder).values
        stated = str(values.get("dtype") or values.get("torch_dtype") or "float32")
    return named_dtype(stated) if checkpoint is None else resolve_dtype(stated, checkpoint)


def pick_device(job: Job) -> str:
    """Return `cpu` or `cuda`. Raises JobError if the job requires a GPU and there is none."""
    available = torch.cuda.is_available()
    if job.engine.device == "cuda" and not available:
        raise JobError("engine.device is cuda, but torch sees no GPU; write auto or cpu, or install a CUDA build of torch")
    return "cuda" if available and job.engine.device != "cpu" else "cpu"


def _check_fp8(job: Job, device: str, dtype: torch.dtype, spec: ModelSpec) -> None:
    """Raise JobError if the job uses e4m3 and the device has no units for it, or the required kernels are missing."""
    key = fp8_key(job.model, job.engine)
    if key is None:
        return
    if device != "cuda" or torch.cuda.get_device_capability() < FP8_CAPABILITY:
        raise JobError(f"{key} {FP8_NEEDS}")
    _, obstacle = choose_backend(device, dtype, spec.head_dim)
    if obstacle:
        raise JobError(f"{key} is fp8, which needs FlashInfer's kernels: {obstacle}. Provide that, or remove it")


def _check_generation(generation: GenerationConfig, spec: ModelSpec, tokenizer: Tokenizer) -> None:
    """Check the job's own settings against the model; a row's settings are checked with the row."""
    ids = [word for word in generation.bad_words if not isinstance(word, str)]
    given = {name: getattr(generation, name) for name in generation.model_fields_set} | {"bad_words": ids}
    params = GenerationConfig.model_validate(given).params()
    fault = refuse_beyond(params, spec.vocab_size) or refuse_special(generation.stop, tokenizer.special_texts)
    if fault:
        raise JobError(f"generation.{fault}")
    refuse_beyond_context(generation, spec.context_length)
