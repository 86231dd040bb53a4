"""What counts as a standstill of the worker, by the signs it gives."""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.connection import Connection

import pytest

from tokabatch.engine.heartbeat import WARMING_STEPS, Patience, Vitals, die_with_parent

PATIENCE = Patience(step=10, warming=100, silence=20, loading=50)


def pass_time(vitals: Vitals, seconds: int) -> None:
    for _ in range(seconds):
        vitals.pass_time(1.0)


@pytest.fixture
def vitals() -> Vitals:
    """A worker that has long warmed up."""
    vitals = Vitals(PATIENCE)
    vitals.ready = True
    vitals.beat(WARMING_STEPS, WARMING_STEPS, False)
    return vitals


def test_idle_workers_may_idle(vitals):
    for _ in range(1000):
        pass_time(vitals, 5)
        vitals.beat(WARMING_STEPS, WARMING_STEPS, False)
    assert vitals.fault is None


def test_silence_is_a_fault(vitals):
    pass_time(vitals, 20)
    assert vitals.fault is None
    pass_time(vitals, 1)
    assert vitals.fault == "it did not respond for 21 s"


def test_a_step_that_is_never_done_is_a_fault_whatever_the_signs(vitals):
    for second in range(11):
        assert vitals.fault is None, second
        vitals.beat(WARMING_STEPS + 2, WARMING_STEPS, False)
        pass_time(vitals, 1)
    assert vitals.fault == f"steps {WARMING_STEPS + 1} to {WARMING_STEPS + 2} were not done after 11 s"


def test_steps_that_get_done_are_no_fault(vitals):
    for done in range(1000):
        vitals.beat(WARMING_STEPS + done + 2, WARMING_STEPS + done, False)
        pass_time(vitals, 9)
        assert vitals.fault is None


def test_a_worker_that_waits_for_its_parent_is_not_to_blame(vitals):
    for _ in range(100):
        vitals.beat(WARMING_STEPS + 2, WARMING_STEPS, True)
        pass_time(vitals, 5)
    assert vitals.fault is None


def test_the_first_steps_may_compile():
    vitals = Vitals(PATIENCE)
    vitals.ready = True
    for _ in range(99):
        vitals.beat(1, 0, False)
        pass_time(vitals, 1)
    assert vitals.fault is None
    pass_time(vitals, 2)
    assert vitals.fault == "step 1 was not done after 101 s"


def test_loading_may_be_silent_for_longer():
    vitals = Vitals(PATIENCE)
    pass_time(vitals, 50)
    assert vitals.fault is None
    vitals.ready = True
    assert vitals.fault is not None


def test_a_standstill_of_the_parent_itself_is_not_held_against_the_worker(vitals):
    vitals.beat(WARMING_STEPS + 1, WARMING_STEPS, False)
    vitals.pass_time(3600.0)
    assert vitals.fault is None


def test_one_number_of_the_job_sets_all_limits():
    assert Patience.of(5.0) == Patience(step=5.0, warming=1800.0, silence=5.0, loading=120.0)
    assert Patience.of(4000.0) == Patience(4000.0, 4000.0, 4000.0, 4000.0)


def _outlive(ready: Connection, told: Connection) -> None:
    """A child that arms its death only after its parent has ended."""
    ready.close()
    time.sleep(0.5)
    die_with_parent()
    told.send("alive")


def _end_at_once(ready: Connection, told: Connection) -> None:
    multiprocessing.get_context("fork").Process(target=_outlive, args=(ready, told)).start()
    ready.send("started")
    os._exit(0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_process_whose_parent_ended_before_it_was_armed_ends():
    context = multiprocessing.get_context("fork")
    (ready, starting), (told, telling) = context.Pipe(duplex=False), context.Pipe(duplex=False)
    parent = context.Process(target=_end_at_once, args=(starting, telling))
    parent.start()
    assert ready.recv() == "started"
    parent.join()
    starting.close()
    telling.close()
    with pytest.raises(EOFError):  # All that held the other end are gone, and sent nothing.
        told.recv()
