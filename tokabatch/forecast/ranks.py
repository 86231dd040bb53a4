"""The time of a step of a replica over several devices: the cost of one device's part, and of communication.

Tensor parallelism splits the heads, the inner layer and the vocabulary, and sums the hidden states of a step's tokens twice per
layer. Pipeline parallelism divides the layers: a stage computes its share of a step and sends the hidden states on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tokabatch.forecast.profile import Profile
from tokabatch.forecast.roofline import Roofline
from tokabatch.forecast.step_work import Number, StepWork

SUM_SECONDS, SUM_RATE = 10e-6, 310e9
SEND_SECONDS, SEND_RATE = 50e-6, 330e9
"""A captured sum over two devices, and a message from one to the next: fixed seconds, and bytes of hidden states per second.
Measured on two H200 with NVLink, from 64 KiB to 64 MiB."""


def seconds_of_ranks(cost: Roofline | Profile, tensor: int, pipeline: int) -> Callable[[StepWork], Number]:
    """Return the time of a step on `tensor` x `pipeline` devices as a function of its work; with several pipeline stages, that
    of one stage, which is the interval between steps."""
    roofline = cost.roofline if isinstance(cost, Profile) else cost
    spec, fixed = roofline.spec, cost.coefficients[0] if isinstance(cost, Profile) else 0.0
    part = replace(
        roofline,
        spec=replace(
            spec,
            num_heads=-(-spec.num_heads // tensor),
            # Each device has at least one head of keys and values.
            num_kv_heads=-(-spec.num_kv_heads // tensor),
            intermediate_size=-(-spec.intermediate_size // tensor),
            vocab_size=-(-spec.vocab_size // tensor),
        ),
    )
    alone = replace(cost, roofline=part) if isinstance(cost, Profile) else part

    def seconds(work: StepWork) -> Number:
        hidden = work.tokens * (spec.hidden_size * roofline.itemsize)
        sums = 2 * spec.num_layers * (SUM_SECONDS + hidden / SUM_RATE) if tensor > 1 else 0.0
        sent = SEND_SECONDS + hidden / SEND_RATE if pipeline > 1 else 0.0
        # The fixed cost of a step is not divided: each stage is launched.
        return fixed + (alone.seconds(work) - fixed + sums) / pipeline + sent

    return seconds
