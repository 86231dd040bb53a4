"""A real worker that is killed by every step that admits a sample of a certain row."""

from __future__ import annotations

import os
import signal

from tokabatch.engine.launcher import Launcher
from tokabatch.engine.worker import WorkerSpec
from tokabatch.scheduling.contracts import StepBatch

ROW = 2


class PoisonedLauncher(Launcher):
    def launch(self, step: StepBatch):
        if ROW in step.inits.row:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().launch(step)


def build(spec: WorkerSpec) -> Launcher:
    return PoisonedLauncher.build(spec)
