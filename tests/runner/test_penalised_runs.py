"""Runs with penalties and biases, set by the job, its rows and the model's own files, against transformers' generate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support import tiny_models
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokabatch import Job, run
from tokabatch.errors import OutputError

PROMPTS = ["Once upon a time", "Once upon a day", "2+2=", "Once"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.add_tokenizer(tiny_models.build("qwen2", tmp_path_factory.mktemp("models") / "qwen2"))


def job(model: Path, folder: Path, rows: list[dict[str, Any]], **generation: Any) -> Job:
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Job.load(
        {
            "model": {"path": str(model), "dtype": "float64"},
            "input": {"path": str(source)},
            "generation": {"temperature": 0.0, "max_tokens": 16, **generation},
            "engine": {"device": "cpu", "page_size": 4},
            "output": {"path": str(folder / "out")},
        }
    )


def samples(folder: Path) -> list[dict[str, Any]]:
    table = pa.concat_tables(pq.read_table(shard) for shard in sorted((folder / "out" / "data").glob("*.parquet")))
    return sorted(table.to_pylist(), key=lambda row: (row["row_index"], row["sample_index"]))


def by_transformers(model: Path, prompt: str, **given: Any) -> list[int]:
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    ids = AutoTokenizer.from_pretrained(model)(prompt, return_tensors="pt").input_ids
    with torch.inference_mode():
        out = reference.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=2, pad_token_id=0, **given)
    return out[0, ids.shape[1] :].tolist()


def test_rows_with_settings_of_their_own_are_drawn_as_transformers_draws_them(model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    plain = [by_transformers(model, prompt) for prompt in PROMPTS]
    banned = [tokenizer.decode(plain[0][:1]), plain[0][2:4]]
    rows = [
        {"prompt": PROMPTS[0], "sampling_params": {"bad_words": banned}},
        {"prompt": PROMPTS[1], "sampling_params": {"repetition_penalty": 1.4, "min_tokens": 12}},
        {"prompt": PROMPTS[2]},
        {"prompt": PROMPTS[3], "sampling_params": {"logit_bias": {"40": 6.5, "2": -100}, "repetition_penalty": 1.0}},
    ]
    run(job(model, tmp_path, rows, n=2, repetition_penalty=1.2))
    wanted = [
        by_transformers(model, PROMPTS[0], repetition_penalty=1.2, bad_words_ids=[plain[0][:1], plain[0][2:4]]),
        by_transformers(model, PROMPTS[1], repetition_penalty=1.4, min_new_tokens=12),
        by_transformers(model, PROMPTS[2], repetition_penalty=1.2),
        by_transformers(model, PROMPTS[3], sequence_bias=[[[40], 6.5], [[2], -100.0]]),
    ]
    assert [sample["token_ids"] for sample in samples(tmp_path)] == [tokens for tokens in wanted for _ in range(2)]
    assert all(mine != theirs for mine, theirs in zip(wanted, plain, strict=True))


def test_the_models_own_repetition_penalty_applies_and_decides_the_run(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    own = tmp_path / "model"
    own.mkdir()
    for file in model.iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    (own / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.3, "do_sample": True}))
    run(job(own, tmp_path, rows))
    assert [each["token_ids"] for each in samples(tmp_path)] == [
        by_transformers(model, prompt, repetition_penalty=1.3) for prompt in PROMPTS
    ]
    with pytest.raises(OutputError, match=r"generation\.repetition_penalty: 1\.3 then, absent now"):
        run(job(own, tmp_path, rows, repetition_penalty=1.0))
    with pytest.raises(OutputError, match=r"generation\.bad_words: absent then, \[\"a\"\] now"):
        run(job(own, tmp_path, rows, bad_words="a"))


def test_a_run_from_before_penalties_is_continued_without_them(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    run(job(model, tmp_path, rows))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert not [name for name in manifest["fingerprint"]["settings"] if "penalty" in name or "bias" in name]
    assert run(job(model, tmp_path, rows, presence_penalty=0.0, logit_bias={})).earlier == len(PROMPTS)


def test_a_stop_string_counts_behind_the_least_tokens_only(model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = by_transformers(model, PROMPTS[0], min_new_tokens=16)
    text = tokenizer.decode(tokens)
    stop = next(char for char in text if text.count(char) > 1)
    first, second = text.index(stop), text.index(stop, text.index(stop) + 1)
    # Every token of this tokenizer is one character.
    for number, (least, cut) in enumerate(((0, first), (first, first), (first + 1, second), (second, second))):
        folder = tmp_path / str(number)
        folder.mkdir()
        run(job(model, folder, [{"prompt": PROMPTS[0]}], stop=stop, min_tokens=least))
        (sample,) = samples(folder)
        assert (sample["text"], sample["stop_reason"], len(sample["token_ids"])) == (text[:cut], stop, cut + 1)


@pytest.mark.parametrize("word", ["n", " n"])
def test_a_bad_word_is_ruled_out_alone_and_behind_a_space(model: Path, tmp_path: Path, word: str) -> None:
    run(job(model, tmp_path, [{"prompt": prompt} for prompt in PROMPTS], n=20, temperature=2.0, bad_words=[word]))
    texts = [sample["text"] for sample in samples(tmp_path)]
    assert not any("n" in text for text in texts) and any("m" in text for text in texts)
