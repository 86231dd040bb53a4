"""The job file: what is accepted, what is refused, and that a refusal says where and what to write instead."""

from __future__ import annotations

import copy
import math
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokabatch.errors import JobError, RowError
from tokabatch.job import GenerationConfig, Job, names_elsewhere, verifier_names
from tokabatch.job.scalars import parse_scalar, write_value
from tokabatch.precheck import refuse_missing_files
from tokabatch.scheduling.contracts import SamplingParams

MINIMAL = {"model": {"path": "m"}, "input": {"path": "x.jsonl"}, "output": {"path": "out/x"}}
HEADER = "model: {path: m}\ninput: {path: x.jsonl}\noutput: {path: out/x}\n"
DOCUMENTED_FILE = r"""
model: {path: meta-llama/Llama-3.2-1B-Instruct, revision: null, tokenizer: null, dtype: auto}   # hub id or folder
input:
  path: data/*.jsonl
  subset: null
  split: null
  limit: null
  id_column: null
prompt:
  template: "Question: {{ question }}\nAnswer:"
  system: null
  chat: auto
  messages: null
  token_ids: null
  few_shot: {path: jobs/data/x.jsonl, k: 4, template: "..."}
generation: {n: 1, temperature: 1.0, top_p: 1.0, top_k: null, min_p: 0.0, max_tokens: 256, stop: [], stop_token_ids: [],
             ignore_eos: false, seed: 0, logprobs: null}
engine: {device: auto, page_size: 16, kv_cache_tokens: auto, max_running: auto, max_step_tokens: auto, hydragen: auto,
         hydragen_min_group: auto, hydragen_min_prefix: auto}
output: {path: out/gsm8k, rows_per_shard: 50000, flush_seconds: 30, columns: all}
errors: {policy: continue, max_fraction: 0.01}
"""


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "job.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(source: object, *overrides: str) -> str:
    with pytest.raises(JobError) as caught:
        Job.load(source, *overrides)  # type: ignore[arg-type]
    return str(caught.value)


def refused_file(folder: Path, text: str | bytes) -> str:
    """The refusal of a job file, its path shortened to `job.yaml`."""
    return refusal(write(folder, text)).replace(str(folder / "job.yaml"), "job.yaml")


