"""What a run found, as plain frozen values, and the sections of facts that are shown of it.

The runner fills these; `render` draws the sections.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from tokabatch.number_text import count_text, counted, samples_so_far, seconds_text, share_text
from tokabatch.report.sections import Section
from tokabatch.scoring.estimates import Estimate, distinct, right_from

_EXIT_WORDS = {
    0: "complete",
    2: "stopped: nothing can be written to the output folder, as at the start before; fix that, then run it again",
    4: "the sample counts do not add up: rows x n is not ok + errors + cancelled + pending. This is a bug, please report it",
    75: "stopped before the end; finished samples are committed; run it again to continue",
    130: "interrupted before the end; finished samples are committed; run it again to continue",
}
_TOTALS = (
    *("rows", "samples", "ok", "errors", "cancelled", "exit_code", "stalled", "output_path", "error_counts", "finish_reasons"),
    *("verifies", "stops_rows", "estimates", "estimator", "unverified", "steps_of_all_starts"),
)
"""The fields of a summary that are not of one start alone."""
_LONG, _NOTES = 60.0, 3
"""The seconds of a run after which notes of its start may have left the screen, and how many of them are shown again."""
NONE_RIGHT = ("none is right", "check the judge, the form of the references, and whether samples are cut off")
_PARTIAL = "the first to finish may differ from the rest"


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
    `host_seconds` the scheduler's own CPU time, `launch_seconds` the worker's for launching steps.
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
    kept_tokens: int | None = None
    """Of the output tokens, those of samples that are ok. A later start draws those of unfinished ones again."""
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
    finish_reasons: tuple[tuple[str, int], ...] = ()
    """How many of the ok samples of all starts ended for each reason, such as `stop` and `length`."""
    verifies: bool = False
    """Whether the job verifies its samples."""
    stops_rows: bool = False
    """Whether verdicts stop rows (verify.stop), so that samples are not judged again."""
    estimates: tuple[Estimate, ...] = ()
    """What the verdicts say once all samples are there: mean score, pass@k and so on, with intervals."""
    estimator: str = ""
    """How they were come to."""
    unverified: int = 0
    """Samples whose reference the verifier does not understand; pass@k counts them as wrong."""
    unverified_reasons: tuple[str, ...] = ()
    steps_of_all_starts: bool = True
    """Whether the folder's record of steps has those of every start: one that was killed leaves none."""
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
    notes: tuple[str, ...] = ()
    """What was noted of the job and its input when this run started."""

    @property
    def pending(self) -> int:
        """Samples that a later run has to compute."""
        return self.samples - self.ok - self.errors - self.cancelled

    @property
    def no_verdict(self) -> bool:
        """Whether the run is complete and verified, and no sample has a verdict."""
        return self.exit_code in (0, 3) and not self.pending and 0 < self.ok <= self.unverified

    @property
    def pass_at_k(self) -> Mapping[int, float]:
        """pass@k by k; empty where there is no estimate, as without `verify`."""
        return {int(each.name[5:]): each.value for each in self.estimates if each.name.startswith("pass@")}

    @property
    def work_seconds(self) -> float:
        """Seconds from the first step on."""
        return max(self.seconds - self.load_seconds, 0.0)

    def dataset(self) -> Any:
        """The samples as a pyarrow.dataset.Dataset: one row a sample, filtered and read as it is asked for. `to_table()` and
        `to_table().to_pandas()` read all of it."""
        # It imports pandas where there is one, which takes a second; a run has no use for it.
        return import_module("pyarrow.dataset").dataset(Path(self.output_path) / "data", format="parquet")

    def __str__(self) -> str:
        """What `tokabatch run` prints at the end."""
        return import_module("tokabatch.report.render").plain(self._sections())

    def _repr_html_(self) -> str:
        """What a notebook shows: the same as tables."""
        return import_module("tokabatch.report.render").html(self._sections())

    def _sections(self) -> tuple[Section, ...]:
        # It builds on this module.
        closing = import_module("tokabatch.report.closing")
        return (*run_sections(self), *closing.closing_sections(Path(self.output_path), self))

    @property
    def this_start(self) -> dict[str, Any]:
        """The figures of this start alone, as JSON values, derived ones included."""
        values = {name: value for name, value in asdict(self).items() if name not in _TOTALS}
        values["output_tokens_per_second"] = round(_rate(self.output_tokens, self.work_seconds), 1)
        values["restarts"] = dict(self.restarts)
        return values

    def to_dict(self) -> dict[str, Any]:
        """JSON values: what all starts come to, derived figures included, and under `this_start` the figures of this one."""
        values: dict[str, Any] = {name: getattr(self, name) for name in _TOTALS}
        values["pending"] = self.pending
        values["error_counts"] = dict(self.error_counts)
        values["finish_reasons"] = dict(self.finish_reasons)
        values["pass_at_k"] = {str(k): value for k, value in self.pass_at_k.items()} or None
        values["estimates"] = {each.name: [each.value, each.low, each.high] for each in self.estimates}
        values["this_start"] = self.this_start
        return values


