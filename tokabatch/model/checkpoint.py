"""A checkpoint's safetensors files, checked by their headers alone: nothing is loaded, and no torch is needed.

The header format is the safetensors specification: eight bytes, little-endian, hold the header's length; then JSON
gives each tensor's dtype, shape and byte range; then the data, without gaps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tokabatch.errors import ModelError
from tokabatch.model.foreign_files import refuse_pointer
from tokabatch.model.spec import EMBEDDING, HEAD, ModelSpec, tensor_shapes
from tokabatch.number_text import counted

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_ITEM_SIZE = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
_NEVER_USED = (".rotary_emb.inv_freq",)
_LONGEST_HEADER = 100_000_000
_AGAIN = "Fetch the model again."


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The place of one tensor. `dtype` is safetensors' name: F64, F32, BF16 or F16."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a model's folder by name, as their headers declare them."""

    folder: Path
    tensors: Mapping[str, TensorInfo]

    def by_file(self) -> dict[Path, list[str]]:
        """Return the tensor names of each file, in file order."""
        files: dict[Path, list[str]] = {}
        for name, info in self.tensors.items():
            files.setdefault(info.file, []).append(name)
        return files


def preflight(folder: Path, spec: ModelSpec) -> Checkpoint:
    """Check that the files are complete and hold exactly the tensors that `spec` needs, in their shapes. Raises ModelError
    naming the file, the tensor and both shapes."""
    checkpoint = read_checkpoint(folder)
    wanted = tensor_shapes(spec)
    for name, shape in wanted.items():
        found = checkpoint.tensors.get(name)
        if found is None:
            raise ModelError(f"{folder}: tensor {name} {list(shape)} is in none of its safetensors files. {_AGAIN}")
        if found.shape != shape:
            problem = f"tensor {name} has shape {list(found.shape)}, but config.json says {list(shape)}"
            raise ModelError(f"{found.file}: {problem}. Use the config.json that belongs to these weights.")
    for name, info in checkpoint.tensors.items():
        if name in wanted or name.endswith(_NEVER_USED):
            continue
        if name != HEAD:
            remedy = "The weights and config.json must belong together, and adapters must be merged."
            problem = f"tensor {name} {list(info.shape)} is not part of this {spec.family} model"
            raise ModelError(f"{info.file}: {problem}. {remedy}")
        if _bytes_differ(name, info, EMBEDDING, checkpoint.tensors[EMBEDDING]):
            remedy = 'Set "tie_word_embeddings": false in config.json if the two are meant to differ.'
            raise ModelError(f"{info.file}: config.json ties {name} to the embedding, but the values differ. {remedy}")
    return checkpoint


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read every header. Raises ModelError for a missing or truncated file and for an index that does not match."""
    tensors: dict[str, TensorInfo] = {}
    declared = _declared_files(folder)
    for file, names in declared.items():
        found = read_header(file)
        missing = [name for name in names if name not in found]
        if missing:
            raise ModelError(f"{file}: tensor {missing[0]} is not in the file, though {_INDEX} says so. {_AGAIN}")
        tensors |= {name: info for name, info in found.items() if not names or name in names}
    return Checkpoint(folder, tensors)


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the files that the weights are read from, the index first if there is one; empty if any of them is missing."""
    try:
        declared = _declared_files(folder)
    except ModelError:
        return ()
    index = () if folder / _SINGLE in declared else (folder / _INDEX,)
    return (*index, *declared)


def has_weights(folder: Path) -> bool:
    """Return whether the folder holds any file of weights, in a format that can be read or not."""
    names = (_INDEX, "*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
    return any(next(folder.glob(name), None) is not None for name in names)


def _declared_files(folder: Path) -> dict[Path, set[str]]:
    """Return the files to read, each with the tensors that the index expects in it; an empty set means all."""
    single, index = folder / _SINGLE, folder / _INDEX
    if single.is_file():
        return {single: set()}
    if not index.is_file():
        pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))
        reason = f" ({pickles[0].name} is a pickle, which could run code)" if pickles else ""
        raise ModelError(
            f"{folder}: it holds neither {_SINGLE} nor {_INDEX}{reason}. Fetch the model again, or convert it to safetensors."
        )
    try:
        weight_map = cast("dict[str, str]", json.loads(index.read_bytes())["weight_map"])
        entries = [(name, str(file)) for name, file in weight_map.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: not a safetensors index ({error!r}). {_AGAIN}") from error
    declared: dict[Path, set[str]] = {}
    for name, file in entries:
        if Path(file).name != file:
            raise ModelError(f"{index}: {file!r} is not a file name. {_AGAIN}")
        declared.setdefault(folder / file, set()).add(name)
    missing = sorted(file.name for file in declared if not file.is_file())
    if missing:
        problem = f"{counted(len(missing), 'weight file is', 'weight files are')} missing of {len(declared)}"
        raise ModelError(f"{folder}: {problem}: {', '.join(missing[:10])}. {_AGAIN}")
    return declared


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Return the tensors of one safetensors file in file order. Raises ModelError if the file is damaged."""
    refuse_pointer(file)
    try:
        entries, data_size = _read_entries(file)
        placed = sorted((int(entry["data_offsets"][0]), name) for name, entry in entries.items())
        tensors: dict[str, TensorInfo] = {}
        expected = 0
        for start, name in placed:
            entry = entries[name]
            info = TensorInfo(file, str(entry["dtype"]), tuple(int(size) for size in entry["shape"]))
            if info.dtype not in _ITEM_SIZE:
                remedy = "Use the unquantised model in float32, bfloat16 or float16."
                raise ModelError(f"{file}: tensor {name} has dtype {info.dtype}, which is not supported. {remedy}")
            stop, size = int(entry["data_offsets"][1]), _ITEM_SIZE[info.dtype]
            for length in info.shape:
                size *= length
            if start != expected or stop - start != size:
                raise ModelError(f"{file}: tensor {name} does not lie where the header says. {_AGAIN}")
            expected = stop
            tensors[name] = info
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ModelError(f"{file}: not a readable safetensors file ({error!r}). {_AGAIN}") from error
    if data_size != expected:
        problem = "truncated" if data_size < expected else "longer than its header says"
        raise ModelError(f"{file}: {problem}: {data_size:,} of {counted(expected, 'byte')} of data. {_AGAIN}")
    return tensors


def _read_entries(file: Path) -> tuple[dict[str, dict[str, Any]], int]:
    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 0 < length <= min(size - 8, _LONGEST_HEADER):
            raise ModelError(f"{file}: truncated or not a safetensors file ({counted(size, 'byte')}). {_AGAIN}")
        entries = json.loads(stream.read(length))
    entries.pop("__metadata__", None)
    return entries, size - 8 - length


def _bytes_differ(name: str, info: TensorInfo, other_name: str, other: TensorInfo) -> bool:
    if (info.dtype, info.shape) != (other.dtype, other.shape):
        return True
    start, size = _data_range(info.file, name)
    other_start, _ = _data_range(other.file, other_name)
    with info.file.open("rb") as left, other.file.open("rb") as right:
        left.seek(start)
        right.seek(other_start)
        while size > 0:
            step = min(size, 1 << 22)
            if left.read(step) != right.read(step):
                return True
            size -= step
    return False


def _data_range(file: Path, name: str) -> tuple[int, int]:
    """Return the first byte and the size of a tensor's data in its file."""
    entries, data_size = _read_entries(file)
    start, stop = entries[name]["data_offsets"]
    return file.stat().st_size - data_size + int(start), int(stop) - int(start)
