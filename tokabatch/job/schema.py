"""The job: everything that a run does, as frozen, strict, nested models. Field descriptions are the reference of the keys.

`Job.load` is the entry point; it raises JobError for whatever is wrong with a job on its own. Whether its files and columns
exist is checked by the readers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import Field, ValidationInfo, field_validator, model_validator

from tokabatch.errors import JobError
from tokabatch.job import fields
from tokabatch.job.generation import SETTINGS, GenerationConfig
from tokabatch.job.keys import Key, KeySection, Section, list_keys, list_sections
from tokabatch.job.keywords import refusing_keys
from tokabatch.job.load import Written, load_model
from tokabatch.job.verify import VerifyConfig


class ModelConfig(Section):
    """The model and its tokenizer."""

    path: fields.ModelPath = Field(description="Hugging Face id or local folder of the model (safetensors).")
    revision: fields.OptionalText = Field(examples=["main"], default=None, description="Branch, tag or commit of a hub model.")
    tokenizer: fields.OptionalModelPath = Field(
        default=None, description="Id or folder of the tokenizer, if not the model's own."
    )
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = Field(
        examples=["bfloat16"],
        default="auto",
        description="Type to compute in; auto is the model's own on a GPU and float32 on a CPU.",
    )
    quantization: Literal["none", "fp8"] = Field(
        default="none", description="fp8: the layers' matrix products in 8 bits (e4m3), weights rounded when loaded; on a GPU."
    )


class InputConfig(Section):
    """The rows to complete."""

    path: fields.InputPath = Field(
        description="JSONL (.gz, .zst) or Parquet: a file, folder, glob or fsspec URL; or hf://datasets/OWNER/NAME."
    )
    subset: fields.OptionalText = Field(
        examples=["main"], default=None, description="Configuration of a hub dataset, such as main."
    )
    split: fields.OptionalText = Field(examples=["test"], default=None, description="Split of a hub dataset, such as test.")
    format: Literal["auto", "rows", "openai"] = Field(
        default="auto", description="openai: each line is a request of an OpenAI batch file; auto: decided by the first line."
    )
    limit: fields.OptionalCount = Field(
        default=None, description="Read only this many rows (or requests of a batch file), from the start."
    )
    id_column: fields.OptionalColumn = Field(
        examples=["task_id"], default=None, description="Column whose values identify rows; null: the row number."
    )


class FewShotConfig(Section):
    """Examples rendered once and put in front of every prompt."""

    path: fields.FilePath = Field(description="File of examples, read as input.path is.")
    k: fields.Count = Field(default=4, description="Number of examples: the first k of the file.")
    template: fields.Template = Field(
        examples=['"Question: {{ question }}\\nAnswer: {{ answer }}\\n\\n"'],
        description="Jinja template of one example, its answer included.",
    )


class PromptConfig(Section):
    """How a row becomes a prompt: at most one of template, messages and token_ids. With none of them, the row's column
    prompt, messages or prompt_token_ids is used."""

    template: fields.OptionalTemplate = Field(
        default=None, description="Sandboxed Jinja over the row's columns; row['my column'] for a name that is not one word."
    )
    system: fields.OptionalTemplate = Field(
        examples=['"You answer in one short sentence."'],
        default=None,
        description="System message, put in front if a chat template is applied.",
    )
    chat: fields.AutoFlag = Field(default="auto", description="Apply the chat template; auto: if there is one.")
    chat_template: fields.OptionalChatTemplate = Field(
        default=None,
        description="Chat template in place of the tokenizer's own: a file, the name of one of its templates, or Jinja text.",
    )
    chat_template_kwargs: fields.TemplateKwargs = Field(
        default={}, description="Variables for the chat template, such as enable_thinking: false."
    )
    messages: fields.MessagesColumn = Field(
        examples=["messages"],
        default=None,
        description="Column of chat messages; a final message of the assistant is continued.",
    )
    token_ids: fields.OptionalColumn = Field(
        examples=["prompt_token_ids"], default=None, description="Column that holds a list of token ids."
    )
    few_shot: FewShotConfig | None = Field(default=None, description="Examples in front of every prompt.")
    continuations: fields.Column = Field(
        examples=["options"],
        default="continuations",
        description="Column of continuations to score: texts or lists of token ids; rows without it are scored as a whole.",
    )
    special_tokens: Literal["text", "allow", "reject"] = Field(
        default="text",
        description="Special tokens spelled out in a row: kept as text, allowed as tokens, or rejected as an error row.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> PromptConfig:
        given = [name for name in ("template", "messages", "token_ids") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given, but a prompt has one source; keep one, remove the rest")
        if self.token_ids is not None:
            for name in ("few_shot", "system"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} cannot be put in front of token_ids; remove {name}, or use template")
            for name in ("chat_template", "chat_template_kwargs"):
                if getattr(self, name):
                    raise ValueError(f"{name} is not used with token_ids, which are taken as they are; remove one of the two")
        if self.chat is False:
            for name in ("system", "messages", "chat_template", "chat_template_kwargs"):
                if getattr(self, name):
                    raise ValueError(f"{name} needs a chat template, but chat is false; remove {name}, or `chat: false`")
        return self


class EngineConfig(Section):
    """How the work is done; no key here changes what is sampled. `auto` values are decided from the device."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Device to compute on; auto: the GPU, if there is one."
    )
    replicas: fields.AutoCount = Field(
        examples=["8"], default="auto", description="Copies of the model, each on its own devices; auto: one per visible GPU."
    )
    tensor: fields.Count = Field(default=1, description="Devices over which each layer of a replica is split.")
    pipeline: fields.Count = Field(default=1, description="Devices over which the layers of a replica are divided.")
    async_tp: fields.AutoFlag = Field(
        default="auto",
        description="With tensor > 1, overlap matrix products with communication in large steps; auto: where it is faster.",
    )
    page_size: fields.PageSize = Field(default=16, description="Tokens per page of the KV cache.")
    kv_cache_tokens: fields.AutoTokens = Field(
        default="auto",
        description="Tokens in the KV cache, the attention's keys and values of earlier tokens; auto: what fits.",
    )
    kv_cache_dtype: Literal["auto", "fp8"] = Field(
        default="auto", description="Type of the KV cache; auto: as computed; fp8: half the memory of 16 bits, on a GPU."
    )
    max_running: fields.AutoCount = Field(
        examples=["256"],
        default="auto",
        description="Maximum number of samples running at once; auto: from the cost of a step.",
    )
    max_step_tokens: fields.AutoCount = Field(
        examples=["4K"], default="auto", description="Maximum number of tokens computed in one step."
    )
    profile: fields.OptionalFile = Field(
        default=None,
        description="Cost model measured by `tokabatch profile`, for max_step_tokens: auto and for predictions.",
    )
    hydragen: fields.AutoFlag = Field(
        default="auto", description="Compute attention over a shared prefix once for all samples that share it."
    )
    hydragen_min_group: fields.AutoGroup = Field(default="auto", description="Minimum number of samples for a shared pass.")
    hydragen_min_prefix: fields.AutoCount = Field(
        default="auto", description="Minimum number of shared tokens for a shared pass."
    )
    queue_depth: fields.AutoCount = Field(
        default="auto", description="Steps in flight; auto: 1 on a CPU, 2 on a GPU, 3 there while few samples run."
    )
    process: fields.AutoFlag = Field(
        default="auto", description="Run the model in a process of its own; auto: on a GPU, or with several replicas."
    )
    hang_seconds: fields.Seconds = Field(
        default=120.0,
        description="A process of the run that makes no progress for this long is killed and replaced.",
    )
    max_restarts: fields.Count = Field(
        default=20, description="Processes of one kind that may fail in a row without a finished sample in between."
    )


