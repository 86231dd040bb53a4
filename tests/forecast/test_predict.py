"""From the job to the predicted run, and from the run's folder to its page, on the quickstart's own files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tokabatch.errors import JobError, OutputError, UsageError
from tokabatch.forecast.cost_model import profile_of
from tokabatch.forecast.devices import PROCESSOR, Device
from tokabatch.forecast.predict import profile_run
from tokabatch.forecast.roofline import DeviceRates
from tokabatch.forecast.scenario import Scenario
from tokabatch.job import Job
from tokabatch.report.outlook import outlook_sections
from tokabatch.report.render import plain
from tokabatch.report.review import write_report
from tokabatch.report.summary import run_sections
from tokabatch.runner.plan import plan_and_simulate
from tokabatch.runner.run import run

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    return Job.load("jobs/quickstart.yaml", f"output.path={tmp_path / 'out'}", "input.limit=6", "generation.n=2")


def test_the_share_that_is_simulated_grows_to_all_of_it(job):
    shares: list[float] = []
    _, outlook = plan_and_simulate(job, Scenario(lengths="70"), on_share=shares.append)
    assert shares == sorted(shares) and shares[0] == 0.0 and shares[-1] == pytest.approx(1.0)
    assert len(shares) > 6 and len(outlook.trials) > 1


def test_a_plan_is_simulated_on_a_device_that_is_not_here(job):
    scenario = Scenario(device="h200", price=3.6, lengths="70:0.4")
    report, outlook = plan_and_simulate(job, scenario)
    assert report.samples == outlook.samples == 12
    assert 12 * 40 < outlook.output_tokens < 12 * 110
    assert outlook.prefilled_tokens + outlook.saved_tokens == report.prompt_tokens
    assert sum(trial.recommended for trial in outlook.trials) == 1
    shown = {label: value for section in outlook_sections(outlook) for label, value in (row[:2] for row in section.rows)}
    assert "H200" in shown["device"] and "3.6 an hour" in shown["time"]
    longest = plan_and_simulate(job, replace(scenario, lengths="max"))[1]
    assert longest.output_tokens == 12 * 192
    assert longest.seconds > outlook.seconds


def test_a_run_on_this_machine_is_simulated_on_a_device_of_another_dtype(job):
    """Which `auto` comes to there."""
    job = job.model_copy(update={"model": job.model.model_copy(update={"dtype": "auto"})})
    run(job)
    report, outlook = plan_and_simulate(job, Scenario(device="h200"))
    assert report.model.dtype == "bfloat16" and report.samples == outlook.samples == 12
    other = job.model_copy(update={"generation": job.generation.model_copy(update={"seed": 9})})
    with pytest.raises(OutputError, match=r"generation\.seed: 0 then, 9 now"):
        plan_and_simulate(other, Scenario(device="h200"))


@pytest.mark.parametrize(("key", "devices"), [("replicas", 3), ("tensor", 2), ("pipeline", 2)])
def test_a_plan_is_simulated_in_its_layout(job, key, devices):
    scenario = Scenario(device="h200", price=3.6, lengths="70:0.4")
    alone = plan_and_simulate(job, scenario)[1]
    laid_out = job.model_copy(update={"engine": job.engine.model_copy(update={key: devices})})
    outlook = plan_and_simulate(laid_out, scenario)[1]
    assert (outlook.samples, outlook.output_tokens) == (alone.samples, alone.output_tokens)
    assert outlook.num_devices == devices and outlook.hours == outlook.seconds * devices / 3600
    assert len(outlook.idle) == (devices if key == "replicas" else 1)
    shown = {label: value for section in outlook_sections(outlook) for label, value in (row[:2] for row in section.rows)}
    expected = f"{devices} replicas" if key == "replicas" else "tensor x pipeline"
    assert expected in shown["layout"] and ("idle at the end" in shown["layout"]) is (key == "replicas")


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        (Scenario(device="abacus"), "write one of h200"),
        (Scenario(device="h200", lengths="many"), "write max, MEAN"),
        (Scenario(device="h200", lengths="0"), "at least 1"),
        (Scenario(device="h200", profile=Path("README.md")), "is not a profile"),
    ],
)
def test_a_scenario_that_cannot_be_is_refused(job, scenario, message):
    with pytest.raises(UsageError, match=message):
        plan_and_simulate(job, scenario)


def _processor_of(rate: float, patch: pytest.MonkeyPatch) -> None:
    """Measure the processor as one of so many operations and bytes a second."""
    measured = Device(DeviceRates(PROCESSOR, rate, rate), 0.0, measured=True)
    patch.setattr("tokabatch.forecast.cost_model.measure_processor", lambda memory: replace(measured, memory=memory))


def test_a_run_that_was_faster_than_its_roofline_says_none(job, tmp_path, monkeypatch):
    """The processor was measured while it was busy, or its caches hold the model."""
    _processor_of(1e3, monkeypatch)
    summary = run(job)
    assert summary.predicted_seconds is None and "roofline" not in plain(run_sections(summary, verbose=True))
    assert "Predicted and actual" not in write_report(tmp_path / "out").read_text()


def test_a_run_leaves_what_its_page_profile_and_next_plan_need(job, tmp_path, monkeypatch):
    _processor_of(1e15, monkeypatch)
    summary = run(job)
    assert summary.predicted_seconds is not None and summary.predicted_seconds > 0
    assert 0 < summary.step_seconds <= summary.seconds
    out = tmp_path / "out"
    page = write_report(out).read_text()
    for title in ("Throughput", "KV cache in use", "pass@k", "Output lengths", "Predicted and actual"):
        assert f"<figcaption>{title}" in page
    assert "jobs/quickstart/problems.jsonl (6 rows)" in page
    fitted = profile_run(out, tmp_path / "profile.json")
    assert fitted.source == str(out)
    again = job.model_copy(update={"output": job.output.model_copy(update={"path": str(tmp_path / "again")})})
    scenario = Scenario(profile=tmp_path / "profile.json", lengths=str(out))
    _, outlook = plan_and_simulate(again, scenario)
    # The same machine, model and lengths: the profile knows what its steps take, within the noise of a small run.
    assert outlook.seconds == pytest.approx(summary.step_seconds, rel=0.8)
    assert abs(outlook.output_tokens / summary.output_tokens - 1) < 0.4


def test_a_job_with_a_profile_is_sized_and_predicted_by_it(job, tmp_path):
    run(job)
    path = tmp_path / "profile.json"
    profile_run(tmp_path / "out", path)
    document = json.loads(path.read_text())
    document["coefficients"] = dict.fromkeys(document["coefficients"], 1.0) | {"step": 1000.0}
    path.write_text(json.dumps(document))
    changes = {
        "output": job.output.model_copy(update={"path": str(tmp_path / "again")}),
        "engine": job.engine.model_copy(update={"profile": str(path)}),
    }
    slow, plain = job.model_copy(update=changes), job.model_copy(update={"output": changes["output"]})
    _, outlook = plan_and_simulate(slow, Scenario(lengths="70"))
    # Steps of a thousand seconds each are worth the most tokens.
    assert {trial.max_step_tokens for trial in outlook.trials} >= {12 + 32_768}
    assert outlook.seconds > 1000 and "profile of" in outlook.cost_model
    with pytest.raises(JobError, match=r"engine\.profile: .* on this processor, not on NVIDIA H200"):
        plan_and_simulate(slow, Scenario(device="h200"))
    by_option = plan_and_simulate(plain, Scenario(profile=path, lengths="70"))[1]
    assert by_option.trials == outlook.trials
    summary = run(slow)
    assert summary.predicted_seconds is not None and summary.predicted_seconds > 1000 * (summary.steps - 1)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_plan_for_a_gpu_computes_in_its_type(job, dtype):
    changed = job.model_copy(update={"model": job.model.model_copy(update={"dtype": dtype})})
    report, outlook = plan_and_simulate(changed, Scenario(device="h200", lengths="70"))
    # Six layers, two KV heads of 64, keys and values, two bytes: the weights are bfloat16.
    assert report.model.dtype == "bfloat16" and report.replica.bytes_per_token == 6 * 2 * 64 * 2 * 2
    assert report.replica.max_step_tokens == report.replica.max_running + 4096
    wider = job.model_copy(update={"model": job.model.model_copy(update={"dtype": "float32"})})
    assert plan_and_simulate(wider, Scenario(device="h200", lengths="70"))[1].seconds > outlook.seconds


def test_a_plan_for_a_gpu_may_ask_for_what_this_machine_lacks(job):
    engine = job.engine.model_copy(update={"device": "cuda", "kv_cache_dtype": "fp8"})
    model = job.model.model_copy(update={"dtype": "auto", "quantization": "fp8"})
    report, _ = plan_and_simulate(job.model_copy(update={"engine": engine, "model": model}), Scenario(device="h200"))
    assert report.replica.bytes_per_token == 6 * 2 * 64 * 2


def test_what_is_there_already_is_not_simulated_again(job):
    run(job)
    more = job.model_copy(update={"generation": job.generation.model_copy(update={"n": 5})})
    assert plan_and_simulate(more, Scenario(lengths="70"))[1].samples == 6 * (5 - 2)
    report, outlook = plan_and_simulate(job, Scenario(lengths="70"))
    assert outlook.samples == 6 * 2 and any("all of these samples" in note for note in report.notes)


def test_running_a_complete_job_again_keeps_the_record_of_its_run(job, tmp_path):
    run(job)
    kept = [(tmp_path / "out" / name).read_bytes() for name in ("summary.json", "steps-00000.parquet")]
    assert run(job).steps == 0
    assert [(tmp_path / "out" / name).read_bytes() for name in ("summary.json", "steps-00000.parquet")] == kept
    assert not (tmp_path / "out" / "steps-00001.parquet").exists()


def test_a_profile_takes_the_place_of_a_profile_alone(job, tmp_path):
    run(job)
    file = tmp_path / "job.yaml"
    file.write_text("model: mine")
    with pytest.raises(UsageError, match="exists and is not a profile"):
        profile_run(tmp_path / "out", file)
    assert file.read_text() == "model: mine"
    with pytest.raises(OutputError, match="cannot be written"):
        profile_run(tmp_path / "out", tmp_path / "nowhere" / "profile.json")
    with pytest.raises(UsageError, match="the run was on this processor"):
        profile_run(tmp_path / "out", tmp_path / "profile.json", "h200")
    profile_run(tmp_path / "out", tmp_path / "profile.json")
    profile_run(tmp_path / "out", tmp_path / "profile.json")


def test_a_run_on_a_device_of_unknown_rates_is_profiled_by_those_of_another(job, tmp_path):
    run(job)
    summary = tmp_path / "out" / "summary.json"
    written = json.loads(summary.read_text())
    written["this_start"]["device"] = "NVIDIA Abacus"
    summary.write_text(json.dumps(written))
    with pytest.raises(UsageError, match="rates of NVIDIA Abacus are not known"):
        profile_run(tmp_path / "out", tmp_path / "profile.json")
    assert profile_run(tmp_path / "out", tmp_path / "profile.json", "h100").roofline.device.name == "NVIDIA Abacus"
    assert profile_of(tmp_path / "profile.json", "NVIDIA Abacus", "engine.profile").device.flops > 1e14


@pytest.mark.parametrize("price", [-3.0, float("nan")])
def test_a_price_is_money(job, price):
    with pytest.raises(UsageError, match="--price"):
        plan_and_simulate(job, Scenario(device="h200", price=price))


def test_a_profile_that_is_none_costs_no_time(job, tmp_path):
    wrong = job.model_copy(update={"engine": job.engine.model_copy(update={"profile": "README.md"})})
    with pytest.raises(JobError, match=r"engine\.profile: README\.md is not a profile"):
        run(wrong)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_run_has_no_page(tmp_path):
    with pytest.raises(OutputError, match="no run has written here"):
        write_report(tmp_path / "nothing")
