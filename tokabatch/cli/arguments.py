"""Arguments and options that several commands have, and how a command that is missing some is answered."""

from __future__ import annotations

import re
import shlex
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from tokabatch import __version__
from tokabatch.errors import UsageError

DEVICES = "h200, h100, a100 or l40s, or a variant such as h100-pcie or a100-40gb"

_OVERRIDES_HELP = """key=value, dotted as in the file: generation.n=4 engine.page_size=32 model.dtype=float32. Numbers take
1K (1,024), 1k (1,000), M and G; a list is written as in YAML: 'generation.stop=["\\n"]'."""

_OPTION = re.compile(r"(--?)([a-z_]+(?:[.-][a-z_]+)*)(=.*)?", re.DOTALL)


_SUBJECTS = ("job", "requests", "out", "model", "section", "url")
"""Parameters that say what a command is about; none of them is a secret, as a key of an override may be."""


class Command(TyperCommand):
    """A command that writes a line at once, before anything slow is imported, and that names what is missing or misspelled in
    its arguments, with what to write instead."""

    def invoke(self, ctx: Any) -> Any:
        if not ctx.params.get("quiet"):
            subject = next((f" {ctx.params[name]}" for name in _SUBJECTS if ctx.params.get(name)), "")
            print(f"tokabatch {__version__}: {ctx.info_name}{subject}", file=sys.stderr, flush=True)
        return super().invoke(ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if ctx.resilient_parsing:  # For completion.
            return super().parse_args(ctx, args)
        if any(each.name == "overrides" for each in self.params):
            self._refuse_dashes(ctx, args)
        named = ((each.opts[0], each.metavar or "") for each in self.params if each.required and not args)
        missing = [f"{option} FILE" if option.startswith("-") else metavar for option, metavar in named]
        if missing:
            example = re.search(r"^ *(tokabatch .*?)(?:  |$)", self.help or "", re.MULTILINE)
            remedy = f"; for example `{example[1]}`" if example else ""
            raise UsageError(
                f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing{remedy}. See --help for more"
            )
        return super().parse_args(ctx, args)

    def _refuse_dashes(self, ctx: Any, args: list[str]) -> None:
        """Raise UsageError for a key of the job that is written as an option: `--generation.n=4`, `--temperature 0`, `-n 4`."""
        options = {name for each in self.get_params(ctx) for name in (*each.opts, *each.secondary_opts)}
        for word, following in zip(args, (*args[1:], "-"), strict=False):
            written = _OPTION.fullmatch(word)
            # An option that is begun, such as --gpus for --gpus-per-task, is suggested by the parser.
            if written is None or any(name.startswith(f"{written[1]}{written[2]}") for name in options):
                continue
            keys = [each.name for each in import_module("tokabatch.job").Job.describe_keys()]
            word_of = written[2].replace("-", "_")
            elsewhere = import_module("tokabatch.job.names_elsewhere")
            if reason := elsewhere.why_none(tuple(word_of.split("."))):
                raise UsageError(f"{word}: {reason}")
            word_of = elsewhere.our_name((word_of,))
            keys += [f"server.{name}" for name in import_module("tokabatch.serve.settings").ServerConfig.model_fields]
            named = [key for key in keys if word_of in (key, key.rpartition(".")[2], key.removesuffix(".path"))]
            if named or "." in word_of:
                value = written[3] or ("=VALUE" if following.startswith("-") or "=" in following else f"={following}")
                remedy = shlex.quote(f"{named[0] if named else word_of}{value}")
                raise UsageError(f"{word}: a key of the job is written without dashes: {remedy}")


def _complete_key(incomplete: str) -> list[str]:
    return [f"{key.name}=" for key in import_module("tokabatch.job").Job.describe_keys() if key.name.startswith(incomplete)]


JobArgument = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.", show_default=False)]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help=_OVERRIDES_HELP, show_default=False, autocompletion=_complete_key),
]
OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="The output folder of a run.", show_default=False)]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Delete the run in the output folder and start over.")]
RetryOption = Annotated[bool, typer.Option("--retry-errors", help="Run the error rows of an earlier run again.")]
RepairOption = Annotated[bool, typer.Option("--repair", help="Recompute the samples of damaged or missing files.")]