FP8_NEEDS = "is fp8, which needs an NVIDIA GPU of the Ada or Hopper generation or later; remove it here"


def fp8_key(model: ModelConfig, engine: EngineConfig) -> str | None:
    """Return the key, of those that are fp8, that messages name."""
    settings = {"model.quantization": model.quantization, "engine.kv_cache_dtype": engine.kv_cache_dtype}
    return next((key for key, value in settings.items() if value == "fp8"), None)


class OutputConfig(Section):
    """Where the completions go, as Parquet."""

    path: fields.FolderPath = Field(description="Folder of the results; it is created.")
    rows_per_shard: fields.Count = Field(
        examples=["10000"], default=50000, description="Maximum number of samples in one Parquet file."
    )
    flush_seconds: fields.Seconds = Field(default=30.0, description="Longest time until a finished sample is on disk.")
    columns: fields.Columns = Field(default="all", description="Input columns to carry over to the output.")
    split_reasoning: fields.Tags = Field(
        default=None,
        description="Add columns reasoning_text and answer_text, and judge only the answer; auto: split at the model's tags.",
    )


class TraceConfig(Section):
    """Record what the device does in a few steps: a Chrome trace, for Perfetto or chrome://tracing. The run pauses for a
    second or two while it is written."""

    path: fields.FilePath = Field(
        examples=["trace.json.gz"], description="File to write, such as trace.json.gz; one that exists is replaced."
    )
    start: fields.Count = Field(examples=["100"], default=50, description="The first step to record; a run's first step is 1.")
    steps: fields.Count = Field(examples=["10"], default=5, description="How many steps to record.")
    replica: fields.Index = Field(
        examples=["1"], default=0, description="Of several replicas, the one to record; the first is 0."
    )


