"""Progress: what is shown when, how fast it is, and that a pipe gets no control codes."""

from __future__ import annotations

import io
import re
import sys
import time
from dataclasses import replace
from types import ModuleType

import pytest
from rich.console import Console

from tokabatch.errors import UsageError
from tokabatch.report.progress import (
    ExpendableProgress,
    LineProgress,
    LiveProgress,
    MessagesOnly,
    NullProgress,
    Phase,
    Progress,
    ProgressSnapshot,
    Rates,
    chosen_progress,
    default_progress,
    open_progress,
)


def at(elapsed: float, phase: Phase = "generating", done: int = 0) -> ProgressSnapshot:
    return ProgressSnapshot(
        phase, elapsed, rows_done=done // 4, rows_total=100, samples_done=done, samples_total=400, errors=1,
        tokens_in=done * 100, tokens_out=done * 50, kv_used=0.432, running=64, waiting=200,
        tokens_left=(400 - done) * 50,
    )  # fmt: skip


def a_terminal() -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=True, width=100, legacy_windows=False), stream


class TestRates:
    def test_sliding_window_and_eta(self) -> None:
        rates = Rates(window=10.0)
        for second in range(101):
            rates.add(at(float(second), done=second if second <= 50 else 50 + (second - 50) * 2))
        assert rates.tokens_out == pytest.approx(100.0)
        assert rates.tokens_in == pytest.approx(200.0)
        assert rates.eta == pytest.approx((400 - 150) * 50 / 100.0)
        assert len(rates._points) <= 12

    def test_the_rest_of_a_simulation_takes_as_long_as_its_share_did(self) -> None:
        rates = Rates()
        for elapsed, share in ((8.0, 0.0), (12.0, 0.1)):
            rates.add(ProgressSnapshot("simulating", elapsed, share=share))
        assert rates.eta is None, "not trusted yet"
        rates.add(ProgressSnapshot("simulating", 28.0, share=0.25))
        assert rates.eta == pytest.approx(60.0)
        stream = io.StringIO()
        lines = LineProgress(stream)
        for elapsed, share in ((8.0, 0.0), (28.0, 0.25)):
            lines.update(ProgressSnapshot("simulating", elapsed, share=share))
        assert stream.getvalue().splitlines()[1].endswith("simulating 25% of the simulation  eta 1:00")

    def test_samples_left_to_judge_take_as_long_at_the_present_speed(self) -> None:
        stream = io.StringIO()
        lines = LineProgress(stream)
        lines.update(ProgressSnapshot("judging", 0.0))
        for elapsed, done in ((5.0, 0), (10.0, 100), (15.0, 400)):
            lines.update(ProgressSnapshot("judging", elapsed, samples_done=done, samples_total=1000))
        assert [line.split("judging")[1].strip() for line in stream.getvalue().splitlines()] == [
            "reading the files of the output folder", "samples 0/1,000",
            "samples 100/1,000  10 per second  eta 1:30", "samples 400/1,000  40 per second  eta 15.0 s",
        ]  # fmt: skip

    def test_nothing_known_yet(self) -> None:
        rates = Rates()
        assert (rates.tokens_in, rates.eta) == (0.0, None)
        rates.add(at(0.0, "reading"))
        rates.add(at(0.0, "generating"))
        assert (rates.tokens_out, rates.eta, rates.done) == (0.0, None, 0.0)
        # A sample, but for less than five seconds; then five seconds, but no sample.
        rates.add(at(4.9, done=1))
        assert rates.tokens_out > 0 and rates.eta is None
        rates.add(at(5.0, done=1))
        assert rates.eta is not None
        early = Rates()
        for second in range(8):
            early.add(replace(at(float(second)), tokens_out=second * 10))
        assert early.tokens_out == 10 and early.eta is None

    def test_the_bar_is_of_tokens_and_counts_what_was_there_before(self) -> None:
        rates = Rates()
        rates.add(replace(at(0.0, done=100), tokens_out=0, tokens_left=400))
        assert rates.done == 0.25
        rates.add(replace(at(1.0, done=100), tokens_out=200, tokens_left=200))
        assert rates.done == 0.25 + 0.75 * 0.5
        rates.add(replace(at(2.0, done=100), tokens_out=201, tokens_left=300))
        assert rates.done == 0.25 + 0.75 * 0.5, "it does not fall where more is expected"

    @pytest.mark.parametrize(("done", "share"), [(40, "50.0%"), (400, "100.0%")])
    def test_the_bar_does_not_go_back_when_a_run_is_stopped(self, done: int, share: str) -> None:
        console, stream = a_terminal()
        with LiveProgress(console) as progress:
            progress.update(replace(at(0.0), tokens_out=0, tokens_left=400))
            progress.update(replace(at(2.0, "writing", done=done), tokens_out=200, tokens_left=200))
        assert set(re.findall(r"(\S+%) +2\.00 s", re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue()))) == {share}