class TestAccepted:
    def test_the_documented_file_and_its_defaults(self, tmp_path: Path) -> None:
        job = Job.load(write(tmp_path, DOCUMENTED_FILE))
        assert job.prompt.template == "Question: {{ question }}\nAnswer:"
        assert job.prompt.few_shot is not None and job.prompt.few_shot.k == 4
        assert job.output.flush_seconds == 30.0 and isinstance(job.output.flush_seconds, float)
        # Everything the example spells out is a default, but for what names files.
        bare = Job.load(MINIMAL)
        assert (job.generation, job.engine, job.errors) == (bare.generation, bare.engine, bare.errors)

    def test_a_file_and_a_mapping_load_the_same(self, tmp_path: Path) -> None:
        assert Job.load(write(tmp_path, HEADER)) == Job.load(str(tmp_path / "job.yaml")) == Job.load(MINIMAL)

    def test_to_dict_is_json_and_loads_back(self) -> None:
        job = Job.load(MINIMAL, 'generation.stop=["\\n"]', "output.columns=[id]", "prompt.template={{ q }}")
        values = job.to_dict()
        assert values["generation"]["stop"] == ["\n"]
        assert Job.load(values) == job

    def test_given_loads_back_with_what_was_left_unset(self) -> None:
        job = Job.load(MINIMAL, "generation.temperature=0.5", "generation.top_k=null", "generation.stop=[x]", "verify=null")
        again = Job.load(job.given())
        defaults = {"temperature": 0.1, "top_p": 0.9, "top_k": 20}
        assert again == job and again.given() == job.given()
        assert again.generation.with_model_defaults(defaults) == job.generation.with_model_defaults(defaults)
        assert Job.load(job.to_dict()).generation.with_model_defaults(defaults)[0].top_p == 1.0

    def test_numbers_and_arrays_of_numpy_are_plain_values(self) -> None:
        drawn = {"n": np.int64(4), "temperature": np.float64(0.5), "ignore_eos": np.bool_(True), "stop": np.array(["a", "b"])}
        given = {
            "model": {"path": np.str_("m")},
            "input": MappingProxyType({"path": Path("rows.jsonl")}),
            "output": {"path": "out", "columns": ("q",)},
            "generation": drawn | {"logit_bias": {np.int32(5): np.float32(1.5)}, "stop_token_ids": [np.int64(7)]},
        }
        job = Job.load(given)
        plain = {"n": 4, "temperature": 0.5, "ignore_eos": True, "stop": ["a", "b"], "logit_bias": {"5": 1.5}}
        sections = {"model": {"path": "m"}, "input": {"path": "rows.jsonl"}, "output": {"path": "out", "columns": ["q"]}}
        assert job == Job.load({**sections, "generation": plain | {"stop_token_ids": [7]}})

    def test_the_mapping_is_left_alone(self) -> None:
        source = {"model": {"path": "m"}, "input": {"path": "x"}, "output": {"path": "o"}, "engine": None}
        Job.load(source, "model.dtype=float32", "engine.page_size=8")
        assert source == {"model": {"path": "m"}, "input": {"path": "x"}, "output": {"path": "o"}, "engine": None}

    def test_an_empty_section_has_its_defaults(self, tmp_path: Path) -> None:
        assert Job.load(write(tmp_path, HEADER + "engine:\ngeneration:\n")) == Job.load(MINIMAL)

    def test_a_null_leaves_a_key_at_its_default(self) -> None:
        nulls = dict.fromkeys(GenerationConfig.model_fields)
        assert Job.load({**MINIMAL, "generation": nulls}).generation == GenerationConfig()
        job = Job.load({**MINIMAL, "generation": {"n": 3, "stop": "x"}}, "generation.stop=null", "generation.seed=null")
        assert (job.generation.n, job.generation.stop, job.generation.seed) == (3, (), 0)
        assert job.generation.model_fields_set == {"n"}, "the model's generation_config.json may set it"
        assert Job.load(MINIMAL, "errors=null", "engine.page_size=null", "mode=null") == Job.load(MINIMAL)
        with pytest.raises(JobError, match=r"`input\.path=null`: got null; accepts a file"):
            Job.load(MINIMAL, "input.path=null")

    def test_examples_are_shown_with_their_answers(self) -> None:
        with pytest.raises(JobError, match=r"few_shot\.template: missing; .*Answer: \{\{ answer \}\}"):
            Job.load(MINIMAL, "prompt.few_shot.path=d.jsonl")

    def test_a_template_without_quotes_is_refused_once(self, tmp_path: Path) -> None:
        path = tmp_path / "job.yaml"
        path.write_text("model: {path: m}\ninput: {path: x}\noutput: {path: o}\nprompt: {template: {{ question }}}\n")
        with pytest.raises(JobError) as refused:
            Job.load(path)
        assert str(refused.value).count("\n") == 0 and "a template needs quotes" in str(refused.value)

    @pytest.mark.parametrize("none", ["null", "~"])
    def test_an_optional_section_may_be_null(self, tmp_path: Path, none: str) -> None:
        path = write(tmp_path, HEADER + f"verify: {none}\nprompt: {{few_shot: {none}}}\n")
        assert Job.load(path) == Job.load(MINIMAL)
        path = write(tmp_path, HEADER + "verify:\n")
        assert Job.load(path, "verify=null").verify is None
        assert Job.load(path, "verify={kind: exact, answer: a}").verify is not None

    def test_path_objects_and_home(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/home/somebody")
        job = Job.load({**MINIMAL, "model": {"path": Path("a/b")}, "output": {"path": "~/out"}})
        assert (job.model.path, job.output.path) == ("a/b", "/home/somebody/out")

    def test_a_file_whose_name_begins_with_a_tilde(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.chdir(tmp_path)
        Path("~data.jsonl").touch()
        assert Job.load({**MINIMAL, "input": {"path": "~data.jsonl"}}).input.path == "~data.jsonl"

    def test_a_trace_in_the_output_folder_needs_no_folder_yet(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.chdir(tmp_path)
        refuse_missing_files(Job.load({**MINIMAL, "output": {"path": "out"}, "trace": {"path": "out/trace.json.gz"}}))
        with pytest.raises(JobError, match=r"trace\.path 'none/a\.json' is in a folder that does not exist"):
            refuse_missing_files(Job.load({**MINIMAL, "output": {"path": "out"}, "trace": {"path": "none/a.json"}}))

    def test_byte_order_mark_and_windows_line_ends(self, tmp_path: Path) -> None:
        assert Job.load(write(tmp_path, b"\xef\xbb\xbf" + HEADER.replace("\n", "\r\n").encode())) == Job.load(MINIMAL)

    def test_importing_loads_no_torch(self) -> None:
        code = "import sys, tokabatch.job; print([m for m in ('torch', 'pyarrow', 'transformers') if m in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


class TestScalars:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("1K", 1024), ("1k", 1000), ("2M", 2 << 20), ("2m", 2_000_000), ("3G", 3 << 30), ("3g", 3_000_000_000),
            ("1e3", 1000), ("2E+06", 2_000_000), ("1e-5", 1e-5), ("1.5e3", 1500.0), (".5", 0.5), ("-7", -7), ("+7", 7),
            ("007", 7), ("0x1F", 31), ("0o17", 15), ("null", None), ("~", None), ("", None), ("true", True),
            ("False", False), ("yes", "yes"), ("no", "no"), ("on", "on"), ("12:30", "12:30"), ("1_000", "1_000"),
            ("1.2.3", "1.2.3"), ("2020-01-01", "2020-01-01"), ("K", "K"), ("1KB", "1KB"), ("nan", "nan"), ("e3", "e3"),
            (".inf", math.inf), ("-.inf", -math.inf), ("<<", "<<"), ("=", "="),
        ],
    )  # fmt: skip
    def test_plain_words(self, text: str, value: object) -> None:
        parsed = parse_scalar(text)
        assert parsed == value and type(parsed) is type(value)

    def test_not_a_number(self) -> None:
        parsed = parse_scalar(".nan")
        assert isinstance(parsed, float) and math.isnan(parsed)

    @given(st.text(max_size=40))
    def test_any_text_has_a_meaning(self, text: str) -> None:
        assert parse_scalar(text) is None or isinstance(parse_scalar(text), str | int | float)

    @given(st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | st.booleans() | st.none())
    def test_what_is_written_reads_back(self, value: object) -> None:
        if isinstance(value, float) and math.isinf(value):
            return
        assert parse_scalar(write_value(value)) == value

    def test_in_a_file(self, tmp_path: Path) -> None:
        text = HEADER + "generation: {max_tokens: 1K, top_p: 1e-1, n: 1e3}\nengine: {kv_cache_tokens: 64K}\n"
        job = Job.load(write(tmp_path, text))
        assert (job.generation.max_tokens, job.generation.top_p, job.generation.n) == (1024, 0.1, 1000)
        assert job.engine.kv_cache_tokens == 65536

    def test_variables_of_the_chat_template(self, tmp_path: Path) -> None:
        file = write(tmp_path, HEADER + "prompt: {chat_template_kwargs: {enable_thinking: false, level: [1, a]}}\n")
        assert Job.load(file).prompt.chat_template_kwargs == {"enable_thinking": False, "level": [1, "a"]}
        job = Job.load(file, "prompt.chat_template_kwargs.enable_thinking=true", "prompt.chat_template_kwargs.date=1K")
        assert job.prompt.chat_template_kwargs == {"enable_thinking": True, "level": [1, "a"], "date": 1024}
        assert Job.load(job.given()) == job

    def test_one_text_or_id_stands_for_a_list_of_one(self, tmp_path: Path) -> None:
        job = Job.load(write(tmp_path, HEADER + 'generation: {stop: "\\n", stop_token_ids: 7}\n'), "generation.stop=END")
        assert (job.generation.stop, job.generation.stop_token_ids) == (("END",), (7,))
        params = job.generation.row_params({"stop": "Q:", "stop_token_ids": 5})
        assert isinstance(params, SamplingParams) and (params.stop, params.stop_token_ids) == (("Q:",), (5,))

    def test_quoted_stays_text(self, tmp_path: Path) -> None:
        job = Job.load(write(tmp_path, HEADER + "verify: {kind: exact, answer: '1K'}\nprompt: {system: \"true\"}\n"))
        assert job.verify is not None and (job.verify.answer, job.prompt.system) == ("1K", "true")


class TestRefusedFiles:
    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            ("generation:\n  max_tokenz: 4", "5: generation.max_tokenz: unknown key; did you mean `max_tokens`?"),
            ("max_tokens: 4", "4: max_tokens: unknown key; did you mean `generation.max_tokens`?"),
            ("generation: {until: x}", "4: generation.until: unknown key; did you mean `stop`?"),
            ("generatoin: {n: 2}", "4: generatoin: unknown key; did you mean `generation`?"),
            ("engine: {seed: 3}", "4: engine.seed: unknown key; did you mean `generation.seed`?"),
            ("engine: {zzz: 3}", "4: engine.zzz: unknown key; the keys of engine are device, replicas"),
            ("prompt: {path: 3}", "there are `model.path`, `input.path`, `prompt.few_shot.path`, `output.path`"),
            ("generation: {n: four}", "4: generation.n: got the text four; accepts a whole number from 1 to 1,000,000"),
            (
                "generation: {n: 2.0}",
                "got the number 2.0; accepts a whole number from 1 to 1,000,000 (repeat the row for more)",
            ),
            ("generation: {n: true}", "got true; accepts a whole number"),
            ("generation: {n: 0}", "got the number 0; accepts a whole number from 1 to 1,000,000"),
            ("generation: {n: 3000000000}", "got the number 3000000000"),
            ("generation: {n: [4]}", "got a list; accepts a whole number"),
            ("generation: {temperature: true}", "got true; accepts a number from 0 to 1,000,000"),
            ("generation: {temperature: -0.1}", "accepts a number from 0 to 1,000,000"),
            ("generation: {temperature: .nan}", "got the number nan; accepts a number from 0"),
            ("generation: {temperature: .inf}", "got the number inf; accepts a number from 0"),
            ("generation: {temperature: 1.0e+39}", "accepts a number from 0 to 1,000,000"),
            ("generation: {top_p: 0}", "accepts a number above 0 and at most 1"),
            ("generation: {top_p: 1.01}", "accepts a number above 0 and at most 1"),
            ("generation: {min_p: 1}", "accepts a number from 0 to below 1"),
            ("generation: {max_tokens: 0}", "accepts a whole number >= 1"),
            ("generation: {top_k: -1}", "or null or 0 for off"),
            ("generation: {stop: 5}", 'accepts a non-empty text, or a list of them, for example `stop: ["\\n\\n"]`'),
            ("generation: {stop: ''}", "4: generation.stop: got empty text; accepts a non-empty text, or a list of them"),
            ("generation: {stop_token_ids: -1}", "4: generation.stop_token_ids: got the number -1; accepts a token id"),
            ("generation: {stop: ['']}", "generation.stop[0]: got empty text"),
            (
                'generation:\n  stop:\n    -"\\n"\n    -b',
                '5: generation.stop: a space is missing behind the dash: write `- "\\n"`',
            ),
            ("generation: {stop: -'a b'}", "4: generation.stop: a list on the line of its key is written in brackets: ['a b']"),
            (
                "generation:\n  stop_token_ids:\n    -5\n    -6",
                "5: generation.stop_token_ids: a space is missing behind the dash: w",
            ),
            ("output:\n  columns:\n    -id", "given twice"),
            (
                'prompt: {template: "\\boxed{}"}',
                r"4: prompt.template: the \b of `\boxed{}` became a backspace character (U+0008), as",
            ),
            (
                'prompt: {system: "Use \\frac{1}{2} and x"}',
                r"prompt.system: the \f of `\frac{1}{2} an…` became a form feed (U+000C)",
            ),
            (
                'prompt: {template: "\\vec\\0"}',
                r"to keep the backslash, write \\v (or, in YAML, use single quotes or a block `|`",
            ),
            ('prompt: {template: "\\x7 \\x01"}', "is not valid YAML"),
            ('generation: {stop: [a, "\\boxed"]}', r"generation.stop[1]: the \b of `\boxed` became a backspace character"),
            (
                'verify: {kind: regex, answer: a, options: {pattern: "\\b[A-D]\\b"}}',
                r"verify.options.pattern: the \b of `\b[A-D]…` became a backspace",
            ),
            ("generation: {n:\u00a04}", "unknown key; write a space behind the colon: `n: 4`"),
            ("generation:\n\u00a0n: 4", "unknown key; the space beside it is U+00A0; write ordinary ones"),
            ("generation:\n  stop:\n    - a\n    - 3", "7: generation.stop[1]: got the number 3"),
            ("generation: {stop_token_ids: [-1]}", "stop_token_ids[0]: got the number -1; accepts a token id"),
            ("generation: {ignore_eos: yes}", "got the text yes; accepts true or false"),
            ("generation: {repetition_penalty: 1.0e-40}", "accepts a number from 0.01 to 100"),
            ("generation: {repetition_penalty: 0}", "accepts a number from 0.01 to 100 (1 is off, more avoids"),
            ("generation: {presence_penalty: 2.5}", "accepts a number from -2 to 2 (0 is off), for example"),
            ("generation: {min_tokens: -1}", "accepts a whole number >= 0, for example `min_tokens: 10`"),
            (
                "generation: {min_tokens: 9, max_tokens: 8}",
                "4: generation: min_tokens is 9, but max_tokens is 8; lower",
            ),
            ("generation: {logit_bias: 5}", "got the number 5; accepts a mapping of token ids to numbers from -100 to 100"),
            (
                "generation: {logit_bias: {no: 5}}",
                "generation.logit_bias: names 'no', which is not a token id; write whole",
            ),
            (
                "generation: {logit_bias: {7: 101}}",
                "gives token 7 101; write a number from -100 to 100 (bad_words",
            ),
            ("generation: {logit_bias: {7: true}}", "gives token 7 True; write a number"),
            ("generation: {bad_words: 5}", "got the number 5; accepts a text, or a list of texts and lists of token ids"),
            ("generation: {bad_words: ['']}", """4: generation.bad_words: holds ''; write texts, or lists of token ids >= 0"""),
            ("generation: {bad_words: [a, [3, -1]]}", "holds [3, -1]; write texts, or lists"),
            ("generation: {bad_words: [[]]}", "holds []; write texts, or lists"),
            ("generation: {seed: -1}", "accepts a whole number from 0 to 2^63 - 1"),
            ("generation: 5", "generation: got the number 5; accepts a mapping of the keys n, temperature"),
            ("engine: {page_size: 24}", "got the number 24; accepts a power of two >= 1, for example `page_size: 16`"),
            ("engine: {device: tpu}", "got the text tpu; accepts one of auto, cpu, cuda"),
            ("engine: {hydragen: 1}", "got the number 1; accepts auto, true or false"),
            ("engine: {max_running: many}", "accepts auto, or a whole number >= 1"),
            ("errors: {max_fraction: 1.5}", "accepts a number from 0 to 1"),
            ("errors: {policy: skip}", "accepts one of continue, stop"),
            ("prompt: {system: 42}", "got the number 42; accepts text (a Jinja template), or null (text that looks like"),
            ("prompt: {template: a, messages: b}", "4: prompt: template and messages are given, but a prompt has one"),
            ("prompt: {template: a, messages: b, token_ids: c}", "template and messages and token_ids are given"),
            ("prompt: {token_ids: a, system: b}", "system cannot be put in front of token_ids"),
            ("prompt: {chat: false, chat_template: a}", "chat_template needs a chat template, but chat is false"),
            ("prompt: {token_ids: a, chat_template_kwargs: {b: 1}}", "chat_template_kwargs is not used with token_ids"),
            (
                "prompt: {chat_template_kwargs: thinking}",
                "got the text thinking; accepts a mapping of the chat template's variables",
            ),
            (
                "prompt: {chat_template_kwargs: {tools: []}}",
                "4: prompt.chat_template_kwargs: holds `tools`, which the template gets from the rows' column",
            ),
            ("prompt: {chat_template_kwargs: {messages: []}}", "holds `messages`, which the run decides itself; remove it"),
            ("prompt: {chat_template_kwargs: {x: .nan}}", "prompt.chat_template_kwargs: holds values that JSON does not have"),
            ("prompt: {chat: false, template: a, system: b}", "system needs a chat template, but chat is false"),
            ("prompt:\n  few_shot: {path: a, k: 0, template: b}", "5: prompt.few_shot.k: got the number 0"),
            ("generation:{n: 4}", "write a space behind the colon: `generation: {n: 4}`"),
            ("generation: temperature=0.7", "for example `generation: {temperature: 0.7}`"),
            ("generation: 'stop=#'", 'for example `generation: {stop: "#"}`'),
            ("prompt: template", 'for example `prompt: {template: "{{ template }}"}`'),
            ("prompt: 'template = {{ q }}'", 'for example `prompt: {template: "{{ q }}"}`'),
            ("prompt:\n  few_shot: {path: a}", "5: prompt.few_shot.template: missing; accepts text (a Jinja template)"),
            (
                "prompt:\n  template: {{ question }}",
                '5: prompt.template: a template needs quotes, because { begins a mapping: `template: "{{ question }}"`',
            ),
            (
                "prompt: {template: {{ q }}}",
                '4: prompt.template: a template needs quotes, because { begins a mapping: `template: "{{ q }}"`',
            ),
            ("prompt:\n  ? [a, b]\n  : c", "5: prompt: a key must be a single word, not a list or mapping"),
            ("verify: {kind: gsm9k, answer: a}", "4: verify.kind: there is no verifier `gsm9k`; did you mean `gsm8k`?"),
            (
                "verify: {kind: gsm8k}",
                "4: verify: kind gsm8k needs `answer`, the column that holds the reference answer; add it",
            ),
            ("verify:", "4: verify: is empty; give its keys (kind, answer, options, correct_from, processes, "),
            ("prompt:\n  few_shot:", "5: prompt.few_shot: is empty; give its keys (path, k, template)"),
            ("verify: {kind: ../gsm8k, answer: a}", "there is no verifier `../gsm8k`"),
            ("generation:\n  n: 2\n  n: 3", "6: generation.n: given twice, first on line 5; keep one"),
            ("model: {path: other}", "4: model: given twice, first on line 1; keep one"),
        ],
    )
    def test_keys_and_values(self, tmp_path: Path, lines: str, message: str) -> None:
        refused = refused_file(tmp_path, f"{HEADER}{lines}\n")
        assert message in refused
        assert all(re.match(r"job\.yaml:\d+: ", line) for line in refused.splitlines())

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "job.yaml: holds nothing; a job file is a mapping"),
            ("- a\n- b\n", "job.yaml: holds a list"),
            ("hello\n", "job.yaml: holds plain text"),
            ("{}\n", "job.yaml: model.path: missing; accepts a Hugging Face id or a local folder"),
            ("a: &x [1]\nb: *x\n", "job.yaml:1: `&x`: YAML anchors and aliases are not accepted"),
            ("a: !!python/object/apply:os.system [ls]\n", "YAML tags are not accepted"),
            ("model:\n\tpath: m\n", "is not valid YAML: there is a tab"),
            ("prompt: {template: 'a}\n", "not valid YAML"),
            ("prompt:\n  system: Answer: now\n", 'needs quotes: `system: "Answer: now"`'),
            ("a: 1\n---\nb: 2\n", "begins a second job"),
            ("a: " + "[" * 5000, "nested more than 20 levels deep"),
            ("a: \x01\n", "not valid YAML"),
            (b"a: \xff\n", "job.yaml: not UTF-8 text (byte 3)"),
            ("a: " + "x" * (1 << 20), "is no job file"),
        ],
        ids=lambda value: repr(value[:24]),
    )
    def test_documents(self, tmp_path: Path, text: str | bytes, message: str) -> None:
        assert message in refused_file(tmp_path, text)

    def test_alias_bomb_is_quick(self, tmp_path: Path) -> None:
        bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
        assert "anchors and aliases are not accepted" in refused_file(tmp_path, bomb)

    def test_several_problems_come_together_in_the_order_of_the_file(self, tmp_path: Path) -> None:
        text = HEADER + "generation:\n  n: 0\n  temprature: 1\n  n: 2\nengine: {page_size: 3}\n"
        lines = refused_file(tmp_path, text).splitlines()
        assert [line.split(":")[1] for line in lines] == ["5", "6", "7", "8"]
        assert "did you mean `temperature`?" in lines[1]

    def test_missing_files(self, tmp_path: Path) -> None:
        write(tmp_path, HEADER)
        missing = refusal(tmp_path / "jop.yaml")
        assert "no such file" in missing and "job.yaml" in missing
        assert "is a folder; name the job file inside it" in refusal(tmp_path)

    def test_a_file_that_may_not_be_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def deny(path: Path) -> bytes:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "read_bytes", deny)
        assert "job.yaml: cannot be read: Permission denied" in refusal(tmp_path / "job.yaml")

    @pytest.mark.parametrize(
        ("key", "given", "told"),
        [
            (
                "input",
                ["a", "b"],
                r'input: got a list; write the rows to a file, .*DataFrame\({"prompt": texts}\)',
            ),
            ("input", (text for text in "ab"), r"input: got a Python generator; write the rows to a file"),
            (
                "input",
                pandas.DataFrame({"a": [1]}),
                r"input: got a Python DataFrame; write the rows to a file, such as df",
            ),
            ("input", {"path": iter([{"a": 1}])}, r"input\.path: got a Python list_iterator; write the rows to a file"),
            ("input", {"path": ["a.jsonl", "b.jsonl"]}, r"input\.path: got a list; write one path: a folder .* or a pattern"),
            ("input", {"rows": ["a", "b"]}, r"input\.rows: unknown key; write the rows to a file"),
            ("prompts", ["a", "b"], r"prompts: unknown key; write the rows to a file"),
            ("columns", ["a", "b"], r"columns: unknown key; did you mean `output\.columns`"),
        ],
    )
    def test_rows_that_a_program_gives_as_they_are(self, key: str, given: object, told: str) -> None:
        assert re.search(told, refusal({**MINIMAL, key: given}))

    def test_mappings_are_as_strict(self) -> None:
        assert refusal({**MINIMAL, "generation": {"n": "4"}}) == (
            'job: generation.n: got the text "4"; accepts a whole number from 1 to 1,000,000 (repeat the row for more), for '
            "example `n: 4`"
        )
        assert "got a Python set; accepts" in refusal({**MINIMAL, "generation": {"temperature": {1}}})
        assert "unknown key" in refusal({**MINIMAL, 3: 4})
        assert r"job: prompt.template: the \b of `\beta` became a backspace" in refusal(
            {**MINIMAL, "prompt": {"template": "\beta"}}
        )

    @settings(max_examples=150, deadline=None)
    @given(st.text(alphabet=st.characters(codec="utf-8"), max_size=60) | st.text("{}[]:,-?&*!|>'\"%@` \n#ab1", max_size=60))
    def test_any_text_is_refused_in_words(self, tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
        path = tmp_path_factory.getbasetemp() / "any.yaml"
        path.write_text(text, encoding="utf-8")
        assert str(path) in refusal(path)


def test_texts_may_begin_with_a_dash_and_hold_tabs(tmp_path: Path) -> None:
    text = 'prompt:\n  template:\n    -a\n  system: "\\ta\\r\\n"\ngeneration: {stop: [-a, "-b", --], bad_words: -x}\n'
    job = Job.load(write(tmp_path, HEADER + text))
    assert (job.prompt.template, job.prompt.system) == ("-a", "\ta\r\n")
    assert (job.generation.stop, job.generation.bad_words) == (("-a", "-b", "--"), ("-x",))


class TestOverrides:
    def test_they_win_over_the_file_and_the_last_wins(self, tmp_path: Path) -> None:
        path = write(tmp_path, HEADER + "generation: {n: 2, seed: 7}\n")
        job = Job.load(path, "generation.n=3", "generation.n=1K", "model.dtype=float32", "output.flush_seconds=2")
        assert (job.generation.n, job.generation.seed, job.model.dtype) == (1024, 7, "float32")

    @pytest.mark.parametrize(
        ("override", "value"),
        [
            ("prompt.template={{ question }}", "{{ question }}"),
            ("prompt.template={% if a %}b{% endif %}", "{% if a %}b{% endif %}"),
            ("prompt.template=Question: {{ q }} a=b", "Question: {{ q }} a=b"),
            ('prompt.template="a\\nb"', "a\nb"),
            ("prompt.template=' x '", " x "),
            ("prompt.template= x ", " x "),
            ("prompt.template='42'", "42"),
            ("prompt.template=null", None),
        ],
    )
    def test_text_values(self, override: str, value: str | None) -> None:
        assert Job.load(MINIMAL, override).prompt.template == value

    def test_lists_sections_and_new_sections(self) -> None:
        job = Job.load(MINIMAL, "generation.stop=[a, '1']", "generation.stop_token_ids=[1K, 2]", "prompt.few_shot.k=2",
                       "prompt.few_shot.path=x", "prompt.few_shot.template=y", "verify={kind: exact, answer: a}",
                       "output.columns=[id]")  # fmt: skip
        assert job.generation.stop == ("a", "1") and job.generation.stop_token_ids == (1024, 2)
        assert job.prompt.few_shot is not None and job.prompt.few_shot.k == 2
        assert job.verify is not None and job.output.columns == ("id",)
        assert Job.load(job.to_dict(), "verify=null").verify is None

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("n=4", "override `n=4`: unknown key; did you mean `generation.n=4`?"),
            ("generation.temp=1", "did you mean `generation.temperature=1`?"),
            ("input.name=main", "did you mean `input.subset=main`?"),
            ("generation.do_sample=true", "unknown key; none is needed: generation.temperature 0 picks"),
            ("gpu_memory_utilization=0.9", "unknown key; none is needed: the KV cache takes what memory is free"),
            ("output.format=jsonl", "unknown key; the output is Parquet; `tokabatch export"),
            ("generation.length_penalty=2", "unknown key; beam search is not supported"),
            ("prompt.gr\udcc3\udcb6\udcc3\udc9fe=4", "override `prompt.größe=4`: unknown key; the keys of prompt are"),
            ("generation.maxtokens=4", "unknown key; did you mean `generation.max_tokens=4`?"),
            ("path=x", "override `path=x`: unknown key; there are `model.path`, `input.path`"),
            ("a.b.c=4", "override `a.b.c=4`: a: unknown key"),
            ("engine.page_size=24", "override `engine.page_size=24`: got the number 24; accepts a power of two >= 1"),
            ("generation.n.x=4", "override `generation.n.x=4`: generation.n: got a mapping; accepts a whole number"),
            ("generation={n: 0}", "override `generation={n: 0}`: generation.n: got the number 0"),
            ("generation.stop=[a", "override `generation.stop=[a`: the value is not valid YAML; close every quote"),
            ("generation.stop={a: 1, a: 2}", "the value is not valid YAML"),
            ("generation.n", "override `generation.n`: write key=value, for example generation.n=4"),
            ("=4", "override `=4`: write key=value"),
            ("generation..n=4", "write key=value"),
            (
                'prompt.template="\\frac"',
                r"the \f of `\frac` became a form feed (U+000C), as in double quotes",
            ),
            ("verify.kind=gsm8k", "override `verify.kind=gsm8k`: verify: kind gsm8k needs `answer`"),
        ],
    )
    def test_refusals_name_the_override(self, tmp_path: Path, override: str, message: str) -> None:
        refused = refusal(write(tmp_path, HEADER + "generation: {n: 2}\n"), override)
        assert message in refused and "job.yaml" not in refused

    def test_file_and_override_problems_come_together(self, tmp_path: Path) -> None:
        refused = refusal(write(tmp_path, HEADER + "engine: {page_size: 3}\n"), "n=4", "generation.n=0", "seed=1")
        assert [line.split(": ")[0].rpartition("/")[2] for line in refused.splitlines()] == [
            "job.yaml:4", "override `n=4`", "override `generation.n=0`", "override `seed=1`",
        ]  # fmt: skip

    @settings(max_examples=150, deadline=None)
    @given(st.text(max_size=30))
    def test_any_override_is_taken_or_refused_in_words(self, text: str) -> None:
        for override in (text, f"generation.stop={text}", f"{text}=1"):
            try:
                Job.load(MINIMAL, override)
            except JobError as error:
                assert "override" in str(error)


