"""Small tokenizers made on the spot (byte-level BPE, with and without BOS and chat template) and a quick way to ingest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from tokabatch.input.store.tokenized_input import InputStore, ingest
from tokabatch.input.tokenizer.loading import load_tokenizer
from tokabatch.input.tokenizer.tokenizer import Tokenizer
from tokabatch.job import Job, ModelConfig

CORPUS = [
    "Question: how many apples are left?\nAnswer: there are 12 apples left.",
    "the quick brown fox",
    "user system assistant",
]
CHAT_TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SPECIAL = ["<|bos|>", "<|eos|>", "<|start|>", "<|end|>"]


def save_tokenizer(folder: Path, *, bos: bool, chat: bool) -> Path:
    """A tokenizer folder as a model has one."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator(CORPUS * 4, trainer)
    backend.add_tokens([AddedToken("<think>", special=False)])
    if bos:
        number = backend.token_to_id("<|bos|>")
        backend.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", number)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|bos|>" if bos else None,
        eos_token="<|eos|>",
        additional_special_tokens=["<|start|>", "<|end|>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    kinds = {"plain": (False, False), "bos": (True, False), "chat": (False, True), "bos_chat": (True, True)}
    return {name: save_tokenizer(root / name, bos=bos, chat=chat) for name, (bos, chat) in kinds.items()}


@pytest.fixture(scope="session")
def tokenizers(tokenizer_folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {name: load_tokenizer(ModelConfig(path=str(folder))) for name, folder in tokenizer_folders.items()}


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: Any, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return write


Ingest = Callable[..., InputStore]


@pytest.fixture
def ingest_job(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> Ingest:
    """Ingests `path` with further sections of a job: ingest_job(path, tokenizer="bos", prompt={...})."""
    count = iter(range(1000))

    def run(
        path: Path | str,
        tokenizer: str = "plain",
        context: int = 4096,
        vocab_size: int | None = None,
        clock: str = "",
        **sections: Any,
    ):
        given = {"model": {"path": "m"}, "output": {"path": "out"}, **sections}
        given["input"] = {"path": str(path), **sections.get("input", {})}
        folder = tmp_path / f"store{next(count)}"
        folder.mkdir()
        return ingest(Job.load(given), tokenizers[tokenizer], folder, context, vocab_size=vocab_size, clock=clock)

    return run


@pytest.fixture
def texts(tokenizers: dict[str, Tokenizer]) -> Callable[..., list[str]]:
    """The decoded prompts of a store, special tokens spelled out."""

    def decode(store: InputStore, tokenizer: str = "plain") -> list[str]:
        prompts = [store.prompt(row) for row in range(store.num_rows)]
        return tokenizers[tokenizer].decode_batch(prompts, skip_special_tokens=False)

    return decode
