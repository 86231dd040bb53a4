"""What a plan found, as plain frozen values, and the sections of facts that are shown of it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from tokabatch.job import Setting
from tokabatch.number_text import bytes_text, count_text, counted, seconds_text, share_text
from tokabatch.report.sections import Section

_SHOWN_CHARACTERS = 4000
_FOLDED_TOKEN_IDS = 12
"""Shown of a prompt at either end."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model as known before its weights load. `family` is the Hugging Face model_type."""

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
    """Of a replica, on its devices together: what a step may hold, and the memory that it takes, in bytes. `pages` is how many
    pages of `page_size` tokens the KV cache has; with `measured_at_start` it has at most as many, because the device is
    measured when the model is loaded. `working_bytes` are those of a step beside its logits, None where they are unknown."""

    bytes_per_token: int
    page_size: int
    pages: int
    max_running: int
    max_step_tokens: int
    weight_bytes: int
    weight_type: str
    logits_bytes: int
    working_bytes: int | None = None
    measured_at_start: bool = False


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What a run takes of the host beside the model, in bytes. `input_bytes` are on disk, mapped into memory; at most
    `waiting_bytes` of finished samples are in memory until they are committed; `output_bytes` is the size of all samples
    before compression, each with max_tokens tokens."""

    input_bytes: int
    waiting_bytes: int
    output_bytes: int


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
    host: HostFacts
    least_seconds: tuple[float, str] | None = None
    """For the samples to compute, each with max_tokens tokens, with the device and the cost model; None for a device whose
    rates are not known."""
    error_counts: tuple[tuple[str, int], ...] = ()
    error_samples: int = 0
    """The samples of these rows."""
    max_error_fraction: float = 1.0
    """errors.max_fraction of the job."""
    notes: tuple[str, ...] = ()

    @property
    def error_rows(self) -> int:
        """Rows that will become error rows."""
        return sum(count for _, count in self.error_counts)

    @property
    def has_too_many_errors(self) -> bool:
        """Whether the run would end with exit code 3 because of its error rows."""
        return self.error_rows == self.rows or self.error_samples > self.max_error_fraction * self.samples

    @property
    def shared_tokens(self) -> int:
        """Prompt tokens that are part of another prompt's prefix."""
        return self.prompt_tokens - self.unique_tokens

    def __str__(self) -> str:
        """What `tokabatch plan` prints."""
        return import_module("tokabatch.report.render").plain(plan_sections(self))

    def _repr_html_(self) -> str:
        """What a notebook shows: the same as tables."""
        return import_module("tokabatch.report.render").html(plan_sections(self))


def plan_sections(report: PlanReport, *, simulated: bool = False) -> tuple[Section, ...]:
    """Everything a plan shows; `simulated`: beside a simulation, which is not proposed then."""
    model, text, ids = report.model, report.first_prompt, report.first_token_ids
    if (rest := len(text) - _SHOWN_CHARACTERS) > 0:
        text = f"{text[:_SHOWN_CHARACTERS]}\n[… and {counted(rest, 'more character')}]"
    shown = " ".join(map(str, ids))
    if (rest := len(ids) - 2 * _FOLDED_TOKEN_IDS) > 1:
        first, last = ids[:_FOLDED_TOKEN_IDS], ids[-_FOLDED_TOKEN_IDS:]
        shown = f"{' '.join(map(str, first))} [… {count_text(rest)} more …] {' '.join(map(str, last))}"
    facts = (
        ("path", model.path),
        ("architecture", f"{model.family}, {counted(model.layers, 'layer')}, hidden size {count_text(model.hidden_size)}"),
        ("attention", f"{counted(model.heads, 'head')}, {counted(model.kv_heads, 'KV head')} of {model.head_dim}"),
        ("parameters", count_text(model.parameters)),
        ("vocabulary", count_text(model.vocab_size)),
        ("context", counted(model.context_length, "token")),
        ("dtype", model.dtype),
    )
    return (
        Section("Model", facts),
        Section("Work", _plan_work(report, simulated)),
        Section("Engine", (("layout", report.layout), *_plan_replica(report.replica))),
        Section("Memory of each replica", _memory(report.replica)),
        Section("Host", _host(report.host)),
        Section("Generation", tuple((s.key, s.value, s.source) for s in report.settings), ("key", "value", "from")),
        *(
            (Section("First prompt", (("", text),)), Section(f"Its {counted(len(ids), 'token id')}", (("", shown),)))
            if ids
            else ()
        ),
        *((Section("Notes", tuple(("", note) for note in report.notes)),) if report.notes else ()),
    )


