"""Two worlds of ranks that all tests here share."""

from __future__ import annotations

import multiprocessing

import pytest
from support.ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """`ranks(mesh)` are the processes of a mesh's number."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tokabatch.engine.executor", "support.scripted_worker"])
    started: dict[int, Ranks] = {}

    def of(mesh: tuple[int, int]) -> Ranks:
        world = mesh[0] * mesh[1]
        if world not in started:
            started[world] = Ranks(world, tmp_path_factory.mktemp(f"world{world}"))
        return started[world]

    yield of
    for each in started.values():
        each.close()