class TestLines:
    def test_a_line_every_few_seconds_and_at_each_phase_and_at_the_end(self) -> None:
        stream = io.StringIO()
        with LineProgress(stream, interval=5.0) as progress:
            progress.update(at(0.0, "reading"))
            progress.update(at(0.1, "reading"))
            progress.message("model: 3,400,000 parameters")
            for tenth in range(10, 111):
                progress.update(at(tenth / 10, done=tenth))
        lines = stream.getvalue().splitlines()
        assert [line.split(" rows")[0] for line in lines if line.startswith("[")] == [
            "[ 0.00 s] reading   ", "[ 1.00 s] generating", "[ 6.00 s] generating", "[ 11.0 s] generating",
        ]  # fmt: skip
        assert lines[1] == "note: model: 3,400,000 parameters"
        assert lines[-2:] == [
            "[ 11.0 s] generating rows 27/100  samples 110/400  errors 1  in 1,000 tok/s",
            "          out 500 tok/s  KV cache 43%  running 64  waiting 200  eta 29.0 s",
        ]

    def test_no_speed_before_the_first_step(self) -> None:
        stream = io.StringIO()
        with LineProgress(stream) as progress:
            progress.update(at(1.0))
        assert stream.getvalue().endswith("samples 0/400  errors 1  waiting 200\n")

    def test_no_control_codes(self) -> None:
        stream = io.StringIO()
        with LineProgress(stream, interval=0.0) as progress:
            for done in range(5):
                progress.update(at(float(done), done=done))
        assert not any(character < " " and character != "\n" for character in stream.getvalue())

    def test_the_last_state_is_shown_also_after_an_error(self) -> None:
        stream = io.StringIO()
        with pytest.raises(KeyError), LineProgress(stream) as progress:
            progress.update(at(0.0))
            progress.update(at(1.0, done=77))
            raise KeyError
        assert "samples 77/400" in stream.getvalue().splitlines()[-2]


class TestLive:
    def test_draws_every_phase(self) -> None:
        console, stream = a_terminal()
        with LiveProgress(console) as progress:
            progress.update(ProgressSnapshot("starting", 0.0))
            progress.update(ProgressSnapshot("reading", 0.1, rows_done=5))
            progress.update(ProgressSnapshot("loading", 0.2, rows_done=5, rows_total=5))
            progress.message("[not markup]")
            progress.update(at(1.0))
            progress.update(at(2.0, done=123))
            progress.update(ProgressSnapshot("writing", 3.0, samples_total=0))
        shown = stream.getvalue()
        for text in ("starting", "reading", "loading", "generating", "writing", "[not markup]", "samples", "400"):
            assert text in shown

    def test_shows_the_last_state_and_gives_the_cursor_back(self) -> None:
        console, stream = a_terminal()
        with LiveProgress(console) as progress:
            progress.update(at(1.0))
            progress.update(at(1.01, done=396))
        assert (
            "rows 99/100  samples 396/400" in stream.getvalue()
            and "99.0%" in stream.getvalue()
            and stream.getvalue().endswith("\x1b[?25h")
        )

    @pytest.mark.parametrize("width", range(24, 90, 6))
    def test_lines_break_between_facts(self, width: int) -> None:
        """At some of these widths, text that is wrapped between words breaks within a fact."""
        stream = io.StringIO()
        with LiveProgress(Console(file=stream, force_terminal=True, width=width, legacy_windows=False)) as progress:
            progress.update(at(1.0))
            progress.update(at(2.0, done=123))
        drawn = stream.getvalue().rpartition("rows 30/100")[2].replace("\x1b[?25h", "").splitlines()
        assert [fact.strip() for line in drawn for fact in line.split("  ") if fact.strip()] == [
            "samples 123/400", "errors 1", "in 12,300 tok/s", "out 6,150 tok/s",
            "KV cache 43%", "running 64", "waiting 200",
        ]  # fmt: skip

    def test_update_costs_nothing_between_frames(self) -> None:
        console, stream = a_terminal()
        snapshot = at(1.0)
        with LiveProgress(console) as progress:
            progress.update(snapshot)
            drawn = len(stream.getvalue())
            began = time.thread_time()
            for _ in range(1000):
                progress.update(snapshot)
            # A thousand calls take well under one frame of a processor.
            assert time.thread_time() - began < 0.15
            assert len(stream.getvalue()) == drawn


