"""What a simulation found, as plain frozen values, and what is shown of it and of a fitted cost model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tokabatch.number_text import counted, seconds_text
from tokabatch.report.sections import Section

_BARS = " ▁▂▃▄▅▆▇█"
_PER_UNIT = {"step": "each step", "sequences": "each running sample of it", "groups": "each group with a shared prefix"}
_OPERATORS = {
    "dense": "matrix products of the layers",
    "logits": "logits and sampling",
    "elementwise": "norms and activations",
    "prefix": "attention to shared prefixes",
    "prefill": "attention of prompt tokens",
    "decode": "attention of output tokens",
}


@dataclass(frozen=True, slots=True)
class Trial:
    """One pair of limits that was simulated, and the seconds it took over the same samples as its rivals."""

    max_running: int
    max_step_tokens: int
    seconds: float
    output_tokens: int
    recommended: bool = False


@dataclass(frozen=True, slots=True)
class Outlook:
    """A whole run, simulated. `kv_over_time` are mean shares of the pages in use over equal parts of the run, `kv_mean` over
    all of it, `kv_use` while samples waited; `waste` is the share of computed tokens computed again. `price` is money an hour,
    None where not given. `trial_samples` is how many samples the trials ran."""

    device: str
    cost_model: str
    lengths: str
    samples: int
    output_tokens: int
    prefilled_tokens: int
    saved_tokens: int
    cacheable_tokens: int
    steps: int
    seconds: float
    tail_seconds: float
    kv_tokens: int
    kv_mean: float
    kv_use: float
    kv_over_time: tuple[float, ...]
    preemptions: int
    waste: float
    waited: float
    simulated_in: float
    price: float | None = None
    trials: tuple[Trial, ...] = ()
    trial_samples: int = 0
    layout: str = ""
    num_devices: int = 1
    idle: tuple[float, ...] = ()
    """The share of the time that each replica has nothing more to do at the end."""

    @property
    def hours(self) -> float:
        """Device-hours: all devices for the whole time."""
        return self.seconds * self.num_devices / 3600


def outlook_sections(outlook: Outlook) -> tuple[Section, ...]:
    """Everything that is shown of a simulation."""
    money = "" if outlook.price is None else f", {outlook.hours * outlook.price:,.2f} at {outlook.price:g} an hour"
    waiting = f", {outlook.kv_use:.1%} while samples wait" if outlook.kv_use else ""
    saved = f" ({outlook.saved_tokens / outlook.cacheable_tokens:.1%})" if outlook.cacheable_tokens else ""
    rate = outlook.output_tokens / outlook.seconds if outlook.seconds else 0.0
    idle = f"; idle at the end {', '.join(f'{share:.1%}' for share in outlook.idle)}" if len(outlook.idle) > 1 else ""
    layout = [("layout", f"{outlook.layout}{idle}")] if outlook.num_devices > 1 or idle else []
    tail = f" ({outlook.tail_seconds / outlook.seconds:.1%})" if outlook.seconds else ""
    rows = [
        ("device", f"{outlook.device}; seconds from {outlook.cost_model}"),
        ("lengths", outlook.lengths),
        *layout,
        ("time", f"{seconds_text(outlook.seconds)} ({outlook.hours:,.3f} device-hours{money}), without loading the model"),
        ("output tokens", f"{outlook.output_tokens:,} ({rate:,.0f} per second), {counted(outlook.samples, 'sample')}"),
        ("steps", f"{outlook.steps:,}"),
        ("prefilled tokens", f"{outlook.prefilled_tokens:,}"),
        ("saved by sharing", f"{outlook.saved_tokens:,} of {outlook.cacheable_tokens:,} possible{saved}"),
        ("KV cache", f"{counted(outlook.kv_tokens, 'token')}, {outlook.kv_mean:.1%} in use on average{waiting}"),
        ("over time", "".join(_BARS[min(8, round(share * 8))] for share in outlook.kv_over_time)),
        ("preemptions", f"{outlook.preemptions:,}, {outlook.waste:.2%} of tokens computed again"),
        ("waiting", f"running samples had to wait for KV cache in {outlook.waited:.1%} of their steps"),
        ("tail", f"{seconds_text(outlook.tail_seconds)}{tail}: fewer than half of the samples still running"),
        ("simulated in", seconds_text(outlook.simulated_in)),
    ]
    sections = [Section("Simulated run", tuple(rows))]
    if outlook.trials:
        table = tuple(
            (
                f"{trial.max_running:,}",
                f"{trial.max_step_tokens:,}",
                seconds_text(trial.seconds),
                f"{trial.output_tokens / max(trial.seconds, 1e-9):,.0f}",
                "recommended: the smallest within 0.5 %" if trial.recommended else "",
            )
            for trial in outlook.trials
        )
        columns = ("max_running", "max_step_tokens", "time", "output tok/s", " ")
        title = f"Settings of engine tried for one replica, on {counted(outlook.trial_samples, 'sample')}"
        sections.append(Section(title, table, columns))
    return tuple(sections)


def profile_sections(file: str, terms: Mapping[str, float]) -> tuple[Section, ...]:
    """A fitted cost model, written to `file`: seconds of overhead, and how many times its theoretical minimum each operator
    takes."""
    rows = [(unit, f"{terms[name] * 1000:.3g} ms") for name, unit in _PER_UNIT.items()]
    rows += [(what, f"{terms[name]:.3g} times the theoretical minimum") for name, what in _OPERATORS.items()]
    return (Section("Cost model", (("file", file), *rows)),)
