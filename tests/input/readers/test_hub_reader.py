"""Hub datasets, with the hub replaced by a local stream and by its failures."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset, IterableDatasetDict
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import OfflineModeIsEnabled

from tokabatch.errors import InputError
from tokabatch.input.readers import hub, open_reader
from tokabatch.job import InputConfig

PATH = "hf://datasets/org/name"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test contacts the real hub."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_streams_a_split_at_a_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def load(name: str, subset: str | None, split: str, revision: str | None, streaming: bool) -> Any:
        calls.append((name, subset, split, revision, streaming))
        return Dataset.from_dict({"q": [f"q{number}" for number in range(2500)]}).to_iterable_dataset()

    monkeypatch.setattr(hub, "load_dataset", load)
    reader = open_reader(InputConfig(path=f"{PATH}@v1", subset="main", split="test"))
    rows = [row for batch in reader.batches() for row in batch.rows]
    assert calls == [("org/name", "main", "test", "v1", True)]
    assert [row.columns for row in rows] == [{"q": f"q{number}"} for number in range(2500)]
    assert [row.index for row in rows] == list(range(2500))
    assert reader.schema is not None and reader.schema.names == ["q"]


def test_one_split_needs_no_name_and_several_do(monkeypatch: pytest.MonkeyPatch) -> None:
    split = Dataset.from_dict({"q": ["a"]}).to_iterable_dataset()
    monkeypatch.setattr(hub, "load_dataset", lambda *_, **__: IterableDatasetDict({"train": split}))
    assert len(list(open_reader(InputConfig(path=PATH)).batches())) == 1
    monkeypatch.setattr(hub, "load_dataset", lambda *_, **__: IterableDatasetDict({"train": split, "test": split}))
    with pytest.raises(InputError, match=r"train, test; set input\.split"):
        open_reader(InputConfig(path=PATH))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OfflineModeIsEnabled("offline"), "set input.path to its"),
        (ConnectionError("no route"), "set input.path to its"),
        (DatasetNotFoundError("no such dataset"), "HF_TOKEN"),
        (ValueError("Config name is missing. Pick one among: main, socratic"), r"main, socratic.*input\.subset"),
    ],
)
def test_failures_name_the_remedy(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(hub, "load_dataset", fail)
    with pytest.raises(InputError, match=message):
        open_reader(InputConfig(path=PATH))


def test_an_unreachable_hub_is_found_with_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError("no route to host")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "dataset_info", fail)
    monkeypatch.setattr(hub, "load_dataset", lambda *_, **__: pytest.fail("went on to load"))
    with pytest.raises(InputError, match=r"no route to host.*set input\.path"):
        open_reader(InputConfig(path=PATH))
