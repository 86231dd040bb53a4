"""Read config.json key by key: the type of each value is checked, and a refusal names the file, the key and the remedy.

The JSON is read as it is; neither code of the checkpoint nor transformers is ever imported. Defaults for missing keys are in
the family files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tokabatch.errors import ModelError
from tokabatch.model.foreign_files import refuse_pointer, refuse_without_config
from tokabatch.model.spec import Llama3Scaling, RopeSpec
from tokabatch.number_text import counted

_UNSCALED = "default"


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """The values of one config.json, or of an object inside it (then named by `prefix`)."""

    path: Path
    values: Mapping[str, Any]
    prefix: str = ""

    def refuse(self, key: str, problem: str) -> ModelError:
        """Return the error to raise for a key."""
        return ModelError(f"{self.path}: `{self.prefix}{key}` {problem}")

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a positive whole number."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise self.refuse(key, f"must be a positive whole number, not {value!r}. Correct the file or fetch it again.")
        return value

    def optional_integer(self, key: str) -> int | None:
        """Return a positive whole number, or None if the key is absent or null."""
        return None if self.values.get(key) is None else self.integer(key)

    def number(self, key: str, default: float | None = None) -> float:
        """Return a positive number."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise self.refuse(key, f"must be a positive number, not {value!r}. Correct the file or fetch it again.")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, f"must be true or false, not {value!r}. Correct the file or fetch it again.")
        return value

    def section(self, key: str) -> ConfigFile | None:
        """Return the object under a key, or None if the key is absent, null or empty."""
        value = self.values.get(key)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise self.refuse(key, f"must be an object, not {value!r}. Correct the file or fetch it again.")
        return ConfigFile(self.path, cast("dict[str, Any]", value), f"{self.prefix}{key}.")

    def _value(self, key: str, default: object) -> object:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.refuse(key, "is missing. Fetch the model's config.json again.")
        return value


def read_config(folder: Path) -> ConfigFile:
    """Read `folder/config.json`. Raises ModelError if it is missing or not a JSON object."""
    path = folder / "config.json"
    if not folder.is_dir():
        remedy = "`model.path` must be a model's folder or a hub id like `owner/name`."
        raise ModelError(f"{folder}: no such folder. {remedy}")
    if not path.exists():
        refuse_without_config(folder)
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        refuse_pointer(path)
        raise ModelError(f"{path}: cannot be read as JSON ({error}). Fetch the file again.") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: must hold a JSON object. Fetch the file again.")
    return ConfigFile(path, cast("dict[str, Any]", values))


def read_rope(config: ConfigFile) -> RopeSpec:
    """Return the rotary embedding, from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling` (before
    it)."""
    rope = config.section("rope_scaling") or config.section("rope_parameters")
    if rope is not None and isinstance(rope.values.get("full_attention"), dict):
        rope = rope.section("full_attention")
    theta = config.number("rope_theta", 10_000.0)
    if rope is None:
        return RopeSpec(theta)
    theta = rope.number("rope_theta", theta)
    key = "rope_type" if "rope_type" in rope.values else "type"
    kind = rope.values.get(key) or _UNSCALED
    if rope.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0)) != 1.0:
        raise rope.refuse("partial_rotary_factor", "other than 1 is not supported. Choose a model without it.")
    if kind == _UNSCALED:
        return RopeSpec(theta)
    if kind != "llama3":
        raise rope.refuse(key, f"{kind!r} is not supported; supported: 'default', 'llama3'. Choose another model.")
    original = config.optional_integer("original_max_position_embeddings")
    scaling = Llama3Scaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_context_length=original
        or rope.integer("original_max_position_embeddings", config.optional_integer("max_position_embeddings")),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise rope.refuse("high_freq_factor", "must exceed `low_freq_factor`. Fetch the model's config.json again.")
    return RopeSpec(theta, scaling)


def refuse_unsupported(config: ConfigFile) -> None:
    """Refuse what no family supports: quantised weights and activations other than SiLU."""
    quantization = config.section("quantization_config")
    if quantization is not None:
        method = quantization.values.get("quant_method", "unknown")
        problem = f"({method}): quantised weights are not supported. Use the unquantised model."
        raise config.refuse("quantization_config", problem)
    activation = config.values.get("hidden_act") or "silu"
    if activation not in ("silu", "swish"):
        raise config.refuse("hidden_act", f"{activation!r} is not supported; supported: 'silu'. Choose another model.")


def refuse_sliding_window(config: ConfigFile, num_layers: int, context_length: int) -> None:
    """Refuse a sliding window that some layer uses and that is shorter than the context. `max_window_layers` counts the leading
    layers with full attention; `layer_types` overrides it (Qwen2, Qwen3)."""
    if not config.flag("use_sliding_window", False):
        return
    window = config.integer("sliding_window", 4096) if config.values.get("sliding_window", 4096) is not None else None
    layer_types = config.values.get("layer_types")
    if layer_types is not None:
        slides = any(kind != "full_attention" for kind in layer_types)
    else:
        slides = int(config.values.get("max_window_layers", 28)) < num_layers
    if window is not None and slides and window < context_length:
        problem = f"(a window of {counted(window, 'token')}) is not supported. Choose another model."
        raise config.refuse("use_sliding_window", problem)
