"""One process of a replica, run as a script by the tests: computes the logits of a model under every mesh of the world.

python rank_process.py RANK WORLD MEETING_FILE FOLDER...; writes FOLDER/logits-TENSORxPIPELINE-RANK.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tokabatch.model.families import read_spec
from tokabatch.model.weights import load_decoder
from tokabatch.parallel.mesh import Mesh

TOKENS = torch.arange(20) * 5 % 101
ROWS = torch.tensor([3, 19])


def attend(layer: int, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THD, k_TKD, v_TKD))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def compute(folder: Path, mesh: Mesh) -> torch.Tensor:
    decoder = load_decoder(folder, read_spec(folder), "float64", "cpu", mesh)
    with torch.inference_mode():
        return decoder.forward(TOKENS, torch.arange(20), attend, ROWS).clone()


def main(rank: int, world: int, meeting_point: Path, folders: list[Path]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=world)
    for sizes in ((1, world), (world, 1)) if world == 2 else ((2, 2),):
        mesh = Mesh.create(*sizes)
        for folder in folders:
            torch.save(compute(folder, mesh), folder / f"logits-{sizes[0]}x{sizes[1]}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), [Path(name) for name in sys.argv[4:]])
