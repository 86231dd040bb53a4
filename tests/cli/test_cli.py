"""The command line as a user meets it: real processes, their output, their exit codes."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.main import get_command

from tokabatch.cli import commands
from tokabatch.errors import EngineError
from tokabatch.number_text import seconds_text

ROOT = Path(__file__).parents[2]
QUICKSTART = "jobs/quickstart.yaml"
SMALL = ("input.limit=2", "generation.n=2", "generation.max_tokens=8")
HEAVY = ("torch", "transformers", "datasets", "pyarrow", "numpy", "pydantic")


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "NO_COLOR", "COLUMNS")}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **changes}


def tokabatch(*arguments: str | Path, **changes: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tokabatch", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment(**changes), capture_output=True, text=True, timeout=120)


def job_file(folder: Path, *lines: str) -> Path:
    path = folder / "job.yaml"
    head = ["model: {path: missing/model}", "input: {path: missing.jsonl}", f"output: {{path: {folder / 'out'}}}"]
    path.write_text("\n".join([*head, *lines]) + "\n")
    return path


class TestWithoutAModel:
    def test_version(self) -> None:
        done = tokabatch("--version")
        assert (done.returncode, done.stderr) == (0, "") and re.fullmatch(r"tokabatch \d+\.\d+\.\d+\n", done.stdout)

    @pytest.mark.parametrize("option", [("--device", "h200"), ("--lengths", "70"), ("--price", "3")])
    def test_what_belongs_to_a_simulation_is_not_ignored_without_one(self, tmp_path: Path, option: tuple[str, str]) -> None:
        done = tokabatch("plan", job_file(tmp_path), *option)
        assert done.returncode == 2 and "belong to --simulate; add it" in done.stderr

    def test_help_teaches(self) -> None:
        done = tokabatch("--help")
        assert done.returncode == 0 and "\x1b" not in done.stdout
        for text in ("tokabatch run jobs/quickstart.yaml", "Exit codes", "75 ", "130 ", "generation.n=4", "tokabatch keys"):
            assert text in done.stdout
        for command in ("run", "plan", "status", "score", "check", "export", "download"):
            assert f"\n  {command} " in done.stdout
            assert "Example" in tokabatch(command, "--help").stdout

    def test_help_fits_80_columns(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        pages = [tokabatch("--help").stdout]
        assert "..." not in pages[0].partition("Commands:")[2]
        pages += [
            tokabatch(each, "--help").stdout for each in re.findall(r"^  ([a-z]+) ", pages[0].partition("Commands:")[2], re.M)
        ]
        assert len(pages) == 16 and not [line for page in pages for line in page.splitlines() if len(line) > 80]

    def test_each_option_says_what_it_is_before_its_default_or_when_it_applies(self) -> None:
        group: Any = get_command(commands.app)
        for name, command in group.commands.items():
            assert command.hidden or re.search(r"^ *Examples?\n", command.help, re.MULTILINE), name
            for each in command.params:
                words = (each.help or "").split()
                assert words and words[0] not in ("Default:", "With"), f"{name} {each.opts[0]}: {each.help}"

    def test_a_key_is_explained_by_its_last_word_alone(self) -> None:
        done = tokabatch("keys", "top_p")
        assert "generation.top_p" in done.stdout and "generation.top_k" not in done.stdout

    def test_every_key_is_explained(self) -> None:
        done = tokabatch("keys")
        assert done.returncode == 0
        assert "generation.max_tokens\n    Maximum length of a sample, in tokens; null: 256.\n    Accepts" in done.stdout
        assert "Accepts a folder's path; required." in done.stdout and "prompt.few_shot.k\n" in done.stdout
        assert "\n\nengine: How the work is done" in done.stdout

    def test_keys_of_a_section_and_one_key(self) -> None:
        done = tokabatch("keys", "prompt")
        assert "prompt.few_shot.k\n" in done.stdout and "generation" not in done.stdout
        done = tokabatch("keys", "generation.n")
        assert "generation.n\n" in done.stdout and "temperature" not in done.stdout and "For example `n: 4`" in done.stdout
        done = tokabatch("keys", "temprature")
        assert (done.returncode, done.stdout) == (2, "") and "did you mean `generation.temperature`?" in done.stderr
        done = tokabatch("keys", "zzz")
        assert done.returncode == 2 and "there are model, input, prompt, prompt.few_shot, generation" in done.stderr

    @pytest.mark.parametrize(
        ("words", "offered"),
        [
            ("tokabatch sta", ["status"]),
            ("tokabatch run job.yaml generation.max", ["generation.max_tokens="]),
            ("tokabatch keys prompt.f", ["prompt.few_shot"]),
        ],
    )
    def test_completion_of_a_shell(self, words: str, offered: list[str]) -> None:
        code = "import sys; sys.argv[0] = 'tokabatch'; from tokabatch.cli import main; main()"
        settings = environment(_TOKABATCH_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(len(words.split()) - 1))
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=settings, capture_output=True, text=True)
        assert done.stdout.split() == offered, done.stderr

    def test_help_is_quick_and_imports_nothing_heavy(self) -> None:
        code = f"import sys, tokabatch.cli; print([name for name in {HEAVY} if name in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        assert done.stdout.strip() == "[]"
        assert min(self._seconds("--help") for _ in range(5)) < 0.5

    def test_every_command_writes_a_line_before_anything_heavy_is_imported(self) -> None:
        code = (
            "import sys\n"
            "from tokabatch import cli\n"
            "class Watch:\n"
            "    def write(self, text):\n"
            "        print(repr(text), {'torch', 'numpy', 'pyarrow', 'datasets'} & {*sys.modules}, file=sys.__stdout__)\n"
            "    def flush(self): pass\n"
            "    def isatty(self): return True\n"
            "sys.stderr = Watch()\n"
            "try: cli.main()\n"
            "except SystemExit: pass\n"
        )
        for words, said in (
            ("serve m server.api_key=secret", "serve m"),
            ("export x --to a.csv", "export x"),
            ("keys", "keys"),
        ):
            done = subprocess.run([sys.executable, "-c", code, *words.split()], cwd=ROOT, capture_output=True, text=True)
            assert re.match(rf"'tokabatch \S+: {said}' set\(\)\n", done.stdout), done.stdout + done.stderr

    def _seconds(self, *arguments: str) -> float:
        """Of a processor, which other programs do not make more."""
        before = os.times()
        tokabatch(*arguments)
        after = os.times()
        return sum(after[2:4]) - sum(before[2:4])

    def test_the_package_alone_is_light_and_its_names_arrive_on_demand(self) -> None:
        code = (
            "import sys, tokabatch\n"
            "assert not {'torch', 'pyarrow', 'numpy', 'pydantic'} & set(sys.modules)\n"
            "assert {name for name in dir(tokabatch) if name[:1] != '_'} == set(tokabatch.__all__) - {'__version__'}\n"
            "assert tokabatch.__version__\n"
            "from tokabatch import Job\n"
            "assert not {'torch', 'pyarrow'} & set(sys.modules)\n"
            "try: tokabatch.nothing\n"
            "except AttributeError as error: print(error)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        assert "has no attribute 'nothing'" in done.stdout

    @pytest.mark.parametrize(
        "arguments", [("nope",), ("run", "a.yaml", "--nope"), ("export", "x"), ("status", "a", "b"), ("--nope",)]
    )
    def test_a_wrong_command_line_is_exit_2(self, arguments: tuple[str, ...]) -> None:
        done = tokabatch(*arguments)
        assert done.returncode == 2 and "Traceback" not in done.stderr and "error: " in done.stderr

    @pytest.mark.parametrize(
        ("command", "missing"),
        [
            ("run", "JOB.yaml is missing; for example `tokabatch run jobs/quickstart.yaml`"),
            ("plan", "JOB.yaml is missing"),
            ("status", "OUT is missing"),
            ("errors", "OUT is missing"),
            ("export", "OUT and --to FILE are missing; for example `tokabatch export out/quickstart --to samples.parquet`"),
            ("download", "MODEL is missing; for example `tokabatch download Qwen/Qwen3-0.6B`"),
        ],
    )
    def test_what_is_missing_is_named(self, command: str, missing: str) -> None:
        done = tokabatch(command)
        assert (done.returncode, done.stdout) == (2, "") and missing in done.stderr and "--help" in done.stderr

    def test_nothing_said_shows_the_help(self) -> None:
        done = tokabatch()
        shown = done.stdout + done.stderr
        assert done.returncode in (0, 2) and shown.startswith("Usage: ") and shown.endswith("print the answer.\n")

    @pytest.mark.parametrize(
        ("written", "remedy"),
        [
            ("--generation.n=4", "without dashes: generation.n=4\n"),
            ("-generation.n=4", "without dashes: generation.n=4\n"),
            ("--generation.n", "without dashes: generation.n=VALUE\n"),
            ("--generation.stop=[a, b]", "without dashes: 'generation.stop=[a, b]'\n"),
        ],
    )
    def test_a_key_written_as_an_option(self, written: str, remedy: str) -> None:
        done = tokabatch("run", "job.yaml", written)
        assert done.returncode == 2 and remedy in done.stderr


class TestRefusals:
    """Exit 2, one message on standard error, no traceback, nothing on standard output, nothing written."""

    @pytest.mark.parametrize("command", ["run", "plan"])
    @pytest.mark.parametrize(
        ("lines", "overrides", "message"),
        [
            (["generation:", "  max_tokenz: 3"], [], "5: generation.max_tokenz: unknown key; did you mean `max_tokens`?"),
            (["engine: {page_size: 24}"], [], "4: engine.page_size: got the number 24; accepts a power of two"),
            ([], ["n=4"], "override `n=4`: unknown key; did you mean `generation.n=4`?"),
            ([], ["generation.n"], "write key=value"),
            (["a: [1"], [], "not valid YAML"),
        ],
    )
    def test_jobs(self, tmp_path: Path, command: str, lines: list[str], overrides: list[str], message: str) -> None:
        done = tokabatch(command, job_file(tmp_path, *lines), *overrides)
        assert (done.returncode, done.stdout) == (2, "")
        assert "\nerror: " in done.stderr and message in done.stderr and "Traceback" not in done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["job.yaml"]

    def test_several_problems_at_once(self, tmp_path: Path) -> None:
        done = tokabatch("run", job_file(tmp_path, "generation: {n: 0}"), "seed=1", "generation.topp=1")
        assert done.returncode == 2 and "\nerrors:\n" in done.stderr and len(done.stderr.splitlines()) == 5

    def test_no_such_job(self, tmp_path: Path) -> None:
        done = tokabatch("run", tmp_path / "x.yaml")
        assert done.returncode == 2 and "no such file" in done.stderr and "Traceback" not in done.stderr

    def test_a_terminal_of_few_characters(self, tmp_path: Path) -> None:
        done = tokabatch("run", job_file(tmp_path), "generation.näme=1", PYTHONIOENCODING="ascii")
        assert done.returncode == 2 and "unknown key" in done.stderr

    def test_status_and_export_of_nothing(self, tmp_path: Path) -> None:
        for arguments in (
            ("status", tmp_path / "no"),
            ("check", tmp_path / "no"),
            ("export", tmp_path / "no", "--to", tmp_path / "a.jsonl"),
        ):
            done = tokabatch(*arguments)
            assert done.returncode == 2 and "Traceback" not in done.stderr and str(tmp_path / "no") in done.stderr

    def test_download_without_the_hub(self, tmp_path: Path) -> None:
        done = tokabatch("download", "nobody/nothing", HF_HOME=str(tmp_path))
        assert done.returncode == 2 and "nobody/nothing" in done.stderr and "Traceback" not in done.stderr
        assert "`tokabatch download nobody/nothing` prints one to copy" in done.stderr
        done = tokabatch("download", tmp_path / "no-folder")
        assert done.returncode == 2 and "MODEL must be a model's folder" in done.stderr and "model.path" not in done.stderr

    @pytest.mark.parametrize(
        ("command", "override", "message"),
        [
            ("run", "model.path=./no-such-folder", "no-such-folder"),
            ("plan", "input.path=no-such-file.jsonl", "no-such-file.jsonl"),
            ("run", "prompt.template={{ no_such_column }}", "no_such_column"),
        ],
    )
    def test_what_a_job_names_must_exist(self, tmp_path: Path, command: str, override: str, message: str) -> None:
        done = tokabatch(command, QUICKSTART, *SMALL, f"output.path={tmp_path / 'out'}", override)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
        assert list(tmp_path.iterdir()) == []


IN_HANDLER = """
import os, signal, threading
from tokabatch.cli.signals import stop_on_signals
with stop_on_signals() as stop:
    assert not stop.poll()
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.poll() == 75
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
signal.signal(signal.SIGINT, signal.SIG_IGN)
with stop_on_signals() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    assert not stop.poll() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
def elsewhere():
    with stop_on_signals() as stop:
        print("thread", stop.poll(), flush=True)
