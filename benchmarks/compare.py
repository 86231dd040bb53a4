"""Run one named workload on several engines side by side and print a table.

    python -m benchmarks.compare repeated-sampling
    python -m benchmarks.compare mixed-lengths --engine tokabatch --engine transformers_generate:batch_size=32

Every engine loads the same weights from one folder and runs the same prompts with the same output length for
every sample, in a process of its own, one after another. Settings not pinned on the command line are tuned
first on a part of the workload (every trial is printed). With `--check` the engines first decode a few prompts
greedily in float64 and must agree token for token. Seconds count from the first request to the last finished
output; loading is apart.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.engines import engine_keys, load_engine, pinned_settings
from benchmarks.models import SHAPES, save_random_model, vocab_size
from benchmarks.workloads import WORKLOADS, Int32, Parameters, Workload, make_workload

LOG = Path(__file__).with_name("LOG.md")
MAX_NOISE = 0.03
BASELINES = ("transformers_generate", "transformers_batch")


@dataclass(frozen=True, slots=True)
class Contestant:
    """An engine with the settings that the command line pins, and later those that tuning found."""

    key: str
    settings: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    outputs: tuple[Int32, ...]
    seconds: float
    cpu_seconds: float
    load_seconds: float
    computed_prefill: int
    computed_decode: int
    peak_rss: int


@dataclass(frozen=True, slots=True)
class Cores:
    """A moment's reading of how long the machine's cores have worked, in seconds: altogether, and on our child processes."""

    at: float
    busy: float | None
    ours: float

    @staticmethod
    def read() -> Cores:
        stat, busy = Path("/proc/stat"), None
        if stat.exists():
            user, nice, system = (int(ticks) for ticks in stat.read_text().split(maxsplit=4)[1:4])
            busy = (user + nice + system) / os.sysconf("SC_CLK_TCK")
        children, own = resource.getrusage(resource.RUSAGE_CHILDREN), resource.getrusage(resource.RUSAGE_SELF)
        ours = children.ru_utime + children.ru_stime + own.ru_utime + own.ru_stime
        return Cores(time.monotonic(), busy, ours)

    def taken_by_others(self) -> float | None:
        """Share of all cores that other processes used since this reading; None where the system does not say."""
        now = Cores.read()
        if self.busy is None or now.busy is None:
            return None
        seconds = (now.at - self.at) * (os.cpu_count() or 1)
        return max(0.0, (now.busy - self.busy) - (now.ours - self.ours)) / seconds


@dataclass(frozen=True, slots=True)
class Bench:
    """Where the files of this comparison lie and how many threads an engine gets."""

    folder: Path
    threads: int
    timeout_s: float

    def child(self, contestant: Contestant, mode: str, model: Path, workload: Workload, settings: dict[str, Any]) -> Path:
        """Run one engine in its own process; returns the file it wrote. Raises CalledProcessError where it failed."""
        out = self.folder / f"out-{contestant.key}-{mode}-{time.monotonic_ns()}.npz"
        file = self.folder / "workload.npz"
        workload.save(file)
        command = [sys.executable, "-m", "benchmarks.engines", contestant.key, mode]
        command += ["--model", str(model), "--workload", str(file), "--out", str(out)]
        command += ["--threads", str(self.threads), "--settings", json.dumps(settings)]
        quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1"}
        threads = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        root = Path(__file__).parent.parent
        subprocess.run(command, check=True, cwd=root, env=os.environ | threads | quiet, timeout=self.timeout_s)
        return out


def main() -> None:
    arguments = parse_arguments()
    parameters = Parameters(
        prompts=arguments.prompts,
        n=arguments.n,
        header=arguments.header,
        prompt=arguments.prompt,
        output=arguments.output,
        vocab_size=vocab_size(arguments.model_shape),
        seed=arguments.seed,
    )
    workload = make_workload(arguments.workload, parameters)
    contestants = [parse_contestant(text) for text in arguments.engine or engine_keys()]
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        bench = Bench(Path(folder), arguments.threads, arguments.timeout)
        if arguments.check:
            check(bench, contestants, workload, arguments.model_shape)
        model = Path(folder) / "model"
        size = save_random_model(arguments.model_shape, model, arguments.dtype, arguments.seed)
        heading = title(arguments, workload, size)
        print(heading, flush=True)
        tuned = [tune(bench, contestant, model, workload, arguments.tune_fraction) for contestant in contestants]
        if arguments.profile:
            for contestant in tuned:
                print(bench.child(contestant, "profile", model, workload, contestant.settings).read_text())
            return
        runs = measure(bench, tuned, model, workload, arguments.rounds)
    table = render(contestants, tuned, runs, workload)
    print(table)
    if arguments.log:
        append_to_log(heading, table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=sorted(WORKLOADS))
    parser.add_argument("--engine", action="append", help="key[:field=value,...]; repeat; default: every driver")
    parser.add_argument("--model-shape", choices=sorted(SHAPES), default="llama-10m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=1, help="measure every engine this often, in turn; medians count")
    parser.add_argument("--tune-fraction", type=float, default=0.25, help="part of the prompts that tuning runs on")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds one engine process may take")
    parser.add_argument("--check", action="store_true", help="first: greedy tokens in float64 agree")
    parser.add_argument("--profile", action="store_true", help="instead of the table: where each engine's time goes")
    parser.add_argument("--log", action="store_true", help="append the table to LOG.md")
    parser.add_argument("--seed", type=int, default=0)
    scale = parser.add_argument_group("scale of the workload (mean lengths in tokens)")
    for name in ("prompts", "n", "header", "prompt", "output"):
        scale.add_argument(f"--{name}", type=int)
    return parser.parse_args()


def parse_contestant(text: str) -> Contestant:
    """`key:field=value,field=value` with each value read as the field's default is typed."""
    key, _, rest = text.partition(":")
    settings = pinned_settings(key, load_engine(key).Settings, [part for part in rest.split(",") if part])
    return Contestant(key, settings)


