"""What users bring: small whole jobs, each after a kind of report about batch tools, and what has to come out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from cases import case_models
from tokenizers import Tokenizer

from tokabatch import Job, run
from tokabatch.errors import UsageError
from tokabatch.report.progress import NullProgress
from tokabatch.scoring.verifiers.gsm8k import verify

GREEDY = {"temperature": 0, "max_tokens": 3}


class Screen(NullProgress):
    """Keeps what the run says."""

    def __init__(self) -> None:
        self.said = ""

    def message(self, text: str) -> None:
        self.said += text + "\n"


@dataclass
class Case:
    """One job in a folder of its own."""

    folder: Path
    model: Path
    generation: dict[str, Any] = field(default_factory=lambda: GREEDY)
    prompt: dict[str, Any] | None = None
    engine: dict[str, Any] | None = None

    def rows(self, *rows: dict[str, Any]) -> Case:
        with (self.folder / "rows.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        return self

    def table(self, table: pa.Table) -> Case:
        pq.write_table(table, self.folder / "rows.parquet")
        return self

    def run(self, *changes: str) -> str:
        """Run it, and return what it says."""
        (file,) = self.folder.glob("rows.*")
        job = {
            "model": {"path": str(self.model), "dtype": "float64"},
            "input": {"path": str(file)},
            "output": {"path": str(self.out)},
            "generation": self.generation,
            "engine": {"device": "cpu", **(self.engine or {})},
        }
        screen = Screen()
        run(Job.load(job if self.prompt is None else {**job, "prompt": self.prompt}, *changes), screen)
        return screen.said

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def samples(self) -> list[dict[str, Any]]:
        table = pyarrow.dataset.dataset(self.out / "data").to_table()
        return sorted(table.to_pylist(), key=lambda row: (row["row_index"], row["sample_index"]))

    def prompt_lengths(self) -> list[int]:
        return [sample["num_prompt_tokens"] for sample in self.samples()]


@pytest.fixture
def case(tmp_path: Path) -> Callable[..., Case]:
    def make(settings: dict[str, Any] | None = None, **of_the_job: Any) -> Case:
        return Case(tmp_path, case_models.make(tmp_path / "model", **(settings or {})), **of_the_job)

    return make


CHAT = {"begin": False, "chat": case_models.CHATML, "eos": "<|done|>", "eos_id": case_models.DONE}


def test_a_binary_column_is_text_or_refused(case):
    job = case(prompt={"template": "Q: {{ question }}\n"}).table(pa.table({"question": [b"hello", "café".encode()]}))
    job.run()
    assert job.prompt_lengths() == [10, 10]  # <|begin|> and nine bytes each


def test_dictionaries_in_lists_over_row_groups(case):
    job = case(generation={"temperature": 0, "max_tokens": 1})
    words, kind = ["red", "blue", "green", "red"], pa.list_(pa.dictionary(pa.int32(), pa.string()))
    table = pa.table({"prompt": list("abcd"), "tags": pa.array([[word] for word in words], kind)})
    pq.write_table(table, job.folder / "rows.parquet", row_group_size=1)
    job.run()
    assert [sample["tags"] for sample in job.samples()] == [[word] for word in words]


def test_a_clock_in_the_chat_template_keeps_the_first_starts_time(case):
    job = case({**CHAT, "chat": case_models.CLOCK}, generation={**GREEDY, "n": 1}).rows({"prompt": "question"})
    job.run()
    job.run("generation.n=2")
    first, second = job.samples()
    assert first["token_ids"] == second["token_ids"]
    assert first["num_prompt_tokens"] == second["num_prompt_tokens"]


def test_end_tokens_that_two_files_disagree_on_are_noted(case):
    job = case({**CHAT, "eos_id": case_models.END}, generation={"temperature": 1, "n": 200, "max_tokens": 12})
    said = job.rows({"prompt": "hello"}).run()
    behind = [sample for sample in job.samples() if case_models.DONE in sample["token_ids"][:-1]]
    assert not behind or "<|done|>" in said


def test_an_extension_may_widen_a_columns_type(case):
    job = case(generation={"temperature": 0, "max_tokens": 1})
    job.rows({"prompt": "a", "note": None, "score": 1, "tags": []}, {"prompt": "b", "note": None, "score": 2, "tags": []})
    job.run()
    job.rows({"prompt": "c", "note": "x", "score": 2.5, "tags": ["t"]})
    job.rows({"prompt": "d", "note": {"k": 1}, "score": "n/a", "tags": [1]})
    job.run()
    samples = job.samples()
    assert [_plain(sample["score"]) for sample in samples] == [1, 2, 2.5, "n/a"]
    assert [_plain(sample["note"]) for sample in samples] == [None, None, "x", {"k": 1}]


def _plain(value: Any) -> Any:
    """A column of mixed types holds JSON text."""
    try:
        return json.loads(value)
    except (TypeError, ValueError):
        return value


def test_a_field_may_have_the_name_of_a_method(case):
    job = case(prompt={"template": "{{ order.items | join(', ') }} {{ order['values'] }} {{ order.copy }}"})
    job.rows({"order": {"id": 1, "items": ["nut", "bolt"], "values": 3, "copy": "x"}}).run()
    (sample,) = job.samples()
    assert sample["num_prompt_tokens"] == 1 + len("nut, bolt 3 x")


def test_gsm8k_answers_are_read_as_people_read_them():
    wrong = [row for row in ANSWERS if verify(row[0], {"answer": row[1]}, answer="answer")["score"] != row[2]]
    assert not wrong


ANSWERS = [
    ("The total is $29.00.", 29, True),
    ("so 72 clips, altogether.", 72, True),
    ("#### 130,000", 130000, True),
    ("#### 42\n\nQuestion: x\n#### 7", 42, True),
    ("#### -5", "-5", True),
    ("#### $1,234.50", "1234.5", True),
    ("The answer is 1/2", 2, False),
    ("**#### 18**", 18, True),
    ("\\boxed{18}", 18, True),
    ("#### 18 dollars", 18, True),
    ("#### 1e3", 1000, False),
    ("#### 5.", 5, True),
    ("####\n18", 18, True),
    ("it is 10,000,000", 10000000, True),
    ("3 - 4 = -1", "-1", True),
    ("50%", 50, True),
    ("#### 18", 18.0, True),
]


@pytest.mark.slow
def test_a_long_column_comes_out_with_every_sample(case):
    document = "lorem ipsum " * 250_000
    job = case(generation={"temperature": 1, "n": 800, "max_tokens": 1}).rows({"prompt": "abc", "doc": document})
    job.run()
    seen = 0
    for shard in sorted((job.out / "data").glob("*.parquet")):
        for batch in pq.ParquetFile(shard).iter_batches(16, columns=["status", "doc"]):
            seen += batch.num_rows
            assert set(batch["status"].to_pylist()) == {"ok"}
            assert all(text.as_py() == document for text in batch["doc"])
    assert seen == 800


def test_named_templates_without_a_default_are_refused(case):
    job = case({**CHAT, "chat": {"tool_use": case_models.CHATML, "rag": case_models.CHATML}})
    job.rows({"messages": [{"role": "user", "content": "hi"}]})
    with pytest.raises(UsageError, match=r"rag.*tool_use|tool_use.*rag"):
        job.run()


def test_a_nested_null_never_prints(case):
    job = case(prompt={"template": "{{ doc.title }}: {{ doc.hint }} {{ xs[1] }}"})
    job.rows({"doc": {"title": "A", "hint": None}, "xs": ["p", None]}).run()
    (sample,) = job.samples()
    assert sample["error_code"] == "missing_field"


def test_a_pad_token_beyond_the_embeddings_stops_nothing(case):
    job = case({"extra": ("[PAD]",)}).rows({"prompt": "abc"}, {"prompt": "de"})
    job.run()
    assert job.prompt_lengths() == [2, 3] and {sample["status"] for sample in job.samples()} == {"ok"}


def test_text_that_holds_chat_markup_is_noted(case):
    job = case({"chat": "{{ bos_token }}" + case_models.CHATML, "eos_id": case_models.DONE}, prompt={"chat": False})
    said = job.rows({"prompt": "<|turn|>user\nhi<|done|>\n<|turn|>assistant\n"}).run()
    assert "<|turn|>" in said and "special_tokens" in said


def test_a_prompt_beyond_the_kv_cache_costs_its_row(case):
    job = case(engine={"kv_cache_tokens": 64}).rows({"prompt": "x" * 400}, {"prompt": "a"}, {"prompt": "b" * 40})
    job.run()
    assert [sample["status"] for sample in job.samples()] == ["error", "ok", "ok"]


def test_a_template_that_names_no_column_is_noted(case):
    job = case(prompt={"template": "Question: {question}\nAnswer:"}).rows({"question": "2+2?"}, {"question": "3+3?"})
    try:
        said = job.run()
    except UsageError as refusal:
        said = str(refusal)
    assert "{{ question }}" in said


def test_a_stop_string_that_cannot_match_is_noted(case):
    generation = {"temperature": 1, "n": 4, "max_tokens": 8, "ignore_eos": True, "stop": ["\\n\\n"]}
    said = case(generation=generation).rows({"prompt": "the end"}).run()
    assert "generation.stop" in said and "double quotes" in said


def test_views_of_text_come_out(case):
    job = case(generation={"temperature": 0, "max_tokens": 1})
    job.table(pa.table({"prompt": ["a", "b"], "source": pa.array(["web", None], pa.string_view())}))
    job.run()
    assert [sample["source"] for sample in job.samples()] == ["web", None]


def test_the_tokenizers_file_is_the_truth(case):
    job = case({"family": "qwen2", "extra": ("<|endoftext|>",)})
    case_models.give_own_digits(job.model)
    texts = ["12 + 312 = 324", "e\u0301te\u0301"]
    said = job.rows(*[{"prompt": text} for text in texts]).run()
    own = Tokenizer.from_file(str(job.model / "tokenizer.json"))
    assert job.prompt_lengths() == [len(own.encode(text).ids) for text in texts] == [13, 8]
    assert "tokenizer.json" in said


def test_tool_calls_of_parquet_are_those_of_jsonl(case):
    calls = [{"name": "weather", "arguments": {"city": "Rome"}}, {"name": "add", "arguments": {"x": 1, "y": 2}}]
    rows = [
        {
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "5"},
            ]
        }
        for call in calls
    ]
    job = case({**CHAT, "chat": case_models.WITH_TOOL_CALLS}).rows(*rows)
    job.run()
    from_jsonl = job.prompt_lengths()
    (job.folder / "rows.jsonl").unlink()
    job.table(pa.Table.from_pylist(rows)).run(f"output.path={job.folder / 'again'}")
    again = pyarrow.dataset.dataset(job.folder / "again" / "data").to_table().sort_by("row_index")
    assert again["num_prompt_tokens"].to_pylist() == from_jsonl


def test_tools_reach_the_template(case):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    job = case({**CHAT, "chat": case_models.WITH_TOOLS})
    job.rows({"messages": [{"role": "user", "content": "hi"}], "tools": tools}).run()
    assert job.prompt_lengths()[0] > len(json.dumps(tools))
