"""`tokabatch` whose engine is scripted; it notes which samples each process has finished, in a file of its own.

python scripted_tokabatch.py STEP_SECONDS NOTES run JOB ...
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.forked_child import make_apart  # noqa: E402

from benchmarks.scripted_engine import quickstart_script  # noqa: E402
from tokabatch import cli  # noqa: E402
from tokabatch.runner import make_replica, preparation, recorder  # noqa: E402

if __name__ == "__main__":
    seconds, notes = float(sys.argv[1]), Path(sys.argv[2])
    make_replica.executor_maker = partial(make_apart, quickstart_script(slots=64, step_seconds=seconds))
    preparation.BATCH_SAMPLES = recorder.BATCH_SAMPLES = 4
    add, file = recorder.Recorder.add, (notes / f"finished-{os.getpid()}").open("a", buffering=1)

    def noted(self: recorder.Recorder, completions: list, goes_on: Callable[[], bool]) -> None:  # pyright: ignore
        for completion in completions:
            file.write(f"{completion.row_index} {completion.sample_index}\n")
        add(self, completions, goes_on)

    recorder.Recorder.add = noted
    del sys.argv[1:3]
    cli.program()
