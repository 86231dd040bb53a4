"""Random models of one small shape whose tokenizers differ: ids 0 to 255 are bytes, then come longer pieces and specials."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

SPECIALS = ("<|begin|>", "<|end|>", "<|pad|>", "<|turn|>", "<|done|>")
BEGIN, END, PAD, TURN, DONE = range(261, 266)
MERGES = [("a", "b"), ("ab", "c"), ("Ċ", "Ċ"), ("e", "n"), ("en", "d")]
CHATML = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|done|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
CLOCK = "Time: {{ strftime_now('%H:%M:%S.%f') }}\n" + CHATML
WITH_TOOLS = "{% if tools %}<|turn|>tools\n{{ tools | tojson }}<|done|>\n{% endif %}" + CHATML
WITH_TOOL_CALLS = CHATML.replace(
    "{{ m['content'] }}", "{{ m['content'] or '' }}{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% endif %}"
)


def make(
    folder: Path,
    *,
    family: str = "llama",
    begin: bool = True,
    chat: str | dict[str, str] | None = None,
    eos: str = "<|end|>",
    eos_id: int = END,
    extra: tuple[str, ...] = (),
) -> Path:
    """Save weights, config and tokenizer. `begin` puts <|begin|> in front of every text; `extra` special tokens follow the
    others, beyond the embeddings; `eos` is the tokenizer's end token, `eos_id` the configuration's."""
    _save_weights(folder, family, eos_id)
    alphabet = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for number, (left, right) in enumerate(MERGES, 256):
        alphabet[left + right] = number
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in (*SPECIALS, *extra)])
    if begin:
        backend.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", BEGIN)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin|>", eos_token=eos, pad_token="<|pad|>")
    tokenizer.chat_template = chat
    tokenizer.save_pretrained(folder)
    return folder


def _save_weights(folder: Path, family: str, eos_id: int) -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 266 + (family == "qwen2"),
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": BEGIN,
        "eos_token_id": eos_id,
        "pad_token_id": PAD,
        "initializer_range": 0.25,
        "tie_word_embeddings": False,
    }
    model = LlamaForCausalLM(LlamaConfig(**shape)) if family == "llama" else Qwen2ForCausalLM(Qwen2Config(**shape))
    model.save_pretrained(folder)


def give_own_digits(folder: Path) -> None:
    """The saved tokenizer.json gets a piece "12" (id 5) and a pre-tokenizer that keeps up to three digits together, without a
    normalizer: not what transformers builds for a Qwen2 tokenizer."""
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    vocab = values["model"]["vocab"]
    del vocab[next(piece for piece, number in vocab.items() if number == 5)]
    vocab["12"] = 5
    values["model"]["merges"].append(["1", "2"])
    digits = {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}"}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    values["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, level]}
    values["normalizer"] = None
    path.write_text(json.dumps(values))