def shown_by(progress: Progress) -> Progress:
    assert isinstance(progress, ExpendableProgress)
    return progress._display


class TestExpendable:
    @pytest.mark.parametrize("moment", ["enter", "update", "message", "exit"])
    def test_a_display_that_raises_is_not_called_again(self, moment: str, caplog: pytest.LogCaptureFixture) -> None:
        calls: list[str] = []

        class Raising(NullProgress):
            def called(self, name: str) -> None:
                calls.append(name)
                if name == moment:
                    raise ValueError("I/O operation on closed file")

            def update(self, snapshot: ProgressSnapshot) -> None:
                self.called("update")

            def message(self, text: str) -> None:
                self.called("message")

            def __enter__(self) -> NullProgress:
                self.called("enter")
                return self

            def __exit__(self, *error: object) -> None:
                self.called("exit")

        with ExpendableProgress(Raising()) as progress:
            progress.update(at(1.0))
            progress.message("x")
        everything = ["enter", "update", "message", "exit"]
        assert calls == everything[: everything.index(moment) + 1]
        assert "I/O operation on closed file" in caplog.text

    def test_a_stop_is_no_failure(self) -> None:
        class Stopping(NullProgress):
            def message(self, text: str) -> None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            ExpendableProgress(Stopping()).message("x")


class TestChoice:
    def test_quiet_and_pipes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            monkeypatch.delenv(name, raising=False)
        assert isinstance(shown_by(open_progress(quiet=True)), MessagesOnly)
        assert isinstance(shown_by(open_progress(quiet=False)), LineProgress)

    def test_quiet_has_messages_and_no_progress(self, capfd: pytest.CaptureFixture[str]) -> None:
        with open_progress(quiet=True) as progress:
            progress.update(at(1.0))
            progress.message("the worker was lost")
        assert capfd.readouterr() == ("", "note: the worker was lost\n")

    def test_null_is_silent(self, capfd: pytest.CaptureFixture[str]) -> None:
        progress: Progress = NullProgress()
        with progress:
            progress.update(at(1.0))
            progress.message("x")
        assert capfd.readouterr() == ("", "")


def test_the_display_that_a_program_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    own = LineProgress(io.StringIO())
    assert chosen_progress(own) is own
    assert isinstance(chosen_progress(None), NullProgress) and isinstance(chosen_progress(False), NullProgress)
    assert isinstance(shown_by(chosen_progress(True)), LineProgress)
    for wrong in (1, "yes", LineProgress, print, {"interval": 1}):
        with pytest.raises(UsageError, match=r"^progress is (a Python|the class) \w+; it takes True, False or a .*$"):
            chosen_progress(wrong)
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    assert isinstance(chosen_progress(True), LineProgress)


def test_a_notebook_and_a_script_on_a_terminal_show_lines(monkeypatch, capsys):
    default_progress().update(ProgressSnapshot("reading", 1.0, rows_done=3))
    assert capsys.readouterr() == ("", "")
    with monkeypatch.context() as patch:
        patch.setattr(sys.stderr, "isatty", lambda: True)
        default_progress().update(ProgressSnapshot("reading", 1.0, rows_done=3))
        assert "rows 3" in capsys.readouterr().err
        patch.setattr(sys, "stderr", None)
        default_progress().update(ProgressSnapshot("reading", 1.0, rows_done=3))
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    default_progress().update(ProgressSnapshot("reading", 1.0, rows_done=3))
    assert "rows 3" in capsys.readouterr().out