def _errors(report: PlanReport) -> str:
    if not report.error_rows:
        return ""
    found = f", {count_text(report.error_rows)} with errors"
    too_many = f", more than errors.max_fraction ({report.max_error_fraction:g}) allows: the run would end with exit code 3"
    return found + (too_many if report.has_too_many_errors else "")


def _plan_work(report: PlanReport, simulated: bool) -> tuple[tuple[str, str], ...]:
    shared = share_text(report.shared_tokens, report.prompt_tokens)
    return (
        ("rows", f"{count_text(report.rows)}{_errors(report)}"),
        *((f"error {code}", count_text(number)) for code, number in report.error_counts),
        ("samples", count_text(report.samples)),
        ("prompt tokens", count_text(report.prompt_tokens)),
        ("longest prompt", counted(report.longest_prompt, "token")),
        ("unique tokens", f"{count_text(report.unique_tokens)}, the fewest that have to be computed"),
        ("shared tokens", f"{count_text(report.shared_tokens)}{shared}"),
        ("output tokens", f"at most {count_text(report.max_output_tokens)}"),
        *((("time", _time(report.least_seconds, simulated)),) if report.error_rows < report.rows else ()),
    )


def _time(least: tuple[float, str] | None, simulated: bool) -> str:
    if least is None:
        return f"not known for this device{'' if simulated else '; --simulate --device predicts it for another one'}"
    seconds, described = least
    remedy = "" if simulated else "\n--simulate predicts the actual time"
    return f"at least {seconds_text(seconds)} ({described})\nif every sample reaches max_tokens{remedy}"


def _plan_replica(replica: ReplicaFacts) -> tuple[tuple[str, str], ...]:
    return (
        ("a step", f"at most {counted(replica.max_running, 'sample')}, {counted(replica.max_step_tokens, 'token')}"),
        ("page", f"{counted(replica.page_size, 'token')} of the KV cache, {counted(replica.bytes_per_token, 'byte')} each"),
    )


def _memory(replica: ReplicaFacts) -> tuple[tuple[str, str], ...]:
    tokens = replica.pages * replica.page_size
    pages = f"{counted(replica.pages, 'page')}, {counted(tokens, 'token')}"
    kv_bytes = tokens * replica.bytes_per_token
    beside = "activations beside it are measured when the model is loaded"
    if replica.working_bytes is not None:
        beside = f"{bytes_text(replica.working_bytes)} assumed for activations"
    elif not replica.measured_at_start:
        beside = "activations beside it"
    return (
        ("weights", f"{bytes_text(replica.weight_bytes)} in {replica.weight_type}"),
        ("workspace", f"{bytes_text(replica.logits_bytes)} for the logits of a step, {beside}"),
        ("KV cache", f"{'at most ' if replica.measured_at_start else ''}{bytes_text(kv_bytes)} ({pages})"),
    )


def _host(host: HostFacts) -> tuple[tuple[str, str], ...]:
    return (
        ("tokenized input", f"{bytes_text(host.input_bytes)} on disk until the run is complete, mapped into memory"),
        ("finished samples", f"at most {bytes_text(host.waiting_bytes)} of memory until they are committed"),
        ("output", f"at most {bytes_text(host.output_bytes)} of disk, less by compression"),
    )
