"""Persistent ranks: processes that connect once and then compute what they receive, under any mesh of their number."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from support import tiny_engine, token_device
from tokabatch.engine.worker import Worker
from tokabatch.model.families import read_spec
from tokabatch.model.scattering import Scattering
from tokabatch.parallel.mesh import CHECK, Mesh, Place
from tokabatch.scheduling.contracts import Completion, SamplingParams
from tokabatch.scheduling.scheduler import Scheduler, SchedulerLimits
from tokabatch.scheduling.stop_conditions import StopRules


class Ranks:
    """`world` processes."""

    def __init__(self, world: int, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            place = Place(rank, 1, world, folder / "meeting")
            process = context.Process(target=_serve, args=(theirs, place), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def call(self, mesh: tuple[int, int], function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(mesh, *arguments)` returns on each rank of a mesh of these sizes."""
        for pipe in self._pipes:
            pipe.send((mesh, function, arguments))
        results = [pipe.recv() for pipe in self._pipes]
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(pipe: Connection, place: Place) -> None:
    torch.set_num_threads(1)
    os.environ[CHECK] = "1"
    meshes = {(1, place.pipeline_size): Mesh.join(place, torch.device("cpu"))}
    while True:
        sizes, function, arguments = pipe.recv()
        if sizes not in meshes:
            meshes[sizes] = Mesh.create(*sizes)
        try:
            pipe.send(function(meshes[sizes], *arguments))
        except Exception as error:
            pipe.send(error)


@dataclass(frozen=True)
class TinyJob:
    """What is drawn, and how it is scheduled."""

    folder: Path
    prompts: list[list[int]]
    params: list[SamplingParams]
    limits: SchedulerLimits
    depth: int = 2
    eos: int = 2
    scatter_from: int | None = None
    """Tokens of a step from which on they are scattered over tensor ranks."""


def run(mesh: Mesh, job: TinyJob) -> dict[tuple[int, int], Completion]:
    """Run the whole job on this mesh, in float64. Every rank schedules for itself, by the results that the last stage sends."""
    limits = replace(job.limits, stages=mesh.pipeline_size)
    worker = Worker.build(tiny_engine.worker_spec(job.folder, limits), mesh)
    if job.scatter_from is not None and mesh.tensor_size > 1:
        worker._decoder.scattering = Scattering(mesh, {job.scatter_from: frozenset()})
    requests = token_device.make_requests(job.prompts, job.params)
    vocab_size = read_spec(job.folder).vocab_size
    scheduler = Scheduler(requests, limits, StopRules(requests.sampling, [job.eos], vocab_size, None))
    launched, done = deque(), {}
    while not scheduler.done:
        step = scheduler.schedule() if scheduler.num_in_flight < job.depth + mesh.pipeline_size - 1 else None
        if step is not None:
            launched.append(worker.launch(step))
            continue
        told = [launched.popleft().wait()]
        if not mesh.is_single:
            dist.broadcast_object_list(told, src=mesh.tensor_size * (mesh.pipeline_size - 1))
        for completion in scheduler.apply(told[0]):
            done[completion.row_index, completion.sample_index] = completion
    return done
