"""Model folders load in tokabatch and in transformers, and their logits are finite and neither flat nor decided."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.gpu import models
from benchmarks.gpu.shapes import SHAPES
from tokabatch.model.checkpoint import preflight
from tokabatch.model.families import read_spec
from tokabatch.model.spec import tensor_shapes


@pytest.mark.parametrize("name", ["tiny", "tiny-qwen3"])
def test_logits_are_spread(name, tiny_folders):
    model = AutoModelForCausalLM.from_pretrained(tiny_folders[name], dtype=torch.float32).eval()
    ids = torch.randint(3, model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = model(ids).logits
    assert logits.isfinite().all()
    assert 1.0 < logits.std(-1).mean() < 4.0
    assert len(logits.argmax(-1).unique()) > 20


@pytest.mark.parametrize("name", ["tiny", "tiny-qwen3"])
def test_weights_are_those_that_tokabatch_requires(name, tiny_folders):
    folder = tiny_folders[name]
    spec = read_spec(folder)
    preflight(folder, spec)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(tensor_shapes(spec))
        for tensor, shape in tensor_shapes(spec).items():
            weight = file.get_tensor(tensor)
            assert weight.dtype == torch.bfloat16 and tuple(weight.shape) == shape
            if weight.dim() == 2:
                assert len(np.unique(weight.view(torch.int16).numpy(), axis=0)) == len(weight), f"{tensor} repeats a row"


@pytest.mark.parametrize("name", ["tiny", "tiny-qwen3"])
def test_the_tokenizer_has_an_id_for_every_embedding(name, tiny_folders):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folders[name])
    assert len(tokenizer) == SHAPES[name].vocab
    assert tokenizer.decode(tokenizer.encode("plain text, bytes: é")) == "plain text, bytes: é"
    texts = tokenizer.batch_decode([[token] for token in range(259, SHAPES[name].vocab)])
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(
    ("name", "billions"), [("llama-3.2-1b", 1.2358), ("qwen3-0.6b", 0.5960), ("llama-3.1-8b", 8.0303), ("tiny", 1.15e-4)]
)
def test_configs_describe_models_of_the_published_sizes(name, billions, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(models.config(SHAPES[name])))
    spec = read_spec(tmp_path)
    count = sum(int(np.prod(shape)) for shape in tensor_shapes(spec).values())
    assert count / 1e9 == pytest.approx(billions, rel=1e-3)
    assert (spec.rope.scaling is not None) == name.startswith("llama")


def test_a_tensor_larger_than_the_block_goes_around_it(tmp_path, monkeypatch):
    block = np.arange(7, dtype=np.uint16)
    with (tmp_path / "numbers").open("wb") as file:
        models._write_cut(file, block, 5, 17)
    written = np.fromfile(tmp_path / "numbers", np.uint16)
    assert written.tolist() == [(5 + place) % 7 for place in range(17)]
