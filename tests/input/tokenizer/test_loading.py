"""tokenizer.json is taken as it is; tokenizer_config.json adds to it what it adds in transformers."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from tokabatch.errors import ModelError
from tokabatch.input.tokenizer import loading
from tokabatch.input.tokenizer.loading import load_tokenizer
from tokabatch.job import ModelConfig

MERGES = [("1", "2"), ("Ġ", "a"), ("e", "n"), ("en", "d"), ("Ċ", "Ċ"), ("<", "|")]
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXTS = st.text() | st.lists(st.sampled_from(["12", " end", "été", "e\u0301", "\n\n", "<|end|>", "<tool>", " a", "'s"])).map(
    "".join
)


def write(folder: Path, pattern: str, model_type: str, *, bos: bool, ignore_merges: bool, **config: Any) -> Path:
    """A byte-level tokenizer as the files of Qwen and Llama 3 have it."""
    vocab = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in MERGES:
        vocab[left + right] = len(vocab)
    backend = Backend(models.BPE(vocab, MERGES, ignore_merges=ignore_merges))
    level = {"add_prefix_space": False, "use_regex": False}
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(**level, trim_offsets=False)])
    backend.decoder = decoders.ByteLevel(**level, trim_offsets=False)
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<|begin|>", "<|end|>", "<|endoftext|>")])
    backend.add_tokens([AddedToken("<tool>", special=False)])
    if model_type.startswith("qwen"):
        backend.normalizer = normalizers.NFC()
    backend.post_processor = processors.ByteLevel(**level, trim_offsets=False)
    if bos:
        begin = backend.token_to_id("<|begin|>")
        backend.post_processor = processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", begin)])
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "pad_token": "<|endoftext|>"} | config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def write_qwen(folder: Path, **config: Any) -> Path:
    config = {"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False, "bos_token": None} | config
    return write(folder, PRETOKENIZE_REGEX, "qwen2", bos=False, ignore_merges=False, **config)


def write_llama(folder: Path, **config: Any) -> Path:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>"} | config
    return write(folder, LLAMA_3, "llama", bos=True, ignore_merges=True, **config)


ADDED = {str(number): {"content": text, "special": True} for number, text in ((262, "<|begin|>"), (270, "<|later|>"))}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("families")
    qwen3 = write_qwen(root / "qwen3")
    (qwen3 / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    return [
        qwen3,
        write_qwen(root / "qwen2", add_bos_token=False),
        write_qwen(root / "qwen2_extra", extra_special_tokens=["<|image|>"]),
        write_llama(root / "llama3"),
        write_llama(root / "llama3_without_bos", add_bos_token=False),
        write_llama(root / "llama3_with_end", add_bos_token=True, add_eos_token=True),
        write_llama(root / "llama3_added", added_tokens_decoder=ADDED),
    ]


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_known_families_give_the_ids_of_transformers(families: list[Path], text: str) -> None:
    for folder in families:
        ours, theirs = load_cached(folder)
        assert ours.encode_batch([text], False)[0] == theirs(text, add_special_tokens=False).input_ids, folder.name
        begun = ours.encode_batch([text], True)[0]
        whole = theirs(text).input_ids
        assert begun == (whole[:-1] if theirs.add_eos_token else whole) or text.startswith("<|begin|>"), folder.name


LOADED: dict[Path, Any] = {}


def load_cached(folder: Path) -> Any:
    if folder not in LOADED:
        LOADED[folder] = load_tokenizer(ModelConfig(path=str(folder))), AutoTokenizer.from_pretrained(folder)
    return LOADED[folder]


def test_nothing_is_said_of_known_families(families: list[Path]) -> None:
    for folder in families:
        tokenizer = load_tokenizer(ModelConfig(path=str(folder)))
        assert tokenizer.replaced == () and tokenizer.describe(1000) == (), folder.name


def test_the_file_is_the_truth_where_transformers_replaces_it(tmp_path: Path) -> None:
    named = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for number, config in enumerate((named, {"tokenizer_class": "Qwen2Tokenizer"})):
        folder = write(tmp_path / str(number), LLAMA_3, "qwen2", bos=True, ignore_merges=True, bos_token="<|begin|>", **config)
        file = Backend.from_file(str(folder / "tokenizer.json"))
        file.normalizer = None
        file.save(str(folder / "tokenizer.json"))
        tokenizer = load_tokenizer(ModelConfig(path=str(folder)))
        for text in ("12 + 312 = 324", "e\u0301te\u0301", "end"):
            assert tokenizer.encode_batch([text], True)[0] == file.encode(text).ids
        assert tokenizer.replaced == ("normalizer", "pre_tokenizer", "model.ignore_merges")
        assert "AutoTokenizer would put its own normalizer and pre_tokenizer" in tokenizer.describe(1000)[0]


def test_no_class_named_in_the_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", LLAMA_3, "qwen2", bos=False, ignore_merges=False)
    assert load_tokenizer(ModelConfig(path=str(folder))).replaced == ("pre_tokenizer",)
    (folder / "tokenizer_config.json").unlink()
    assert load_tokenizer(ModelConfig(path=str(folder))).replaced == ("pre_tokenizer",)


@pytest.mark.parametrize(
    "name", ["PreTrainedTokenizerFast", "TokenizersBackend", "GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizerFast"]
)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_the_named_class_is_the_one_that_autotokenizer_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, name: str
) -> None:
    folder = write(
        tmp_path / "a", LLAMA_3, model_type, bos=True, ignore_merges=True, bos_token="<|begin|>", tokenizer_class=name
    )
    replaced = load_tokenizer(ModelConfig(path=str(folder))).replaced
    monkeypatch.setattr(loading, "TRUSTED_CLASSES", {})
    assert load_tokenizer(ModelConfig(path=str(folder))).replaced == replaced


def test_known_families_do_not_import_autotokenizer(families: list[Path]) -> None:
    folders = [str(folder) for folder in families]
    code = f"""
        import sys
        from tokabatch.input.tokenizer.loading import load_tokenizer
        from tokabatch.job import ModelConfig
        for folder in {folders!r}:
            load_tokenizer(ModelConfig(path=folder))
        assert "transformers.models.auto.tokenization_auto" not in sys.modules
        """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_a_class_that_is_code_of_its_own_is_not_needed(tmp_path: Path) -> None:
    auto_map = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    folder = write_llama(tmp_path / "a", tokenizer_class="Evil", auto_map=auto_map)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w')\nclass Evil: pass\n")
    tokenizer = load_tokenizer(ModelConfig(path=str(folder)))
    assert tokenizer.encode_batch(["12"], True) == [[262, 256]] and not (tmp_path / "RAN").exists()


def test_a_folder_without_tokenizer_json(tmp_path: Path) -> None:
    folder = write_qwen(tmp_path / "a")
    values = json.loads((folder / "tokenizer.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(values["model"]["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in MERGES))
    whole = load_tokenizer(ModelConfig(path=str(folder)))
    (folder / "tokenizer.json").unlink()
    tokenizer = load_tokenizer(ModelConfig(path=str(folder)))
    assert tokenizer.encode_batch(["12 end"], False) == whole.encode_batch(["12 end"], False)
    assert tokenizer.replaced == ()
    (folder / "vocab.json").rename(folder / "vocab.txt")
    (folder / "merges.txt").unlink()
    with pytest.raises(ModelError, match=r"has no vocabulary: Qwen2Tokenizer found none in its files; copy tokenizer\.json"):
        load_tokenizer(ModelConfig(path=str(folder)))


def test_a_missing_or_damaged_tokenizer_is_refused(tmp_path: Path, tokenizer_folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"model\.path.*holds no tokenizer \(no tokenizer\.json\)"):
        load_tokenizer(ModelConfig(path=str(tmp_path)))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"model\.tokenizer"):
        load_tokenizer(ModelConfig(path=str(tokenizer_folders["bos"]), tokenizer=str(tmp_path)))
    other = ModelConfig(path=str(tmp_path), tokenizer=str(tokenizer_folders["bos"]))
    assert load_tokenizer(other).prefix_text == "<|bos|>"
