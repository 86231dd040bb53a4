"""Mistakes of a first hour: each ends in a message that says what to write instead, without a traceback, and writes nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tokabatch import cli, precheck
from tokabatch.precheck import has_no_gpu

ROOT = Path(__file__).parents[2]
Q = "jobs/quickstart.yaml"
JOB = "model: {path: jobs/quickstart}\ninput: {path: jobs/quickstart/problems.jsonl}\n"
REQUEST = '{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "x"}}\n'
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
FILES = {
    "array.jsonl": '[{"question": "a"}]\n',
    "unjudged.yaml": JOB + "output: {path: o}\nverify: {kind: choice, answer: answer}\nprompt: {template: '{{ question }}'}\n",
    "data.pq": "",
    "noend": "",
    "data.csv": "question,answer\na,1\n",
    "data.json": json.dumps([{"question": "a"}]),
    "tabs.yaml": "model:\n\tpath: m\n",
    "escape.yaml": JOB + 'output: {path: o}\nverify: {kind: regex, options: {pattern: "(\\d+)"}}\n',
    "indent.yaml": "model:\n  path: m\n dtype: auto\n",
    "list.yaml": "- model\n",
    "jinja.yaml": "model: {path: m}\ninput: {path: x}\noutput: {path: o}\nprompt:\n  template: {{ question }}\n",
    "twice.yaml": "model: {path: m}\nmodel: {path: n}\ninput: {path: x}\noutput: {path: o}\n",
    "empty.yaml": "",
    "runs/a/manifest.json": "{}",
    "runs/a/data/a.parquet": "",
    "typo.yaml": f"{JOB}prompt: {{chat: false,\n  template: '{{{{ qestion }}}}'}}\noutput: {{path: o}}\n",
    "curly.yaml": f"{JOB}prompt: {{template: '{{{{ a }}'}}\noutput: {{path: o}}\n",
    "long.jsonl": '{"a": 1}\n' * 3000,
    "rows.jsonl": '{"question": "a", "answer": "1"}\n',
    "model/config.json": '{"model_type": "mamba"}',
    "nothing/readme.txt": "",
    "section.yaml": f"{JOB}output: {{path: o}}\ngenerate: {{n: 2}}\n",
    "vllm.yaml": "input: {path: rows.jsonl}\noutput: {path: o}\nmodel_name_or_path: jobs/quickstart\nsampling_params: {n: 2}\n",
    "half.yaml": "model: {path: m}\n",
    "anchor.yaml": f"{JOB}output: &o {{path: o}}\n",
    "documents.yaml": f"{JOB}output: {{path: o}}\n---\na: 1\n",
    "empty.jsonl": "",
    "packed.jsonl.gz": "no gzip",
    "settings/tokenizer_config.json": '{"tokenizer_class": "Qwen2Tokenizer"}',
    "packed/tokenizer.model": "",
    "half/vocab.json": "{}",
    "bare/config.json": (ROOT / "jobs" / "quickstart" / "config.json").read_text(),
    "pickle/config.json": (ROOT / "jobs" / "quickstart" / "config.json").read_text(),
    "pickle/pytorch_model.bin": "",
    "moe/config.json": '{"model_type": "qwen3_moe"}',
    "typo/config.json": '{"model_type": "llamma"}',
    "foreign/data/mine.parquet": "",
    "taken.jsonl.run/data/mine.parquet": "",
    "adapter/adapter_config.json": "{}",
    "gguf/model.Q4_K_M.gguf": "GGUF",
    "pointer.jsonl.gz": POINTER,
    "cloned/config.json": (ROOT / "jobs" / "quickstart" / "config.json").read_text(),
    "cloned/tokenizer.json": "{}",
    "cloned/model.safetensors": POINTER,
    "clone/config.json": POINTER,
    "words/config.json": (ROOT / "jobs" / "quickstart" / "config.json").read_text(),
    "words/tokenizer.json": POINTER,
    "swapped.yaml": "modle: {path: m}\ninput: {path: rows.jsonl}\noutput: {path: o}\n",
    "judge_without.py": "x = 1\n",
    "judge_broken.py": "1 / 0\n",
    "judge_named.py": "from json import loads\n\ndef grade(text, row):\n    return True\n",
    "judge_async.py": "async def also(text, row):\n    return True\n\ndef plain(text, row):\n    return True\n",
    "judge_syntax.py": "def verify(text, row)\n    return True\n",
    "judge.py": "def grade(text, row)\n    return True\n",
    "judge_taken.py": "COLUMNS = {'text': str}\ndef verify(text, row):\n    return True\n",
    "judge_plain.py": "def verify(text, row):\n    return True\n",
    "judge_imports.py": "import sympyx\n",
    "colon.yaml": "model {path: m}\ninput: {path: x}\noutput: {path: o}\ngeneration: {n 4}\n",
    "flat.yaml": "model: qs\ndataset: rows.jsonl\nprompt: '{{ q }}'\nsampling: {n: 2}\n"
    "output: o\ngeneration: hot\nverify: gsm8k\n",
    "place.yaml": "model: {path: m}\ninput: {path: x, template: t}\noutput: {dir: o}\n"
    "generation: {verify: {kind: exact}}\nprompt: {messages: [{role: user, content: x}]}\n",
    "unjudged.jsonl": '{"question": "a", "answer": ["none"], "why": {"a": 1}}\n',
    "weights/config.json": "{}",
    "weights/tokenizer.json": "{}",
    "repository/.git/HEAD": "",
    "repository/code.c": "",
    "project/pyproject.toml": "",
    "notes/notes.md": "",
    "loop.jinja": "{% for m in %}",
    "requests.jsonl": '{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "x"}}\n'
    * 2,
}
MISTAKES = [
    (("run",), "JOB.yaml is missing; for example `tokabatch run jobs/quickstart.yaml`"),
    (("jobs/quickstart.yaml",), r"there is no command jobs/quickstart\.yaml; .* `tokabatch run jobs/quickstart\.yaml`"),
    (("validate", Q), r"there is no command validate; write `tokabatch plan JOB\.yaml`"),
    (("help",), "write `tokabatch --help`"),
    (("verion",), "there is no command verion; the commands are run, batch, "),
    (("statsu", "out"), r"did you mean `status`\?"),
    (("--verbose", "run", Q), "there is no option --verbose; a command comes first, and its options behind it: tokabatch run"),
    (("run", Q, "--dry-run"), r"no option --dry-run; `tokabatch plan JOB\.yaml` checks a job without running it"),
    (("run", Q, "--force"), "no option --force; --overwrite starts over"),
    (("run", "--config", Q), r"the job file is named without an option; for example `tokabatch run jobs/quickstart\.yaml`"),
    (("run", Q, "--quite"), r"no option --quite; did you mean --quiet\?"),
    (("run", "--overwrite"), r"error: JOB\.yaml is missing; for example `tokabatch run jobs/quickstart\.yaml`"),
    (("run", Q, "--lease", "soon"), "'--lease': .*; for example"),
    (("export", "out"), r"error: --to FILE is missing; for example `tokabatch export out/quickstart --to samples\.parquet`"),
    (("export", "out", "-o", "a.csv"), "no option -o; the file to write is named by --to"),
    (("export", "out", "--to", "-", "--limit", "3"), "no option --limit; the options are --to, --nested, --columns, --where"),
    (("run", Q, "other.yaml"), "override `other.yaml`: a command takes one job file"),
    (("plan", "generation.n=4", Q), r"generation\.n=4: is an override, and the job file comes before it: JOB\.yaml gener"),
    (("plan", Q, "promt.x=1"), r"promt: unknown key; did you mean `prompt`\?"),
    (("keys", "top"), r"did you mean `generation\.top_k` or `generation\.top_p`\?"),
    (("report", "out", "--to", "nothing"), r"--to nothing: the page is HTML; name nothing/report\.html"),
    (("status", "out", "out"), r"unexpected extra argument.*; for example `tokabatch status out/quickstart`"),
    (("status", "typo.yaml"), "give the folder that the job names as output.path, here o\n"),
    (("score", "typo.yaml", "verify.kind=exact"), "give the folder that the job names as output.path, here o\n"),
    (("export", "out", "--to", "-", "--sort", "id"), "no option --sort; the options are --to"),
    (("run", Q, "model.path=./wordz"), r"no such folder .*\(did you mean words\?\)\. model\.path must be"),
    (("status", "runs"), "as output.path; the runs below it: runs/a\n"),
    (("report", "runs/a/data"), r"as output.path; did you mean runs/a\?"),
    (("export", "runs", "--to", "a.jsonl"), "as output.path; the runs below it: runs/a\n"),
    (("run", "nope.yaml"), "no such file"),
    (("run", "."), "is a folder; name the job file inside it"),
    (("run", "rows.jsonl"), "is a data file, not a job file; name it as input.path in a job file"),
    (("run", "tabs.yaml"), "indent with spaces instead"),
    (("run", "list.yaml"), "holds a list; a job file is a mapping of sections"),
    (("run", "empty.yaml"), "holds nothing; a job file is a mapping of sections"),
    (("run", "jinja.yaml"), "quote"),
    (("run", "twice.yaml"), "given twice, first on line 1; keep one"),
    (("run", Q, "--generation.n=4"), r"written without dashes: generation\.n=4"),
    (("run", Q, "-n", "4"), r"-n: a key of the job is written without dashes: generation\.n=4\n"),
    (("run", Q, "--max-tokens=20"), r"without dashes: generation\.max_tokens=20\n"),
    (("run", Q, "--tensor-parallel-size", "2"), r"without dashes: engine\.tensor=2\n"),
    (("run", Q, "--output-dir", "o"), r"without dashes: output\.path=o\n"),
    (("run", "vllm.yaml"), r"vllm\.yaml:3: model_name_or_path: .*`model\.path`.*:4: sampling_params: .*`generation`"),
    (("run", Q, "model.lora=adapter"), "adapters .* are not supported; merge the adapter into its model"),
    (("run", Q, "input.path=/no/such/rows.jsonl"), "does not exist; check the path"),
    (("run", Q, "engine.max_num_seqs=8"), r"did you mean `engine\.max_running=8`\?"),
    (("run", Q, "--max-model-len", "2048"), "--max-model-len: none is needed: the context is the model's own"),
    (("run", Q, "sampling_params.n=4"), r"did you mean `generation\.n=4`\?"),
    (("run", Q, "num_fewshot=5"), r"did you mean `prompt\.few_shot\.k=5`\?"),
    (
        ("batch", "requests.jsonl", "--model", "jobs/quickstart", "--to", "taken.jsonl"),
        r"error: the run's folder 'taken\.jsonl\.run' holds 1 file that no run wrote .*\. Choose another --to, or move",
    ),
    (
        ("batch", "requests.jsonl", "--model", "jobs/quickstart", "--to", "r.jsonl", "output.path=foreign"),
        r"output\.path 'foreign' holds 1 file .*\. Choose another output\.path, or move",
    ),
    (("batch", "--input", "rows.jsonl", "--model", "m"), "no option --input; the file to read is named without an option"),
    (("batch", "rows.jsonl", "--model", "m", "--output", "o"), "no option --output; the file to write is named by --to"),
    (("run", Q, "generation.stop_token_ids=[x]"), r"for example `'generation\.stop_token_ids=\[\d+\]'`"),
    (("run", Q, "generation.stop=None"), "generation.stop=None`: None is a text in YAML; write null"),
    (("run", Q, "generation.seed=None"), "generation.seed=None`: None is a text in YAML; write null"),
    (("run", Q, "prompt.system=None"), "None is a text in YAML; write null"),
    (("run", Q, "--output", "out/a b"), r"without dashes: 'output\.path=out/a b'\n"),
    (("serve", "jobs/quickstart", "--port", "80"), r"without dashes: server\.port=80\n"),
    (("run", "jobs/quickstart"), r"is a folder; did you mean jobs/quickstart\.yaml\?"),
    (("run", "jobs/quickstart.yml"), r"did you mean jobs/quickstart\.yaml\?"),
    (("run", Q, "input.path=hf://openai/gsm8k"), "is not a hub dataset; write hf://datasets/OWNER/NAME"),
    (("run", Q, "model.path=https://huggingface.co/Qwen/Qwen3-0.6B"), "is a web address; write Qwen/Qwen3-0.6B\n"),
    (("slurm", Q, "--time", "4h"), "sbatch's format, such as 4:00:00"),
    (("run", Q, "input.path=row.jsonl"), r"does not exist; did you mean rows\.jsonl\?"),
    (("run", Q, "model.path=/no/where"), r": /no/where: no such folder\. model\.path must be"),
    (("run", "escape.yaml"), r"escape\.yaml:4: .* is not valid YAML: within double quotes .* and \\d is none; write \\\\d"),
    (("run", "indent.yaml"), r"not valid YAML: it is indented by 1, as no line above"),
    (("run", Q, "verify=none"), r"or null, for example `'verify=\{kind: exact, answer: answer\}'`"),
    (
        ("run", "flat.yaml"),
        r"for example `model: \{path: qs\}`.*`prompt: \{template: \"\{\{ q \}\}\"\}`.*4: sampling: .*`generation`",
    ),
    (
        ("run", "flat.yaml"),
        r"`output: \{path: o\}`.*got the text hot; .*`generation: \{n: 4\}`.*`verify: \{kind: gsm8k, answer: answer\}`",
    ),
    (("run", "place.yaml"), r"output\.dir: .* `path`\?.*generation\.verify: unknown key; did you mean `verify`\?"),
    (("run", "place.yaml"), r"input\.template: unknown key; did you mean `prompt\.template`\?"),
    (("run", "place.yaml"), r"messages: got a list; accepts a column's name, or null \(messages .* prompt\.system and prompt"),
    (
        ("run", Q, "engine.kv_cache_tokens=64", "generation.max_tokens=10", "input.limit=20"),
        r"kv_cache_tokens is 64, but the shortest sample needs at least \d+ ",
    ),
    (("run", Q, "input.path=openai/gsm8k"), "; a dataset of the hub is written hf://datasets/openai/gsm8k, its split as input"),
    (("run", Q, "input.dataset=openai/gsm8k"), "named by input.path: hf://datasets/openai/gsm8k, its split as input.split"),
    (
        ("run", Q, "input.path=hf://datasets/openai/gsm8k/main"),
        "be reached; check the URL. If main is a subset, write hf://datasets/openai/gsm8k, its split as input.split",
    ),
    (("run", Q, "input.path=sub/rows.jsonl"), "does not exist; relative paths start from the folder you run in"),
    (("run", Q, "-o", "x"), "no option -o; the folder to write is a key of the job: output.path=FOLDER"),
    (("status", "out", "--force"), "no option --force; the options are"),
    (("run", Q, "--gpu"), "no option --gpu; the device is a key: engine.device=cuda"),
    (("report", "out", "--to", "."), "the page is HTML; name report.html"),
    (
        ("run", Q, "output.path=$SCRATCH/out"),
        r"variables such as \$SCRATCH are not replaced here: write the path out",
    ),
    (("run", Q, "model.path=${MODELS}/a"), r"variables such as \$\{MODELS\} are not replaced here"),
    (("run", Q, "prompt.template=escape.yaml"), r"prompt\.template is the text itself, but 'escape\.yaml' is a file; write"),
    (("run", Q, "prompt.template=prompt.jinja"), r"'prompt\.jinja' is the name of a file, and there is none in /"),
    (("run", Q, "verify.stop={after_correct: 1, majority: 2}"), "takes one of the two"),
    (("run", Q, "verify={type: gsm8k, answer: answer}"), r"verify\.type: unknown key; did you mean `kind`\?"),
    (("run", Q, "verify={knd_of: gsm8k}"), r"verify\.knd_of: unknown key; did you mean `kind`\?"),
    (("run", Q, "output_type=generate_until"), "did you mean `mode=generate_until`"),
    (("run", Q, "mode=generate_until"), "got the text generate_until; write generate"),
    (("run", Q, "engine.device=cuda:2"), "write cuda, and start with CUDA_VISIBLE_DEVICES=2"),
    (("run", Q, "doc_to_text=Q"), r"did you mean `prompt\.template=Q`"),
    (("run", Q, "nodes=2"), "it is an option of Slurm; `tokabatch slurm JOB` writes a batch script"),
    (("run", Q, "input.type=json"), r"did you mean `input\.format=json`"),
    (("run", Q, "output.path=s3://bucket/out"), "is a URL, and results are written to a local folder; name one"),
    (("run", Q, "output.path=file:///tmp/out"), "is a URL; write the path itself: /tmp/out"),
    (("run", Q, "input.path=https://huggingface.co/datasets/openai/gsm8k"), "is a web page; write hf://datasets/openai/gsm8k"),
    (
        ("run", Q, "input.path=https://huggingface.co/datasets/a/b/blob/main/c.jsonl"),
        "is a web page; write https://huggingface.co/datasets/a/b/resolve/main/c.jsonl",
    ),
    (("run", Q, "model.path=Qwen/Qwen3-0.6B@main"), "write Qwen/Qwen3-0.6B as model.path, main as model.revision"),
    (("run", Q, "verify.reference=answer"), r"did you mean `verify\.answer=answer`\?"),
    (("run", Q, "generation={max_tokens: 1,000}"), r"generation\.000: unknown key; a comma ends a value between { and }"),
    (("run", Q, "prompt.few_shot.path=data.csv"), r"`prompt\.few_shot\.path=data\.csv`: .*data\.csv is not a format that can"),
    (
        ("run", Q, "prompt.few_shot={path: no.jsonl, template: x}"),
        r"`prompt\.few_shot=.*`: prompt\.few_shot\.path 'no\.jsonl'",
    ),
    (("keys", "temp"), r"did you mean `generation\.temperature`\?"),
    (("keys", "batch_size"), r"did you mean `engine\.max_running`\?"),
    (("keys", "sampling_params"), r"did you mean `generation`\?"),
    (("keys", "do_sample"), r"generation\.temperature 0 picks"),
    (("export", "out", "--to", "a.csv", "--to", "b.csv"), "--to is given twice; give it once: --to FILE"),
    (
        ("export", "out", "--columns=a", "--to", "b.csv", "--columns", "b"),
        "--columns is given twice; give it once: --columns NAM",
    ),
    (("export", "out", "--open"), "no option --open; the options are"),
    (
        ("serve", "--model", "jobs/quickstart"),
        "--model: the model is named without an option; for example `tokabatch serve",
    ),
    (("serve", "jobs/quickstart", "--dtype", "float32"), r"a key of the job is written without dashes: model\.dtype=float32"),
    (
        ("slurm", Q, "--partition", "gpu"),
        "options of sbatch itself are written as --sbatch partition=gpu",
    ),
    (("slurm", Q, "--gpus", "1"), r"no option --gpus; did you mean --gpus-per-task\?"),
    (("ping", "hello", "--url", "localhost:9"), "no server at http://localhost:9: .*tokabatch serve MODEL"),
    (("run", Q, "verify.kind=./judge_async.py"), r"add one, or name another: \./judge_async\.py:plain\."),
    (
        ("run", Q, "input.path=requests.jsonl"),
        r"no column question; .*it is a batch file of OpenAI's API; write",
    ),
    (("run", Q, "input.path=data.pq"), r"rename it to \.parquet"),
    (("run", Q, "input.path=noend"), r"if it holds one JSON object a line, rename it to \.jsonl"),
    (("plan", "unjudged.yaml"), r"unjudged\.yaml:4: verify: no row can be judged, row 0"),
    (("run", Q, "input.path=$HOME/rows.jsonl"), r"variables such as \$HOME are not replaced here: write the path out"),
    (("run", Q, "generation.n", "4"), r"write key=value, for example generation\.n=4"),
    (("run", Q, "n=4"), r"did you mean `generation\.n=4`\?"),
    (("run", Q, "generation.n=four"), r"accepts a whole number.*for example `generation\.n=4`"),
    (("run", Q, "generation.n=0"), "accepts a whole number from 1"),
    (("run", Q, "generation.temperature=-1"), "accepts a number from 0 to 1,000,000"),
    (("run", Q, "generation.top_p=2"), "accepts a number above 0 and at most 1"),
    (("run", Q, "generation.max_tokens=1.5"), "accepts a whole number"),
    (("run", Q, "generation.stop=[a"), "close every quote and bracket"),
    (("run", Q, "engine.device=gpu"), "got the text gpu; write cuda"),
    (("run", Q, "engine.device=cuda:0"), "got the text cuda:0; write cuda"),
    (("run", Q, "engine.device=mps"), "accepts one of auto, cpu, cuda"),
    (("run", Q, "model.dtype=fp16"), "got the text fp16; write float16"),
    (("run", Q, "model.dtype=half"), "got the text half; write float16"),
    (("run", Q, "model.dtype=bf16"), "got the text bf16; write bfloat16"),
    (("run", Q, "model.dtype=FP32"), "got the text FP32; write float32"),
    (("run", Q, "model.dtype=int8"), "accepts one of auto, float64, float32, bfloat16, float16"),
    (("run", Q, "verify.kind=gsm"), r"did you mean `gsm8k`\?"),
    (("run", Q, "verify.answer=reslt"), "answer"),
    (("run", Q, "prompt.messages=messages"), "keep one, remove the rest"),
    (("run", Q, "prompt.template={{ qestion }}"), r"did you mean 'question'\?"),
    (("run", "typo.yaml"), r"typo\.yaml:4: prompt\.template: the input has no column qestion \(did you mean 'question'\?\)"),
    (("run", "curly.yaml"), r"curly\.yaml:3: prompt\.template is not a valid Jinja template: line 1: unexpected '}'"),
    (("run", Q, "input.path=data.csv"), "`input.path=data.csv`: .*pandas|jsonl"),
    (("run", Q, "prompt.few_shot={path:x}"), "write a space behind the colon: `path: x`"),
    (("run", Q, "verify.kind=./judg.py"), r"there is no file judg\.py in /.*; check the path"),
    (("run", Q, "model.path=models/mine"), r"no such folder in /.*not in the hub cache.*tokabatch download"),
    (
        ("run", Q, "input.path=long.jsonl"),
        r"the first 1,024 rows have no column question; their columns are a\. If later rows have it, put",
    ),
    (("run", Q, "input.path=data.json"), "jq|jsonl"),
    (("run", Q, "input.path=nothing"), r"holds no \.jsonl or \.parquet file"),
    (("run", Q, "input.path=rows.json"), r"does not exist"),
    (("run", Q, "input.path=s3://bucket/rows.jsonl"), "`pip install s3fs`"),
    (("run", Q, "input.path=https://example.org/rows.jsonl"), "`pip install aiohttp requests`"),
    (("run", Q, "model.path=model"), "llama.*qwen2.*qwen3|mamba"),
    (("run", Q, "model.path=nothing"), "config.json"),
    (("run", Q, "output.columns=[qestion]"), r"did you mean 'question'\?"),
    (("run", Q, "output.path=rows.jsonl"), "Choose another output.path"),
    (("run", Q, "output.path=/proc/nowhere/out"), r"no folder can be created in /proc \(.*Choose another output.path"),
    (
        ("run", Q, "prompt.template={% if context %}{{ context }}{% endif %}{{ qestion }}"),
        r"no column context, qestion \(did you mean 'question'\?\); .* for an optional column write {{ context \| default",
    ),
    (("run", Q, "model.path=./mine"), r"\./mine: no such folder \(looked in /.*hub id like"),
    (
        ("run", Q, "engine.kv_cache_tokens=8"),
        r"engine\.kv_cache_tokens is 8, but the shortest sample needs at least \d+ .*auto",
    ),
    (("run", Q, "engine.kv_cache_tokens=16", "generation.max_tokens=context"), "sample needs at least 2064 .*write auto"),
    (("run", Q, "engine.queue_depth=4"), r"engine\.queue_depth is 4; .* write 1 to 3 or auto"),
    (
        ("run", Q, "engine.page_size=4096"),
        r"engine\.page_size is 4096, more than the model's context of 2,048 tokens; write 16",
    ),
    (("run", Q, "input.path=nothing", "output.path=nothing/out"), "choose an output.path outside of that folder"),
    (("plan", Q, "--device", "h200"), "belong to --simulate; add it"),
    (("run", "judge_without.py"), r"judge_without\.py: is a program, not a job file; start it with `python judge_without\.py`"),
    (
        ("run", Q, "generation.max_tokens=999999"),
        r"the model's context is .* write `max_tokens: context`, .*, or a number",
    ),
    (("run", Q, "generation.stop_token_ids=999999"), "the model's token ids end at"),
    (("plan", Q, "--simulate", "--device", "b300"), "h200"),
    (("plan", Q, "--simulate", "--lengths", "long"), "write max, MEAN, MEAN:SIGMA"),
    (("keys", "sampling"), r"there is no section or key sampling; did you mean `generation`\?"),
    (("status", "nothing"), "no run has written here; give the folder that the job names as output.path"),
    (("errors", "out"), "no run has written here; give the folder"),
    (("export", "jobs", "--to", "a.jsonl"), "holds no committed samples"),
    (("export", "nothing", "--to", "a.xlsx"), r"ends in \.jsonl, \.csv or \.parquet, or - for standard output"),
    (("export", "nothing", "--to", "a.jsonl", "--where", "right"), "accepts correct, wrong, ok, error or cancelled"),
    (("report", "nothing"), "no run has written here"),
    (("report", "nothing", "--to", "page.pdf"), r"the page is HTML; name page\.html"),
    (("run", "section.yaml"), r"section\.yaml:4: generate: unknown key; did you mean `generation`\?"),
    (("run", "half.yaml"), r"errors:\n.*input\.path: missing; accepts .*output\.path: missing; accepts a folder's path"),
    (("run", "anchor.yaml"), r"anchor\.yaml:3: .*write the value out, or put text that begins with & or \* in quotes"),
    (("run", "documents.yaml"), "keep one job a file, and remove that line"),
    (("run", Q, "generation={n: 4, temprature: 1}"), r"generation\.temprature: unknown key; did you mean `temperature`\?"),
    (("run", Q, "modl.path=x"), r"modl: unknown key; did you mean `model\.path=x`\?"),
    (("run", Q, "model=jobs/quickstart"), "keys path, revision.*, for example `'model={path: jobs/quickstart}'`"),
    (("run", Q, "verify.stop={}"), "for example {after_correct: 1}"),
    (("run", Q, "mode=score"), "these have no effect: n, max_tokens, stop; remove them"),
    (("run", Q, "generation.min_tokens=900"), "lower min_tokens or raise max_tokens"),
    (("run", Q, "input.path=empty.jsonl"), "holds no rows; check the file"),
    (("run", Q, "input.path=packed.jsonl.gz"), "is not compressed, despite its name: it is text .*Fetch it again, or make"),
    (("run", Q, "input.path=pointer.jsonl.gz"), "is a pointer of Git LFS, not the file itself.* git lfs pull"),
    (("run", Q, "model.path=cloned"), "cloned/model.safetensors: is a pointer of Git LFS.*`git lfs pull`"),
    (("run", Q, "model.path=clone"), "clone/config.json: is a pointer of Git LFS.*`git lfs pull`"),
    (("plan", Q, "model.tokenizer=words"), "words/tokenizer.json: is a pointer of Git LFS.*`git lfs pull`"),
    (("run", Q, "model.path=adapter"), r"it is an adapter \(LoRA\), not a whole model.* merge it into its base model"),
    (("run", Q, "model.path=gguf"), "GGUF files are not supported; name the same model in safetensors"),
    (("run", Q, "model.path=gguf/model.Q4_K_M.gguf"), "GGUF files are not supported"),
    (("run", Q, "model.path=jobs/quickstart/model.safetensors"), "is a file; name its folder, jobs/quickstart"),
    (("run", Q, "model.path=jobs"), "jobs: holds no config.json itself; did you mean jobs/quickstart"),
    (
        ("run", Q, "generation=null", "mode=score", "prompt.continuations=answr"),
        r"prompt\.continuations: the input has no column 'answr' \(did you mean 'answer'\?\)",
    ),
    (("run", Q, "input.id_column=ident"), "no column 'ident'; its columns are answer, question"),
    (
        ("run", Q, "prompt.few_shot.path=none.jsonl"),
        "does not exist; relative paths start from the folder you run in, /",
    ),
    (
        ("run", Q, "prompt.few_shot.k=900"),
        r"yaml:\d+: .* holds 4 rows, but few_shot\.k is 900; lower k",
    ),
    (("run", Q, "prompt.template={{ question | uper }}"), r"line 1: No filter named 'uper'; did you mean upper\?\n"),
    (("run", Q, "prompt.template={% include 'x' %}"), "cannot include other files.*; remove that tag"),
    (
        ("run", Q, "prompt={messages: chat}"),
        "needs a chat template.*give one as prompt.chat_template, or write the prompt as prompt.template instead",
    ),
    (
        ("run", Q, "prompt.chat_template=chat.jinja"),
        "there is no file 'chat.jinja', and the tokenizer",
    ),
    (
        ("run", Q, "prompt.chat_template=loop.jinja"),
        "is not a valid Jinja template: line 1: Expected",
    ),
    (
        ("run", Q, "model.path=bare"),
        "Fetch the model again, or convert it to safetensors",
    ),
    (("run", Q, "model.path=pickle"), r"pytorch_model\.bin is a pickle, which could run code"),
    (("run", Q, "model.path=moe"), r"'qwen3_moe' is not supported; supported: llama, qwen2, qwen3\.\n"),
    (("run", Q, "model.path=typo"), "supported: llama, qwen2, qwen3. Did you mean 'llama'?"),
    (("run", Q, "model.tokenizer=bare"), r"holds no tokenizer .*; copy tokenizer\.json into the folder, or name"),
    (("run", Q, "model.tokenizer=settings"), r"holds no tokenizer \(no tokenizer\.json\); copy"),
    (
        ("run", Q, "model.tokenizer=half"),
        r"holds vocab\.json, but neither merges\.txt nor tokenizer\.json; copy tokenizer\.json",
    ),
    (("run", Q, "model.tokenizer=packed"), r"holds tokenizer\.model, but no tokenizer\.json; .*, or install sentencepiece or"),
    (
        ("run", Q, "output.path=foreign"),
        "no run wrote .*Choose another output.path, or move it away",
    ),
    (("run", Q, "output.path=weights"), r"holds a model \(config\.json, tokenizer\.json\), .*; name a folder .* weights/run\n"),
    (
        ("run", Q, "output.path=repository"),
        r"holds a repository \(\.git\), .*; name a folder that is empty or new, such as rep",
    ),
    (("run", Q, "output.path=project", "--overwrite"), r"holds a Python project \(pyproject\.toml\), .*; name a folder that"),
    (
        ("run", Q, "input.path=unjudged.jsonl"),
        r"no row can be judged, row 0 \(.*line 1\) because the reference answer .* holds no number; correct verify or",
    ),
    (
        ("run", Q, "input.path=unjudged.jsonl", "verify={kind: exact, answer: why}"),
        "because the reference answer is an object or binary data, not text, a number or a list of them; correct",
    ),
    (("run", Q, "trace.path=nothing"), "trace.path 'nothing' is a folder; name a file in a folder that exists"),
    (("run", Q, "trace.path=none/trace.json"), "trace.path 'none/trace.json' is in a folder that does not exist; name"),
    (("run", Q, "output.path=~no_such_user/out"), "~no_such_user is no user's folder here; write the path out, or ./~no"),
    (("run", Q, "generation={n=4}"), "generation.n=4: unknown key; inside a mapping, a colon and a space stand .*: `n: 4`"),
    (("run", Q, "generation.n="), r"=`: has no value; write generation\.n=4 or generation\.n=null for the default\n"),
    (
        ("run", Q, "prompt.system="),
        r"write 'prompt\.system=.*' or prompt\.system=null for none\n",
    ),
    (
        ("run", Q, "verify.options.pattern="),
        r"write 'verify\.options\.pattern=\"\"' for empty text or verify\.options\.pattern=null",
    ),
    (("run", Q, "output.path="), r"`output\.path=`: has no value; write output\.path=out/first\n"),
    (("run", Q, "verify="), r"`verify=`: has no value; write 'verify=\{.*\}' or verify=null for none\n"),
    (("run", Q, "generation.m="), r"generation\.m=`: unknown key; the keys of generation are"),
    (("run", Q, "engine.profile=none.json"), r"there is no file 'none\.json' in /.*; make one from a finished run with `tokab"),
    (("run", Q, "prompt.template={{ question is odds }}"), r"No test named 'odds'; did you mean odd\?\n"),
    (("run", Q, "prompt.chat=true"), r"needs a chat template, .*; give one as prompt\.chat_template, or remove prompt\.chat"),
    (("run", Q, "prompt.template={{ context | upper }}"), r"put default\(''\) in front of its other filters, or another"),
    (("run", Q, "verify.kind=./judge_without.py"), r"has no function `verify\(text, row\)`; add one"),
    (("run", Q, "verify.kind=./judge_named.py"), r"add one, or name another: \./judge_named\.py:grade\."),
    (
        ("run", Q, "verify.kind=./judge_broken.py"),
        r"loaded \(ZeroDivisionError in line 1: division by zero\); correct the file",
    ),
    (
        ("run", Q, "verify.kind=./judge_syntax.py"),
        r"cannot be loaded \(SyntaxError: .*\(judge_syntax.py, line 1\)\); correct the file",
    ),
    (("run", Q, "verify.kind=./judge.py:grade"), r"cannot be loaded \(SyntaxError: .*\(judge.py, line 1\)\); correct the file"),
    (
        ("run", Q, "verify.kind=./judge_imports.py"),
        r"No module named 'sympyx'\); the module sympyx that it imports is not there: check the name, put a file of",
    ),
    (("run", Q, "verify.kind=./judge_taken.py"), "COLUMNS of its file names 'text', a column that the output has already"),
    (("run", Q, "verify={kind: regex, options: {pattern: '('}}"), r"options\.pattern '\(' is not a valid regular expression"),
    (("run", Q, "verify.options={letters: abc}", "verify.kind=choice"), "write different capital letters"),
    (("run", Q, "verify.options={normalize: all}", "verify.kind=exact"), "write one of strip, lower, squad"),
    (("run", Q, "verify.kind=./judge_plain.py", "verify.stop={majority: 2}"), "its COLUMNS have no 'extracted'"),
    (("run", "colon.yaml"), r"colon\.yaml:1: model \{path: .*a colon is missing behind model: write `model: \{path: …\}`"),
    (("run", "colon.yaml"), r"generation\.n 4: .*a colon is missing behind n: write `n: 4`"),
    (("run", Q, "generation.best_of=4"), r"not ranked by their probability; generation\.n draws several, and verify"),
    (("export", "out", "--columns", "qid", "length", "--to", "r.csv"), r"separated by commas; write --columns qid,length\n"),
    (("slurm", Q, "--sbatch", "partition", "gpu"), r"--sbatch: takes one word; write --sbatch partition=gpu\n"),
    (
        ("run", Q, "verify.kind=no.module:grade"),
        "there is no module no.module here .*give a file's path",
    ),
    (("run", Q, "verify.options={stric: 1}"), "verify.options names 'stric', which it does not take; it takes none"),
    (("run", Q, "--overwrite", "--retry-errors"), "give one of the two"),
    (("run", Q, "--shared", "--overwrite"), "use --overwrite, --retry-errors or --repair in a run without --shared"),
    (("plan", Q, "engine.device=cuda"), "engine.device is cuda, but .*; write auto or cpu"),
    (("plan", Q, "model.quantization=fp8"), "model.quantization is fp8, which needs an NVIDIA GPU .*; remove it here"),
    (("plan", Q, "engine.kv_cache_dtype=fp8"), "engine.kv_cache_dtype is fp8, which needs an NVIDIA GPU .*; remove it here"),
    (("serve", "jobs/quickstart", "engine.device=cuda"), "engine.device is cuda, but .*; write auto or cpu"),
    (
        ("plan", Q, "generation.max_tokens=9999"),
        "context is 2,048 tokens, prompt included; write `max_tokens: context`, which is what each",
    ),
    (("plan", Q, "engine.process=false", "engine.replicas=2"), "remove engine.process: false"),
    (("export", "jobs", "--to", "none/a.jsonl"), "the folder none does not exist; create it first"),
    (("export", "nothing", "--to", "a.csv", "--format", "xml"), "--format xml: accepts jsonl, csv, parquet or openai"),
    (
        ("export", "nothing", "--to", "a.csv", "--format", "jsonl"),
        "does not end in .jsonl; name a.jsonl, or leave --format out",
    ),
    (("export", "nothing", "--to", "-", "--format", "parquet"), "standard output; name a file: --to samples.parquet"),
    (("export", "nothing", "--to", "a.csv", "--errors", "b"), "--errors belongs to --format openai; add it"),
    (
        ("export", "nothing", "--to", "a.csv", "--nested", "--format", "openai"),
        "leave them out",
    ),
    (("score", "nothing", "verify.kind=exact"), "give the folder that the job names as output.path"),
    (("profile", "nothing", "--to", "p.json"), "give the folder that the job names as output.path"),
    (("serve", Q), r"is a job file; name the model itself: tokabatch serve jobs/quickstart\n"),
    (("serve", "nowhere"), r"nowhere: no such folder \(looked in /.*\)\. model\.path must be a model's folder or a hub id"),
    (("serve", "jobs/quickstart", "server.prt=1"), r"did you mean `server\.port=1`\?"),
    (("serve", "jobs/quickstart", "server.port=99999"), r"accepts a port, from 0 .* for example `server\.port=8000`"),
    (("serve", "jobs/quickstart", "input.path=x"), "the keys here are model, prompt, generation, engine, server"),
    (("ping", "hello", "--url", "http://127.0.0.1:1"), "start one with `tokabatch serve MODEL`"),
    (
        ("batch", "rows.jsonl", "--model", "jobs/quickstart", "--to", "r.jsonl"),
        "is not a batch file: .*completed by `tokabatch run`",
    ),
    (("plan", "swapped.yaml"), r"\nerror: swapped\.yaml:1: modle: unknown key; did you mean `model`\?\n$"),
    (("run", Q, "modle.path=x"), r"did you mean `model\.path=x`\?$"),
    (("batch", "requests.jsonl", "--model", "jobs/quickstart", "--to", "requests.jsonl"), "name a file elsewhere"),
    (("batch", "requests.jsonl", "--model", "jobs/quickstart", "--to", "r.jsonl"), "'a' .*line 1 and .*line 2.*Rename one"),
    (("slurm", "nope.yaml"), r"no such file \(looked in /.*\); job files there: "),
    (
        ("slurm", Q, "--to", "none/x.sbatch"),
        "cannot be written: No such file or directory; name a file in a folder that you may write to",
    ),
    (("download", "./x"), r"no such folder \(looked in /.*\)\. MODEL must be a model's folder or a hub id"),
    (("check", "nothing"), "no run has written here; give the folder that the job names as output.path"),
    (("check", "runs"), "as output.path; the runs below it: runs/a\n"),
    (("plan", Q, "output.path=r.jsonl"), r"name a folder, such as r\. `tokabatch export r --to r\.jsonl` then writes one file"),
    (("keys", "server.prt"), r"did you mean `server\.port`\?"),
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # Read when the package is imported, which may have been before.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.mark.parametrize(("arguments", "remedy"), MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_the_message_says_what_to_do(
    arguments: tuple[str, ...], remedy: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(here.rglob("*"))
    quiet = ("--quiet",) if arguments[0] == "run" and len(arguments) > 1 else ()
    monkeypatch.setattr(sys, "argv", ["tokabatch", *arguments, *quiet])
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, ""), said
    assert "Traceback" not in said.err and re.search(remedy, said.err, re.DOTALL), said.err
    assert sorted(here.rglob("*")) == before


SLOW = ("torch", "transformers", "tokenizers")
LATE = ("engine.process", "kv_cache_tokens=64", "--simulate", "max_tokens=9999", "--to r.jsonl", "long.jsonl")
"""What torch or the whole input decides, or a run alone."""


OF_GPUS = ("engine.device=cuda", "=fp8")
"""What torch decides only where there may be a GPU."""


def test_what_the_job_and_its_first_rows_show_is_refused_before_anything_slow_is_imported(here: Path) -> None:
    late = LATE if has_no_gpu() else (*LATE, *OF_GPUS)
    lines = {arguments: " ".join(arguments) for arguments, _ in MISTAKES}
    early = [each for each, line in lines.items() if not any(key in line for key in late)]
    early += [each for each, line in lines.items() if has_no_gpu() and any(key in line for key in OF_GPUS)]
    program = f"""
