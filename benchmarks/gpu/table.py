"""What is printed of a pass: its figures beside the roofline, and its line of the table."""

from __future__ import annotations

from benchmarks.gpu.floor import Floor
from benchmarks.gpu.whole_pass import Figures
from benchmarks.workloads import Workload

COLUMNS = ("model", "workload", "out tok/s", "roofline", "share", "steady tok/s", "step ms", "start s", "host us", "GPU idle")
TABLE_HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def describe_workload(workload: Workload) -> str:
    prompts = len(workload.prompts)
    shared = workload.common_prefix() if prompts > 1 else 0
    return (
        f"{prompts:,} prompts x {workload.n:,} samples, {workload.num_prompt_tokens / prompts:,.0f} tokens in "
        f"({shared:,} common), {workload.num_output_tokens / workload.num_samples:,.0f} out, "
        f"{workload.num_output_tokens:,} output tokens"
    )


def describe_pass(figures: Figures, floor: Floor, roofline_device: str) -> list[str]:
    """Lines to print. Times a sample a step are totals divided by the output tokens."""
    micro = 1e6 / figures.output_tokens
    loop, deciding, launching = figures.loop_cpu_seconds, figures.schedule_seconds, figures.launch_cpu_seconds
    facts = {
        "device": f"{figures.device}; the roofline is that of an {roofline_device}",
        "start": f"{figures.start_seconds:.1f} s from the process's start to the first step (reading the input "
        f"{figures.read_seconds:.1f}, loading {figures.load_seconds:.1f})",
        "whole pass": f"{figures.whole_seconds:.2f} s, {figures.rate:,.0f} output tokens/s: {figures.rate / floor.rate:.0%} "
        f"of the roofline's {floor.rate:,.0f} ({floor.seconds:.2f} s, prefill {floor.prefill_seconds:.2f})",
        "steps": f"{figures.steps:,}, {figures.step_seconds:.2f} s on each replica; the first "
        f"{', '.join(f'{ms:.0f}' for ms in figures.first_steps_ms)} ms; "
        f"{figures.write_seconds:.2f} s from the last result to the end",
        "tokens": f"{figures.prompt_tokens:,} in ({figures.prefilled_tokens:,} computed), {figures.output_tokens:,} out; "
        f"{figures.max_running:,} running at most, {figures.preemptions:,} preemptions; {figures.num_pages:,} KV pages",
        "host CPU": f"{micro * (loop + launching):.2f} us a sample a step: scheduling and recording {micro * loop:.2f} "
        f"(deciding and applying {micro * deciding:.2f}), launching {micro * launching:.2f}, "
        f"{1e3 * launching / figures.steps:.1f} ms a step",
        "steady state": _steady(figures, floor),
    }
    return [f"  {name:14}{text}" for name, text in facts.items()]


def table_line(model: str, label: str, figures: Figures, floor: Floor, idle: float | None) -> str:
    steady = figures.steady
    host = 1e6 * (figures.loop_cpu_seconds + figures.launch_cpu_seconds) / figures.output_tokens
    cells = (
        model,
        label,
        f"{figures.rate:,.0f} ({figures.whole_seconds:.2f} s)",
        f"{floor.rate:,.0f} ({floor.seconds:.2f} s)",
        f"{figures.rate / floor.rate:.0%}",
        f"{steady.rate:,.0f}" if steady else "-",
        f"{steady.median_step_ms:.1f}" if steady else "-",
        f"{figures.start_seconds:.1f}",
        f"{host:.2f}",
        "-" if idle is None else f"{idle:.1%}",
    )
    return f"| {' | '.join(cells)} |"


def _steady(figures: Figures, floor: Floor) -> str:
    steady = figures.steady
    if steady is None:
        return "none, the pass was too short"
    decode = floor.output_tokens / floor.decode_seconds
    return (
        f"{steady.rate:,.0f} output tokens/s over {steady.seconds:.1f} s with {steady.running:,.0f} running, median step "
        f"{steady.median_step_ms:.1f} ms (roofline without prefill {decode:,.0f})"
    )
