"""From `model.path` to a folder on disk: a local folder as it is, a hub id through huggingface_hub's cache.

Fetches safetensors, JSON and tokenizer files only: never pickles, never code. HF_HOME, HF_TOKEN and HF_HUB_OFFLINE are
honoured by huggingface_hub itself.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tokabatch.errors import ModelError

_WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")
_UNWANTED = ("*/*", "consolidated*")
_FORMS = "`model.path` must be a model's folder or a hub id like `owner/name`."


def resolve_model(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """The folder of a model. Raises ModelError with the remedy where there is none to be had."""
    name = str(path_or_hub_id)
    local = Path(path_or_hub_id).expanduser()
    if local.is_dir():
        return local
    if local.exists():
        raise ModelError(f"{name}: is a file. {_FORMS}")
    if isinstance(path_or_hub_id, Path) or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(f"{name}: no such folder. {_FORMS}")
    return _fetch(name, revision)


def _fetch(name: str, revision: str | None) -> Path:
    place = name if revision is None else f"{name} at revision {revision!r}"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*_WANTED], ignore_patterns=[*_UNWANTED]))
    except GatedRepoError as error:
        raise ModelError(f"{place}: access is restricted. Accept its terms on the hub, then set HF_TOKEN.") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{place}: no such revision. Give a branch, tag or commit as `model.revision`.") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"{place}: not on the hub, or private. Check `model.path`, or set HF_TOKEN.") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        remedy = "Connect (HF_HUB_OFFLINE unset), or give a local folder as `model.path`."
        raise ModelError(f"{place}: not a folder, not in the hub cache, and the hub is out of reach. {remedy}") from error
    except HFValidationError as error:
        raise ModelError(f"{name}: neither a folder nor a hub id ({error}). Check `model.path`.") from error
    except (OSError, RuntimeError) as error:
        remedy = "Run the command again; what has arrived is kept."
        raise ModelError(f"{place}: could not be fetched ({error}). {remedy}") from error
