"""The decoder against transformers: every family, on random weights of their real config shapes scaled down."""

from __future__ import annotations

import json

import pytest
import torch

from tokabatch.model.families import read_spec
from tokabatch.model.layers import rotary_frequencies, rotary_table
from tokabatch.model.linear import DenseLinear, make_linear
from tokabatch.model.spec import Llama3Scaling, RopeSpec
from tokabatch.model.weights import load_decoder

LENGTH = 120


def prompt(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, 397, (length,), generator=torch.Generator().manual_seed(3))


def load(folder, dtype="auto"):
    return load_decoder(folder, read_spec(folder), dtype, "cpu")


@pytest.mark.parametrize("shard_size", ["1GB", "120KB"])
def test_logprobs_equal_transformers(variant, shard_size, save_model, naive_attend):
    folder, reference = save_model(variant, shard_size)
    assert (folder / "model.safetensors.index.json").exists() == (shard_size == "120KB")
    token_ids = prompt()
    with torch.inference_mode():
        logits = load(folder).forward(token_ids, torch.arange(LENGTH), naive_attend(), torch.arange(LENGTH))
        expected = reference(token_ids[None]).logits[0]
    assert logits.dtype == torch.float32
    difference = (logits.log_softmax(-1) - expected.log_softmax(-1)).abs().max().item()
    assert difference < 2e-5 * max(1.0, expected.abs().max().item())
    assert difference < 1e-4


def test_float64_greedy_tokens_equal_transformers(variant, save_model, naive_attend):
    folder, reference = save_model(variant)
    reference.double()
    decoder = load(folder, "float64")
    known, attend, new = prompt(40), naive_attend(), prompt(40)
    for _ in range(25):
        with torch.inference_mode():
            position = torch.arange(len(known) - len(new), len(known))
            logits = decoder.forward(new, position, attend, torch.tensor([len(new) - 1]))
            expected = reference(known[None]).logits[0, -1]
        assert logits.dtype == torch.float64
        torch.testing.assert_close(logits[0], expected, rtol=1e-4, atol=1e-4)
        assert int(logits.argmax()) == int(expected.argmax())
        new = logits.argmax(-1)
        known = torch.cat((known, new))


@pytest.mark.parametrize("name", ["llama-tied", "qwen3"])
def test_float64_is_float64_throughout(name, save_model, naive_attend):
    """Chunked, token by token and whole, a prompt's logits agree to float64's rounding: nothing inside is rounded to
    float32."""
    folder, _ = save_model(name)
    decoder = load(folder, "float64")
    token_ids = prompt(50)
    with torch.inference_mode():
        whole = decoder.forward(token_ids, torch.arange(50), naive_attend(), torch.arange(50))
        attend = naive_attend()
        parts = [
            decoder.forward(token_ids[a:b], torch.arange(a, b), attend, torch.arange(b - a))
            for a, b in ((0, 17), (17, 18), (18, 40), (40, 50))
        ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["llama-tied", "qwen3"])
def test_bfloat16_is_as_near_to_the_truth_as_transformers(name, save_model, naive_attend):
    folder, reference = save_model(name, dtype=torch.bfloat16)
    token_ids = prompt(64)
    with torch.inference_mode():
        logits = load(folder).forward(token_ids, torch.arange(64), naive_attend(), torch.arange(64))
        assert logits.dtype == torch.bfloat16
        theirs = reference(token_ids[None]).logits[0].double()
        truth = load(folder, "float64").forward(token_ids, torch.arange(64), naive_attend(), torch.arange(64))
    assert (logits.double() - truth).abs().mean() < 1.3 * (theirs - truth).abs().mean()


@pytest.mark.parametrize("rows", [[], [5], [7, 0, 7]])
def test_only_the_wanted_rows_get_logits(rows, save_model, naive_attend):
    folder, _ = save_model("llama-tied")
    decoder = load(folder)
    token_ids = prompt(8).int()
    positions = torch.arange(8, dtype=torch.int32)
    with torch.inference_mode():
        everything = decoder.forward(token_ids, positions, naive_attend(), torch.arange(8))
        some = decoder.forward(token_ids, positions, naive_attend(), torch.tensor(rows, dtype=torch.int32))
    torch.testing.assert_close(some, everything[rows].view(-1, 397), rtol=1e-5, atol=1e-5)


def test_the_input_is_left_as_it_is_and_runs_repeat(save_model, naive_attend):
    folder, _ = save_model("llama-untied")
    decoder = load(folder, "float64")
    token_ids = prompt(8)
    with torch.inference_mode():
        first = decoder.forward(token_ids, torch.arange(8), naive_attend(), torch.arange(8))
        again = decoder.forward(token_ids, torch.arange(8), naive_attend(), torch.arange(8))
    assert torch.equal(first, again)
    assert torch.equal(token_ids, prompt(8))


@pytest.mark.parametrize("bias", [False, True])
def test_packed_and_dense_products_agree(bias):
    weight, x, residual = torch.randn(48, 40), torch.randn(9, 40), torch.randn(9, 48)
    bias_O = torch.randn(48) if bias else None
    packed, dense = make_linear(weight, bias_O), DenseLinear(weight, bias_O)
    torch.testing.assert_close(packed(x), dense(x))
    torch.testing.assert_close(packed.add_to(residual.clone(), x), dense.add_to(residual.clone(), x))
    assert packed(x[:0]).shape == (0, 48)


def test_llama3_scaling_keeps_short_wavelengths_and_slows_long_ones():
    plain = rotary_frequencies(RopeSpec(500_000.0), 64, torch.float64)
    scaled = rotary_frequencies(RopeSpec(500_000.0, Llama3Scaling(8.0, 1.0, 4.0, 8192)), 64, torch.float64)
    wavelength = 2 * torch.pi / plain
    ratio = scaled / plain
    assert torch.equal(ratio[wavelength < 8192 / 4], torch.ones_like(ratio[wavelength < 8192 / 4]))
    torch.testing.assert_close(ratio[wavelength > 8192], torch.full_like(ratio[wavelength > 8192], 1 / 8))
    middle = ratio[(wavelength >= 8192 / 4) & (wavelength <= 8192)]
    assert len(middle) and ((middle > 1 / 8) & (middle < 1)).all()


def test_the_rotary_table_covers_the_context_in_the_models_dtype(save_model):
    folder, _ = save_model("qwen3")
    table = rotary_table(read_spec(folder), torch.float64, torch.device("cpu"))
    assert table.shape == (512, 1, 24) and table.dtype == torch.float64
    assert json.loads((folder / "config.json").read_text())["head_dim"] == 24
