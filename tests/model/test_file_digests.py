"""Which of a model's files are tracked, and what counts as a change of one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import tiny_models

from tokabatch.errors import ModelError
from tokabatch.model.file_digests import known_files, refuse_changed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_models.add_tokenizer(tiny_models.build("llama", tmp_path / "model"))


def test_what_is_read_is_known(folder: Path) -> None:
    (folder / "tokenizer.4.0.0.json").write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    for name in ("tools.jinja", "tools.jinja~"):
        (folder / "additional_chat_templates" / name).write_text("{{ tools }}")
    names = [file.name for file in known_files(folder, folder)]
    assert names == [
        "model/config.json", "model/model.safetensors", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json",
        "tokenizer/tokenizer.4.0.0.json", "tokenizer/additional_chat_templates/tools.jinja",
    ]  # fmt: skip


def test_weights_that_are_not_all_there_are_not_known_yet(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    )
    assert not [file for file in known_files(folder, folder) if "safetensors" in file.name]
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"")
    assert sum("safetensors" in file.name for file in known_files(folder, folder)) == 3


def test_the_same_content_is_no_change(folder: Path) -> None:
    files = known_files(folder, folder)
    for file in files:
        content = file.path.read_bytes()
        file.path.unlink()
        file.path.write_bytes(content)
        os.utime(file.path, (1, 1))
    refuse_changed(files)


def flip(path: Path) -> None:
    """One byte changes in place, and the file looks as old as before."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [flip, Path.unlink, lambda path: path.write_bytes(b"")], ids=["flip", "remove", "empty"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_any_other_content_is_refused(folder: Path, name: str, change) -> None:
    files = known_files(folder, folder)
    change(folder / name)
    with pytest.raises(ModelError, match=rf"{name} has changed since this run began .*run the same command again"):
        refuse_changed(files)
