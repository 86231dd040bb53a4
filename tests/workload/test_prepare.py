"""What `plan` and `run` say of a model's files and of the settings before anything is drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import tiny_models
from tokenizers import Tokenizer

from tokabatch import Job, plan, run
from tokabatch.errors import ModelError
from tokabatch.report.progress import NullProgress


class Heard(NullProgress):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture
def told(tmp_path: Path) -> Callable[..., str]:
    """What both commands say of a job: `model` is called with the folder, to change it."""

    def tell(change: Callable[[Path], Any], rows: list[dict[str, Any]], family: str = "llama", **generation: Any) -> str:
        folder = tiny_models.add_tokenizer(tiny_models.build(family, tmp_path / "model"))
        change(folder)
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = {
            "model": {"path": str(folder)},
            "input": {"path": str(tmp_path / "rows.jsonl")},
            "generation": {"max_tokens": 3} | generation,
            "engine": {"device": "cpu"},
            "output": {"path": str(tmp_path / "out")},
            "errors": {"max_fraction": 1},
        }
        notes = plan(Job.load(given)).notes
        heard = Heard()
        assert run(Job.load(given), heard).exit_code == 0
        said = [note for note in notes if note in heard.messages]
        assert len(set(said)) == len(said)
        return "\n".join(said)

    return tell


def nothing(folder: Path) -> None:
    """The files as they are."""


def add_tokens(*texts: str) -> Callable[[Path], None]:
    def add(folder: Path) -> None:
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        backend.add_special_tokens(list(texts))
        backend.save(str(folder / "tokenizer.json"))

    return add


def edit(name: str, **values: Any) -> Callable[[Path], Any]:
    def write(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))

    return write


def test_nothing_is_said_without_need(told: Callable[..., str]) -> None:
    assert told(nothing, [{"prompt": "abc"}], stop="\n") == ""


def test_tokens_added_by_a_fine_tune_do_not_stop_a_run(told: Callable[..., str], tmp_path: Path) -> None:
    rows = [{"prompt": "abc"}, {"prompt": "abc", "sampling_params": {"stop": "[PAD]"}}]
    said = told(add_tokens("[PAD]", "[MASK]"), rows)
    assert "added tokens 97 '[PAD]', 98 '[MASK]' have no embedding in the model, which has 97" in said


def test_another_pre_tokenizer(told: Callable[..., str]) -> None:
    said = told(nothing, [{"prompt": "a"}], "qwen2")
    assert "transformers' AutoTokenizer would put its own normalizer and pre_tokenizer" in said


def test_end_tokens_that_differ(told: Callable[..., str]) -> None:
    said = told(edit("generation_config.json", eos_token_id=0), [{"prompt": "a"}])
    assert "generation_config.json 0 '<pad>'; config.json 2 '<eos>'; the tokenizer 2 '<eos>'" in said


def test_generation_defaults_that_are_not_honoured(told: Callable[..., str]) -> None:
    assert "also says no_repeat_ngram_size: 3" in told(
        edit("generation_config.json", no_repeat_ngram_size=3), [{"prompt": "a"}]
    )


def test_stops_that_no_sample_will_hold(told: Callable[..., str]) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b", "sampling_params": {"stop": ["é"]}}]
    said = told(nothing, rows, stop=r"\nQ:")
    assert r"""generation.stop holds '\nQ:': a backslash and 'n'""" in said
    assert "sampling_params.stop of row 1 (" in said
    assert "rows.jsonl line 2) holds 'é', which the tokenizer writes as ''" in said


def test_an_input_of_bad_rows_only(tmp_path: Path) -> None:
    folder = tiny_models.add_tokenizer(tiny_models.build("llama", tmp_path / "model"))
    (tmp_path / "rows.jsonl").write_text('{"prompt": null}\n{broken\n')
    given = {"model": {"path": str(folder)}, "input": {"path": str(tmp_path / "rows.jsonl")}, "output": {"path": "out"}}
    report = plan(Job.load(given))
    assert report.notes[0] == "warning: no row can be completed: correct the job or its rows"
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n' + "{broken\n" * 5 + '{"prompt": null}\n')
    notes = plan(Job.load(given)).notes
    assert [note.split(":")[0] for note in notes if "bad_json" in note] == ["row 1", "row 2", "row 3", "2 more rows"]
    assert any(note.startswith("row 6: ") for note in notes)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{broken\n')
    assert not any("no row" in note for note in plan(Job.load(given)).notes)


def test_several_greedy_samples_of_a_row(told: Callable[..., str]) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b", "sampling_params": {"temperature": 0}}]
    assert told(nothing, rows, n=1) == ""
    assert "generation.n above 1 for 1 of 2 rows: the samples of a row" in told(nothing, rows, n=2)


def test_several_greedy_samples_of_all_rows(told: Callable[..., str]) -> None:
    assert "generation.n above 1 for all rows" in told(nothing, [{"prompt": "a"}], n=2, temperature=0)


def test_a_plan_needs_no_weights_and_a_run_does(tmp_path: Path) -> None:
    folder = tiny_models.add_tokenizer(tiny_models.build("llama", tmp_path / "model"))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    job = Job.load(
        {
            "model": {"path": str(folder)},
            "input": {"path": str(tmp_path / "rows.jsonl")},
            "engine": {"device": "cpu"},
            "output": {"path": str(tmp_path / "out")},
        }
    )
    with_weights = plan(job)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    without = plan(job)
    assert f"{folder} holds no weights: a plan needs none, a run does" in without.notes
    assert without.samples == with_weights.samples and not (tmp_path / "out").exists()
    with pytest.raises(ModelError, match=r"holds neither model\.safetensors nor"):
        run(job)


def test_a_pointer_of_git_lfs_in_place_of_the_tokenizer_is_named(told: Callable[..., str]) -> None:
    def point(folder: Path) -> None:
        (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")

    with pytest.raises(ModelError, match=r"tokenizer\.json: is a pointer of Git LFS, .*`git lfs pull`"):
        told(point, [{"prompt": "a"}])
