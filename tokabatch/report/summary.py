"""What a run or a plan found, as plain frozen values, and the sections of facts that are shown of them.

The runner fills these; `render` draws the sections. Knows no terminal, no file and no engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

from tokabatch.job import Setting
from tokabatch.scoring.estimates import Estimate

_EXIT_WORDS = {
    0: "complete",
    2: "stopped like the start before it: nothing can be written to the output folder; fix that, then run it again",
    3: "complete, but with more errors than errors.max_fraction allows",
    4: "the sample counts do not add up: rows x n is not ok + errors + cancelled + pending. This is a bug, please report it",
    75: "stopped before the end; what was finished is committed, run it again to go on",
    130: "interrupted before the end; what was finished is committed, run it again to go on",
}
_PARTIAL = "short samples finish first, so the final value will differ"
_SHOWN_CHARACTERS = 4000
_FOLDED_TOKEN_IDS = 12
"""Shown of a prompt at either end."""


@dataclass(frozen=True, slots=True)
class Section:
    """A titled list of (label, value). With `columns`, `rows` is a table under those headings instead."""

    title: str
    rows: tuple[tuple[str, ...], ...]
    columns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ReplicaShare:
    """What one of several replicas did. `devices` names its GPUs; `idle` and `idle_at_end` are the shares of the time, from the
    first result on and of the last tenth of it, in which it had nothing to run."""

    devices: tuple[str, ...]
    samples: int
    output_tokens: int
    prefilled_tokens: int
    idle: float
    idle_at_end: float


@dataclass(frozen=True, slots=True)
class RunSummary:
    """The figures of one run. Token counts are over this run's own work, recomputed tokens counted once more in
    `prefilled_tokens` only.

    `cached_tokens` of the prompts were not prefilled because another sample had; `cacheable_tokens` is the most that any
    order and any cache could have saved. `seconds` is the whole run, `load_seconds` the part before the first step,
    `host_seconds` the scheduler's own CPU time, `launch_seconds` the worker's for launching steps. `pass_at_k` is None where
    nothing was verified.
    """

    rows: int
    samples: int
    ok: int
    errors: int
    prompt_tokens: int
    cached_tokens: int
    cacheable_tokens: int
    prefilled_tokens: int
    output_tokens: int
    seconds: float
    load_seconds: float
    steps: int
    output_path: str
    exit_code: int
    layout: str = ""
    """The replicas of the run, and why so many."""
    stalled: bool = False
    """Whether the run had to stop because the output folder took nothing of what it finished."""
    earlier: int = 0
    """Samples that earlier runs had committed. Counts and pass@k include them, the figures of the work do not."""
    cancelled: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    waited_steps: int = 0
    """Steps in which a running sample had to wait for pages, added up over samples."""
    max_running: int = 0
    max_step_tokens: int = 0
    """The limits of the last step."""
    host_seconds: float = 0.0
    launch_seconds: float = 0.0
    restarts: tuple[tuple[str, int], ...] = ()
    """Workers that were lost and replaced, by cause."""
    requeued: int = 0
    """Running samples that a lost worker or a dropped step sent back to wait; `recomputed_tokens` counts theirs as well."""
    dropped_steps: int = 0
    """Steps that the device had no memory for; those after them were half as large."""
    error_counts: tuple[tuple[str, int], ...] = ()
    verifies: bool = False
    """Whether the job verifies its samples."""
    estimates: tuple[Estimate, ...] = ()
    """What the verdicts say once all samples are there: mean score, pass@k and so on, with intervals."""
    estimator: str = ""
    """How they were come to."""
    unverified: int = 0
    """Samples whose reference the verifier does not understand; pass@k counts them as wrong."""
    unverified_reasons: tuple[str, ...] = ()
    replicas: tuple[ReplicaShare, ...] = ()
    """Where there were several. Seconds of steps are those of one replica on average."""
    step_seconds: float = 0.0
    tail_seconds: float = 0.0
    """Time at the end in which nothing waited any more and less than half of the samples ran."""
    kv_use: float = 0.0
    """Mean share of the KV pages in use."""
    num_pages: int = 0
    device: str = ""
    itemsize: int = 0
    """Bytes of a number computed with."""
    predicted_seconds: float | None = None
    """What a cost model says of the steps taken; None where it knows nothing of the device."""
    predicted_by: str = ""

    @property
    def pending(self) -> int:
        """Samples that a later run still owes."""
        return self.samples - self.ok - self.errors - self.cancelled

    @property
    def pass_at_k(self) -> Mapping[int, float] | None:
        """pass@k by k; None where there is no estimate."""
        return {int(each.name[5:]): each.value for each in self.estimates if each.name.startswith("pass@")} or None

    @property
    def work_seconds(self) -> float:
        """Seconds from the first step on."""
        return max(self.seconds - self.load_seconds, 0.0)

    def dataset(self) -> Any:
        """The samples as a pyarrow.dataset.Dataset: one row a sample, filtered and read as it is asked for. `to_table()` and
        `to_table().to_pandas()` read all of it."""
        # It imports pandas where there is one, which takes a second; a run has no use for it.
        return import_module("pyarrow.dataset").dataset(Path(self.output_path) / "data", format="parquet")

    def _repr_html_(self) -> str:
        """What a notebook shows: the sections of `run_sections` as tables."""
        return "".join(
            f"<b>{escape(section.title)}</b><table>"
            + "".join(
                f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"
                for row in (*filter(None, (section.columns,)), *section.rows)
            )
            + "</table>"
            for section in run_sections(self)
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values, derived figures included."""
        values = asdict(self)
        values["pending"] = self.pending
        values["output_tokens_per_second"] = round(_rate(self.output_tokens, self.work_seconds), 1)
        values["error_counts"] = dict(self.error_counts)
        values["restarts"] = dict(self.restarts)
        values["pass_at_k"] = None if self.pass_at_k is None else {str(k): value for k, value in self.pass_at_k.items()}
        values["estimates"] = {each.name: [each.value, each.low, each.high] for each in self.estimates}
        return values


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


