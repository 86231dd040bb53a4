"""What can be read from a tokenizer's folder without transformers, which takes seconds to import."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from tokabatch.errors import ModelError
from tokabatch.job import ModelConfig

TOKENIZER_JSON = "tokenizer.json"
_CONFIG, _TEMPLATE = "tokenizer_config.json", "chat_template"
_VOCABULARIES = ("tokenizer.*.json", "vocab.txt")
"""Files from which transformers makes a tokenizer without tokenizer.json: patterns. tokenizer_config.json alone gives an empty
one."""
_BPE = ("vocab.json", "merges.txt")
"""Files from which it makes one together; one of them alone makes none."""
_MODELS = "*.model"
_READERS_OF_MODELS = ("sentencepiece", "tiktoken")
"""The libraries with which transformers reads those; which one is needed depends on the file."""
_TEMPLATES = (f"{_TEMPLATE}.jinja", f"{_TEMPLATE}.json", "additional_chat_templates")


def tokenizer_folder(model: ModelConfig) -> Path | None:
    """Return the local folder of the job's tokenizer; None if it is on the hub. Raises ModelError if the folder holds no
    tokenizer."""
    name = model.tokenizer or model.path
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return None
    if (folder / TOKENIZER_JSON).exists() or any(next(folder.glob(file), None) for file in _VOCABULARIES):
        return folder
    there, absent = ([name for name in _BPE if (folder / name).exists() is wanted] for wanted in (True, False))
    if not absent:
        return folder
    what, also = "no tokenizer (no tokenizer.json)", ""
    if packed := next(folder.glob(_MODELS), None):
        if any(map(find_spec, _READERS_OF_MODELS)):
            return folder
        what, also = f"{packed.name}, but no tokenizer.json", f", or install {' or '.join(_READERS_OF_MODELS)}, which reads it"
    elif there:
        what = f"{there[0]}, but neither {absent[0]} nor {TOKENIZER_JSON}"
    key = "model.tokenizer" if model.tokenizer else "model.path"
    raise ModelError(
        f"{key} {name!r} holds {what}; copy tokenizer.json into the folder, or name a folder or hub id that has it as "
        f"model.tokenizer{also}"
    )


def has_no_chat_template(folder: Path) -> bool:
    """Return whether a tokenizer's folder certainly holds no chat template; False if that cannot be decided."""
    if any((folder / name).exists() for name in _TEMPLATES):
        return False
    try:
        values = json.loads((folder / _CONFIG).read_bytes())
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and not cast("dict[str, Any]", values).get(_TEMPLATE)
