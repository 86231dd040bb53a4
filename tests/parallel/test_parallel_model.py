"""Several processes over gloo compute what one computes: tensor parallel, pipeline parallel, and both at once."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tokabatch.errors import ModelError
from tokabatch.model.families import read_spec
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
SCRIPT = Path(__file__).with_name("rank_process.py")


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


def run_ranks(world: int, folders: list[Path], meeting_point: Path) -> None:
    common = [str(world), str(meeting_point), *map(str, folders)]
    ranks = [subprocess.Popen([sys.executable, str(SCRIPT), str(rank), *common]) for rank in range(world)]
    try:
        assert [process.wait(100) for process in ranks] == [0] * world
    finally:
        for process in ranks:
            process.kill()


@pytest.mark.parametrize(("world", "meshes"), [(2, ["2x1", "1x2"]), pytest.param(4, ["2x2"], marks=pytest.mark.slow)])
def test_several_processes_equal_one(world, meshes, folders, tmp_path):
    run_ranks(world, folders, tmp_path / "meeting-point")
    compute = runpy.run_path(str(SCRIPT))["compute"]
    for folder in folders:
        expected = compute(folder, Mesh.single())
        for mesh in meshes:
            num_stages = int(mesh[-1])
            parts = [torch.load(folder / f"logits-{mesh}-{rank}.pt") for rank in range(world)]
            last_stage = parts[world - world // num_stages :]
            for part in last_stage:
                torch.testing.assert_close(part, expected, rtol=0, atol=1e-9)
            assert all(part.shape == (0, 101) for part in parts[: -len(last_stage)])


def test_a_mesh_that_does_not_fit_the_model_is_refused(folders):
    spec = read_spec(folders[0])
    with pytest.raises(ModelError, match="num_attention_heads"):
        load_decoder(folders[0], spec, "float32", "cpu", Mesh(rank=0, tensor_size=3, pipeline_size=1))
    with pytest.raises(ModelError, match="pipeline"):
        load_decoder(folders[0], spec, "float32", "cpu", Mesh(rank=0, tensor_size=1, pipeline_size=4))


def test_shards_and_stages_cover_everything_once():
    for size in (1, 7, 8):
        for ranks in (1, 2, 3, 4):
            shards = [Mesh(rank, ranks, 1).shard(size) for rank in range(ranks)]
            assert [x for shard in shards for x in shard] == list(range(size))
            stages = [Mesh(rank, 1, ranks).stage_layers(size) for rank in range(ranks)]
            assert [x for stage in stages for x in stage] == list(range(size))
    place = Mesh(rank=5, tensor_size=2, pipeline_size=3)
    assert (place.tensor_rank, place.pipeline_rank, place.is_last_stage) == (1, 2, True)