def run_sections(summary: RunSummary, verbose: bool = False) -> tuple[Section, ...]:
    """The final summary of a run; `verbose` adds the figures of the scheduler and the engine."""
    result = _EXIT_WORDS.get(summary.exit_code, f"exit code {summary.exit_code}")
    if summary.exit_code == 3 and not summary.ok:
        result = "no row could be completed: the error rows say why"
    counts = [
        ("result", result),
        ("rows", _count(summary.rows)),
        ("samples", _books(summary)),
        *((("from earlier runs", f"{_count(summary.earlier)} samples"),) if summary.earlier else ()),
        *((f"error {code}", f"{_count(number)} samples") for code, number in summary.error_counts),
        ("output", summary.output_path),
    ]
    prompts = _count(summary.prompt_tokens)
    if summary.cached_tokens:
        prompts += f", of which {summary.cached_tokens / summary.prompt_tokens:.1%} were shared and not computed again"
    work = [
        ("time", f"{seconds_text(summary.seconds)} (loading {seconds_text(summary.load_seconds)})"),
        ("output tokens", _with_rate(summary.output_tokens, summary.work_seconds)),
        ("prompt tokens", prompts),
    ]
    if summary.tail_seconds:
        share = _share_of_time(summary.tail_seconds, summary.step_seconds)
        work.append(
            ("last samples", f"{seconds_text(summary.tail_seconds)}{share} with fewer than half of the samples running")
        )
    if not summary.steps:
        work = [("time", seconds_text(summary.seconds)), ("computed", "nothing: no sample was missing")]
        work = work if not summary.pending and summary.ok else work[:1]
    sections = [Section("Run", tuple(counts)), Section("Work", (*work, *_faults(summary)))]
    if summary.replicas:
        columns = ("replica", "samples", "output tokens", "prefilled tokens", "idle", "idle in the last tenth")
        table = tuple(
            (
                " ".join((str(number), *(f"GPU {name}" for name in share.devices))),
                *map(_count, (share.samples, share.output_tokens, share.prefilled_tokens)),
                f"{share.idle:.1%}",
                f"{share.idle_at_end:.1%}",
            )
            for number, share in enumerate(summary.replicas)
        )
        sections.append(Section("Replicas", table, columns))
    if verbose:
        sections.append(Section("Engine", tuple(_engine(summary))))
    if summary.verifies and summary.ok:
        unclear = [("not verified", f"{_count(summary.unverified)} samples, counted as wrong")] if summary.unverified else []
        why = [("because", reason) for reason in summary.unverified_reasons]
        (verified,) = verdict_sections(summary.estimates, summary.samples - summary.pending, summary.samples, summary.estimator)
        sections.append(Section(verified.title, (*verified.rows, *unclear, *why)))
    return tuple(sections)


def verdict_sections(estimates: Sequence[Estimate], done: int, samples: int | None, estimator: str = "") -> tuple[Section, ...]:
    """What the verdicts say, of `done` samples of so many; `estimator` says how."""
    rows = [(each.name, f"{each.value:.4f}  ({each.low:.4f} to {each.high:.4f})") for each in estimates]
    rows += [("estimated", estimator)] if estimates and estimator else []
    if samples is not None and done < samples:
        rows = [("no estimate", f"{_count(done)} of {_count(samples)} samples are there; {_PARTIAL}")]
    return (Section("Verified", tuple(rows)),)