import sys
from tokabatch import cli
for arguments in {early!r}:
    sys.argv = ["tokabatch", *arguments]
    try:
        cli.main()
    except SystemExit as ended:
        assert ended.code == 2, arguments
    assert not set({SLOW!r}) & sys.modules.keys(), arguments
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=here, capture_output=True, text=True, check=False)
    assert ended.returncode == 0 and len(early) > 90, ended.stderr


def test_that_there_is_no_gpu_is_said_only_where_there_can_be_none(monkeypatch: pytest.MonkeyPatch) -> None:
    if has_no_gpu():
        assert not torch.cuda.is_available()
    monkeypatch.setattr(precheck, "_CUDA", "libno_such_library.so.1")
    monkeypatch.setattr(precheck, "_DEVICE_FILES", ("no_such_device*",))
    assert has_no_gpu() is (sys.platform == "linux")
    with monkeypatch.context() as loaded:
        loaded.setattr(precheck, "_CUDA", None)  # which loads the program itself
        assert not has_no_gpu()
    with monkeypatch.context() as other:
        other.setattr(sys, "platform", "win32")
        assert not has_no_gpu()
    monkeypatch.setattr(precheck, "_DEVICE_FILES", ("no_such_device*", "nul[l]"))
    assert not has_no_gpu()


def test_a_gpu_of_another_machine_may_be_planned_for_without_one(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("engine.device=cuda", "engine.kv_cache_dtype=fp8", "input.limit=2")
    monkeypatch.setattr(sys, "argv", ["tokabatch", "plan", Q, "--simulate", "--device", "h100", *settings])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None), capsys.readouterr().err
