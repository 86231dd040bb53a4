"""Models of the Hugging Face hub: fetched into huggingface_hub's cache, whose import takes half as long as a start may.

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
from tokabatch.model.resolve import nearest_folder

_WEIGHTS = ("*.safetensors",)
_WANTED = ("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")
_UNWANTED = ("*/*", "consolidated*")


def fetch_model(name: str, revision: str | None, *, weights: bool, key: str, revision_key: str) -> Path:
    """Download the model `name` and return its folder in the cache. Raises ModelError with the remedy; the user wrote `name`
    and `revision` under the keys `key` and `revision_key`."""
    wanted = (*_WANTED, *_WEIGHTS) if weights else _WANTED
    place = name if revision is None else f"{name} at revision {revision!r}"
    absent = f"{place}: no such folder in {Path.cwd()}{nearest_folder(Path(name))}"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*wanted], ignore_patterns=[*_UNWANTED]))
    except GatedRepoError as error:
        raise ModelError(f"{place}: access is restricted. Accept its terms on the hub, then set HF_TOKEN.") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{place}: no such revision. Give a branch, tag or commit as {revision_key}.") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"{absent}, and not on the hub, or private. Check {key}, or set HF_TOKEN.") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        remedy = (
            "Connect (HF_HUB_OFFLINE unset), or name a local folder as model.path in the job: on a machine that is connected, "
            f"`tokabatch download {name}` prints one to copy."
        )
        raise ModelError(f"{absent}, not in the hub cache, and the hub cannot be reached. {remedy}") from error
    except HFValidationError as error:
        raise ModelError(f"{name}: neither a folder nor a hub id ({error}). Check {key}.") from error
    except Exception as error:  # errors of the disk, or of the HTTP client that the hub library uses
        remedy = "Run the command again; what has arrived is kept."
        raise ModelError(f"{place}: could not be fetched ({error}). {remedy}") from error
