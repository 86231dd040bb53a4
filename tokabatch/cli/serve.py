"""The commands of a server, `serve` and `ping`, and `download`."""

from __future__ import annotations

import shlex
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from tokabatch.cli.printing import print_result
from tokabatch.errors import UsageError
from tokabatch.report.labels import coloured


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub name of the model.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Keys under model, prompt, generation, engine and server (`tokabatch keys server`).",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Serve a model over HTTP, as OpenAI's API.

    Completions, chat, log-probabilities of given texts, files and batches. Requests that wait at the same time are ordered by
    shared prefix and join one plan; the same seed gives the same answer under any load. Keys under generation are the
    defaults for what a request leaves out. Needs the extra `serve`: pip install 'tokabatch[serve]'. The first SIGTERM or
    Ctrl-C lets running samples finish (server.grace_seconds), the second ends at once.

    \b
    Examples
      tokabatch serve jobs/quickstart
      tokabatch serve jobs/quickstart server.host=0.0.0.0 server.api_key=secret
      tokabatch serve jobs/quickstart server.port=8080 generation.max_tokens=512
    """
    if model.endswith((".yaml", ".yml")) and Path(model).is_file():
        served = import_module("tokabatch.job").Job.load(model).model.path
        raise UsageError(f"{model}: is a job file; name the model itself: tokabatch serve {shlex.quote(served)}")
    config = import_module("tokabatch.serve.settings").ServiceConfig.load(model, *(overrides or ()))
    early = import_module("tokabatch.precheck")
    early.refuse_without_gpu(config.model, config.engine)
    early.refuse_model(config.model)
    print(f"loading {config.model.path}", file=sys.stderr)
    try:
        server = import_module("tokabatch.serve.server")
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise UsageError(f"a server needs {error.name}; install it with: pip install 'tokabatch[serve]'") from error
    raise typer.Exit(server.serve(config, lambda text: print(coloured(text, sys.stderr), file=sys.stderr)))


def ping(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue.", show_default=False)],
    url: Annotated[str, typer.Option("--url", help="Where the server is.")] = "http://127.0.0.1:8000",
    chat: Annotated[bool, typer.Option("--chat", help="Send it as a user's message.")] = False,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Maximum number of tokens of the answer.")] = 64,
    api_key: Annotated[str | None, typer.Option("--api-key", help="The server's key.", envvar="OPENAI_API_KEY")] = None,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds to wait.")] = 300.0,
) -> None:
    """Send one prompt to a running server and print the answer.

    \b
    Example
      tokabatch ping "Question: what is 3 + 4?" --max-tokens 32
    """
    answer = import_module("tokabatch.serve.ping").ping(
        url if "://" in url else f"http://{url}", prompt, chat=chat, max_tokens=max_tokens, api_key=api_key, timeout=timeout
    )
    print_result(answer)


def download(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hugging Face id, such as Qwen/Qwen3-0.6B.", show_default=False)
    ],
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit.", show_default=False)] = None,
) -> None:
    """Fetch a model from the Hugging Face hub.

    It goes into the hub's cache; the folder it lies in is printed. HF_HOME, HF_TOKEN and HF_HUB_OFFLINE are honoured.

    \b
    Example
      tokabatch download Qwen/Qwen3-0.6B
    """
    print_result(
        str(import_module("tokabatch.model.resolve").resolve_model(model, revision, key="MODEL", revision_key="--revision"))
    )