class TestGeneration:
    def test_params(self) -> None:
        job = Job.load(MINIMAL, "generation.n=3", "generation.stop=[x]", "generation.logprobs=0")
        assert job.generation.params() == SamplingParams(n=3, stop=("x",), logprobs=0)

    def test_penalties_and_biases(self) -> None:
        given = "{repetition_penalty: 1.1, min_tokens: 2, logit_bias: {7: 3, 5: -1.5}, bad_words: [[4], [8, 9]]}"
        job = Job.load(MINIMAL, f"generation={given}")
        wanted = {"logit_bias": ((5, -1.5), (7, 3.0)), "bad_words": ((4,), (8, 9)), "min_tokens": 2, "repetition_penalty": 1.1}
        assert job.generation.params() == SamplingParams(**wanted) and job.generation.params().penalised
        assert Job.load(job.given()) == job and Job.load(job.to_dict()).generation == job.generation
        # Parquet's maps arrive as pairs, its structs full of nulls.
        for biases in ([(1, 2.0)], {"1": 2.0, "2": None}, {1: 2}):
            params = job.generation.row_params({"logit_bias": biases, "bad_words": [], "frequency_penalty": 0.5})
            assert params == SamplingParams(**wanted | {"logit_bias": ((1, 2.0),), "bad_words": (), "frequency_penalty": 0.5})
        assert not SamplingParams(temperature=0.0, top_k=3).penalised

    def test_min_tokens_is_held_against_the_max_tokens_that_applies(self) -> None:
        generation = GenerationConfig(max_tokens=1000, min_tokens=20)
        assert isinstance(generation.row_params({"min_tokens": 500}), SamplingParams)
        refused = generation.row_params({"max_tokens": 10})
        assert isinstance(refused, RowError)
        assert refused.message.startswith("sampling_params: min_tokens is 20, but max_tokens is 10; lower min_tokens or raise")

    def test_row_params_override_and_nulls_do_not(self) -> None:
        generation = GenerationConfig(n=3, temperature=0.5, top_k=7)
        params = generation.row_params({"temperature": 0, "n": None, "stop": ["a"], "top_k": 0})
        assert params == SamplingParams(n=3, temperature=0.0, stop=("a",))

    @pytest.mark.parametrize(
        ("struct", "message"),
        [
            ({"temperature": -1.0}, "sampling_params.temperature: got the number -1.0; accepts a number from 0 to 1,000,000"),
            ({"temperature": float("nan")}, "got the number nan"),
            ({"n": 0}, "sampling_params.n: got the number 0"),
            ({"top_p": 0.0}, "sampling_params.top_p"),
            ({"max_token": 5}, "sampling_params.max_token: unknown key; did you mean `max_tokens`?"),
            ({"max_completion_tokens": 5}, "max_completion_tokens: unknown key; did you mean `max_tokens`?"),
            ({"num_return_sequences": 5}, "num_return_sequences: unknown key; did you mean `n`?"),
            ({"zzz": 5}, "unknown key; the keys here are n, temperature"),
            ({"n": "3", "seed": 1.5}, "sampling_params.n: got the text"),
        ],
    )
    def test_row_params_refusals(self, struct: dict[str, object], message: str) -> None:
        refused = GenerationConfig().row_params(struct)
        assert isinstance(refused, RowError) and refused.code == "bad_sampling"
        assert message in refused.message and "\n" not in refused.message

    def test_model_defaults_fill_what_the_job_leaves_open(self) -> None:
        job = Job.load(MINIMAL, "generation.temperature=0.2")
        effective, listed = job.generation.with_model_defaults(
            {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "seed": None, "min_p": 7.0, "repetition_penalty": 1.05}
        )
        assert (effective.temperature, effective.top_p, effective.top_k, effective.min_p) == (0.2, 0.9, 20, 0.0)
        sources = {setting.key: (setting.value, setting.source) for setting in listed}
        assert sources["temperature"] == ("0.2", "job")
        assert sources["top_p"] == ("0.9", "generation_config.json")
        assert sources["repetition_penalty"] == ("1.05", "generation_config.json") and effective.repetition_penalty == 1.05
        assert sources["max_tokens"] == ("256", "default") and sources["min_p"] == ("0.0", "default")
        assert list(sources) == list(GenerationConfig.model_fields)


