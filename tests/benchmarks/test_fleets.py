"""The run's own division of a plan over members that are simulated: all end together, when one would with its share."""

from __future__ import annotations

from benchmarks import fleets


def test_members_end_together_though_no_length_is_known():
    done = fleets.share(12, 6_000, running=32)
    assert done.finished == 6_000
    # All slots at work to the last token is what no run reaches whose lengths are unknown; one member with all slots is one.
    assert done.full_slots < done.pooled < done.makespan < 1.03 * done.pooled and done.makespan < 1.1 * done.full_slots
    assert done.first_idle > 0.93 * done.makespan
    # Guided self-scheduling: large runs at first, small ones in the end.
    assert 12 * 4 < done.runs < 12 * 40


def test_members_that_begin_apart_end_together_where_all_samples_are_equally_long():
    """Two waves each: the second one is divided while the first one of the member that began later is nearly done."""
    done = fleets.share(2, 1000, running=258, sigma=0.0, seconds=(0.011, 0.0725), late=0.3)
    assert done.finished == 1000 and max(done.idle) < 0.3
    assert max(done.samples) - min(done.samples) < 20