def _engine(summary: RunSummary) -> list[tuple[str, str]]:
    saved = _share(summary.cached_tokens, summary.cacheable_tokens)
    rows = [
        ("prefilled tokens", _count(summary.prefilled_tokens)),
        ("saved by sharing", f"{_count(summary.cached_tokens)} of {_count(summary.cacheable_tokens)} possible{saved}"),
        *((("layout", summary.layout),) if summary.layout else ()),
        ("steps", _steps(summary)),
        ("preemptions", _preemptions(summary)),
    ]
    if summary.step_seconds:
        rows.append(("KV cache", f"{summary.kv_use:.1%} in use on average"))
    if summary.predicted_seconds is not None:
        share = _share_of_time(summary.predicted_seconds, summary.step_seconds)
        predicted = f"step time {seconds_text(summary.step_seconds)}; {summary.predicted_by}"
        rows.append(("predicted", f"{predicted} predicts {seconds_text(summary.predicted_seconds)}{share}"))
    return rows


def plan_sections(report: PlanReport) -> tuple[Section, ...]:
    """Everything a plan shows."""
    model, text, ids = report.model, report.first_prompt, report.first_token_ids
    if (rest := len(text) - _SHOWN_CHARACTERS) > 0:
        text = f"{text[:_SHOWN_CHARACTERS]}\n[… and {_count(rest)} more characters]"
    shown = " ".join(map(str, ids))
    if (rest := len(ids) - 2 * _FOLDED_TOKEN_IDS) > 1:
        first, last = ids[:_FOLDED_TOKEN_IDS], ids[-_FOLDED_TOKEN_IDS:]
        shown = f"{' '.join(map(str, first))} [… {_count(rest)} more …] {' '.join(map(str, last))}"
    facts = (
        ("path", model.path),
        ("architecture", f"{model.family}, {model.layers} layers, hidden size {_count(model.hidden_size)}"),
        ("attention", f"{model.heads} heads, {model.kv_heads} KV heads of {model.head_dim}"),
        ("parameters", _count(model.parameters)),
        ("vocabulary", _count(model.vocab_size)),
        ("context", f"{_count(model.context_length)} tokens"),
        ("dtype", model.dtype),
    )
    return (
        Section("Model", facts),
        Section("Work", _plan_work(report)),
        Section("Engine", (("layout", report.layout), *_plan_replica(report.replica))),
        Section("Generation", tuple((s.key, s.value, s.source) for s in report.settings), ("key", "value", "from")),
        Section("First prompt", (("", text),)),
        Section(f"Its {_count(len(ids))} token ids", (("", shown),)),
        *((Section("Notes", tuple(("", note) for note in report.notes)),) if report.notes else ()),
    )


