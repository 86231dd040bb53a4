"""Any small job for a scheduler, drawn by hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from tokabatch.scheduling.contracts import SamplingParams
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.scheduler import SchedulerLimits


@st.composite
def jobs(draw):
    """Prompts with nested shared prefixes, limits from roomy to barely possible, one to three steps in flight."""
    heads = draw(st.lists(st.lists(st.integers(0, 3), max_size=14), min_size=1, max_size=4))
    tails = st.lists(st.integers(0, 3), min_size=1, max_size=6)
    prompts = [draw(st.sampled_from(heads)) + draw(tails) for _ in range(draw(st.integers(1, 10)))]
    params = [
        SamplingParams(n=draw(st.integers(1, 6)), max_tokens=draw(st.integers(1, 20)), ignore_eos=draw(st.booleans()))
        for _ in range(draw(st.integers(1, 2)))
    ]
    page_size = draw(st.sampled_from([1, 2, 4, 8]))
    longest = max(map(len, prompts)) + max(p.max_tokens for p in params)
    pages = -(-longest // page_size)
    max_running = draw(st.integers(1, 12))
    limits = SchedulerLimits(
        page_size=page_size,
        num_pages=pages + 1 + draw(st.integers(0, 40)),
        max_running=max_running,
        max_step_tokens=max_running + draw(st.integers(0, 20)),
        max_pages_per_sequence=pages,
        grouping=draw(st.sampled_from([None, GroupingLimits(1, 1), GroupingLimits(2, 1), GroupingLimits(3, 2)])),
    )
    return prompts, params, limits, draw(st.integers(1, 3))
