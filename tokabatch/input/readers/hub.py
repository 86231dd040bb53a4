"""A dataset of the Hugging Face hub, streamed: `hf://datasets/org/name`, or `hf://datasets/org/name@revision`.

Subset and split come from the job, the revision from the path. Rows arrive as Arrow batches, in the dataset's own types if the
hub declares them. The only module that imports `datasets`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa
from datasets import IterableDataset, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from tokabatch.errors import InputError
from tokabatch.input.files.arrow_rows import rows_of
from tokabatch.input.readers import HUB_SCHEME
from tokabatch.input.readers.parquet import conform, plain_schema
from tokabatch.input.rows import MAX_BATCH_ROWS, RowBatch

CONNECT_SECONDS = 10.0
OFFLINE_ADVICE = (
    "If this machine has no hub access, download the dataset elsewhere and set input.path to its .jsonl or .parquet file."
)


@dataclass(frozen=True, slots=True)
class HubReader:
    """Streams one split."""

    name: str
    dataset: IterableDataset
    schema: pa.Schema

    def batches(self, columns: Collection[str] | None = None) -> Iterator[RowBatch]:
        index = 0
        for table in _tables(self.dataset, self.name):
            for batch in table.to_batches(max_chunksize=MAX_BATCH_ROWS):
                yield rows_of(conform(batch, self.schema, self.name), columns, index, self.name)
                index += batch.num_rows


def open_dataset(path: str, subset: str | None, split: str | None) -> HubReader:
    """Open `hf://datasets/org/name[@revision]`: the registry's entry point. Raises InputError with the remedy."""
    repository, _, revision = path.removeprefix(HUB_SCHEME).partition("@")
    name = f"{path} ({', '.join(part for part in (subset, split) if part) or 'default'})"
    if not constants.HF_HUB_OFFLINE:
        _check_reachable(path, repository, revision or None)
    try:
        loaded = load_dataset(repository, subset, split=split, revision=revision or None, streaming=True)
    except (OfflineModeIsEnabled, ConnectionError, HfHubHTTPError) as error:
        raise InputError(f"cannot reach the hub for {path}: {_first_line(error)}. {OFFLINE_ADVICE}") from error
    except DatasetNotFoundError as error:
        raise InputError(f"{path}: {_first_line(error)}. Check the name, or log in if it is gated (HF_TOKEN).") from error
    except (ValueError, OSError, RuntimeError) as error:
        raise InputError(f"{path} cannot be opened: {error}. Check input.subset and input.split. {OFFLINE_ADVICE}") from error
    except Exception as error:  # the kind depends on the HTTP client that the hub library uses
        raise InputError(f"cannot reach the hub for {path}: {_first_line(error)}. {OFFLINE_ADVICE}") from error
    if isinstance(loaded, IterableDatasetDict):
        splits = [str(key) for key in loaded]
        if len(splits) != 1:
            raise InputError(f"{path} has the splits {', '.join(splits)}; set input.split to one of them")
        loaded = loaded[splits[0]]
    return HubReader(name, loaded, _schema(loaded, name))


def _check_reachable(path: str, repository: str, revision: str | None) -> None:
    """Send one request without retries, so that a machine without a network is refused within seconds."""
    try:
        HfApi().dataset_info(repository, revision=revision, timeout=CONNECT_SECONDS)
    except (RepositoryNotFoundError, GatedRepoError) as error:
        raise InputError(f"{path}: {_first_line(error)}. Check the name, or log in if it is gated (HF_TOKEN).") from error
    except Exception as error:  # the kind depends on the HTTP client that the hub library uses
        raise InputError(f"cannot reach the hub for {path}: {_first_line(error)}. {OFFLINE_ADVICE}") from error


def _schema(dataset: IterableDataset, name: str) -> pa.Schema:
    if dataset.features is not None:
        return plain_schema(dataset.features.arrow_schema)
    first = next(_tables(dataset.take(MAX_BATCH_ROWS), name), None)
    if first is None:
        raise InputError(f"{name} holds no rows")
    return plain_schema(first.schema)


def _tables(dataset: IterableDataset, name: str) -> Iterator[pa.Table]:
    batches: Any = dataset.with_format("arrow").iter(batch_size=MAX_BATCH_ROWS)
    try:
        yield from cast("Iterator[pa.Table]", batches)
    except Exception as error:  # the kind depends on the HTTP client that the hub library uses
        raise InputError(f"reading {name} from the hub failed: {_first_line(error)}. {OFFLINE_ADVICE}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