def status_sections(values: Mapping[str, Any], pace: Mapping[str, float | None] | None = None) -> tuple[Section, ...]:
    """The state of an output folder: (name, value) as they come, unknown ones left out; `pace` is that of a running job."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if value is None:
            continue
        text = f"{value:.4f}" if isinstance(value, float) else _count(value) if isinstance(value, int) else str(value)
        rows.append((name.replace("_", " "), text))
    return (Section("Status", (*rows, *_pace(pace or {}))),)


def share_sections(shares: Mapping[str, Any]) -> tuple[Section, ...]:
    """Who computes what of a run that several processes share: its units, and a line for each process at work."""
    rows = [("units", f"{_count(shares['units'])}, {_count(shares['complete'])} of them complete")]
    for task in shares["tasks"]:
        units = ", ".join(map(str, task["units"])) or "none yet"
        rows.append(
            (f"task {task['name']}", f"on {task['host']}, units {units}; seen {seconds_text(max(0.0, task['renewed']))} ago")
        )
    return (Section("Shared", tuple(rows)),)


def _pace(pace: Mapping[str, float | None]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    if (running := pace.get("running_seconds")) is not None:
        rows.append(("running for", seconds_text(running)))
    if (commit := pace.get("commit_seconds")) is not None:
        rows.append(("last commit", f"{seconds_text(commit)} ago"))
    samples, tokens = pace.get("samples_per_second"), pace.get("tokens_per_second")
    if samples is not None and tokens is not None:
        rows.append(("speed", f"{samples:,.3g} samples, {tokens:,.0f} output tokens per second"))
    if rows:
        left = pace.get("seconds_left")
        rows.append(("time left", "known after three commits" if left is None else f"about {seconds_text(left)} at this speed"))
    return rows


_PER_UNIT = {"step": "each step", "sequences": "each running sample of it", "groups": "each group with a shared prefix"}
_OPERATORS = {
    "dense": "matrix products of the layers",
    "logits": "logits and sampling",
    "elementwise": "norms and activations",
    "prefix": "attention to shared prefixes",
    "prefill": "attention of prompt tokens",
    "decode": "attention of output tokens",
}


def profile_sections(file: str, terms: Mapping[str, float]) -> tuple[Section, ...]:
    """A fitted cost model, written to `file`: seconds of overhead, and how many times its theoretical minimum each operator
    takes."""
    rows = [(unit, f"{terms[name] * 1000:.3g} ms") for name, unit in _PER_UNIT.items()]
    rows += [(what, f"{terms[name]:.3g} times the theoretical minimum") for name, what in _OPERATORS.items()]
    return (Section("Cost model", (("file", file), *rows)),)


def check_sections(facts: Mapping[str, int | str], faults: Sequence[tuple[str, str]]) -> tuple[Section, ...]:
    """What reading a folder back found; `faults` are files and what is wrong with them."""
    rows = tuple((name, _count(value) if isinstance(value, int) else value) for name, value in facts.items())
    sections = [Section("Checked", rows)]
    if faults:
        sections.append(Section("Damaged", tuple(("", f"{file} {problem}") for file, problem in faults)))
    return tuple(sections)


def seconds_text(seconds: float) -> str:
    """`4.1 ms`, `0.41 s`, `12.3 s`, `4:05` (minutes) or `3:04:05`."""
    if 0 < seconds < 0.01:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _plan_work(report: PlanReport) -> tuple[tuple[str, str], ...]:
    shared = _share(report.shared_tokens, report.prompt_tokens)
    return (
        ("rows", _count(report.rows) + (f", {_count(report.error_rows)} with errors" if report.error_rows else "")),
        *((f"error {code}", _count(number)) for code, number in report.error_counts),
        ("samples", _count(report.samples)),
        ("prompt tokens", _count(report.prompt_tokens)),
        ("longest prompt", f"{_count(report.longest_prompt)} tokens"),
        ("unique tokens", f"{_count(report.unique_tokens)} to prefill at least"),
        ("shared tokens", f"{_count(report.shared_tokens)}{shared}"),
        ("output tokens", f"at most {_count(report.max_output_tokens)}"),
    )


def _plan_replica(replica: ReplicaFacts) -> tuple[tuple[str, str], ...]:
    size = [("bytes per token", _count(replica.bytes_per_token)), ("page", f"{_count(replica.page_size)} tokens")]
    pages = "as many as the device's memory holds"
    if replica.pages is not None:
        tokens = replica.pages * replica.page_size
        pages = f"{_count(replica.pages)} ({_count(tokens)} tokens, {tokens * replica.bytes_per_token / (1 << 20):,.1f} MiB)"
    return (
        *size,
        ("pages", pages),
        ("a step", f"at most {_count(replica.max_running)} samples, {_count(replica.max_step_tokens)} tokens"),
    )


def _faults(summary: RunSummary) -> list[tuple[str, str]]:
    """What befell the worker, where anything did."""
    rows: list[tuple[str, str]] = []
    if summary.restarts:
        causes = ", ".join(f"{_count(number)} {cause}" for cause, number in summary.restarts)
        rows.append(("worker restarts", f"{_count(sum(number for _, number in summary.restarts))} ({causes})"))
    if summary.dropped_steps:
        rows.append(("out of memory", f"{_count(summary.dropped_steps)} steps dropped, the later ones half as large"))
    if summary.requeued:
        rows.append(("taken back", f"{_count(summary.requeued)} running samples, their tokens kept"))
    return rows


def _steps(summary: RunSummary) -> str:
    times = f"scheduler {seconds_text(summary.host_seconds)}, launching {seconds_text(summary.launch_seconds)} of CPU time"
    limits = f" of at most {_count(summary.max_running)} samples, {_count(summary.max_step_tokens)} tokens"
    return f"{_count(summary.steps)}{limits if summary.max_running else ''}; {times}"


def _books(summary: RunSummary) -> str:
    parts = [f"{_count(summary.ok)} ok", f"{_count(summary.errors)} errors"]
    parts += [f"{_count(summary.cancelled)} cancelled"] if summary.cancelled else []
    parts += [f"{_count(summary.pending)} pending"] if summary.pending else []
    return f"{_count(summary.samples)} = {' + '.join(parts)}"


def _count(number: int) -> str:
    return f"{number:,}"


def _rate(number: int, seconds: float) -> float:
    return number / seconds if seconds > 0 else 0.0


def _with_rate(number: int, seconds: float) -> str:
    return f"{_count(number)} ({_rate(number, seconds):,.0f} per second)" if seconds > 0 else _count(number)


def _share(part: int, whole: int) -> str:
    return f" ({part / whole:.1%})" if whole else ""


def _preemptions(summary: RunSummary) -> str:
    waited = f"; samples waited {_count(summary.waited_steps)} steps for pages" if summary.waited_steps else ""
    return f"{_count(summary.preemptions)}, {_count(summary.recomputed_tokens)} tokens recomputed{waited}"


def _share_of_time(part: float, whole: float) -> str:
    return f" ({part / whole:.0%})" if whole > 0 else ""
