"""The settings of a server: the sections of a job for model and engine, and a section of its own."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from tokabatch.job import EngineConfig, GenerationConfig, Job, ModelConfig, PromptConfig, fields
from tokabatch.job.load import load_model

Port = Annotated[int, Field(ge=0, le=65535), fields.Accepts("a port, from 0 (any free one) to 65535", "8000")]
Milliseconds = Annotated[float, Field(ge=0, le=1000), fields.Accepts("a number of milliseconds from 0 to 1000", "5")]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=(), validate_default=False)


class ServerConfig(_Section):
    """Keys of `tokabatch serve`, not of a job file: where it listens, and its limits."""

    host: fields.Text = Field(
        examples=["0.0.0.0"], default="127.0.0.1", description="Address to listen on; 0.0.0.0 for all of this machine's."
    )
    port: Port = Field(default=8000, description="Port to listen on; 0: any free port.")
    name: fields.OptionalText = Field(
        examples=["my-model"], default=None, description="Name of the model in requests; null: model.path."
    )
    api_key: fields.OptionalText = Field(
        examples=["secret"], default=None, description="Key that clients must send as `Authorization: Bearer …`; null: none."
    )
    allow_origins: fields.Texts = Field(
        examples=["https://chat.example.org"],
        default=(),
        description="Origins of web pages whose scripts may call the server (CORS); `*` for all, none by default.",
    )
    context: fields.OptionalCount = Field(
        examples=["8192"],
        default=None,
        description="Maximum number of tokens of a prompt and its output; null: the model's context.",
    )
    collect_ms: Milliseconds = Field(
        default=5.0, description="While samples run, requests are collected for this long before they join them."
    )
    max_body: fields.Count = Field(
        examples=["64M"], default=32 << 20, description="Maximum size of a request's body, in bytes."
    )
    max_request_tokens: fields.Count = Field(
        examples=["4M"], default=1 << 20, description="Maximum number of tokens per request: prompts times n times max_tokens."
    )
    max_waiting: fields.Count = Field(
        examples=["1K"],
        default=1 << 16,
        description="Maximum number of samples running and waiting; requests beyond it get status 503.",
    )
    files: fields.OptionalText = Field(
        examples=["batches"],
        default="tokabatch-files",
        description="Folder of /v1/files and /v1/batches, created when the server starts; null: neither is served.",
    )
    max_file: fields.Count = Field(
        examples=["1G"], default=512 << 20, description="Maximum size of an uploaded file, in bytes."
    )
    flush_seconds: fields.Seconds = Field(
        default=10.0, description="Longest time until a finished sample of a batch is on disk."
    )
    grace_seconds: fields.Seconds = Field(
        default=30.0, description="Time that running samples get to finish after the first signal to stop."
    )


class ServiceConfig(_Section):
    """A server, described completely."""

    model: ModelConfig
    prompt: PromptConfig = PromptConfig()
    generation: GenerationConfig = GenerationConfig()
    engine: EngineConfig = EngineConfig()
    server: ServerConfig = ServerConfig()

    @classmethod
    def load(cls, model: str, *overrides: str) -> ServiceConfig:
        """The server of a model, with overrides such as `server.port=8080`. Raises JobError listing every problem found."""
        return load_model(cls, {"model": {"path": model}}, overrides)[0]

    def job(self, rows: str = "-", results: str = "-results", form: str = "rows") -> Job:
        """The job that these sections are of, with `rows` as its input, of the format `form`. As in batch files, a request that
        does not say max_tokens has what the prompt leaves of the context, unless these settings say it."""
        given = self.model_dump(mode="json", exclude_unset=True, exclude={"server"})
        generation = {"max_tokens": "context", **given.get("generation", {})}
        output = {"path": results, "flush_seconds": self.server.flush_seconds}
        return Job.load({**given, "generation": generation, "input": {"path": rows, "format": form}, "output": output})

    @property
    def name(self) -> str:
        """What requests call the model."""
        return self.server.name or self.model.path