signal.signal(signal.SIGINT, signal.default_int_handler)
thread = threading.Thread(target=elsewhere)
thread.start()
thread.join()
with stop_on_signals() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.poll() == 130
    os.kill(os.getpid(), signal.SIGINT)
    print("never")
"""


def test_the_first_signal_asks_and_the_second_ctrl_c_ends_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", IN_HANDLER], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "thread 0\n"), done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("stopping: ")] == [
        "stopping: committing finished samples, if any (SIGTERM)",
        "stopping: committing finished samples, if any (SIGUSR1)",
        "stopping: committing finished samples, if any; Ctrl-C again to stop at once",
    ]


STOPPED_EARLY = "stopped; run the same command again to continue"


def test_a_deadline_is_called_one_and_a_signal_by_its_name() -> None:
    program = (
        "import os, signal, time\nfrom tokabatch.cli.signals import stop_on_signals\n"
        "with stop_on_signals(deadline=0.01234567) as stop:\n"
        "    time.sleep(5) if not stop.poll() else None\n    print(stop.poll())\n"
        "with stop_on_signals(deadline=60) as stop:\n    os.kill(os.getpid(), signal.SIGUSR1)\n    print(stop.poll())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, check=True, env=environment())
    doing = "stopping: committing finished samples, if any"
    assert done.stderr.splitlines() == [f"{doing} (--deadline 0.01234567 is reached)", f"{doing} (SIGUSR1)"]
    assert done.stdout.split() == ["75", "75"]


def test_ctrl_c_while_the_program_is_imported_leaves_no_traceback() -> None:
    program = (
        "import os, signal\nfrom tokabatch import __main__ as command\n"
        "command.import_module = lambda name: os.kill(os.getpid(), signal.SIGINT)\ncommand.start()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_ctrl_c_while_score_is_imported_stops_it(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\nfrom tokabatch.cli import folder, main\nfound = folder.import_module\n"
        "folder.import_module = lambda name: [os.kill(os.getpid(), signal.SIGINT), found(name)][1]\n"
        f"sys.argv = ['tokabatch', 'score', {str(tmp_path)!r}]\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, ""), done.stderr
    said = done.stderr.splitlines()
    assert said[1:] == ["stopping: keeping the verdicts so far; Ctrl-C again to stop at once", STOPPED_EARLY], done.stderr


def test_an_error_of_the_engine_is_a_message_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise EngineError("the worker died")

    monkeypatch.setattr(commands, "app", fail)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(SystemExit) as caught:
        commands.main()
    sys.stderr.seek(0)
    assert (caught.value.code, sys.stderr.read()) == (1, "error: the worker died\n")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, subprocess.CompletedProcess[str]]]:
    """One small run of the quickstart, looked at by several tests."""
    out = tmp_path_factory.mktemp("run") / "out"
    yield out, tokabatch("run", QUICKSTART, *SMALL, f"output.path={out}")


class TestQuickstart:
    def test_plan_shows_everything_and_writes_nothing(self, tmp_path: Path) -> None:
        done = tokabatch("plan", QUICKSTART, *SMALL, f"output.path={tmp_path / 'out'}")
        assert (done.returncode, list(tmp_path.iterdir())) == (0, []), done.stderr
        assert "\x1b" not in done.stdout
        for text in (
            "First prompt",
            "token ids",
            "unique tokens",
            "longest prompt",
            "bytes each",
            "at most 32",
            "weights",
            "workspace",
            "on disk until",
        ):
            assert text in done.stdout
        assert re.search(r"max_tokens +8 +job", done.stdout) and re.search(r"\n  samples +4\n", done.stdout)

    def test_a_changed_job_is_refused_before_anything_slow_is_imported(
        self, finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
    ) -> None:
        out, _ = finished
        other = shutil.copytree(ROOT / "jobs" / "quickstart", tmp_path / "model")
        (other / "tokenizer_config.json").write_text((other / "tokenizer_config.json").read_text() + "\n")
        changes = (
            "generation.temperature=0.3",
            "generation.seed=9",
            "generation.n=1",
            "verify.kind=exact",
            f"model.path={other}",
        )
        program = f"""
