"""What it costs that requests arrive one after the other: python -m benchmarks.arrivals MS ... [--gpu h200]

Workload `b` on a 1B model in simulated time: the real scheduler of a server, each prompt given to it MS milliseconds after the
one before (what the HTTP process takes for a request), steps of the GPU's roofline. Prints the seconds until the last sample is
drawn, beside those of 0 ms. What is not in it: the answers to the last samples.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.gpu.models import config, write_tokenizer
from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.workloads import make_gpu_workload
from tokabatch.forecast.cost_model import unmeasured_gpu
from tokabatch.forecast.devices import known_device
from tokabatch.forecast.roofline import Roofline
from tokabatch.forecast.simulate import STOP, SimulatedDevice
from tokabatch.forecast.step_work import measure_work
from tokabatch.model.families import read_spec
from tokabatch.scheduling.contracts import SamplingParams
from tokabatch.scheduling.scheduler import Scheduler, SchedulerLimits
from tokabatch.scheduling.stop_conditions import StopRules
from tokabatch.serve.dispatch import Wanted, as_requests, ordered

LIMITS = SchedulerLimits(
    page_size=16, num_pages=200_000, max_running=8192, max_step_tokens=16_384, max_pages_per_sequence=8192, grouping=None
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ms", type=float, nargs="+")
    parser.add_argument("--gpu", default="h200")
    chosen = parser.parse_args()
    shape = SHAPES["llama-3.2-1b"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config(shape)))
        write_tokenizer(Path(folder), shape)
        spec = read_spec(Path(folder))
    cost = unmeasured_gpu(Roofline(spec, known_device(chosen.gpu).rates))
    workload = make_gpu_workload("b", spec.vocab_size)
    params = SamplingParams(max_tokens=int(workload.output_length_PN[0, 0]), ignore_eos=True)
    wanted = [Wanted(prompt, params) for prompt in workload.prompts]
    order = ordered(workload.prompts, False)
    plan = as_requests(order.permutation.tolist(), [wanted[place] for place in order.permutation], order.lcp)
    first = 0.0
    for gap in (0.0, *chosen.ms):
        scheduler = Scheduler(plan.take(np.zeros(0, np.int64)), LIMITS, StopRules(plan.sampling, [STOP], STOP + 1, None))
        scheduler.settle_pages(LIMITS.num_pages)
        device = SimulatedDevice(plan, lambda row, sample: np.full(len(row), params.max_tokens), LIMITS.max_running)
        seconds, given = 0.0, 0
        while given < len(plan) or not scheduler.done:
            if scheduler.done:
                seconds = max(seconds, given * gap / 1e3)
            there = len(plan) if not gap else min(len(plan), int(seconds * 1e3 / gap + 1e-9) + 1)
            if there > given:
                scheduler.extend(plan.take(np.arange(given, there)))
                given = there
            step = scheduler.schedule()
            assert step is not None
            seconds += float(cost.seconds(measure_work(step, LIMITS.page_size)))
            scheduler.apply(device.run(step))
        first = first or seconds
        print(f"{gap:g} ms a request: {seconds:.2f} s, {100 * first / seconds:.1f} % of 0 ms", flush=True)


if __name__ == "__main__":
    main()
