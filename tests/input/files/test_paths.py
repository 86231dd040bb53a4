"""From `input.path` to files, and the refusals of what is no dataset."""

from __future__ import annotations

import gzip
import io
import os
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tokabatch.errors import InputError
from tokabatch.input.files.paths import would_read
from tokabatch.input.prompts.few_shot import render_few_shot
from tokabatch.input.readers import describe_unused, formats, open_path, open_reader
from tokabatch.job import FewShotConfig, InputConfig


def values(path: str) -> list[int]:
    rows = [row for batch in open_path(path).batches() for row in batch.rows]
    assert [row.index for row in rows] == list(range(len(rows)))
    return [row.columns["a"] for row in rows if row.columns]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, number in {"b.jsonl": 2, "a.jsonl": 1, "sub/c.jsonl": 3, "_tmp/d.jsonl": 4, ".e.jsonl": 5}.items():
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{{"a": {number}}}\n')
    return tmp_path / "set"


def test_formats_are_the_files_of_the_folder() -> None:
    assert set(formats()) == {"jsonl", "parquet"}


def test_folder_glob_file_and_url_in_sorted_order(folder: Path) -> None:
    (folder / "README.md").write_text("about")
    assert values(str(folder)) == [1, 2, 3]
    assert values(f"{folder}/*.jsonl") == [1, 2]
    assert values(f"{folder}/b.jsonl") == [2]
    assert values(f"file://{folder}/b.jsonl") == [2]
    with fsspec.open("memory://set/a.jsonl", "wb") as file:
        file.write(b'{"a": 9}\n')
    assert values("memory://set/a.jsonl") == [9]


def test_a_name_with_glob_characters_is_a_file_first(tmp_path: Path) -> None:
    (tmp_path / "x[1].jsonl").write_text('{"a": 1}\n')
    assert values(str(tmp_path / "x[1].jsonl")) == [1]


def test_subset_and_split_are_accepted_for_files_but_not_beside_other_splits(folder: Path) -> None:
    def read(path: Path, split: str) -> int:
        return sum(len(batch.rows) for batch in open_reader(InputConfig(path=str(path), subset="main", split=split)).batches())

    assert (read(folder, "test"), read(folder / "a.jsonl", "a")) == (3, 1)
    (folder / "sub/c.jsonl").rename(folder / "sub/test-00000-of-00001.jsonl")
    assert read(folder / "sub", "test") == 1
    with pytest.raises(InputError, match=r"more than the split 'test', and.*/a\.jsonl would be read"):
        read(folder, "test")
    (folder / "a.jsonl").rename(folder / "train_sft-00000-of-00001.jsonl")
    with pytest.raises(InputError, match="more than the split 'train_sft'"):
        read(folder, "train_sft")


def test_a_split_that_selects_nothing_is_noted(folder: Path) -> None:
    def noted(path: Path, split: str | None) -> str:
        return "".join(describe_unused(InputConfig(path=str(path), subset="main", split=split)))

    assert "input.split is 'test', but selects rows of a hub dataset alone" in noted(folder / "a.jsonl", "test")
    assert noted(folder / "a.jsonl", None) == ""
    (folder / "a.jsonl").rename(folder / "gsm8k_test.jsonl")
    assert noted(folder / "gsm8k_test.jsonl", "test") == ""
    assert describe_unused(InputConfig(path="hf://datasets/openai/gsm8k", split="test")) == ()