def no_verdict_text(stops_rows: bool, judge_again: str) -> str:
    """What is said where no sample has a verdict; `judge_again` judges the samples that are there."""
    if stops_rows:
        # Other verdicts would have stopped other rows.
        return "NO SAMPLE HAS A VERDICT: correct the judge or the references, then start over (--overwrite)"
    return (
        f"NO SAMPLE HAS A VERDICT: correct the judge, or name another column (verify.answer=COLUMN), then {judge_again}; "
        "references that are wrong in the input need a new run (--overwrite)"
    )


def run_sections(summary: RunSummary, verbose: bool = False) -> tuple[Section, ...]:
    """The final summary of a run; `verbose` adds the figures of the scheduler and the engine."""
    result = _EXIT_WORDS.get(summary.exit_code, f"exit code {summary.exit_code}")
    if summary.exit_code == 3:
        found = f"{counted(summary.errors, 'error')} in {counted(summary.samples, 'sample')}"
        found += share_text(summary.errors, summary.samples)
        result = f"complete, but with {found}, more than errors.max_fraction allows; raise it to accept them"
    if summary.exit_code == 3 and not summary.ok:
        result = "no row could be completed; see the error rows below"
    if summary.exit_code == 75 and not summary.pending:
        result = "every sample is committed, but the run is not marked as complete; run it again to complete it"
    if summary.exit_code == 0 and summary.pending:
        result = "this process has nothing left to compute; other processes of the run (--shared) compute the pending samples"
    elif summary.no_verdict:
        result = f"complete, but {no_verdict_text(summary.stops_rows, 'run `tokabatch score`')}"
    counts = [
        ("result", result),
        ("rows", count_text(summary.rows)),
        ("samples", _books(summary)),
        *((("from earlier runs", counted(summary.earlier, "sample")),) if summary.earlier else ()),
        *((f"error {code}", counted(number, "sample")) for code, number in summary.error_counts),
        ("output", summary.output_path),
    ]
    prompts = count_text(summary.prompt_tokens)
    if summary.cached_tokens:
        prompts += f", of which {summary.cached_tokens / summary.prompt_tokens:.1%} were shared and not computed again"
    work = [
        ("time", f"{seconds_text(summary.seconds)} (loading {seconds_text(summary.load_seconds)})"),
        ("output tokens", _output_tokens(summary)),
        ("prompt tokens", prompts),
    ]
    if summary.tail_seconds:
        share = _share_of_time(summary.tail_seconds, summary.step_seconds)
        work.append(("tail", f"{seconds_text(summary.tail_seconds)}{share}: fewer than half of the samples still running"))
    if not summary.steps:
        work = [("time", seconds_text(summary.seconds)), ("computed", "nothing; all samples were there already")]
        work = work if not summary.pending and summary.ok else work[:1]
    title = "Work of this start" if summary.earlier and summary.steps else "Work"
    sections = [Section("Run", tuple(counts)), Section(title, (*work, *_faults(summary)))]
    if summary.replicas:
        columns = ("replica", "samples", "output tokens", "prefilled tokens", "idle", "idle in the last tenth")
        table = tuple(
            (
                " ".join((str(number), *(f"GPU {name}" for name in share.devices))),
                *map(count_text, (share.samples, share.output_tokens, share.prefilled_tokens)),
                f"{share.idle:.1%}",
                f"{share.idle_at_end:.1%}",
            )
            for number, share in enumerate(summary.replicas)
        )
        sections.append(Section("Replicas", table, columns))
    if summary.notes and summary.seconds >= _LONG:
        more = summary.notes[_NOTES:]
        told = (*summary.notes[:_NOTES], *((f"and {counted(len(more), 'more note')} above",) if more else ()))
        sections.append(Section("Noted at the start", tuple(("", note) for note in told)))
    if verbose:
        sections.append(Section("Engine", tuple(_engine(summary))))
    if summary.verifies and summary.ok:
        unclear = (
            [("without a verdict", f"{counted(summary.unverified, 'sample')}, counted as wrong")] if summary.unverified else []
        )
        unclear += none_right(summary.estimates, summary.stops_rows)
        unclear += [("because", reason) for reason in summary.unverified_reasons]
        done = summary.samples - summary.pending
        sections += verdict_sections(summary.estimates, done, summary.samples, summary.estimator, more=unclear)
    return tuple(sections)


