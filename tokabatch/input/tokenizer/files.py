"""What can be read from a tokenizer's folder without transformers, which takes seconds to import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from tokabatch.errors import ModelError
from tokabatch.job import ModelConfig

TOKENIZER_JSON = "tokenizer.json"
_CONFIG, _TEMPLATE = "tokenizer_config.json", "chat_template"
_OTHERS = (_CONFIG, "tokenizer.model", "vocab.json", "vocab.txt")
_TEMPLATES = (f"{_TEMPLATE}.jinja", f"{_TEMPLATE}.json", "additional_chat_templates")


def tokenizer_folder(model: ModelConfig) -> Path | None:
    """Return the local folder of the job's tokenizer; None if it is on the hub. Raises ModelError if the folder holds no
    tokenizer."""
    name = model.tokenizer or model.path
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return None
    if not any((folder / file).exists() for file in (TOKENIZER_JSON, *_OTHERS)):
        key = "model.tokenizer" if model.tokenizer else "model.path"
        raise ModelError(
            f"{key} {name!r} holds no tokenizer (no tokenizer.json); copy it "
            "into the folder, or name a folder or hub id that has it as model.tokenizer"
        )
    return folder


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