def tune(bench: Bench, contestant: Contestant, model: Path, workload: Workload, fraction: float) -> Contestant:
    """Settings that are not pinned, chosen on the first part of the workload; nothing runs where nothing is left to
    choose."""
    engine = load_engine(contestant.key)
    if all(axis.field in contestant.settings for axis in engine.SWEEP):
        return contestant
    part = workload.take(max(2, round(fraction * len(workload.prompts))))
    print(
        f"tuning {contestant.key} {describe(contestant.settings)} on {part.num_samples} samples",
        flush=True,
    )
    out = bench.child(contestant, "tune", model, part, contestant.settings)
    return Contestant(contestant.key, json.loads(out.read_text()))


def measure(bench: Bench, contestants: list[Contestant], model: Path, workload: Workload, rounds: int) -> list[list[Run]]:
    """All engines in turn, round after round, so that a busy minute of the machine does not hit one engine alone."""
    runs: list[list[Run]] = [[] for _ in contestants]
    for _ in range(rounds):
        for own, contestant in zip(runs, contestants, strict=True):
            before = Cores.read()
            run = load_run(bench.child(contestant, "measure", model, workload, contestant.settings))
            others = before.taken_by_others()
            assert_lengths(contestant, run, workload)
            own.append(run)
            noise = f"; OTHER PROCESSES USED {others:.0%} OF THE CORES" if others and others > MAX_NOISE else ""
            print(f"  {contestant.key}: {run.seconds:.2f} s ({run.cpu_seconds:.2f} s CPU){noise}", flush=True)
    return runs


def load_run(file: Path) -> Run:
    with np.load(file) as data:
        ends = np.cumsum(data["length"])[:-1]
        return Run(
            outputs=tuple(np.split(data["tokens"], ends)),
            seconds=float(data["seconds"]),
            cpu_seconds=float(data["cpu_seconds"]),
            load_seconds=float(data["load_seconds"]),
            computed_prefill=int(data["computed_prefill"]),
            computed_decode=int(data["computed_decode"]),
            peak_rss=int(data["peak_rss"]),
        )


def assert_lengths(contestant: Contestant, run: Run, workload: Workload) -> None:
    wanted: npt.NDArray[Any] = workload.output_length_PN.reshape(-1)
    got = np.array([len(output) for output in run.outputs])
    if got.shape != wanted.shape or (got != wanted).any():
        raise SystemExit(f"{contestant.key} did not emit the workload's output lengths: its figures mean nothing")