class TestReference:
    def test_every_key_is_described(self) -> None:
        keys = Job.describe_keys()
        assert all(key.description.endswith(".") and key.accepts for key in keys)
        assert {key.name for key in keys if key.default is None} >= {"model.path", "input.path", "output.path"}

    def test_every_example_is_accepted(self, tmp_path: Path) -> None:
        """What a refusal tells people to write must load: provoke each key's refusal and follow it."""
        for key in Job.describe_keys():
            base = {**MINIMAL, "verify": {"kind": "exact", "answer": "a"}, "trace": {"path": "trace.json"}}
            beside = ("prompt.few_shot.path=x", "prompt.few_shot.template=y") if "few_shot" in key.name else ()
            wrong = "[{}]" if key.name.endswith(("_kwargs", "_bias", ".options")) else "{a: 1}"
            advice = re.search(r"for example `(.*)`$", refusal(base, *beside, f"{key.name}={wrong}"))
            assert advice is not None, key.name
            Job.load(base, *beside, *shlex.split(advice[1]))

    def test_verifiers_are_listed_without_importing_them(self) -> None:
        assert {"gsm8k", "exact"} <= set(verifier_names())
        assert not any(name.startswith("_") for name in verifier_names())

    @pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("jobs/*.yaml")), ids=lambda path: path.name)
    def test_the_jobs_of_this_repository_load(self, path: Path) -> None:
        Job.load(path)


