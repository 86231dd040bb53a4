"""What is refused, and what the refusal says: configs, and files damaged in every way the fault table lists."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from tokabatch.errors import ModelError
from tokabatch.model.checkpoint import preflight
from tokabatch.model.families import family_names, read_spec
from tokabatch.model.resolve import resolve_model
from tokabatch.model.spec import Llama3Scaling
from tokabatch.model.weights import load_decoder


def write_config(folder: Path, **values) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_every_family_file_is_a_family():
    files = Path(sys.modules["tokabatch.model.families"].__file__).parent.glob("[a-z]*.py")
    assert family_names() == sorted(file.stem for file in files)
    assert {"llama", "qwen2", "qwen3"} <= set(family_names())


@pytest.mark.parametrize("family", family_names())
@pytest.mark.parametrize("missing", ["everything", "null"])
def test_missing_keys_mean_what_transformers_makes_of_them(family, missing, tmp_path):
    values = {} if missing == "everything" else {"num_key_value_heads": None, "rope_scaling": None}
    folder = write_config(tmp_path, model_type=family, **values)
    spec, theirs = read_spec(folder), AutoConfig.from_pretrained(folder)
    assert spec.family == family
    assert spec.vocab_size == theirs.vocab_size
    assert spec.hidden_size == theirs.hidden_size
    assert spec.num_layers == theirs.num_hidden_layers
    assert spec.num_heads == theirs.num_attention_heads
    assert spec.num_kv_heads == theirs.num_key_value_heads
    assert spec.head_dim == getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
    assert spec.intermediate_size == theirs.intermediate_size
    assert spec.rms_norm_eps == theirs.rms_norm_eps
    assert spec.context_length == theirs.max_position_embeddings
    assert spec.tied_embeddings == theirs.tie_word_embeddings
    assert spec.rope.theta == theirs.rope_parameters["rope_theta"]
    assert spec.rope.scaling is None


def test_rope_is_read_from_old_and_new_keys(tmp_path):
    scaling = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    expected = Llama3Scaling(32.0, 1.0, 4.0, 8192)
    for values in (
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **scaling}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **scaling}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}},
    ):
        rope = read_spec(write_config(tmp_path, model_type="llama", **values)).rope
        assert (rope.theta, rope.scaling) == (5e5, expected)
    assert read_spec(write_config(tmp_path, model_type="llama", rope_theta=123.0)).rope.theta == 123.0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "another"}, ["`model_type`", "'another'", ", ".join(family_names())]),
        ({"model_type": "qwen"}, ["Did you mean 'qwen"]),
        ({"model_type": ["llama"]}, ["`model_type`"]),
        ({"model_type": "llama", "hidden_size": "big"}, ["`hidden_size`", "'big'"]),
        ({"model_type": "llama", "hidden_act": "gelu"}, ["`hidden_act`", "'gelu'"]),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "yarn", "factor": 2}}, ["`rope_scaling.rope_type`", "'yarn'"]),
        ({"model_type": "llama", "rope_parameters": {"type": "dynamic"}}, ["`rope_parameters.type`", "'dynamic'"]),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "llama3"}}, ["`rope_scaling.factor`", "missing"]),
        ({"model_type": "llama", "quantization_config": {"quant_method": "awq"}}, ["`quantization_config`", "awq"]),
        ({"model_type": "llama", "num_key_value_heads": 5}, ["`num_key_value_heads`", "divide"]),
        ({"model_type": "qwen3", "head_dim": 33}, ["`head_dim`", "even"]),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 128, "max_window_layers": 4},
            ["`use_sliding_window`", "128"],
        ),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["sliding_attention"] * 32},
            ["`use_sliding_window`", "4,096"],
        ),
    ],
)
def test_unsupported_configs_are_refused_by_key(values, words, tmp_path):
    with pytest.raises(ModelError) as caught:
        read_spec(write_config(tmp_path, **values))
    for word in [str(tmp_path / "config.json"), *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"use_sliding_window": False, "sliding_window": 128},
        {"use_sliding_window": True, "sliding_window": None},
        {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 32},
        {"use_sliding_window": True, "sliding_window": 1 << 20, "max_window_layers": 0},
    ],
)
def test_a_sliding_window_that_never_bites_is_accepted(values, tmp_path):
    assert read_spec(write_config(tmp_path, model_type="qwen2", **values)).qkv_bias


def test_a_config_that_is_not_there_or_not_json(tmp_path):
    with pytest.raises(ModelError, match="not found"):
        read_spec(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="JSON"):
        read_spec(tmp_path)
    with pytest.raises(ModelError, match="no such folder"):
        read_spec(tmp_path / "nowhere")


def damage_missing_shard(folder: Path) -> list[str]:
    victim = sorted(folder.glob("*.safetensors"))[1]
    victim.unlink()
    return [str(folder), victim.name, "missing"]


def damage_truncation(folder: Path) -> list[str]:
    victim = sorted(folder.glob("*.safetensors"))[1]
    os.truncate(victim, victim.stat().st_size - 100)
    return [str(victim), "truncated"]


def damage_header(folder: Path) -> list[str]:
    victim = sorted(folder.glob("*.safetensors"))[1]
    os.truncate(victim, 50)
    return [str(victim), "truncated"]


def damage_garbage(folder: Path) -> list[str]:
    victim = sorted(folder.glob("*.safetensors"))[0]
    victim.write_bytes((16).to_bytes(8, "little") + b"not json at all!" + bytes(100))
    return [str(victim), "not a readable safetensors file"]


def damage_shape(folder: Path) -> list[str]:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 160}))
    return ["mlp.gate_proj.weight", "[168, 64]", "[160, 64]"]


def damage_missing_tensor(folder: Path) -> list[str]:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    return [str(folder), "model.layers.3.input_layernorm.weight", "[64]"]


def damage_unexpected_tensor(folder: Path) -> list[str]:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_bias": False}))
    return ["self_attn", "bias", "not part of this llama model"]


def damage_index(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    index.write_text("[]")
    return [str(index), "not a safetensors index"]


def damage_index_promise(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name, other = "model.norm.weight", min(set(content["weight_map"].values()) - {content["weight_map"]["model.norm.weight"]})
    content["weight_map"][name] = other
    index.write_text(json.dumps(content))
    return [other, name, "is not in the file"]


def damage_pickle(folder: Path) -> list[str]:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    return [str(folder), "pickle", "safetensors"]


def damage_dtype(folder: Path) -> list[str]:
    victim = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(victim)
    name = min(tensors)
    save_file(tensors | {name: tensors[name].to(torch.int8)}, victim)
    return [str(victim), name, "I8"]


DAMAGES = [value for name, value in list(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_weights_are_refused_before_anything_is_loaded(damage, save_model):
    folder, _ = save_model("llama-biased", "120KB")
    words = damage(folder)
    with pytest.raises(ModelError) as caught:
        preflight(folder, read_spec(folder))
    for word in words:
        assert word in str(caught.value)


def test_a_tied_head_may_be_stored_only_if_it_is_the_embedding(save_model):
    folder, _ = save_model("llama-tied")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    preflight(folder, read_spec(folder))
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file)
    with pytest.raises(ModelError, match=r"lm_head\.weight.*tie_word_embeddings"):
        preflight(folder, read_spec(folder))


def test_dtype_auto_is_the_checkpoints(save_model):
    folder, _ = save_model("qwen3", dtype=torch.bfloat16)
    spec = read_spec(folder)
    assert load_decoder(folder, spec, "auto", "cpu").dtype == torch.bfloat16
    assert load_decoder(folder, spec, "float32", "cpu").dtype == torch.float32
    with pytest.raises(ModelError, match="float8"):
        load_decoder(folder, spec, "float8", "cpu")


def test_resolve_takes_folders_as_they_are_and_refuses_what_is_none(tmp_path):
    assert resolve_model(tmp_path) == tmp_path
    with pytest.raises(ModelError, match=r"model\.revision 'v1' has no effect: .* is a folder here.* Remove model\.revision"):
        resolve_model(tmp_path, "v1")
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="is a file"):
        resolve_model(tmp_path / "file")
    for name in ("./nowhere", "a/b/c", "nowhere"):
        with pytest.raises(ModelError, match="no such folder"):
            resolve_model(name)


def test_offline_a_hub_id_that_is_not_cached_is_refused_at_once(tmp_path):
    script = "from tokabatch.model.resolve import resolve_model\nresolve_model('nobody/nothing', 'main')"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert "ModelError: nobody/nothing at revision 'main'" in done.stderr
    assert "local folder" in done.stderr


def test_reading_specs_and_headers_needs_no_torch():
    script = "import sys, tokabatch.model.families, tokabatch.model.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0
