"""The figures of a server in the text format of Prometheus (exposition format 0.0.4)."""

from __future__ import annotations

from collections.abc import Mapping

from tokabatch.serve.engine import Engine


def render(engine: Engine, answered: Mapping[int, int]) -> str:
    """`answered` counts responses by status."""
    counts, numbered = engine.counts, engine.standings
    lines: list[str] = []

    def metric(name: str, kind: str, about: str, values: Mapping[str, float]) -> None:
        lines.extend((f"# HELP tokabatch_{name} {about}", f"# TYPE tokabatch_{name} {kind}"))
        lines.extend(f"tokabatch_{name}{labels} {value:.10g}" for labels, value in values.items())

    def each(values: Mapping[int, float]) -> dict[str, float]:
        return {f'{{replica="{number}"}}': value for number, value in values.items()}

    metric("responses_total", "counter", "Responses by status.", {f'{{status="{s}"}}': n for s, n in answered.items()})
    metric("prompts_total", "counter", "Prompts taken.", {"": counts.prompts})
    metric("samples_total", "counter", "Samples finished, errors included.", {"": counts.samples})
    metric("samples_cancelled_total", "counter", "Samples whose client had disconnected.", {"": counts.cancelled})
    errors = {f'{{code="{code}"}}': float(number) for code, number in counts.errors.items()}
    metric("sample_errors_total", "counter", "Samples that failed, by error code.", errors)
    metric("prompt_tokens_total", "counter", "Tokens of finished prompts.", {"": counts.prompt_tokens})
    metric("output_tokens_total", "counter", "Tokens of finished samples.", {"": counts.output_tokens})
    metric("scheduler_restarts_total", "counter", "Scheduler processes replaced.", {"": counts.restarts})
    metric("samples_unfinished", "gauge", "Samples that run or wait.", {"": engine.unfinished})
    metric("samples_running", "gauge", "Samples that run.", each({n: s.running for n, s in numbered.items()}))
    metric(
        "kv_cache_usage",
        "gauge",
        "Part of the KV cache in use, from 0 to 1.",
        each({n: s.kv_used for n, s in numbered.items()}),
    )
    metric("steps_total", "counter", "Steps computed.", each({n: s.scheduled.steps for n, s in numbered.items()}))
    metric(
        "prefilled_tokens_total",
        "counter",
        "Prompt tokens computed.",
        each({n: s.scheduled.prefilled_tokens for n, s in numbered.items()}),
    )
    metric(
        "cached_tokens_total",
        "counter",
        "Prompt tokens found in the cache.",
        each({n: s.scheduled.cached_tokens for n, s in numbered.items()}),
    )
    metric(
        "preemptions_total", "counter", "Samples preempted.", each({n: s.scheduled.preemptions for n, s in numbered.items()})
    )
    restarts = {n: float(s.counts.restarts.total()) for n, s in numbered.items()}
    metric("worker_restarts_total", "counter", "Worker processes replaced.", each(restarts))
    return "\n".join(lines) + "\n"
