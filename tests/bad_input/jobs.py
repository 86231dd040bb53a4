"""Jobs that cannot work: what is wrong with the job file, its input or its model, and what the refusal has to name.

Each case starts from a good job in a folder of its own (`rows.jsonl`, `model/`, output to `out`), breaks one thing, and may
change keys of the job or return the text of the whole job file.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Changes = dict[str, Any]


@dataclass(frozen=True)
class BadJob:
    name: str
    spoil: Callable[[Path], Changes | str | None]
    """Breaks the folder's files; returns changed sections of the job, or the whole text of a job file."""
    says: str
    """A regular expression that the message must match: what is wrong, and where or what to do."""


def _keys(**sections: Any) -> Callable[[Path], Changes]:
    return lambda folder: sections


def _rows(content: bytes, name: str = "rows.jsonl") -> Callable[[Path], Changes]:
    def write(folder: Path) -> Changes:
        (folder / name).write_bytes(content)
        return {"input": {"path": str(folder / name)}}

    return write


def _text(text: str) -> Callable[[Path], str]:
    head = "model: {path: MODEL}\ninput: {path: ROWS}\noutput: {path: OUT}\n"
    return lambda folder: head + text


def _config(**values: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return write


def _many_samples(folder: Path) -> Changes:
    return _rows(b'{"prompt": "a"}\n' * 1001)(folder) | {"generation": {"n": 1_000_000}}


def _folder_of_no_data(folder: Path) -> Changes:
    (folder / "empty").mkdir()
    return {"input": {"path": str(folder / "empty")}}


def _cut_gzip(folder: Path) -> Changes:
    whole = gzip.compress((folder / "rows.jsonl").read_bytes() * 100)
    return _rows(whole[: len(whole) // 2], "rows.jsonl.gz")(folder)


def _broken_zstd(folder: Path) -> Changes:
    return _rows(b"\0no zstd", "rows.jsonl.zst")(folder)


def _two_formats(folder: Path) -> Changes:
    (folder / "mixed").mkdir()
    (folder / "mixed" / "a.jsonl").write_text("{}\n")
    (folder / "mixed" / "b.parquet").write_text("")
    return {"input": {"path": str(folder / "mixed")}}


def _output_in_a_file(folder: Path) -> Changes:
    (folder / "file").write_text("")
    return {"output": {"path": str(folder / "file" / "out")}}


def _weights(folder: Path) -> Path:
    return folder / "model" / "model.safetensors"


def _truncated(folder: Path) -> None:
    data = _weights(folder).read_bytes()
    _weights(folder).write_bytes(data[: len(data) * 2 // 3])


def _header_cut(folder: Path) -> None:
    _weights(folder).write_bytes(_weights(folder).read_bytes()[:6])


def _no_header(folder: Path) -> None:
    _weights(folder).write_bytes(b"\x80\x02}q\x00." * 200)


def _sharded(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in two files with an index; returns them."""
    tensors = load_file(_weights(folder))
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / "model" / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    _weights(folder).unlink()
    return tensors


def _missing_shard(folder: Path) -> None:
    _sharded(folder)
    (folder / "model" / "model-2.safetensors").unlink()


def _shard_without_its_tensor(folder: Path) -> None:
    tensors = _sharded(folder)
    name = sorted(tensors)[1]
    save_file({name: tensors[name]}, folder / "model" / "model-2.safetensors")


def _index_that_leaves_the_folder(folder: Path) -> None:
    _sharded(folder)
    index = folder / "model" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-2.", "../model-2."))


def _pickles(name: str) -> Callable[[Path], None]:
    def rename(folder: Path) -> None:
        torch.save(load_file(_weights(folder)), folder / "model" / name)
        _weights(folder).unlink()

    return rename


def _missing_tensor(folder: Path) -> None:
    tensors = load_file(_weights(folder))
    del tensors["model.norm.weight"]
    save_file(tensors, _weights(folder))


def _foreign_tensor(folder: Path) -> None:
    save_file(load_file(_weights(folder)) | {"adapter.lora_A": torch.zeros(2, 2)}, _weights(folder))


def _int8(folder: Path) -> None:
    tensors = load_file(_weights(folder))
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"].to(torch.int8)}, _weights(folder))


def _fewer_embeddings(folder: Path) -> None:
    tensors = load_file(_weights(folder))
    cut = {name: value[:90].clone() for name, value in tensors.items() if value.shape[0] == 97}
    save_file(tensors | cut, _weights(folder))
    _config(vocab_size=90)(folder)


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "model" / name).unlink()


def _without_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "model" / name).unlink()


def _broken(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "model" / name).write_text("{broken") and None


def _remote_code(folder: Path) -> None:
    """A model and tokenizer whose files require code of their own."""
    model = folder / "model"
    (model / "evil.py").write_text(f"open({str(folder / 'RAN')!r}, 'w')\nclass Evil: pass\n")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    auto_map = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"auto_map": auto_map, "tokenizer_class": "Evil"}))
    (model / "tokenizer.json").rename(model / "vocab.json")
    (model / "merges.txt").write_text("")
    _config(auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})(folder)


def _model_file(folder: Path) -> Changes:
    return {"model": {"path": str(folder / "rows.jsonl")}}


def _no_model(folder: Path) -> Changes:
    shutil.rmtree(folder / "model")
    return {}


BILLION = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

BAD_JOBS = [
    # The job file
    BadJob("unknown key", _text("generation: {max_tokenz: 3}"), r"max_tokenz: unknown key; did you mean `max_tokens`"),
    BadJob("unknown section", _text("generatoin: {n: 3}"), r"4: generatoin: .*`generation`"),
    BadJob("duplicate key", _text("generation: {n: 1, n: 2}"), r"4: .*n.* (twice|already)"),
    BadJob("alias bomb", _text(BILLION), "alias|anchor"),
    BadJob(
        "1e3 is a number, 1e-3 no count",
        _text("generation: {n: 1e3, max_tokens: 1e-3}"),
        r"4: generation\.max_tokens: .*0\.001",
    ),
    BadJob("a tag that makes objects", _text("generation: !!python/object/apply:os.system [true]"), r"4: .*tag"),
    BadJob("no YAML", _text("a: [1"), "not valid YAML"),
    BadJob("n is 0", _keys(generation={"n": 0}), r"generation\.n: .*0"),
    BadJob("n without end", _keys(generation={"n": 2_000_000_000}), r"generation\.n: .*1,000,000 \(repeat the row"),
    BadJob("more samples than a run notes", _many_samples, r"generation\.n: 1,001 rows come to 1,001,000,000 samples"),
    BadJob("top_p is 0", _keys(generation={"top_p": 0.0}), r"generation\.top_p"),
    BadJob("top_p above 1", _keys(generation={"top_p": 1.01}), r"generation\.top_p"),
    BadJob("NaN temperature", _keys(generation={"temperature": float("nan")}), r"generation\.temperature"),
    BadJob("infinite temperature", _keys(generation={"temperature": float("inf")}), r"generation\.temperature"),
    BadJob(
        "max_tokens beyond the context",
        _keys(generation={"max_tokens": 512}),
        r"max_tokens is 512.* context is 512",
    ),
    BadJob(
        "template of no column",
        _keys(prompt={"template": "{{ promt }}"}),
        r"no column promt \(did you mean 'prompt'\?\); its columns are id, prompt",
    ),
    BadJob(
        "template without an end", _keys(prompt={"template": "{{ prompt"}), r"prompt\.template is not a valid Jinja.*line 1"
    ),
    BadJob("messages without a chat template", _keys(prompt={"messages": "prompt"}), "needs a chat template"),
    # The input
    BadJob("no such file", _keys(input={"path": "nowhere.jsonl"}), r"input\.path 'nowhere\.jsonl' does not exist"),
    BadJob("glob without a match", _keys(input={"path": "nowhere/*.jsonl"}), "matches no file; check the pattern"),
    BadJob("folder of no data", _folder_of_no_data, "holds no .jsonl or .parquet file"),
    BadJob("two formats", _two_formats, "mixes jsonl and parquet files; name one kind"),
    BadJob("empty file", _rows(b""), "holds no rows"),
    BadJob("only blank lines", _rows(b"\n\n\n"), "holds no rows"),
    BadJob("gzip cut short", _cut_gzip, "cut short.*rows are missing"),
    BadJob("broken zstd", _broken_zstd, "damaged near compressed byte 0"),
    BadJob("text named .zst", _rows(b"no zstd", "rows.jsonl.zst"), "is not compressed, despite its name"),
    BadJob("UTF-16", _rows("{}\n".encode("utf-16")), "UTF-16 text.*iconv"),
    BadJob("CSV", _rows(b"a,b\n", "rows.csv"), r"rows\.csv is not a format.*to_parquet"),
    BadJob("a JSON array", _rows(b"[]", "rows.json"), "jq -c"),
    BadJob("no Parquet", _rows(b"PAR1 nonsense", "rows.parquet"), r"rows\.parquet is not a readable Parquet file"),
    BadJob("column absent from the file", _rows(b'{"text": "a"}\n' * 3), "no column prompt or .*; its columns are text"),
    BadJob("no id column", _keys(input={"id_column": "key"}), r"input\.id_column: the input has no column 'key'.*id, prompt"),
    BadJob("duplicate ids", _rows(b'{"prompt": "a", "id": 7}\n' * 3), r"'?7'?.*(rows? )?0.*1"),
    # The model
    BadJob("no model", _no_model, "no such folder"),
    BadJob("a file as the model", _model_file, "is a file"),
    BadJob("missing shard", _missing_shard, r"1 weight file is missing of 2: model-2\.safetensors"),
    BadJob("shard without its tensor", _shard_without_its_tensor, r"model-2\.safetensors: tensor .* is not in the file"),
    BadJob("index that leaves the folder", _index_that_leaves_the_folder, r"'\.\./model-2\.safetensors' is not a file name"),
    BadJob("truncated weights", _truncated, r"model\.safetensors: truncated: [\d,]+ of [\d,]+ bytes"),
    BadJob("header cut", _header_cut, r"model\.safetensors: truncated or not a safetensors file \(6 bytes\)"),
    BadJob("no safetensors inside", _no_header, r"model\.safetensors: .*not a.* safetensors file"),
    BadJob(".bin only", _pickles("pytorch_model.bin"), r"pytorch_model\.bin is a pickle, which could run code.*convert"),
    BadJob(".pt only", _pickles("model.pt"), r"model\.pt is a pickle, which could run code.*convert"),
    BadJob("missing tensor", _missing_tensor, r"model\.norm\.weight \[32\] is in none"),
    BadJob("foreign tensor", _foreign_tensor, r"adapter\.lora_A \[2, 2\] is not part of.*adapters must be merged"),
    BadJob("shapes unlike the config", _config(intermediate_size=64), r"shape \[48, 32\], but config\.json says \[64, 32\]"),
    BadJob("int8 weights", _int8, r"dtype I8, which is not supported.*unquantised"),
    BadJob("more ids than embeddings", _fewer_embeddings, "ids up to 96, but the model in .* has embeddings for 90 only"),
    BadJob("no config", _without("config.json"), r"config\.json: not found"),
    BadJob("broken config", _broken("config.json"), r"config\.json: cannot be read as JSON"),
    BadJob("unknown family", _config(model_type="mamba"), "mamba.*(llama|supported)"),
    BadJob("quantised model", _config(quantization_config={"quant_method": "gptq"}), r"gptq.*weights are not supported"),
    BadJob("odd numbers in the config", _config(num_hidden_layers="two"), "`num_hidden_layers` must be a positive whole"),
    BadJob("no tokenizer", _without_tokenizer, "holds no tokenizer"),
    BadJob("broken tokenizer", _broken("tokenizer.json"), "cannot load the tokenizer"),
    BadJob("remote code", _remote_code, "cannot load the tokenizer"),
    # The output
    BadJob("output inside a file", _output_in_a_file, r"output\.path .* cannot be written.*Choose another"),
    BadJob("output column that is not there", _keys(output={"columns": ["answer"]}), r"output\.columns: .*no column 'answer'"),
]
