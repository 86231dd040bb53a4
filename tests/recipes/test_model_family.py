"""The recipe of a model family: one file where the sizes differ, and a field and its use where an operator is new."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from support import tiny_models
from support.edited_package import EditedPackage
from transformers import AutoModelForCausalLM, PreTrainedModel

from tokabatch import Job, run
from tokabatch.model import families

PROMPTS = ["What is 1+1?", "What is 2+5? Say it.", "Say"]
SEED_OSS = '''
"""Seed-OSS: Llama with biases of its own on q, k and v. Defaults are those of transformers' SeedOssConfig."""

from __future__ import annotations

from tokabatch.model.config import ConfigFile, read_rope, refuse_unsupported
from tokabatch.model.spec import ModelSpec


def spec(config: ConfigFile) -> ModelSpec:
    """The model that a config of this family describes."""
    refuse_unsupported(config)
    return ModelSpec(
        family="seed_oss",
        vocab_size=config.integer("vocab_size", 155_136),
        hidden_size=config.integer("hidden_size", 4096),
        num_layers=config.integer("num_hidden_layers", 64),
        num_heads=config.integer("num_attention_heads", 80),
        num_kv_heads=config.integer("num_key_value_heads", 8),
        head_dim=config.integer("head_dim", 128),
        intermediate_size=config.integer("intermediate_size", 27_648),
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=read_rope(config),
        context_length=config.integer("max_position_embeddings", 524_288),
        tied_embeddings=config.flag("tie_word_embeddings", False),
        qkv_bias=config.flag("attention_bias", True),
        o_bias=config.flag("attention_out_bias", False),
        mlp_bias=config.flag("mlp_bias", False),
    )
'''
SOFTCAPPED = '''
"""Llama whose logits are capped as Gemma 2's are."""

from __future__ import annotations

from dataclasses import replace

from tokabatch.model.config import ConfigFile
from tokabatch.model.families import llama
from tokabatch.model.spec import ModelSpec


def spec(config: ConfigFile) -> ModelSpec:
    """The model that a config of this family describes."""
    return replace(llama.spec(config), family="softcapped", logit_cap=config.number("final_logit_softcapping"))
'''


def write_job(model: Path, folder: Path, **generation: Any) -> Path:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    job = {
        "model": {"path": str(model), "dtype": "float64"},
        "input": {"path": str(rows)},
        "generation": {"max_tokens": 12, "ignore_eos": True, "logprobs": 0, **generation},
        "engine": {"device": "cpu"},
        "output": {"path": str(folder / "out")},
    }
    (folder / "job.yaml").write_text(json.dumps(job))
    return folder / "job.yaml"


def read(out: Path) -> list[dict[str, Any]]:
    samples = [sample for shard in (out / "data").glob("*.parquet") for sample in pq.read_table(shard).to_pylist()]
    return sorted(samples, key=lambda sample: sample["row_index"])


@torch.inference_mode()
def expected_logits(reference: PreTrainedModel, sample: dict[str, Any]) -> torch.Tensor:
    """Of the sample's tokens, each from those before it. The tokenizer has a token a character, from 32 at the id 4 on."""
    prompt = [ord(character) - 28 for character in PROMPTS[sample["row_index"]]]
    tokens = torch.tensor([[*prompt, *sample["token_ids"]]])
    return reference(tokens).logits[0, len(prompt) - 1 : -1]


@pytest.fixture
def seed_oss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tmp_path / "families"
    folder.mkdir()
    (folder / "seed_oss.py").write_text(SEED_OSS)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(folder)])
    yield
    sys.modules.pop("tokabatch.model.families.seed_oss", None)


def test_a_family_of_known_operators_is_one_file(seed_oss, tmp_path):
    assert "seed_oss" in families.family_names()
    model = tiny_models.add_tokenizer(tiny_models.build("seed_oss", tmp_path / "model", head_dim=16))
    run(Job.load(write_job(model, tmp_path, temperature=0.0)))
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    samples = read(tmp_path / "out")
    assert len(samples) == len(PROMPTS) and all(len(sample["token_ids"]) == 12 for sample in samples)
    for sample in samples:
        assert sample["token_ids"] == expected_logits(reference, sample).argmax(-1).tolist()


def test_a_new_operator_is_a_field_and_its_use(tmp_path):
    package = EditedPackage(tmp_path / "edited")
    package.add("model/families/softcapped.py", SOFTCAPPED)
    package.edit(
        "model/spec.py",
        "    mlp_bias: bool = False\n",
        "    mlp_bias: bool = False\n    logit_cap: float | None = None\n",
    )
    package.edit(
        "model/decoder.py",
        "        return head(rms_norm(hidden_SE, norm_E, self.spec.rms_norm_eps))\n",
        "        logits_SV = head(rms_norm(hidden_SE, norm_E, self.spec.rms_norm_eps))\n"
        "        cap = self.spec.logit_cap\n"
        "        return logits_SV if cap is None else cap * torch.tanh(logits_SV / cap)\n",
    )
    assert len(package.changed) == 3, "files to open beside a test"
    model = tiny_models.add_tokenizer(tiny_models.build("llama", tmp_path / "model"))
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "softcapped", "final_logit_softcapping": 2.0}))
    done = package.run(write_job(model, tmp_path, seed=3))
    assert done.returncode == 0, done.stderr
    samples = read(tmp_path / "out")
    assert len(samples) == len(PROMPTS)
    for sample in samples:
        plain, drawn = expected_logits(reference, sample), torch.tensor(sample["token_ids"])[:, None]
        capped = (2.0 * torch.tanh(plain / 2.0)).log_softmax(-1).gather(1, drawn).sum().item()
        assert sample["cumulative_logprob"] == pytest.approx(capped, rel=1e-5)
        assert abs(plain.log_softmax(-1).gather(1, drawn).sum().item() - capped) > 1, "the cap shows"
