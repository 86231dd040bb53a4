"""Several processes over gloo compute what one computes: tensor parallel, pipeline parallel, and both at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tokabatch.errors import ModelError
from tokabatch.model.families import read_spec
from tokabatch.model.partition import PART, VocabularyShard, check_mesh, kv_heads, stage_layers
from tokabatch.model.spec import ModelSpec
from tokabatch.model.weights import load_decoder
from tokabatch.parallel.mesh import Mesh

SHAPE = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 51,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def save(model: PreTrainedModel, folder: Path) -> Path:
    torch.manual_seed(0)
    for tensor in model.parameters():
        torch.nn.init.normal_(tensor, 0.2, 0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    tied, biased = Qwen2Config(**SHAPE, tie_word_embeddings=True), Qwen3Config(**SHAPE, head_dim=12, attention_bias=True)
    return [save(Qwen2ForCausalLM(tied), root / "tied"), save(Qwen3ForCausalLM(biased), root / "biased")]


def attend(layer: int, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THD, k_TKD, v_TKD))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def compute(mesh: Mesh, folder: Path) -> torch.Tensor:
    decoder = load_decoder(folder, read_spec(folder), "float64", "cpu", mesh)
    with torch.inference_mode():
        return decoder.forward(torch.arange(20) * 5 % 101, torch.arange(20), attend, torch.tensor([3, 19])).clone()


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_several_processes_equal_one(mesh, folders, ranks):
    for folder in folders:
        expected = compute(Mesh.single(), folder)
        parts = ranks(mesh).call(mesh, compute, folder)
        for part in parts[-mesh[0] :]:
            torch.testing.assert_close(part, expected, rtol=0, atol=1e-9)
        assert all(part.shape == (0, 101) for part in parts[: -mesh[0]])


def test_a_mesh_that_does_not_fit_the_model_is_refused(folders):
    spec = read_spec(folders[0])
    with pytest.raises(
        ModelError, match=r"num_attention_heads \(4\) is not a multiple of 3 .* write one of 1, 2, 4 as engine.tensor"
    ):
        load_decoder(folders[0], spec, "float32", "cpu", Mesh(rank=0, tensor_size=3, pipeline_size=1))
    with pytest.raises(ModelError, match="num_key_value_heads"):
        check_mesh(replace(spec, num_heads=12, num_kv_heads=4), Mesh(0, 6, 1))
    with pytest.raises(ModelError, match="pipeline"):
        load_decoder(folders[0], spec, "float32", "cpu", Mesh(rank=0, tensor_size=1, pipeline_size=4))


def test_shards_cover_everything_once():
    for size in (1, 7, 8, 128, 129, 1000):
        for ranks in (1, 2, 3, 4):
            meshes = [Mesh(rank, ranks, 1) for rank in range(ranks)]
            assert [x for mesh in meshes for x in mesh.shard(size)] == list(range(size))
            vocabulary = [VocabularyShard.of(size, mesh) for mesh in meshes]
            assert [x for shard in vocabulary for x in shard.tokens] == list(range(size))
            assert len({shard.width for shard in vocabulary}) == 1
            assert ranks == 1 or all(shard.tokens.start % PART == 0 or not shard.tokens for shard in vocabulary)
    place = Mesh(rank=5, tensor_size=2, pipeline_size=3)
    assert (place.tensor_rank, place.pipeline_rank, place.is_last_stage) == (1, 2, True)


@pytest.mark.parametrize(
    ("kv", "size", "held"), [(8, 4, [[0, 1], [2, 3], [4, 5], [6, 7]]), (2, 4, [[0], [0], [1], [1]]), (1, 2, [[0], [0]])]
)
def test_key_value_heads_are_held_by_several_ranks_where_there_are_fewer(kv, size, held, folders):
    spec = replace(read_spec(folders[0]), num_heads=8, num_kv_heads=kv)
    assert [list(kv_heads(spec, Mesh(rank, size, 1))) for rank in range(size)] == held


def stages_of(spec: ModelSpec, stages: int) -> list[int]:
    found = [stage_layers(spec, Mesh(rank, 1, stages)) for rank in range(stages)]
    assert [layer for stage in found for layer in stage] == list(range(spec.num_layers))
    return [len(stage) for stage in found]


def test_stages_are_cut_by_what_layers_and_head_cost(folders):
    spec = read_spec(folders[0])
    llama_1b = replace(
        spec,
        vocab_size=128_256,
        hidden_size=2048,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        intermediate_size=8192,
    )
    assert stages_of(llama_1b, 2) == [10, 6]
    llama_70b = replace(llama_1b, hidden_size=8192, num_layers=80, num_heads=64, head_dim=128, intermediate_size=28_672)
    assert stages_of(llama_70b, 4) == [20, 20, 21, 19]
    for layers in range(1, 9):
        for stages in range(1, layers + 1):
            assert min(stages_of(replace(spec, num_layers=layers), stages)) >= 1