import sys
from tokabatch import cli
for change in {changes!r}:
    for command in ("run", "plan"):
        sys.argv = ["tokabatch", command, {QUICKSTART!r}, *{SMALL!r}, "output.path={out}", change]
        try:
            cli.main()
        except SystemExit as ended:
            assert ended.code == 2, change
        assert not {{"torch", "transformers", "tokenizers"}} & sys.modules.keys(), change
"""
        command = [sys.executable, "-c", program]
        ended = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, ended.stderr
        assert ended.stderr.count("temperature: 1.0 then, 0.3 now") == ended.stderr.count("write generation.n=2") == 2

    def test_a_wrong_job_from_python_is_refused_before_anything_slow_is_imported(
        self, finished: tuple[Path, subprocess.CompletedProcess[str]]
    ) -> None:
        program = f"""
import sys
from tokabatch import Job, UsageError, plan, run
given = Job.load({QUICKSTART!r}, *{SMALL!r}, "output.path={finished[0]}").given()
wrong = (
    ("generation", {{"temprature": 1}}, "did you mean `temperature`"),
    ("input", {{"path": "nope.jsonl"}}, "nope.jsonl"),
    ("prompt", {{"template": "{{{{ qestion }}}}"}}, "did you mean 'question'"),
    ("model", {{"path": "./nope"}}, "nope"),
    ("generation", {{"seed": 9}}, "seed: .* then, 9 now"),
)
for section, values, said in wrong:
    for called in (run, plan):
        try:
            called({{**given, section: {{**given[section], **values}}}})
        except UsageError as error:
            print(said, "|", str(error).replace("\\n", " "))
