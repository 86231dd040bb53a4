"""The files that decide a model's output: which files of a folder are read, how each is identified, and whether it has changed.

A file is identified by its size and digest; during a run, also by the file system's metadata, so that a check reads nothing.
Editors' backups and other files beside them are not read, so they decide nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokabatch.errors import ModelError
from tokabatch.model.checkpoint import weight_files
from tokabatch.number_text import counted

CONFIG = "config.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt",
    "added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""What transformers reads of a tokenizer, beside one for its own version and further chat templates."""
_OF_A_VERSION = re.compile(r"tokenizer\.\d[\d.]*\.json")
_TEMPLATES = "additional_chat_templates"
_WHOLE_BYTES = 64 << 20
_PIECES, _PIECE_BYTES = 4096, 4096


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One file as it was first read. `name` distinguishes it from the run's other files, `mark` identifies its content; `state`
    is the file system's metadata before it was read."""

    name: str
    path: Path
    mark: str
    state: tuple[int, ...]


def known_files(model: Path, tokenizer: Path, *, weights: bool = True) -> tuple[ModelFile, ...]:
    """Return the files read from the two folders, the weights only if all of them are there and `weights` is True. Raises
    ModelError for one that cannot be read."""
    places = [("model", CONFIG, model / CONFIG)]
    places += [("model", path.name, path) for path in weight_files(model) if weights]
    places += [("tokenizer", path.relative_to(tokenizer).as_posix(), path) for path in _tokenizer_files(tokenizer)]
    return tuple(_known(f"{kind}/{name}", path) for kind, name, path in places if path.is_file())


def refuse_changed(files: Iterable[ModelFile]) -> None:
    """Raise ModelError for a file whose content has changed. Only files that were touched are read again."""
    for file in files:
        try:
            if _state(file.path) == file.state:
                continue
            found = file_mark(file.path)
        except OSError as error:
            found = f"cannot be read: {error.strerror or error}"
        if found != file.mark:
            raise ModelError(
                f"{file.path} has changed since this run began ({file.mark} then; {found} now): its samples would be of two "
                "models. Put the file back and run the same command again, or choose another output.path for the new one."
            )


def file_mark(path: Path) -> str:
    """Return size and digest of a file. A file beyond 64 MiB is digested by 4,096 pieces of 4 KiB, evenly spread from its first
    byte to its last: training or merging weights changes more than what lies between two of them. Raises OSError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES:
            content = file.read()
            return f"{counted(len(content), 'byte')}, sha256 {hashlib.sha256(content).hexdigest()}"
        digest = hashlib.sha256()
        for piece in range(_PIECES):
            file.seek(piece * (size - _PIECE_BYTES) // (_PIECES - 1))
            digest.update(file.read(_PIECE_BYTES))
    return f"{counted(size, 'byte')}, sampled sha256 {digest.hexdigest()}"


def _tokenizer_files(folder: Path) -> Iterator[Path]:
    yield from (folder / name for name in TOKENIZER_FILES)
    try:
        yield from (path for path in sorted(folder.iterdir()) if _OF_A_VERSION.fullmatch(path.name))
        if (folder / _TEMPLATES).is_dir():
            yield from (path for path in sorted((folder / _TEMPLATES).iterdir()) if path.suffix == ".jinja")
    except OSError as error:
        raise ModelError(f"{folder} cannot be listed: {error.strerror or error}") from error


def _known(name: str, path: Path) -> ModelFile:
    try:
        # Read first: a file that changes while it is read has another state afterwards.
        state = _state(path)
        return ModelFile(name, path, file_mark(path), state)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error


def _state(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev
