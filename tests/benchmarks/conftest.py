from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu.models import write_model


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory) -> dict[str, Path]:
    """The tiny models, written once."""
    root = tmp_path_factory.mktemp("gpu-models")
    folders = {name: root / name for name in ("tiny", "tiny-qwen3")}
    for name, folder in folders.items():
        write_model(name, folder)
    return folders
