"""What a model's own files say about generation: sampling defaults for what the job leaves open, and its end tokens.

Reads `generation_config.json` and `config.json` of a local model folder; knows no tokenizer class and no hub.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol, cast

from tokabatch.errors import ModelError
from tokabatch.job import GenerationConfig, Job, Setting


class HasEos(Protocol):
    """The part of a tokenizer that names its end token."""

    @property
    def eos_id(self) -> int | None: ...


def effective_generation(job: Job, folder: Path) -> tuple[GenerationConfig, tuple[Setting, ...]]:
    """The job's generation with the model's defaults where the job says nothing, and where each value came from.

    Defaults of a model whose file says `do_sample: false` describe no sampling and are left out.
    """
    defaults = _read(folder / "generation_config.json")
    return job.generation.with_model_defaults({} if defaults.get("do_sample") is False else defaults)


def eos_token_ids(folder: Path, tokenizer: HasEos) -> tuple[int, ...]:
    """The model's end-of-sequence ids: generation_config.json, else config.json, else the tokenizer; may be empty."""
    for name in ("generation_config.json", "config.json"):
        ids = _ids(_read(folder / name).get("eos_token_id"))
        if ids:
            return ids
    return () if tokenizer.eos_id is None else (tokenizer.eos_id,)


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}. Fetch the model again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object. Fetch the model again.")
    return cast("dict[str, Any]", value)


def _ids(value: Any) -> tuple[int, ...]:
    listed = cast("list[Any]", value) if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(item for item in listed if isinstance(item, int) and not isinstance(item, bool)))
