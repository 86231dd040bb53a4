"""The commands before a run: `plan`, `keys`, and `profile`, whose cost model simulations use."""

from __future__ import annotations

import sys
from dataclasses import replace
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from tokabatch.cli.arguments import DEVICES, JobArgument, OutArgument, OverridesArgument
from tokabatch.cli.folder import read_state
from tokabatch.cli.job import checked_job, seconds_since_start, starting
from tokabatch.cli.printing import print_note, print_result, terminal_columns
from tokabatch.errors import EXIT_ERRORS, UsageError


def _complete_section(incomplete: str) -> list[str]:
    return [each.name for each in all_sections() if each.name.startswith(incomplete)]


def all_sections() -> tuple[Any, ...]:
    """The sections of a job file, and `server`, whose keys `tokabatch serve` takes besides."""
    server = import_module("tokabatch.serve.settings").ServerConfig
    return (
        *import_module("tokabatch.job").Job.describe_sections(),
        *import_module("tokabatch.job.keys").list_sections(server, "server"),
    )


def plan(
    job: JobArgument,
    overrides: OverridesArgument = None,
    simulate: Annotated[
        bool,
        typer.Option("--simulate", help="Simulate every step of the run: time, cost, KV use."),
    ] = False,
    device: Annotated[
        str | None, typer.Option("--device", help=f"Simulate on this device instead of this machine: {DEVICES}.")
    ] = None,
    lengths: Annotated[
        str,
        typer.Option(
            "--lengths", help="Output tokens: max (max_tokens), MEAN or MEAN:SIGMA (log-normal; 0.7), or a run's OUT."
        ),
    ] = "max",
    profile: Annotated[
        Path | None, typer.Option("--profile", help="Measured cost model (see `tokabatch profile`) in place of the roofline.")
    ] = None,
    price: Annotated[float | None, typer.Option("--price", help="Price of an hour of the device.")] = None,
) -> None:
    """Check a job and show what it would do.

    Loads no weights and writes nothing. Reads the whole input and shows rows, samples and tokens, memory, disk and the least
    time, the settings in effect, and the first prompt. With --simulate, the scheduler runs the whole job against a cost model.

    \b
    Examples
      tokabatch plan jobs/quickstart.yaml generation.n=100
      tokabatch plan jobs/quickstart.yaml --simulate --lengths 70:0.4
      tokabatch plan jobs/gsm8k.yaml --simulate --device h200 --price 3.5
      tokabatch plan jobs/gsm8k.yaml --simulate --device h100 engine.replicas=8
    """
    if not simulate and (device, profile, price, lengths) != (None, None, None, "max"):
        raise UsageError("--device, --lengths, --profile and --price belong to --simulate; add it")
    assumed = import_module("tokabatch.forecast.scenario")
    scenario = assumed.Scenario(device, profile, price, lengths)
    absent_gpu = simulate and assumed.check_scenario(scenario) is not None
    with checked_job(job, overrides, absent_gpu=absent_gpu) as loaded, starting(False) as progress:
        planner = import_module("tokabatch.runner.plan")
        snapshot = import_module("tokabatch.report.progress").ProgressSnapshot

        def on_rows(rows: int, errors: int) -> None:
            progress.update(snapshot("reading", seconds_since_start(), rows_done=rows, errors=errors))

        def on_share(share: float) -> None:
            progress.update(snapshot("simulating", seconds_since_start(), share=share))

        if simulate:
            report, outlook = planner.plan_and_simulate(loaded, scenario, on_rows, on_share)
        else:
            report, outlook = planner.plan(loaded, on_rows), None
    sections = import_module("tokabatch.report.plan_report").plan_sections
    simulated = () if outlook is None else import_module("tokabatch.report.outlook").outlook_sections(outlook)
    print_result((*sections(report, simulated=simulate), *simulated))
    if report.has_too_many_errors:
        raise typer.Exit(EXIT_ERRORS)


def keys(
    section: Annotated[
        str | None,
        typer.Argument(
            metavar="SECTION", help="A section or a key; default: all.", show_default=False, autocompletion=_complete_section
        ),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the keys as lists in Markdown.")] = False,
) -> None:
    """Explain the keys of a job file and of a server.

    What each does, what it accepts, its default, an example.

    \b
    Examples
      tokabatch keys generation
      tokabatch keys prompt.few_shot.k
      tokabatch keys top_p
      tokabatch keys --markdown > keys.md
    """
    sections = all_sections()
    if section is not None:
        names = {name for each in sections for name in (each.name, *(key.name for key in each.keys))}
        inside = [name for name in names if name == section or name.startswith(f"{section}.")]
        inside = inside or [name for name in names if name.rpartition(".")[2] == section]
        if not inside:
            elsewhere, path = import_module("tokabatch.job.names_elsewhere"), tuple(section.split("."))
            if reason := elsewhere.why_none(path):
                raise UsageError(f"there is no section or key {section}; {reason}")
            by_leaf = {name.rpartition(".")[2]: name for name in names} | {name: name for name in names}
            ours = elsewhere.our_name(path)
            begun = sorted(leaf for leaf in by_leaf if leaf.startswith(section))
            near = [ours] if ours in by_leaf else begun or get_close_matches(section, by_leaf, n=1)
            hint = (
                f"did you mean {' or '.join(f'`{by_leaf[leaf]}`' for leaf in near[:3])}?"
                if near
                else f"there are {', '.join(each.name for each in sections if each.name)}"
            )
            raise UsageError(f"there is no section or key {section}; {hint}")
        kept = ((each, tuple(key for key in each.keys if key.name in inside)) for each in sections)
        sections = tuple(replace(each, keys=chosen) for each, chosen in kept if chosen)
    render = import_module("tokabatch.report.key_reference")
    print_result(render.markdown(sections) if markdown else render.plain(sections, terminal_columns(sys.stdout)))


def profile(
    out: OutArgument,
    to: Annotated[Path, typer.Option("--to", metavar="PROFILE.json", help="File to write.", show_default=False)],
    device: Annotated[
        str | None, typer.Option("--device", help=f"Device of the run, if it was not recorded: {DEVICES}.")
    ] = None,
) -> None:
    """Fit a cost model to the steps of a finished run.

    `plan --simulate --profile` and the key engine.profile take it.

    \b
    Example
      tokabatch profile out/quickstart --to profile.json
    """
    read_state(out)
    fitted = import_module("tokabatch.forecast.predict").profile_run(out, to, device)
    terms = zip(import_module("tokabatch.forecast.profile").TERMS, fitted.coefficients, strict=True)
    print_note(import_module("tokabatch.report.outlook").profile_sections(str(to), dict(terms)))