def none_right(estimates: Sequence[Estimate], stops_rows: bool) -> list[tuple[str, str]]:
    """Advice where no sample is right. Where a right sample ends a row (verify.stop), an estimate of zero does not say so."""
    found = not stops_rows and any(each.name == "pass@1" and not each.value for each in estimates)
    return [NONE_RIGHT] if found else []


def verdict_sections(
    estimates: Sequence[Estimate],
    done: int,
    samples: int | None,
    estimator: str = "",
    *,
    unjudged: int = 0,
    more: Sequence[tuple[str, str]] = (),
) -> tuple[Section, ...]:
    """What the verdicts say, of `done` samples of so many, `unjudged` of which are still to be judged; `estimator` says how,
    `more` follows."""
    rows = [(each.name, f"{each.value:.4f} {each.interval('.4f')}") for each in distinct(estimates)]
    if estimates:
        rows.append(("in brackets", "95% intervals over the rows"))
        rows += [("right", right)] if (right := right_from(estimates)) else []
        rows += [("estimated", estimator)] if estimator else []
    if samples is not None and done < samples:
        rows = [("no estimate", f"{samples_so_far(done, samples)}; {_PARTIAL}")]
    elif unjudged:
        rows = [("no estimate", f"{counted(unjudged, 'sample')} still to be judged")]
    elif not estimates:
        rows = [("no estimate", "no sample has a verdict")]
    return (Section("Verified", (*rows, *more)),)


def _engine(summary: RunSummary) -> list[tuple[str, str]]:
    share = share_text(summary.cached_tokens, summary.cacheable_tokens)
    # What is possible is known of the whole plan, of which a part has begun.
    saved = "" if summary.pending else f" of {count_text(summary.cacheable_tokens)} possible{share}"
    rows = [
        ("prefilled tokens", count_text(summary.prefilled_tokens)),
        ("saved by sharing", f"{count_text(summary.cached_tokens)}{saved}"),
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


def _faults(summary: RunSummary) -> list[tuple[str, str]]:
    """What happened to the worker, where anything did."""
    rows: list[tuple[str, str]] = []
    if summary.restarts:
        causes = ", ".join(f"{count_text(number)} {cause}" for cause, number in summary.restarts)
        rows.append(("worker restarts", f"{count_text(sum(number for _, number in summary.restarts))} ({causes})"))
    if summary.dropped_steps:
        rows.append(("out of memory", f"{counted(summary.dropped_steps, 'step')} dropped, the later ones half as large"))
    if summary.requeued:
        rows.append(
            ("taken back", counted(summary.requeued, "running sample, its tokens kept", "running samples, their tokens kept"))
        )
    return rows


def _steps(summary: RunSummary) -> str:
    times = f"scheduler {seconds_text(summary.host_seconds)}, launching {seconds_text(summary.launch_seconds)} of CPU time"
    limits = f" of at most {counted(summary.max_running, 'sample')}, {counted(summary.max_step_tokens, 'token')}"
    return f"{count_text(summary.steps)}{limits if summary.max_running else ''}; {times}"


def _books(summary: RunSummary) -> str:
    parts = [f"{count_text(summary.ok)} ok", counted(summary.errors, "error")]
    parts += [f"{count_text(summary.cancelled)} cancelled"] if summary.cancelled else []
    parts += [f"{count_text(summary.pending)} pending"] if summary.pending else []
    return f"{count_text(summary.samples)} = {' + '.join(parts)}"


def _rate(number: int, seconds: float) -> float:
    return number / seconds if seconds > 0 else 0.0


def _output_tokens(summary: RunSummary) -> str:
    text, seconds = count_text(summary.output_tokens), summary.work_seconds
    if seconds > 0:
        text += f" ({_rate(summary.output_tokens, seconds):,.0f} per second after loading)"
    if summary.pending and summary.kept_tokens is not None and summary.kept_tokens < summary.output_tokens:
        text += f", {count_text(summary.kept_tokens)} of them in finished samples; the others are drawn again"
    return text


def _preemptions(summary: RunSummary) -> str:
    waited = f"; samples waited {counted(summary.waited_steps, 'step')} for pages" if summary.waited_steps else ""
    return f"{count_text(summary.preemptions)}, {counted(summary.recomputed_tokens, 'token')} recomputed{waited}"


def _share_of_time(part: float, whole: float) -> str:
    return f" ({part / whole:.0%})" if whole > 0 else ""
