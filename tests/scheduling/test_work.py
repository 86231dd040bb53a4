"""The table of prompts: what is noted of those that are left when others are taken out, begun, added and forgotten."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support import token_device as device

from tokabatch.scheduling.work import Work, common_prefix


@pytest.mark.parametrize("seed", range(20))
def test_the_prompts_left_are_found_by_row_and_know_their_common_prefixes(seed: int):
    """Every answer is that of a list gone through from the beginning."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 2, rng.integers(1, 9)).tolist() for _ in range(60)]
    requests = device.make_requests(prompts)
    given = requests.lcp.copy()
    work, added = Work(requests), 0
    left = {number: (int(row), requests.prompt(number)) for number, row in enumerate(requests.row_index)}
    begun = 0
    for _ in range(25):
        waiting = [number for number in left if number >= begun]
        kind = rng.choice(["take out", "take out", "begin", "extend", "forget"])
        if kind == "take out":
            out = (
                sorted(rng.choice(waiting, min(len(waiting), int(rng.integers(1, 9))), replace=False).tolist())
                if waiting
                else []
            )
            work.take_out(np.array(out, np.int32))
            for number in out:
                del left[number]
        elif kind == "begin" and waiting:
            count = int(rng.integers(1, 4))
            assert work.upcoming(count).tolist() == waiting[:count]
            work.begin(count)
            begun = waiting[:count][-1] + 1
        elif kind == "extend" and added < 5:
            # Prompts that share nothing with the others, of rows that are there and of new ones.
            more = device.make_requests([[10 + added], [10 + added, 1]])
            added += 1
            more = replace(more, row_index=more.row_index + rng.integers(0, 61))
            left |= {number: (int(more.row_index[i]), more.prompt(i)) for i, number in enumerate(work.extend(more).tolist())}
        elif kind == "forget" and (count := work.forgettable(work.next)):
            work.forget(count)
            left, begun = {number - count: prompt for number, prompt in left.items() if number >= count}, begun - count
        waiting = [number for number in left if number >= begun]
        assert work.not_begun().tolist() == waiting and work.exhausted == (not waiting)
        assert work.exhausted or work.next == waiting[0]
        for count in (1, 5, 100):
            assert work.upcoming(count).tolist() == waiting[:count]
        for row in range(70):
            assert work.of_row(row) == [number for number, (of, _) in left.items() if of == row]
        before = np.zeros(0, np.int32)
        for number, (_, tokens) in left.items():
            assert number < begun or work.lcp[number] == common_prefix(before, tokens)
            before = tokens
    assert np.array_equal(requests.lcp, given), "the caller's own table has been changed"
