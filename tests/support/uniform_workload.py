"""Workloads worked out on paper: every prompt and every sample alike, so that their work has a closed form."""

from __future__ import annotations

from dataclasses import dataclass

from tokabatch.forecast.roofline import DeviceRates, Roofline
from tokabatch.forecast.step_work import StepWork
from tokabatch.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class UniformWorkload:
    """`prompts` prompts of `header` tokens common to all and `own` tokens each, `samples` samples a prompt of `output` tokens,
    with `running` samples at once. `hydragen`: whether shared prefixes are read once for their group."""

    prompts: int
    samples: int
    header: int
    own: int
    output: int
    running: int
    hydragen: bool = True

    @property
    def output_tokens(self) -> int:
        return self.prompts * self.samples * self.output

    def prefill(self) -> StepWork:
        """All prompts, every shared token computed once, in one step."""
        tokens = self.header + self.prompts * self.own
        return StepWork(
            tokens=float(tokens),
            sampled=float(self.prompts),
            sequences=float(self.prompts),
            prefill_pairs=self.header * (self.header + 1) / 2 + self.prompts * self.own * (self.own + 1) / 2,
            prefill_kv=float(tokens),
            prefix_pairs=float(self.prompts * self.own * self.header),
            prefix_kv=float(self.header),
        )

    def decode(self) -> tuple[float, StepWork]:
        """How many decode steps there are, and the mean one, samples being half done on average."""
        total = self.prompts * self.samples
        running = min(self.running, total)
        suffix, grouped = (self.output + 1) / 2, self.hydragen and self.samples > 1
        shared = (self.header if self.hydragen else 0) + (self.own if grouped else 0)
        own = self.header + self.own - shared + suffix
        live_prompts = running / self.samples
        return total * self.output / running, StepWork(
            tokens=float(running),
            sampled=float(running),
            sequences=float(running),
            decode_kv=running * own,
            prefix_pairs=float(running * shared),
            prefix_kv=(self.header if self.hydragen else 0.0) + (live_prompts * self.own if grouped else 0.0),
            groups=(live_prompts if grouped else 0.0) + (self.header > 0 and self.hydragen),
        )


def workload_seconds(spec: ModelSpec, device: DeviceRates, workload: UniformWorkload, itemsize: int = 2) -> float:
    """The least time of a whole workload: all prefill, then the running limit full until the last sample ends."""
    model = Roofline(spec, device, itemsize)
    steps, decode = workload.decode()
    return float(model.seconds(workload.prefill()) + steps * model.seconds(decode))
