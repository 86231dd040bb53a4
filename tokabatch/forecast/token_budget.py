"""How many prompt tokens and how many samples a step is worth, by a cost model.

Whatever a step computes, it reads the weights and is launched once. The more tokens share that, the less each of them pays,
and beyond some number a larger step only takes memory. Simulated over workloads from chat to long prompts, total time changes
by less than 1 % above the number of prompt tokens that is found here (benchmarks/LOG.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from tokabatch.forecast.step_work import Number, StepWork

FIXED_SHARE = 0.02
"""What a step costs however many tokens it has, as a share of what its prompt tokens cost, at most."""
FEWEST, MOST = 512, 32_768
STEP_SECONDS, STEP_SHARE = 0.0015, 0.05
"""What a step of a GPU takes beside its work, between its kernels and on the host, and the most that this and the reading of
the weights may be of what the samples of a decode step cost."""


def prefill_tokens(seconds: Callable[[StepWork], Number]) -> int:
    """Prompt tokens to compute in a step beside what decodes: a power of two from `FEWEST` to `MOST`, the one next below the
    number at which the fixed cost of the model `seconds` is `FIXED_SHARE` of the tokens' own."""
    fixed = float(seconds(_prefill(1)))
    each = float(seconds(_prefill(2 * MOST)) - seconds(_prefill(MOST))) / MOST
    if each <= 0:
        return MOST
    return 2 ** int(math.log2(min(max(fixed / (FIXED_SHARE * each), FEWEST), MOST)))


def running_samples(seconds: Callable[[StepWork], Number]) -> int:
    """Samples to run at once on a GPU where its cache has room: a power of two from `FEWEST` to `MOST`, by the same rule."""
    fixed = STEP_SECONDS + float(seconds(_decode(1)))
    each = float(seconds(_decode(2 * MOST)) - seconds(_decode(MOST))) / MOST
    if each <= 0:
        return MOST
    return 2 ** int(math.log2(min(max(fixed / (STEP_SHARE * each), FEWEST), MOST)))


def _decode(samples: int) -> StepWork:
    """A step of samples that decode, without their attention: the shorter their contexts, the more of them a step is worth."""
    count = float(samples)
    return StepWork(tokens=count, sampled=count, sequences=count, decoded=count)


def _prefill(tokens: int) -> StepWork:
    """A step of prompt tokens alone, without their attention, which grows with the prompts and not with the step."""
    return StepWork(tokens=float(tokens), sampled=1.0, sequences=1.0)
