"""The model families, found by file name: `families/<model_type>.py` offers `spec(config: ConfigFile) -> ModelSpec`.

The file's name is the `model_type` of config.json. Adding a family is adding one file.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from tokabatch.model.config import ConfigFile, read_config
from tokabatch.model.spec import ModelSpec


def family_names() -> list[str]:
    """Return the supported values of `model_type`, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def read_spec(folder: Path) -> ModelSpec:
    """Return the model described by `folder/config.json`. Raises ModelError, naming the key, if it is not supported."""
    config = read_config(folder)
    known = family_names()
    name = config.values.get("model_type")
    if name not in known:
        # `qwen3_moe` is no misspelt `qwen3` but another architecture.
        misspelt = not str(name).startswith(tuple(f"{family}_" for family in known))
        near = get_close_matches(str(name), known, n=1, cutoff=0.7) if misspelt else []
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise config.refuse("model_type", f"{name!r} is not supported; supported: {', '.join(known)}.{hint}")
    build: Callable[[ConfigFile], ModelSpec] = importlib.import_module(f"{__name__}.{name}").spec
    spec = build(config)
    _check(config, spec)
    return spec


def _check(config: ConfigFile, spec: ModelSpec) -> None:
    if spec.num_heads % spec.num_kv_heads:
        problem = f"({spec.num_kv_heads}) must divide num_attention_heads ({spec.num_heads})."
        raise config.refuse("num_key_value_heads", problem)
    if spec.head_dim % 2:
        raise config.refuse("head_dim", f"({spec.head_dim}) must be even: rotary embedding turns pairs of dimensions.")
