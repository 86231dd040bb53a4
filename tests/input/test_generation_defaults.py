"""Whose sampling settings apply, and which tokens end a sample."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tokabatch.errors import ModelError
from tokabatch.input.generation_defaults import EndTokens, describe_ignored, effective_generation, find_end_tokens
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
    write(tmp_path, "generation_config.json", temperature=0.6, do_sample=False, repetition_penalty=1.1)
    effective, settings = effective_generation(job, tmp_path)
    assert (effective.temperature, effective.repetition_penalty) == (1.0, 1.1)
    assert describe_ignored(tmp_path, job_with(temperature=0.0), settings) == ()


def job_with(**generation: Any) -> Job:
    return Job.load({"model": {"path": "m"}, "input": {"path": "i"}, "output": {"path": "o"}, "generation": generation})


def ignored(folder: Path, **generation: Any) -> str:
    job = job_with(**generation)
    return "; ".join(describe_ignored(folder, job, effective_generation(job, folder)[1]))


def test_what_is_not_honoured_is_noted_with_its_value(tmp_path: Path) -> None:
    assert ignored(tmp_path) == ""
    sampled = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
    ids = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0, "transformers_version": "5.0", "use_cache": True}
    neutral = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "typical_p": 1, "num_beams": 1, "bad_words_ids": None}
    write(tmp_path, "generation_config.json", **sampled, **ids, **neutral, suppress_tokens=[])
    assert ignored(tmp_path) == ""
    write(tmp_path, "generation_config.json", **sampled, repetition_penalty=1.05, no_repeat_ngram_size=3, min_new_tokens=2)
    says = "generation_config.json also says no_repeat_ngram_size: 3, min_new_tokens: 2, which is not used here"
    assert ignored(tmp_path) == says
    assert "min_new_tokens" not in ignored(tmp_path, min_tokens=0)
    write(tmp_path, "generation_config.json", repetition_penalty=0.0)
    assert "repetition_penalty: 0.0, which is not used here" in ignored(tmp_path)


def test_what_the_job_decides_itself_is_not_noted(tmp_path: Path) -> None:
    write(tmp_path, "generation_config.json", max_new_tokens=2048, max_length=4096, stop_strings=["END"])
    assert 'max_new_tokens: 2048, max_length: 4096, stop_strings: ["END"], which is not used here' in ignored(tmp_path)
    assert "generation.max_tokens bounds a sample" in ignored(tmp_path)
    assert ignored(tmp_path, max_tokens=5) == 'generation_config.json also says stop_strings: ["END"], which is not used here'
    assert ignored(tmp_path, max_tokens=5, stop=["x"]) == ""


def test_greedy_models_and_defaults_that_cannot_be_taken_are_noted(tmp_path: Path) -> None:
    write(tmp_path, "generation_config.json", do_sample=False, temperature=0.6)
    assert "do_sample: false, which is greedy; here generation.temperature decides, and it is 1" in ignored(tmp_path)
    assert ignored(tmp_path, temperature=0.5) == ""
    write(tmp_path, "generation_config.json", do_sample=True, top_p=0, temperature="hot")
    assert 'temperature: "hot"' in ignored(tmp_path) and "top_p: 0," in ignored(tmp_path)
    assert ignored(tmp_path, top_p=0.5, temperature=1.0) == ""
    write(tmp_path, "generation_config.json", eos_token_id="<|end|>")
    assert ignored(tmp_path) == 'generation_config.json also says eos_token_id: "<|end|>", which is not used here'
    write(tmp_path, "generation_config.json", eos_token_id=[3, -1, [5]], do_sample="false")
    assert ignored(tmp_path) == (
        'generation_config.json also says eos_token_id: [-1, [5]], do_sample: "false", which is not used here'
    )
    assert find_end_tokens(tmp_path, SimpleNamespace(eos_id=None, special_by_id={})) == EndTokens((3,))


def test_end_tokens(tmp_path: Path) -> None:
    tokenizer = SimpleNamespace(eos_id=7, special_by_id={7: "<|done|>", 3: "<|end|>", 9: "<|stop|>"})
    assert find_end_tokens(tmp_path, tokenizer) == EndTokens((7,))
    write(tmp_path, "config.json", eos_token_id=7)
    write(tmp_path, "generation_config.json", eos_token_id=[3, 7, 3])
    assert find_end_tokens(tmp_path, tokenizer) == EndTokens((3, 7))
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "generation_config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json"):
        find_end_tokens(tmp_path, tokenizer)
    assert find_end_tokens(tmp_path / "none", SimpleNamespace(eos_id=None, special_by_id={})) == EndTokens(())


def test_end_tokens_that_the_files_do_not_agree_on(tmp_path: Path) -> None:
    tokenizer = SimpleNamespace(eos_id=7, special_by_id={7: "<|done|>", 3: "<|end|>", 9: "<|stop|>"})
    write(tmp_path, "generation_config.json", eos_token_id=3)
    ends = find_end_tokens(tmp_path, tokenizer)
    assert ends.ids == (3, 7)
    assert ends.note == (
        "the model's files name different end tokens (generation_config.json 3 '<|end|>'; the tokenizer 7 '<|done|>'); "
        "samples end at 3 '<|end|>', 7 '<|done|>'"
    )
    write(tmp_path, "config.json", eos_token_id=[2, 9])
    ends = find_end_tokens(tmp_path, tokenizer)
    assert ends.ids == (3, 9, 7)
    assert ends.note and "config.json 2, 9 '<|stop|>'" in ends.note
    assert ends.note.endswith("samples end at 3 '<|end|>', 9 '<|stop|>', 7 '<|done|>', not at 2, which is no special token")
