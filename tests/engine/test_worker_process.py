from __future__ import annotations

from multiprocessing import Pipe
from typing import Any

import pytest

from tokabatch.engine import worker_process
from tokabatch.engine.worker_process import serve

STEPS = 5


class Recorded:
    """Steps, results and launches in the order in which they take place. A step is `done` once `behind` later ones are
    queued."""

    def __init__(self, behind: int) -> None:
        self.sizes, self.behind = "sizes", behind
        self.launched = 0
        self.events: list[tuple[str, int]] = []

    def launch(self, step: int) -> Step:
        self.events.append(("launch", step))
        self.launched += 1
        return Step(self, step)

    def make_ahead(self) -> None: ...

    def close(self) -> None: ...


class Step:
    def __init__(self, device: Recorded, number: int) -> None:
        self.device, self.number = device, number

    @property
    def done(self) -> bool:
        left = STEPS if self.device.launched == STEPS else self.device.launched - self.number - 1
        return left >= self.device.behind

    def wait(self) -> int:
        self.device.events.append(("result", self.number))
        return self.number


class Quiet:
    begun = finished = 0
    waiting = False


@pytest.mark.parametrize("behind", [0, 1, 2])
def test_a_result_is_sent_before_the_next_launch_if_another_step_is_queued(
    behind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The next step is there, however late the thread that reads it is.
    monkeypatch.setattr(worker_process, "POLL_SECONDS", 60.0)
    ours, theirs = Pipe()
    device = Recorded(behind)
    for step in range(STEPS):
        ours.send(step)
    ours.send(None)
    pulse: Any = Quiet()
    serve(theirs, (lambda spec: device, None, True), pulse)
    # A step that is finished when nothing is queued behind it does not delay the next launch.
    early = max(1, behind)
    expected = [(kind, step) for kind, step in device.events if kind == "launch"][: early + 1]
    for step in range(STEPS - early - 1):
        expected += [("result", step), ("launch", step + early + 1)]
    assert device.events[: len(expected)] == expected
