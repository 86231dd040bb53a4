"""The committed model: small, complete, and loadable by transformers alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from problem_generator import held_out, shots
from safetensors import safe_open
from training_data import BEGIN, document
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from tokabatch.job import Job

QUICKSTART = Path(__file__).parents[3] / "jobs" / "quickstart"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(QUICKSTART)


def test_sizes() -> None:
    assert (QUICKSTART / "model.safetensors").stat().st_size <= 12_000_000
    others = [path for path in QUICKSTART.iterdir() if path.is_file() and path.name != "model.safetensors"]
    assert sum(path.stat().st_size for path in others) <= 300_000


def test_weights_are_bfloat16_and_hold_every_parameter_once() -> None:
    config = json.loads((QUICKSTART / "config.json").read_text())
    with safe_open(QUICKSTART / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    assert config["tie_word_embeddings"] and config["dtype"] == "bfloat16" and config["max_position_embeddings"] == 2048


def test_digits_are_single_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenizer.tokenize("Tom has 3 * 4567 = 13701 apples.")
    assert [token for token in tokens if any(c.isdigit() for c in token)] == list("3456713701")


def test_tokenizer_returns_every_text(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [document(problem) for problem in held_out()] + ["Größe — 三 \U0001f600\t\n\n x", ""]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and BEGIN not in text
        assert tokenizer.decode(ids[1:]) == text


def test_prompt_and_answer_meet_between_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """The prompt's tokens are a prefix of what the model was trained on, and leave room for the longest answer."""
    job = Job.load(str(QUICKSTART.with_suffix(".yaml")))
    header = "".join(document(shot) + "\n\n" for shot in shots())
    for problem in held_out():
        prompt = tokenizer(f"{header}Question: {problem.question}\nAnswer:")["input_ids"]
        whole = tokenizer(header + document(problem) + "\n\n")["input_ids"]
        assert whole[: len(prompt)] == prompt and len(whole) <= 1024
        assert len(whole) - len(prompt) <= job.generation.max_tokens


def test_model_has_learned_the_worked_examples_form(tokenizer: PreTrainedTokenizerBase) -> None:
    """Greedy, one easy problem: the answer ends in ####, and a blank line or the end token follows."""
    model = LlamaForCausalLM.from_pretrained(QUICKSTART, dtype=torch.float32)
    header = "".join(document(shot) + "\n\n" for shot in shots())
    question = (
        "Question: Tom has 12 shells. Then he buys 7 shells. He loses 4 shells. How many shells does Tom have now?\nAnswer:"
    )
    inputs = tokenizer(header + question, return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=60)[0, inputs["input_ids"].shape[1] :]
    answer = tokenizer.decode(output).split("\n\n")[0].removesuffix(tokenizer.eos_token)
    assert answer.endswith("#### 15"), answer
