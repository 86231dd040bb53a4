"""Whose sampling settings apply, and which tokens end a sample."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tokabatch.data.generation_defaults import effective_generation, eos_token_ids
from tokabatch.errors import ModelError
from tokabatch.job import Job


def write(folder: Path, name: str, **values: Any) -> None:
    (folder / name).write_text(json.dumps(values))


def test_the_job_wins_over_the_model_over_the_default(tmp_path: Path) -> None:
    write(tmp_path, "generation_config.json", temperature=0.6, top_p=0.9, do_sample=True)
    job = Job.load({"model": {"path": "m"}, "input": {"path": "i"}, "output": {"path": "o"}, "generation": {"top_p": 1.0}})
    effective, settings = effective_generation(job, tmp_path)
    assert (effective.temperature, effective.top_p, effective.top_k) == (0.6, 1.0, None)
    sources = {setting.key: setting.source for setting in settings}
    assert (sources["temperature"], sources["top_p"], sources["top_k"]) == ("generation_config.json", "job", "default")
    write(tmp_path, "generation_config.json", temperature=0.6, do_sample=False)
    assert effective_generation(job, tmp_path)[0].temperature == 1.0


def test_end_tokens(tmp_path: Path) -> None:
    tokenizer = SimpleNamespace(eos_id=7)
    assert eos_token_ids(tmp_path, tokenizer) == (7,)
    write(tmp_path, "config.json", eos_token_id=5)
    assert eos_token_ids(tmp_path, tokenizer) == (5,)
    write(tmp_path, "generation_config.json", eos_token_id=[3, 4, 3])
    assert eos_token_ids(tmp_path, tokenizer) == (3, 4)
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "generation_config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json"):
        eos_token_ids(tmp_path, tokenizer)
