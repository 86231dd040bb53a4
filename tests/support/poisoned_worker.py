"""A real worker that is killed by every step in which a certain token comes from the host: a row that kills workers."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

from tokabatch.engine.worker import Worker, WorkerSpec
from tokabatch.messages import StepBatch

POISON = 4 + ord("|") - ord(" ")
"""The id that the tests' tokenizer gives this character alone."""


@dataclass
class PoisonedWorker:
    worker: Worker

    def launch(self, step: StepBatch):
        if POISON in step.token_ids:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.worker.launch(step)


def build(spec: WorkerSpec) -> PoisonedWorker:
    return PoisonedWorker(Worker.build(spec))
