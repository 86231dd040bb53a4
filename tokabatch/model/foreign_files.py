"""What stands where a model should: files of other kinds, and what to do about each."""

from __future__ import annotations

from pathlib import Path

from tokabatch.errors import ModelError

_POINTER = b"version https://git-lfs"
_GGUF = "GGUF files are not supported; name the same model in safetensors: its folder (config.json, *.safetensors) or hub id"
_LORA = (
    "it is an adapter (LoRA), not a whole model, and adapters are not supported; merge it into its base model with peft "
    "(merge_and_unload, save_pretrained), and name that folder"
)


def refuse_pointer(file: Path) -> None:
    """Raise ModelError if the file is a pointer of Git LFS, as a clone without Git LFS has in place of large files."""
    try:
        with file.open("rb") as stream:
            if stream.read(len(_POINTER)) != _POINTER:
                return
    except OSError:
        return
    raise ModelError(f"{file}: is a pointer of Git LFS, not the file itself; fetch it with `git lfs pull` in that folder")


def refuse_file(file: Path) -> None:
    """Raise ModelError for a file of a model that was named in place of its folder."""
    if file.suffix == ".gguf":
        raise ModelError(f"{file}: {_GGUF}")
    if (file.parent / "config.json").is_file():
        raise ModelError(f"{file}: is a file; name its folder, {file.parent}")


def refuse_without_config(folder: Path) -> None:
    """Raise ModelError for a folder without config.json, by what it holds instead."""
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder}: {_LORA}")
    if next(folder.glob("*.gguf"), None) is not None:
        raise ModelError(f"{folder}: {_GGUF}")
    inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
    if inside:
        raise ModelError(f"{folder}: holds no config.json itself; did you mean {folder / inside[-1]}?")
    raise ModelError(f"{folder / 'config.json'}: not found. A model's folder holds config.json, *.safetensors and a tokenizer.")