@pytest.mark.parametrize("given", [None, 5, b"job.yaml", ["job.yaml"]])
def test_what_is_no_job_is_refused_with_what_is_one(given: object) -> None:
    with pytest.raises(JobError, match="a job is the path of a job file, or a mapping of its sections"):
        Job.load(given)  # pyright: ignore[reportArgumentType]


def test_an_override_is_text() -> None:
    with pytest.raises(JobError, match=r"got a Python dict as an override; write text, for example 'generation\.n=4'"):
        Job.load({}, {"generation.n": 4})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("written", "nested"),
    [
        ({"generation.n": 4}, "generation.n: unknown key; write `generation: {n: …}`"),
        ({"prompt": {"few_shot.k": 4}}, "prompt.few_shot.k: unknown key; write `few_shot: {k: …}`"),
    ],
)
def test_a_dotted_key_in_a_file_is_written_as_sections(written: dict[str, object], nested: str) -> None:
    with pytest.raises(JobError) as caught:
        Job.load(written)
    assert f"job: {nested}" in str(caught.value).splitlines()


def test_bytes_of_an_override() -> None:
    """As Python reads them from the command line where they are no UTF-8, and in a locale of ASCII."""
    job = {"model": {"path": "m"}, "input": {"path": "rows.jsonl"}, "prompt": {"template": "x"}, "output": {"path": "out"}}
    for override in ("output.path=caf\udce9", "output.path=caf\ud800"):
        with pytest.raises(JobError, match="a folder's path"):
            Job.load(job, override)
    assert Job.load(job, "generation.stop=caf\udcc3\udca9").generation.stop == ("café",)
    assert Job.load(job, "generation.stop=café").generation.stop == ("café",)


