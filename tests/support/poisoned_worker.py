"""A real worker that is killed by every step that admits a sample of a certain row."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

from tokabatch.engine.worker import Worker, WorkerSpec
from tokabatch.messages import StepBatch

ROW = 2


@dataclass
class PoisonedWorker:
    worker: Worker

    def launch(self, step: StepBatch):
        if ROW in step.inits.row:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.worker.launch(step)


def build(spec: WorkerSpec) -> PoisonedWorker:
    return PoisonedWorker(Worker.build(spec))