def check(bench: Bench, contestants: list[Contestant], workload: Workload, shape: str) -> None:
    """Greedy tokens in float64 on a few prompts; the first engine is the reference. Exits where they differ."""
    model = bench.folder / "model-float64"
    save_random_model(shape, model, "float64")
    few = workload.greedy(prompts=6, tokens=32)
    reference: Run | None = None
    for contestant in contestants:
        run = load_run(bench.child(contestant, "measure", model, few, contestant.settings))
        assert_lengths(contestant, run, few)
        reference = reference or run
        for index, (ours, theirs) in enumerate(zip(run.outputs, reference.outputs, strict=True)):
            if not np.array_equal(ours, theirs):
                at = int((ours != theirs).argmax())
                raise SystemExit(f"check: {contestant.key} differs from {contestants[0].key}: prompt {index}, token {at}")
    distinct = len({int(token) for output in reference.outputs for token in output}) if reference else 0
    print(
        f"check: {len(contestants)} engines agree on {few.num_output_tokens} greedy tokens in float64 ({distinct} distinct)",
        flush=True,
    )


def title(arguments: argparse.Namespace, workload: Workload, size: int) -> str:
    return (
        f"{workload.name}: {len(workload.prompts)} prompts x {workload.n} samples, "
        f"{workload.num_prompt_tokens:,} prompt tokens ({workload.common_prefix()} common to all), "
        f"{workload.num_output_tokens:,} output tokens; "
        f"{arguments.model_shape} ({size / 1e6:.1f}M parameters, {arguments.dtype}), {arguments.threads} threads"
    )


def render(contestants: list[Contestant], tuned: list[Contestant], runs: list[list[Run]], workload: Workload) -> str:
    """Markdown. `ratio` is against the fastest of the engines that come from transformers without help by hand."""
    seconds = [statistics.median(run.seconds for run in own) for own in runs]
    baseline = min(
        (
            s
            for s, c in zip(seconds, contestants, strict=True)
            if c.key in BASELINES and c.settings.get("prefix", "none") == "none"
        ),
        default=None,
    )
    rows = [
        "| engine | seconds | CPU s | out tok/s | prompt tok/s | ratio | useful | load s | peak RSS | settings |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for contestant, final, own, median in zip(contestants, tuned, runs, seconds, strict=True):
        spread = f" ({min(r.seconds for r in own):.1f}-{max(r.seconds for r in own):.1f})" if len(own) > 1 else ""
        cells = (
            contestant.key,
            f"{median:.1f}{spread}",
            f"{statistics.median(run.cpu_seconds for run in own):.1f}",
            f"{workload.num_output_tokens / median:,.0f}",
            f"{workload.num_prompt_tokens / median:,.0f}",
            f"{baseline / median:.2f}x" if baseline else "-",
            useful(own[0], workload),
            f"{own[0].load_seconds:.1f}",
            f"{max(run.peak_rss for run in own) / 2**20:,.0f} MiB",
            describe(final.settings) or "-",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def useful(run: Run, workload: Workload) -> str:
    """The workload's tokens, each prompt counted once, as a share of the token positions that went through the model. Below
    1 is padding, finished rows and prompts computed for every sample; above 1, shared beginnings computed once."""
    parts: list[str] = []
    if run.computed_prefill > 0:
        parts.append(f"prefill {workload.num_prompt_tokens / run.computed_prefill:.0%}")
    if run.computed_decode > 0:
        parts.append(f"decode {workload.num_output_tokens / run.computed_decode:.0%}")
    return ", ".join(parts) or "-"


def describe(settings: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())


def append_to_log(heading: str, table: str) -> None:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=LOG.parent, check=False
    ).stdout.strip()
    command = "python -m benchmarks.compare " + shlex.join(sys.argv[1:])
    hardware = f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    entry = f"\n## {time.strftime('%Y-%m-%d')}, {commit or 'no commit'}, {hardware}\n\n`{command}`\n\n{heading}\n"
    entry += f"\n{table}\n"
    with LOG.open("a") as file:
        file.write(entry)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