def test_the_case_of_an_extension_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "X.JSONL.GZ").write_bytes(gzip.compress(b'{"a": 1}\n'))
    assert values(str(tmp_path)) == [1]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{folder}/nothing.jsonl", "does not exist"),
        ("{folder}/*.parquet", "matches no file"),
        ("{folder}/empty", "holds no .jsonl or .parquet file"),
        ("{folder}/saved", r"holds data-0.arrow\); .*load_from_disk"),
        ("{folder}/rows.jsonl.xz", "decompress it with unxz"),
        ("{folder}/data.json", r"rename it to \.jsonl if .*jq -c"),
        ("{folder}/pipe.jsonl", "neither a file nor a folder"),
        ("{folder}/data.csv", "Parquet or JSON Lines"),
        ("{folder}/noextension", "is not a format"),
        ("{folder}/mixed", "mixes jsonl and parquet"),
        ("nosuchscheme://bucket/x.jsonl", "nosuchscheme"),
        ("hf://datasets/org/name", "name one file"),
        ("{folder}/packed.parquet.gz", "inside another compressed file"),
    ],
)
def test_refusals_name_the_path_and_the_remedy(folder: Path, path: str, message: str) -> None:
    for name in (
        "data.json",
        "data.csv",
        "noextension",
        "packed.parquet.gz",
        "mixed/a.jsonl",
        "mixed/b.parquet",
        "empty/notes.md",
        "saved/data-0.arrow",
        "rows.jsonl.xz",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    os.mkfifo(folder / "pipe.jsonl")
    with pytest.raises(InputError, match=message):
        open_path(path.format(folder=folder))


def test_refusals_name_the_key_that_holds_the_path(tmp_path: Path) -> None:
    config = FewShotConfig(path=str(tmp_path / "none.jsonl"), template="x")
    with pytest.raises(InputError, match=r"^prompt\.few_shot\.path '.*none\.jsonl' does not exist"):
        render_few_shot(config.path, config.k, config.template)
    with pytest.raises(InputError, match=r"^input\.path '.*none\.jsonl' does not exist"):
        open_reader(InputConfig(path=config.path))


class OutOfReach(Exception):
    """As of an HTTP client: no OSError."""


class Unreachable(MemoryFileSystem):
    """Fails at the named call."""

    protocol = "unreachable"
    cachable = False

    def __init__(self, at: str) -> None:
        super().__init__()
        self.at = at

    def isfile(self, path: str) -> bool:
        if self.at == "isfile":
            raise OutOfReach("name resolution failed\nmore")
        return True

    def open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        if self.at == "open":
            raise OutOfReach("name resolution failed\nmore")
        return Broken(b'{"a": 1}\n')


class Broken(io.BytesIO):
    def read(self, size: int | None = -1, /) -> bytes:
        raise OutOfReach("name resolution failed\nmore")


@pytest.mark.parametrize("at", ["isfile", "open", "read"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet", "x.jsonl.gz"])
def test_a_server_out_of_reach_is_named(monkeypatch: pytest.MonkeyPatch, at: str, name: str) -> None:
    monkeypatch.setattr("tokabatch.input.files.paths.url_to_fs", lambda path: (Unreachable(at), path))
    with pytest.raises(InputError, match=rf"{name}'? cannot be read: name resolution failed\. .* name the local copy\.$"):
        list(open_path(f"unreachable://set/{name}").batches())


@pytest.mark.parametrize(
    ("path", "target", "read"),
    [
        ("data/**/*.jsonl", "data/rows.jsonl", True),
        ("data/**/*.jsonl", "data/a/b/rows.jsonl", True),
        ("*.jsonl", "out/all.jsonl", False),
        ("data/*.jsonl", "data/exports/all.jsonl", False),
        ("data/../data/*.jsonl", "data/all.jsonl", True),
        ("file://{here}/data/rows.jsonl", "data/rows.jsonl", True),
        ("links/*.jsonl", "elsewhere/rows.jsonl", True),
        ("data", "data/a/new.jsonl.gz", True),
        ("data", "data/_new.jsonl", False),
        ("data", "data/.exports/new.jsonl", False),
        ("data", "data/new.csv", False),
        ("hf://datasets/openai/gsm8k", "data/rows.jsonl", False),
    ],
)
def test_which_new_file_a_job_would_read(path, target, read, tmp_path, monkeypatch):
    for name in ("data/rows.jsonl", "elsewhere/rows.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("{}")
    (tmp_path / "links").mkdir()
    (tmp_path / "links/rows.jsonl").symlink_to(tmp_path / "elsewhere/rows.jsonl")
    monkeypatch.chdir(tmp_path)
    assert would_read(path.format(here=tmp_path), Path(target), ("jsonl", "parquet")) is read