def test_a_section_decides_what_a_name_means() -> None:
    assert names_elsewhere.why_none(("verify", "timeout")) is None
    assert names_elsewhere.our_name(("verify", "timeout")) == "verify.seconds"
    assert names_elsewhere.why_none(("generation", "timeout"))
    assert "--repair" in str(names_elsewhere.why_none(("repair",)))


def test_names_of_other_tools_lead_to_keys_that_exist() -> None:
    keys = {key.name for key in Job.describe_keys()}
    known = keys | {name.rpartition(".")[2] for name in keys} | set(Job.model_fields)
    assert known.issuperset(names_elsewhere._KEYS.values())  # pyright: ignore[reportPrivateUsage]
    ours = keys | {name.rpartition(".")[2] for name in keys}
    assert not ours & {*names_elsewhere._KEYS, *names_elsewhere._WITHOUT_KEY}  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize(
    ("named", "written"),
    [
        ({"n": 3}, "Job.load('job.yaml', 'generation.n=3')"),
        ({"max_new_tokens": 9, "temp": 0.5}, "Job.load('job.yaml', 'generation.max_tokens=9', 'generation.temperature=0.5')"),
        ({"generation": {"n": 3, "stop": ["\n"]}}, r"""Job.load('job.yaml', 'generation.n=3', 'generation.stop=["\\n"]')"""),
        ({"model_name": "m"}, "Job.load('job.yaml', 'model.path=m')"),
        ({"verify": None}, "Job.load('job.yaml', 'verify=null')"),
    ],
)
def test_keys_as_arguments_are_refused_with_the_overrides_to_write(named: dict[str, object], written: str) -> None:
    with pytest.raises(JobError) as refused:
        Job.load("job.yaml", **named)  # pyright: ignore[reportCallIssue]
    assert str(refused.value) == f"Job.load takes no keys of a job, such as {next(iter(named))}: write {written}"


