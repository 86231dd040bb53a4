"""Model folders with random bf16 weights of real shapes, written straight to safetensors: config, weights, tokenizer.

The weights are cut from one block of normal numbers, scaled to the matrix, row after row around the block; its length has no
common divisor with a row, so no row of a matrix occurs twice. 16 GB are written at the speed of the disk.
Every matrix keeps its input's size (deviation 1 / sqrt(inputs)), and logits deviate by about 2: finite, and neither flat nor
decided.

The tokenizer is byte-level, without merges, of the right vocabulary: text is encoded byte by byte, ids decode to short words.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from benchmarks.gpu.shapes import SHAPES, Shape
from tokabatch.model.families import read_spec
from tokabatch.model.spec import tensor_shapes

Bits = npt.NDArray[np.uint16]

BLOCK = 33_554_393
"""A prime, so that it divides no matrix."""
LOGIT_DEVIATION = 2.0
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
EOS = 2


def write_model(name: str, folder: Path, *, sparse: bool = False) -> int:
    """A folder that tokabatch, transformers, vLLM and SGLang load. Returns the bytes of the weights; `sparse`: all are 0, and
    take no room on the disk. Raises KeyError for an unknown name."""
    shape = SHAPES[name]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(shape), indent=2))
    write_tokenizer(folder, shape)
    tensors = tensor_shapes(read_spec(folder))
    total = 2 * sum(prod(size) for size in tensors.values())
    with (folder / "model.safetensors").open("wb") as file:
        file.write(_header(tensors))
        if sparse:
            file.truncate(file.tell() + total)
            return total
        blocks = _Blocks()
        for (tensor, size), begin in zip(tensors.items(), _offsets(tensors), strict=True):
            _write_cut(file, blocks[_kind(tensor, size)], begin, prod(size))
    return total


def config(shape: Shape) -> dict[str, Any]:
    """config.json as the family's transformers class writes it."""
    names = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    return {
        "architectures": [names[shape.family]],
        "model_type": shape.family,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.context,
        "rope_theta": shape.rope_theta,
        "rope_scaling": dict(shape.rope_scaling) or None,
        "rms_norm_eps": shape.eps,
        "tie_word_embeddings": shape.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": 1,
        "eos_token_id": EOS,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def write_tokenizer(folder: Path, shape: Shape) -> None:
    """tokenizer.json of exactly `shape.vocab` ids: special tokens, the 256 bytes, then words."""
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += _words(shape.vocab - len(tokens))
    tokenizer = Tokenizer(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL_TOKENS, strict=True))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": shape.context, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def _words(count: int) -> list[str]:
    """Distinct words of consonants and vowels, three of four behind a space (`Ġ` in byte-level spelling)."""
    syllables = [consonant + vowel for consonant in "bcdfghjklmnprstvwz" for vowel in "aeiou"]
    base = len(syllables)
    words: list[str] = []
    for number in range(count):
        parts = [syllables[number % base], syllables[number // base % base]]
        parts += [syllables[number // base**2 - 1]] if number >= base**2 else []
        words.append(("" if number % 4 == 0 else "Ġ") + "".join(parts))
    return words


def _header(tensors: dict[str, tuple[int, ...]]) -> bytes:
    """The safetensors header (its format: 8 bytes of length, JSON, spaces up to a multiple of 8)."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, size in tensors.items():
        end = begin + 2 * prod(size)
        entries[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _offsets(tensors: dict[str, tuple[int, ...]]) -> Iterator[int]:
    """Where in the block each tensor begins: anywhere, the same on every machine."""
    rng = np.random.default_rng(1)
    for _ in tensors:
        yield int(rng.integers(BLOCK))


def _kind(name: str, size: tuple[int, ...]) -> tuple[float, float]:
    """Mean and deviation of a tensor's numbers."""
    if len(size) == 1:
        return 1.0, 0.05
    is_vocabulary = name.startswith(("model.embed_tokens", "lm_head"))
    return 0.0, (LOGIT_DEVIATION if is_vocabulary else 1.0) / size[1] ** 0.5


class _Blocks:
    """The block by mean and deviation, as bf16 bits; a model has three or four of them."""

    def __init__(self) -> None:
        self._normal = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))
        self._made: dict[tuple[float, float], Bits] = {}

    def __getitem__(self, kind: tuple[float, float]) -> Bits:
        if kind not in self._made:
            mean, deviation = kind
            block = (self._normal * deviation).add_(mean).to(torch.bfloat16)
            self._made[kind] = block.view(torch.int16).numpy().view(np.uint16)
        return self._made[kind]


def _write_cut(file: IO[bytes], block: Bits, begin: int, count: int) -> None:
    """`count` numbers of the block from `begin` on, around its end as often as it takes."""
    while count:
        part = block[begin : begin + count]
        file.write(part.data)
        count -= len(part)
        begin = 0
