"""Load a tokenizer from its folder.

`tokenizer.json` is authoritative; `tokenizer_config.json` adds to it. For some families transformers builds a class of its own
and replaces the file's pre-tokenizer or normalizer by that class's. Here the file's are used, and what transformers would have
replaced is reported.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from tokabatch.errors import ModelError
from tokabatch.input.tokenizer.files import TOKENIZER_JSON, tokenizer_folder
from tokabatch.input.tokenizer.tokenizer import Tokenizer
from tokabatch.job import ModelConfig

CONFIGS = ("tokenizer_config.json", "config.json")
# transformers imports AutoTokenizer when it is first named, which takes seconds: only where nothing else can tell.
CLASS_ALIASES = ('"PreTrainedTokenizerFast"', '"TokenizersBackend"')
"""Two names of one class. Looking it up by the first makes transformers import every model that it has, which takes seconds."""
GENERAL_CLASSES = ("PreTrainedTokenizer", "TokenizersBackend")
TRUSTED_CLASSES = {
    "llama": (*GENERAL_CLASSES, "GPT2Tokenizer"),
    "qwen2": ("Qwen2Tokenizer",),
    "qwen3": (*GENERAL_CLASSES, "Qwen2Tokenizer"),
}
"""The classes, without "Fast", that AutoTokenizer uses where a model of this type names them. AutoTokenizer itself would import
much that a run does not use, among it scikit-learn if that is installed."""
PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
BYTE_LEVEL_FLAGS = ("add_prefix_space", "trim_offsets", "use_regex")
"""Parameters of a ByteLevel that have no effect in a decoder or on a post-processor's ids."""
MODEL_SETTINGS = (
    "dropout",
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "fuse_unk",
    "byte_fallback",
    "ignore_merges",
)


def load_tokenizer(model: ModelConfig) -> Tokenizer:
    """Load the tokenizer that the job names, from a local folder or the hub. Raises ModelError with the remedy."""
    name = model.tokenizer or model.path
    key = "model.tokenizer" if model.tokenizer else "model.path"
    folder = tokenizer_folder(model) or Path(name)
    has_file = (folder / TOKENIZER_JSON).is_file()
    loader: Any = PreTrainedTokenizerFast if has_file else transformers.AutoTokenizer
    try:
        loaded: Any = loader.from_pretrained(
            str(folder) if has_file else name,
            revision=model.revision if model.tokenizer is None else None,
            trust_remote_code=False,
        )
    except Exception as error:  # transformers raises many kinds of error for a missing, damaged or remote-code tokenizer
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise ModelError(
            f"cannot load the tokenizer of {name!r} ({key}): {reason}. Check that the folder holds tokenizer.json, or "
            "fetch the model with `tokabatch download`."
        ) from error
    if not isinstance(loaded, PreTrainedTokenizerFast):
        raise ModelError(f"the tokenizer of {name!r} has no tokenizer.json; only tokenizers of that kind can be used")
    if not has_file and loaded.get_vocab().keys() <= set(loaded.all_special_tokens):
        # Of a folder without the files that its class reads, transformers makes a tokenizer without a vocabulary.
        raise ModelError(
            f"the tokenizer of {name!r} ({key}) has no vocabulary: {type(loaded).__name__} found none in its files; copy "
            "tokenizer.json into the folder"
        )
    return Tokenizer(loaded, name, _replaced(folder, loaded.backend_tokenizer) if has_file else ())


def _replaced(folder: Path, backend: Backend) -> tuple[str, ...]:
    """Return the parts of tokenizer.json that transformers' AutoTokenizer would replace, found on a copy without a vocabulary;
    empty if that copy cannot be loaded."""
    if not isinstance(backend.model, models.BPE):
        return ()
    settings = {name: getattr(backend.model, name) for name in MODEL_SETTINGS}
    bare = Backend(models.BPE({}, [], **{name: value for name, value in settings.items() if value is not None}))
    for part in PARTS:
        value = getattr(backend, part)
        if value is not None:
            setattr(bare, part, value)
    with tempfile.TemporaryDirectory(prefix="tokabatch-tokenizer-") as copy:
        bare.save(str(Path(copy) / TOKENIZER_JSON))
        try:
            theirs = _parts(_load_as_auto(folder, Path(copy)))
        except Exception:  # a class that needs a vocabulary, or remote code: there is nothing to compare with
            return ()
    return tuple(name for name, value in _parts(bare).items() if value != theirs[name])


def _load_as_auto(folder: Path, copy: Path) -> Backend:
    """Load the file in `copy`, with the folder's configurations, as AutoTokenizer does."""
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in CONFIGS if (folder / name).is_file()}
    for name, text in texts.items():
        (copy / name).write_text(text.replace(*CLASS_ALIASES), encoding="utf-8")
    tokenizer, model = (json.loads(texts.get(name, "{}")) for name in CONFIGS)
    loader = _class_by_name(tokenizer, model)
    if loader is not None:
        return loader.from_pretrained(str(copy)).backend_tokenizer
    # A whole configuration, which takes seconds to import, is needed only if no class is named.
    config = SimpleNamespace(model_type=model.get("model_type", ""), tokenizer_class=model.get("tokenizer_class"))
    known = {"config": config} if tokenizer.get("tokenizer_class") else {}
    auto: Any = transformers.AutoTokenizer.from_pretrained(str(copy), trust_remote_code=False, **known)
    return auto.backend_tokenizer


def _class_by_name(tokenizer: dict[str, Any], model: dict[str, Any]) -> Any:
    """Return the class that AutoTokenizer uses with these configurations if that is the named one; None if its further rules
    decide."""
    name = str(tokenizer.get("tokenizer_class", "")).removesuffix("Fast")
    if "auto_map" in tokenizer or name not in TRUSTED_CLASSES.get(model.get("model_type", ""), ()):
        return None
    return PreTrainedTokenizerFast if name in GENERAL_CLASSES else getattr(transformers, name)


def _parts(backend: Backend) -> dict[str, Any]:
    """Return what decides ids and texts besides the vocabulary; an empty affix counts as none."""
    values = cast("dict[str, Any]", json.loads(backend.to_str()))
    idle = {"pre_tokenizer": ("trim_offsets",), "normalizer": ()}
    parts: dict[str, Any] = {name: _without(values[name], idle.get(name, BYTE_LEVEL_FLAGS)) for name in PARTS}
    return parts | {f"model.{name}": values["model"].get(name) or None for name in MODEL_SETTINGS}


def _without(value: Any, names: Collection[str]) -> Any:
    if isinstance(value, dict):
        given = cast("dict[str, Any]", value)
        dropped = names if given.get("type") == "ByteLevel" else ()
        return {key: _without(item, names) for key, item in given.items() if key not in dropped}
    return [_without(item, names) for item in cast("list[Any]", value)] if isinstance(value, list) else value