@pytest.mark.parametrize("word", ["path", "nonsense"])
def test_other_arguments_are_errors_of_the_program(word: str) -> None:
    with pytest.raises(TypeError, match=word):
        Job.load(MINIMAL, **{word: "x"})  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_control_characters_that_are_meant_are_accepted() -> None:
    sections = {"model": {"path": "m"}, "input": {"path": "i.jsonl"}, "output": {"path": "o"}}
    stops = ["\x1e", "\x1b[0m", "\x1bM"]
    for template in ("a\f\nb \x01c", 'a{{ "\\x0c" }}b'):
        job = Job.load({**sections, "prompt": {"template": template}, "generation": {"stop": stops}})
        assert job.prompt.template == template
        assert list(job.generation.stop) == stops
    with pytest.raises(JobError, match="x0c"):
        Job.load({**sections, "prompt": {"template": "a\fb"}})


@pytest.mark.parametrize(
    "given",
    [
        *("verify=gsm8k", "verify=exact", "verify=none", "verify=code", "verify=regex", "verify=./judge.py", "verify=3"),
        *("model=a/b", "model=[a/b]", "input=rows.jsonl", "output=o", "generation=4", "generation=hot"),
        *("engine=cpu", "engine=4", "prompt=question", "errors=0", "errors=stop", "trace=t.json", "trace=5"),
        *("verify={kind: code, allow_code_execution: true, stop: 1}", "prompt.few_shot=5", "prompt.few_shot=examples.jsonl"),
    ],
)
def test_the_example_for_a_section_given_as_a_value_is_a_whole_section(given: str) -> None:
    job = {"model": {"path": "m"}, "input": {"path": "x.jsonl"}, "output": {"path": "o"}}
    with pytest.raises(JobError) as refused:
        Job.load(job, given)
    (written,) = re.findall(r"for example `(.*)`", str(refused.value))
    (override,) = shlex.split(written)
    if override.startswith("verify.stop="):
        override, given = "verify={kind: code, allow_code_execution: true}", override
        Job.load(job, override, given)
    else:
        Job.load(job, override)