try:
    run({QUICKSTART!r}, "generation.n=4")
except UsageError as error:
    print("run takes no overrides |", error)
for called, named, said in (
    (run, {{"n": 3}}, r"run\\(Job.load\\('job.yaml', 'generation.n=3'\\)\\)"),
    (plan, {{"max_new_tokens": 9}}, r"plan\\(Job.load\\('job.yaml', 'generation.max_tokens=9'\\)\\)"),
    (run, {{"generation": {{"n": 3}}}}, r"run\\(Job.load\\('job.yaml', 'generation.n=3'\\)\\)"),
):
    try:
        called("job.yaml", **named)
    except UsageError as error:
        print(said, "|", error)
try:
    run("job.yaml", quiet=True)
except TypeError as error:
    print("no argument quiet; there are job, progress, .*repair.*progress=False shows nothing |", error)
for named, said in (
    ({{"progress": "yes"}}, "progress is a Python str; it"),
    ({{"overwrite": "no"}}, "overwrite is 'no'; it takes True or False"),
):
    try:
        run({QUICKSTART!r}, **named)
    except UsageError as error:
        print(said, "|", error)
assert not {{"torch", "transformers", "tokenizers"}} & sys.modules.keys()
"""
        command = [sys.executable, "-c", program]
        ended = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, ended.stderr
        lines = [line.split(" | ") for line in ended.stdout.splitlines()]
        assert len(lines) == 17 and all(re.search(said, error) for said, error in lines), ended.stdout

    def test_run_leaves_every_sample_in_parquet(self, finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
        out, done = finished
        assert done.returncode == 0, done.stderr
        table = pq.read_table(sorted((out / "data").glob("part-*.parquet"))).to_pylist()
        assert sorted((row["row_index"], row["sample_index"]) for row in table) == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert all(row["status"] == "ok" and row["num_output_tokens"] <= 8 for row in table)
        for name in ("manifest.json", "summary.json", "_SUCCESS"):
            assert (out / name).exists()
        # The time is that of the command, imports included, on the page as on the screen.
        seconds = json.loads((out / "summary.json").read_text())["this_start"]["seconds"]
        assert f"time           {seconds_text(seconds)} (loading" in done.stdout

    def test_summary_on_stdout_progress_on_stderr(self, finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
        _, done = finished
        assert "4 = 4 ok + 0 errors" in done.stdout and "not computed again" in done.stdout and "pass@2" in done.stdout
        out = finished[0]
        assert len(re.findall(r"\n  row \d, sample \d, (?:right|wrong)  \S", done.stdout)) >= 2
        assert f"tokabatch export {out} --to samples.jsonl" in done.stdout and f"tokabatch report {out}" in done.stdout
        assert f"tokabatch errors {out}" not in done.stdout
        found = tokabatch("errors", out)
        assert (found.returncode, found.stdout) == (0, f"{out} holds no error rows\n")
        assert "generating" in done.stderr and "generating" not in done.stdout
        assert "\x1b" not in done.stdout + done.stderr and "\r" not in done.stderr

    def test_status(self, finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
        done = tokabatch("status", finished[0])
        assert done.returncode == 0 and re.search(r"state +complete", done.stdout) and re.search(r"ok +4\n", done.stdout)
        assert re.search(r"started +20\d\d-\d\d-\d\d \d\d:", done.stdout) and re.search(r"input .*\.jsonl\n", done.stdout)
        done = tokabatch("status", finished[0], "--json")
        shown = json.loads(done.stdout)
        assert (shown["state"], shown["rows"], shown["samples"], shown["ok"], shown["pending"]) == ("complete", 2, 4, 4, 0)
        assert shown["estimates"] == json.loads((finished[0] / "summary.json").read_text())["estimates"] != {}
        assert (shown["pace"], shown["shared"], shown["of_another_judge"]) == (None, None, None)

    @pytest.mark.parametrize(("nested", "lines"), [((), 4), (("--nested",), 2)])
    def test_export(
        self, finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path, nested: tuple[str, ...], lines: int
    ) -> None:
        target = tmp_path / "all.jsonl"
        done = tokabatch("export", finished[0], "--to", target, *nested)
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in target.read_text().splitlines()]
        assert len(rows) == lines and [row["row_index"] for row in rows] == sorted(row["row_index"] for row in rows)
        assert str(target) in done.stdout and "replaced" not in done.stderr
        done = tokabatch("export", finished[0], "--to", target, *nested)
        assert done.returncode == 0 and f"note: replaced {target}\n" in done.stderr

    def test_verdicts_and_a_page_that_replace_a_file(
        self, finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
    ) -> None:
        for command, suffix in (("score", "parquet"), ("report", "html"), ("export", "csv")):
            target = tmp_path / f"{'a' * 300}.{suffix}"
            done = tokabatch(command, finished[0], "--to", target)
            assert done.returncode == 2 and "cannot be reached: File name too long; name a file elsewhere" in done.stderr
        for command, target in (("score", tmp_path / "v.parquet"), ("report", tmp_path / "page.html")):
            for replaced in (False, True):
                done = tokabatch(command, finished[0], "--to", target)
                assert done.returncode == 0 and (f"note: replaced {target}\n" in done.stderr) is replaced, done.stderr

    def test_export_to_standard_output(self, finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
        done = tokabatch("export", finished[0], "--to", "-", "--columns", "row_index,text", "--where", "ok")
        assert done.returncode == 0 and [json.loads(line)["row_index"] for line in done.stdout.splitlines()] == [0, 0, 1, 1]
        done = tokabatch("export", finished[0], "--to", "-", "--format", "csv", "--columns", "row_index,status")
        assert done.returncode == 0 and done.stdout.splitlines() == [
            '"row_index","status"',
            *('0,"ok" 0,"ok" 1,"ok" 1,"ok"'.split()),
        ]
        done = tokabatch("export", finished[0].with_name(f"{finished[0].name}x"), "--to", "-")
        assert done.returncode == 2 and f"names as output.path; did you mean {finished[0]}?" in done.stderr
        done = tokabatch("export", finished[0], "--to", "-", "--where", "good")
        assert done.returncode == 2 and "--where good: accepts correct, wrong, ok, error or cancelled" in done.stderr
        command = f"{sys.executable} -m tokabatch export {finished[0]} --to - | true; echo ${{PIPESTATUS[0]}}"
        piped = subprocess.run(
            ["bash", "-c", command], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
        )
        assert piped.stdout in ("141\n", "0\n") and piped.stderr == ""

    def test_report_shows_samples_and_settings(
        self, finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
    ) -> None:
        done = tokabatch("report", finished[0], "--to", tmp_path / "page.html")
        page = (tmp_path / "page.html").read_text()
        assert done.returncode == 0 and "max_tokens 8" in page and "jobs/quickstart/problems.jsonl" in page
        assert "tokabatch 0." in page and page.count("<details>") >= 4

    def test_verify_reads_it_back(self, finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
        done = tokabatch("verify", finished[0])  # as it was called once
        assert "called `tokabatch check` now" in done.stderr
        assert done.returncode == 0 and re.search(r"result +complete\n", done.stdout) and re.search(r"ok +4\n", done.stdout)
        shutil.copytree(finished[0], tmp_path / "copy")
        (tmp_path / "copy" / "data" / "part-00000.parquet").write_bytes(b"")
        done = tokabatch("check", tmp_path / "copy")
        assert done.returncode == 4 and "part-00000.parquet is damaged" in done.stdout
        assert re.search(r"tokabatch run \S*copy/job\.json output\.path=\S*copy --repair\n", done.stdout)

    def test_from_python(self, tmp_path: Path) -> None:
        code = (
            "from tokabatch import Job, UsageError, plan, run\n"
            f"job = Job.load({QUICKSTART!r}, *{SMALL!r}, 'output.path={tmp_path / 'out'}')\n"
            "summary = run(job, progress=True)\n"
            "print(summary.ok, summary.exit_code, list(summary.pass_at_k), summary.dataset().to_table().num_rows)\n"
            "print(run(job.given(), progress=False).ok, plan(job.given()).notes[0])\n"
            "try: run(job, progress=3)\n"
            "except UsageError as error: print(error)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
        )
        first, second, refusal = done.stdout.splitlines()
        assert done.stderr.count("generating") == 1 and "samples 4/4" in done.stderr and "Traceback" not in done.stderr
        assert refusal.startswith("progress is a Python int; it takes True, False or a tokabatch.Progress")
        assert first == "4 0 [1, 2] 4" and second.startswith("4 ") and "are those of the whole job" in second, done.stderr

    def test_a_script_without_a_main_guard_may_use_a_worker_process(self, tmp_path: Path) -> None:
        script = tmp_path / "script.py"
        keys = (*SMALL, "engine.process=true", f"output.path={tmp_path / 'out'}")
        script.write_text(f"from tokabatch import Job, run\nprint(run(Job.load({QUICKSTART!r}, *{keys!r})).ok)\n")
        settings = environment(PYTHONPATH=str(ROOT))
        done = subprocess.run([sys.executable, script], cwd=ROOT, env=settings, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout) == (0, "4\n"), done.stderr

    def test_a_finished_run_is_simulated_as_a_whole(self, finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
        arguments = (
            "plan",
            QUICKSTART,
            *SMALL,
            f"output.path={finished[0]}",
            "--simulate",
            "--device",
            "h200",
            "--lengths",
            "8",
        )
        done = tokabatch(*arguments)
        assert done.returncode == 0 and "are those of the whole job" in done.stdout, done.stderr
        assert re.search(r"output tokens +\d+ \(\S+ per second\), 4 samples", done.stdout)

    def test_too_many_errors_is_exit_3_and_quiet_is_quiet(self, tmp_path: Path) -> None:
        rows = tmp_path / "rows.jsonl"
        rows.write_text('{"prompt": "a"}\nnot json\n')
        done = tokabatch(
            "run", QUICKSTART, "generation.n=1", "generation.max_tokens=4", "prompt={}", "verify=null", f"input.path={rows}",
            "input.limit=null", f"output.path={tmp_path / 'out'}", "--quiet",
        )  # fmt: skip
        assert done.returncode == 3, done.stderr
        assert "generating" not in done.stderr
        assert "bad_json" in done.stdout and "2 = 1 ok + 1 error" in done.stdout
        named = re.compile(r"bad_json +1 +\S*rows.jsonl line 2 .*Expecting value")
        assert named.search(done.stdout) and f"tokabatch errors {tmp_path / 'out'} " in done.stdout
        found = tokabatch("errors", tmp_path / "out")
        assert found.returncode == 0 and named.search(found.stdout)

    def test_a_terminal_gets_a_live_display(self, tmp_path: Path) -> None:
        shown = in_terminal("run", QUICKSTART, *SMALL, f"output.path={tmp_path / 'out'}")
        assert "\x1b[?25l" in shown and "\x1b[?25h" in shown and "generating" in shown and "pass@2" in shown

    def test_no_color_is_honoured(self, finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
        assert "\x1b" in in_terminal("status", finished[0])
        assert "\x1b" not in in_terminal("status", finished[0], NO_COLOR="1")

    def test_ctrl_c_commits_what_is_finished(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        arguments = ("run", QUICKSTART, "generation.n=500", "generation.max_tokens=8", f"output.path={out}")
        process = subprocess.Popen(
            [sys.executable, "-m", "tokabatch", *arguments], cwd=ROOT, env=environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert process.stderr is not None
        for line in process.stderr:
            if re.search("generating.* samples [1-9]", line):
                break
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 130, stderr
        assert "Traceback" not in stderr and "committed" in stdout and " pending" in stdout
        assert stderr.count("stopping: committing finished samples, if any; Ctrl-C again to stop at once\n") == 1
        committed = sum(pq.read_metadata(shard).num_rows for shard in out.glob("data/part-*.parquet"))
        assert f" = {committed:,} ok" in stdout and committed > 0
        assert not (out / "_SUCCESS").exists()
        done = tokabatch("export", out, "--to", tmp_path / "partial.jsonl", "--where", "correct")
        assert done.returncode == 0 and f"incomplete: {committed:,} of 24,000 samples so far; short samples" in done.stderr


def in_terminal(*arguments: str | Path, **changes: str) -> str:
    """Everything that a command shows on a terminal of its own."""
    leader, follower = pty.openpty()
    settings = environment(TERM="xterm-256color", COLUMNS="100", LINES="30", **changes)
    command = [sys.executable, "-m", "tokabatch", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT, env=settings, stdout=follower, stderr=follower)
    os.close(follower)
    shown = b""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (process.poll() is None or select.select([leader], [], [], 0)[0]):
        if select.select([leader], [], [], 0.2)[0]:
            try:
                shown += os.read(leader, 65536)
            except OSError:  # The other end is closed: nothing more will come.
                break
    process.wait(timeout=30)
    os.close(leader)
    return shown.decode()


@pytest.mark.parametrize(("given", "spins"), [(None, "'1000'"), ("ACTIVE", "'30000000000'")])
def test_threads_of_torch_hardly_spin_unless_the_user_says_so(given, spins):
    """OpenMP itself prints what it has read, when torch loads it."""
    settings = environment(OMP_DISPLAY_ENV="VERBOSE")
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        settings.pop(name, None)
    settings |= {} if given is None else {"OMP_WAIT_POLICY": given}
    code = "import tokabatch.cli, torch"
    shown = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=True).stderr
    assert f"GOMP_SPINCOUNT = {spins}" in shown


def test_ctrl_c_after_the_end_prints_no_traceback() -> None:
    """While libraries run what they have registered for the exit."""
    interrupted = "atexit.register(os.kill, os.getpid(), signal.SIGINT)"
    code = f"import atexit, os, signal; from tokabatch.cli import commands as c; c.main = lambda: {interrupted}; c.program()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
