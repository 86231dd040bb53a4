"""Small random models of the supported families, in the files that Hugging Face would hold."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "bos_token_id": None,
}


OWN = {"qwen3": {"head_dim": 16}}
"""What a family has beside these."""


def random_model(family: str, **settings: object) -> PreTrainedModel:
    """transformers' model of a family, which is named as in config.json."""
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))


def build(family: str, folder: Path, seed: int = 0, deviation: float = 0.3, **overrides: object) -> Path:
    """Save a model whose logits are spread enough that greedy choices are not ties, and return its folder."""
    settings = COMMON | OWN.get(family, {}) | overrides
    torch.manual_seed(seed)
    model = random_model(family, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, deviation)
    model.save_pretrained(folder)
    return folder


def add_tokenizer(folder: Path, chat_template: str | None = None) -> Path:
    """A byte-level tokenizer of 97 ids: ids 0 to 2 are special (2 ends a text), then printable ASCII and newline."""
    alphabet = ["\n", *map(chr, range(32, 125))]
    symbols = {bytes_to_unicode()[ord(char)]: index for index, char in enumerate(alphabet, 3)}
    vocab = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | symbols
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return folder
