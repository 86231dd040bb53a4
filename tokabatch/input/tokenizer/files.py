"""What the files of a tokenizer's folder show without transformers, which takes seconds to import."""

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
    """The local folder that the job's tokenizer is read from; None for one on the hub. Raises ModelError where no file of a
    tokenizer is in it."""
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
    """Whether no file of a tokenizer's folder holds a chat template; False where that cannot be told."""
    if any((folder / name).exists() for name in _TEMPLATES):
        return False
    try:
        values = json.loads((folder / _CONFIG).read_bytes())
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and not cast("dict[str, Any]", values).get(_TEMPLATE)