class ErrorsConfig(Section):
    """How a run treats a row that cannot be completed, which always becomes an error row."""

    policy: Literal["continue", "stop"] = Field(default="continue", description="Continue after an error row, or stop the run.")
    max_fraction: fields.Fraction = Field(
        default=0.01, description="Fraction of error samples above which the run exits with 3."
    )


class _Loaded(type(Section)):
    """Makes a call of the class a refusal. Validation, copies and pickles create instances without one."""

    def __call__(cls, *sources: object, **values: object) -> NoReturn:
        written = next(iter(values), "")
        write, call = (f"{{{written!r}: ...}}", f"{written}=...") if written else ("...", "...")
        raise JobError(f"a job is loaded from its file or mapping: write Job.load({write}) in place of Job({call})")


class Job(Section, metaclass=_Loaded):
    """One run, described completely."""

    mode: Literal["generate", "score"] = Field(
        default="generate",
        description="score: sample nothing, compute log-probabilities of each row's continuations or whole text.",
    )
    model: ModelConfig
    input: InputConfig
    prompt: PromptConfig = PromptConfig()
    generation: GenerationConfig = GenerationConfig()
    engine: EngineConfig = EngineConfig()
    output: OutputConfig
    verify: VerifyConfig | None = None
    trace: TraceConfig | None = None
    errors: ErrorsConfig = ErrorsConfig()

    @field_validator("generation", "verify")
    @classmethod
    def _of_mode(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("mode") != "score" or value is None:
            return value
        if isinstance(value, VerifyConfig):
            if value.stop is not None:
                raise ValueError("has `stop`, which has no effect in mode: score, because no samples are generated; remove it")
            return value
        changed = [name for name in SETTINGS if getattr(value, name) != GenerationConfig.model_fields[name].default]
        if useless := [name for name in changed if name != "logprobs"]:
            remove = "remove it" if len(useless) == 1 else "remove them"
            raise ValueError(f"mode: score generates no samples, so these have no effect: {', '.join(useless)}; {remove}")
        if value.logprobs:
            raise ValueError(f"logprobs is {value.logprobs}; mode: score reports given tokens alone: write 0")
        return value

    @model_validator(mode="after")
    def _output_apart(self) -> Job:
        rows, results = Path(self.input.path).absolute(), Path(self.output.path).absolute()
        if rows in results.parents and not any(part[:1] in "._" for part in results.relative_to(rows).parts):
            raise ValueError(
                f"output.path {self.output.path!r} lies in input.path {self.input.path!r}, so the next start would read its "
                "results as rows; choose an output.path outside of that folder"
            )
        return self

    @classmethod
    @refusing_keys(lambda: list_keys(Job), "{job}", source=1)
    def load(cls, source: str | Path | Mapping[str, Any], *overrides: str) -> Job:
        """Read a job file (or a mapping of the same shape) and apply overrides such as `generation.n=4`. Paths inside are
        relative to the working directory. Raises JobError listing every problem found."""
        return load_model(cls, source, overrides)[0]

    @classmethod
    def load_with_places(cls, source: str | Path | Mapping[str, Any], *overrides: str) -> tuple[Job, Written]:
        """Load a job as `load` does; also return where each key was written, for messages."""
        return load_model(cls, source, overrides)

    @classmethod
    def describe_keys(cls) -> tuple[Key, ...]:
        """Return every key of a job file, in order."""
        return tuple(list_keys(cls))

    @classmethod
    def describe_sections(cls) -> tuple[KeySection, ...]:
        """Return the same keys by section."""
        return tuple(list_sections(cls))

    def refuse_sharing(self) -> None:
        """Raise JobError if the job cannot be divided between processes that do not see each other's samples."""
        if self.verify is not None and self.verify.stop is not None:
            raise JobError(
                "verify.stop looks at all samples of a row, and --shared divides them between processes: remove --shared, or "
                "write verify.stop=null"
            )
        if self.errors.policy == "stop":
            raise JobError(
                "errors.policy is stop, and with --shared one process would stop at an error row while the others continue; "
                "write errors.policy=continue, and set errors.max_fraction"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values with every default filled in: the record of a run. A job loaded from it has every key set,
        so a model's own generation defaults no longer apply; `given` returns the form that loads back as the same job."""
        return self.model_dump(mode="json")

    def given(self) -> dict[str, Any]:
        """Return plain JSON values of what the job gives, without defaults: `Job.load(job.given())` is the same job."""
        return self.model_dump(mode="json", exclude_unset=True)