def test_a_word_in_place_of_a_prompt_is_taken_for_a_column() -> None:
    with pytest.raises(JobError, match=r'`prompt: \{template: "\{\{ question \}\}"\}`'):
        Job.load({"model": {"path": "m"}, "input": {"path": "x"}, "output": {"path": "o"}, "prompt": "question"})


class _Frame:
    """As a table of pandas looks to a job."""

    columns = ("question",)


@pytest.mark.parametrize(
    ("section", "value", "remedy"),
    [
        ("input", [{"question": "1 + 1"}], r"pandas\.DataFrame\(rows\)\.to_json\(.*`input: \{path: rows\.jsonl\}`"),
        ("input", _Frame(), r"df\.to_json\("),
        ("input", {"path": [{"question": "1 + 1"}, {"question": "2"}]}, r"pandas\.DataFrame\(rows\)\.to_json\("),
        ("input", {"path": _Frame()}, r"df\.to_json\("),
        ("verify", lambda text, row: True, r"`verify: \{kind: \./judge\.py\}`"),
        ("verify", {"kind": len}, r"`verify: \{kind: \./judge\.py\}`"),
    ],
)
def test_rows_and_functions_given_as_they_are_are_refused_with_the_file_to_write(section, value, remedy) -> None:
    job = {"model": {"path": "m"}, "input": {"path": "x"}, "output": {"path": "o"}, section: value}
    with pytest.raises(JobError, match=remedy):
        Job.load(job)


def test_programs_that_construct_or_change_a_job_are_told_what_to_write() -> None:
    job = Job.load({"model": {"path": "m"}, "input": {"path": "x"}, "output": {"path": "o"}})
    with pytest.raises(JobError, match=r"load a changed one, for example Job\.load\(job\.given\(\), 'generation\.n=3'\)"):
        job.generation.n = 3
    assert Job.load(job.given(), "generation.n=3").generation.n == 3
    with pytest.raises(JobError, match=r"write Job\.load\(\.\.\.\)"):
        Job({"model": {"path": "m"}})  # pyright: ignore[reportCallIssue]
    with pytest.raises(JobError, match=r"write Job\.load\(\{'model': \.\.\.\}\) in place of Job\(model=\.\.\.\)"):
        Job(model="jobs/quickstart")  # pyright: ignore[reportArgumentType, reportCallIssue]
    with pytest.raises(JobError, match="is loaded from its file or mapping"):
        Job()  # pyright: ignore[reportCallIssue]
    for other in (copy.copy(job), copy.deepcopy(job), job.model_copy(), pickle.loads(pickle.dumps(job))):
        assert type(other) is Job and other == job and other.given() == job.given()
