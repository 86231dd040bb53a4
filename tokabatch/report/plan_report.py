"""What a plan found, as plain frozen values, and the sections of facts that are shown of it."""

from __future__ import annotations

from dataclasses import dataclass

from tokabatch.job import Setting
from tokabatch.report.sections import Section, count_text, share_text

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_SHOWN_CHARACTERS = 4000
_FOLDED_TOKEN_IDS = 12
"""Shown of a prompt at either end."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model before its weights load. `family` is the Hugging Face model_type."""

    path: str
    family: str
    parameters: int
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    dtype: str


@dataclass(frozen=True, slots=True)
class ReplicaFacts:
    """A KV cache of `pages` of `page_size` tokens, None where the device decides that at start; and what a step may hold."""

    bytes_per_token: int
    page_size: int
    pages: int | None
    max_running: int
    max_step_tokens: int


@dataclass(frozen=True, slots=True)
class PlanReport:
    """What `tokabatch plan` finds without loading weights. `unique_tokens` are the nodes of the prompts' prefix tree: the
    fewest prompt tokens that have to be prefilled; `max_output_tokens` is the sum of max_tokens over all samples."""

    model: ModelFacts
    layout: str
    replica: ReplicaFacts
    rows: int
    samples: int
    prompt_tokens: int
    unique_tokens: int
    max_output_tokens: int
    longest_prompt: int
    first_prompt: str
    first_token_ids: tuple[int, ...]
    settings: tuple[Setting, ...]
    error_counts: tuple[tuple[str, int], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def error_rows(self) -> int:
        """Rows that will become error rows."""
        return sum(count for _, count in self.error_counts)

    @property
    def shared_tokens(self) -> int:
        """Prompt tokens that stand in another prompt's prefix already."""
        return self.prompt_tokens - self.unique_tokens


def plan_sections(report: PlanReport) -> tuple[Section, ...]:
    """Everything a plan shows."""
    model, text, ids = report.model, report.first_prompt, report.first_token_ids
    if (rest := len(text) - _SHOWN_CHARACTERS) > 0:
        text = f"{text[:_SHOWN_CHARACTERS]}\n[… and {count_text(rest)} more characters]"
    shown = " ".join(map(str, ids))
    if (rest := len(ids) - 2 * _FOLDED_TOKEN_IDS) > 1:
        first, last = ids[:_FOLDED_TOKEN_IDS], ids[-_FOLDED_TOKEN_IDS:]
        shown = f"{' '.join(map(str, first))} [… {count_text(rest)} more …] {' '.join(map(str, last))}"
    facts = (
        ("path", model.path),
        ("architecture", f"{model.family}, {model.layers} layers, hidden size {count_text(model.hidden_size)}"),
        ("attention", f"{model.heads} heads, {model.kv_heads} KV heads of {model.head_dim}"),
        (
            "parameters",
            f"{count_text(model.parameters)} ({model.parameters * _BYTES[model.dtype] / (1 << 30):,.2f} GiB in {model.dtype})",
        ),
        ("vocabulary", count_text(model.vocab_size)),
        ("context", f"{count_text(model.context_length)} tokens"),
        ("dtype", model.dtype),
    )
    return (
        Section("Model", facts),
        Section("Work", _plan_work(report)),
        Section("Engine", (("layout", report.layout), *_plan_replica(report.replica))),
        Section("Generation", tuple((s.key, s.value, s.source) for s in report.settings), ("key", "value", "from")),
        Section("First prompt", (("", text),)),
        Section(f"Its {count_text(len(ids))} token ids", (("", shown),)),
        *((Section("Notes", tuple(("", note) for note in report.notes)),) if report.notes else ()),
    )


def _plan_work(report: PlanReport) -> tuple[tuple[str, str], ...]:
    shared = share_text(report.shared_tokens, report.prompt_tokens)
    return (
        ("rows", count_text(report.rows) + (f", {count_text(report.error_rows)} with errors" if report.error_rows else "")),
        *((f"error {code}", count_text(number)) for code, number in report.error_counts),
        ("samples", count_text(report.samples)),
        ("prompt tokens", count_text(report.prompt_tokens)),
        ("longest prompt", f"{count_text(report.longest_prompt)} tokens"),
        ("unique tokens", f"{count_text(report.unique_tokens)} to prefill at least"),
        ("shared tokens", f"{count_text(report.shared_tokens)}{shared}"),
        ("output tokens", f"at most {count_text(report.max_output_tokens)}"),
    )


def _plan_replica(replica: ReplicaFacts) -> tuple[tuple[str, str], ...]:
    size = [("bytes per token", count_text(replica.bytes_per_token)), ("page", f"{count_text(replica.page_size)} tokens")]
    pages = "as many as the device's memory holds"
    if replica.pages is not None:
        tokens = replica.pages * replica.page_size
        size_in_mib = tokens * replica.bytes_per_token / (1 << 20)
        pages = f"{count_text(replica.pages)} ({count_text(tokens)} tokens, {size_in_mib:,.1f} MiB)"
    return (
        *size,
        ("pages", pages),
        ("a step", f"at most {count_text(replica.max_running)} samples, {count_text(replica.max_step_tokens)} tokens"),
    )
