"""Arguments and options that several commands have, and how a command line is refused: with what to write instead."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from typer.core import TyperCommand, TyperGroup

from tokabatch import __version__
from tokabatch.errors import UsageError
from tokabatch.report.labels import takes_colour

DEVICES = "h200, h100, a100 or l40s, or a variant such as h100-pcie or a100-40gb"

_OVERRIDES_HELP = """key=value, dotted as in the file: generation.n=4 engine.page_size=32 model.dtype=float32. Numbers take
1K (1,024), 1k (1,000), M and G; a list is written as in YAML: 'generation.stop=["\\n"]'."""

_OPTION = re.compile(r"(--?)([a-z_]+(?:[.-][a-z_]+)*)(=.*)?", re.DOTALL)

_Refused = cast("type[Exception]", typer.BadParameter.__bases__[0])
"""What the parser raises for a command line that it does not take."""

_OPTIONS_ELSEWHERE = (
    (("--dry-run", "--check", "--validate"), "job", "`tokabatch plan JOB.yaml` checks a job without running it"),
    (("--force", "--clean", "--restart"), "--overwrite", "--overwrite starts over"),
    (("-o", "--out", "--output", "--output-file"), "--to", "the file to write is named by --to"),
    (("-o", "--out", "--output"), "job", "the folder to write is a key of the job: output.path=FOLDER"),
    (("--config", "--job", "--file", "-f", "-c"), "job", "the job file is named without an option"),
    (("-i", "--input", "--input-file"), "requests", "the file to read is named without an option"),
    (("-i", "--input", "--input-file"), "job", "the file to read is a key of the job: input.path=FILE"),
    (
        (
            "--partition",
            "--account",
            "--qos",
            "--mem",
            "--constraint",
            "--nodes",
            "--gres",
            "--array",
            "-p",
            "-A",
        ),
        "--sbatch",
        "options of sbatch itself are written as --sbatch partition=gpu",
    ),
    (("--cpu",), "overrides", "the device is a key: engine.device=cpu"),
    (("--cuda", "--gpu"), "overrides", "the device is a key: engine.device=cuda"),
)
"""What other tools call it, a parameter that a command must have for the remedy, and the remedy."""
_COMMANDS_ELSEWHERE = {
    **dict.fromkeys(("validate", "lint", "dry-run", "simulate", "estimate"), "plan JOB.yaml"),
    **dict.fromkeys(("resume", "continue", "start", "generate", "infer", "retry"), "run JOB.yaml"),
    **dict.fromkeys(("ls", "list", "show", "info", "progress", "watch"), "status OUT"),
    **dict.fromkeys(("eval", "evaluate", "judge", "grade"), "score OUT"),
    **dict.fromkeys(("convert", "dump", "cat"), "export OUT --to FILE"),
    **dict.fromkeys(("server", "chat"), "serve MODEL"),
    **dict.fromkeys(("config", "schema", "options"), "keys"),
    **{"run-batch": "batch REQUESTS.jsonl --model MODEL --to RESULTS.jsonl", "version": "--version", "help": "--help"},
}
"""What other tools call it, and how it is written here."""

_SUBJECTS = ("job", "requests", "out", "model", "section", "url")
"""Parameters that say what a command is about; none of them is a secret, as a key of an override may be."""


def _coloured(text: str) -> str:
    """A help text as a terminal shows it: its headings bold, and the names in its lists in colour. The lists come last."""
    if not takes_colour(sys.stdout):
        return text
    text = re.sub(
        r"^(?:Usage|Arguments|Options|Commands)(?=:)|(?<=^  )(?:Examples?|Exit codes)$",
        "\x1b[1m\\g<0>\x1b[0m",
        text,
        flags=re.M,
    )
    said, *lists = re.split(r"^(?=\x1b\[1m(?:Arguments|Options|Commands))", text, flags=re.M)
    return said + "".join(re.sub(r"(?<=^  )\S.*?(?=  |$)", "\x1b[36m\\g<0>\x1b[0m", each, flags=re.M) for each in lists)


_LONG = frozenset({"run", "plan", "batch", "score", "serve"})
"""Commands that take long. The line that the others write at once would be noise in the log of a script."""


class Command(TyperCommand):
    """A command that writes a line at once, before anything slow is imported, and that names what is missing or misspelled in
    its arguments, with what to write instead."""

    def get_help(self, ctx: Any) -> str:
        return _coloured(super().get_help(ctx))

    def invoke(self, ctx: Any) -> Any:
        if not ctx.params.get("quiet") and (ctx.info_name in _LONG or sys.stderr.isatty()):
            subject = next((f" {ctx.params[name]}" for name in _SUBJECTS if ctx.params.get(name)), "")
            print(f"tokabatch {__version__}: {ctx.info_name}{subject}", file=sys.stderr, flush=True)
        return super().invoke(ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if ctx.resilient_parsing:  # For completion.
            return super().parse_args(ctx, args)
        if any(each.name == "overrides" for each in self.params):
            self._refuse_dashes(ctx, args)
        for each in self.params:
            given = sum(word.partition("=")[0] in each.opts for word in args if word.startswith("-"))
            if given > 1 and each.nargs == 1 and not (each.multiple or getattr(each, "is_flag", False)):
                raise UsageError(f"{each.opts[0]} is given twice; give it once: {each.opts[0]} {each.metavar or 'VALUE'}")
        named = ((each.opts[0], each.metavar or "") for each in self.params if each.required and not args)
        missing = [f"{option} FILE" if option.startswith("-") else metavar for option, metavar in named]
        if missing:
            raise UsageError(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing{self._example()}")
        words = list(args)  # The parser empties the list.
        try:
            rest = super().parse_args(ctx, args)
        except _Refused as error:
            extra = re.search(r"unexpected extra argument.*? \((?!s\))(.*)\)", error.format_message())  # type: ignore[attr-defined]
            self._refuse_spread(words, extra[1].split() if extra else ())
            raise UsageError(f"{_message(error, self.get_params(ctx))}{self._example()}") from None
        self._refuse_spread(words, ctx.params.get("overrides") or ())
        return rest

    def _refuse_spread(self, args: Sequence[str], left: Sequence[str]) -> None:
        """Raise UsageError for the value of an option that goes on in a word that is left over: `--columns qid length`."""
        for each in self.params:
            joint = {"NAME,NAME": ",", "KEY=VALUE": "="}.get(each.metavar or "")
            for option, *value in zip(args, args[1:], args[2:], strict=False):
                if joint and option in each.opts and value[1] in left and "=" not in "".join(value):
                    more = takewhile(left.__contains__, args[args.index(option) + 3 :]) if joint == "," else ()
                    written = joint.join(word.strip(",") for word in (*value, *more))
                    separated = "its names are separated by commas" if joint == "," else "takes one word"
                    raise UsageError(f"{option}: {separated}; write {option} {written}")

    def _example(self) -> str:
        example = re.search(r"^ *(tokabatch .*?)(?:  |$)", self.help or "", re.MULTILINE)
        return f"{f'; for example `{example[1]}`' if example else ''}. See --help for more"

    def _refuse_dashes(self, ctx: Any, args: list[str]) -> None:
        """Raise UsageError for a key of the job that is written as an option: `--generation.n=4`, `--temperature 0`, `-n 4`."""
        params = self.get_params(ctx)
        options = {name for each in params for name in (*each.opts, *each.secondary_opts)}
        arguments = {each.name for each in params if each.param_type_name == "argument"} - {"job"}
        for word, following in zip(args, (*args[1:], "-"), strict=False):
            written = _OPTION.fullmatch(word)
            # An option that is begun, such as --gpus for --gpus-per-task, is suggested by the parser.
            if written is None or any(name.startswith(f"{written[1]}{written[2]}") for name in options):
                continue
            if any(
                (needs in arguments or (needs.startswith("-") and needs in options)) and f"{written[1]}{written[2]}" in names
                for names, needs, _ in _OPTIONS_ELSEWHERE
            ):
                # What others call an option or argument of this command: the parser's refusal names it.
                continue
            keys = [each.name for each in import_module("tokabatch.job").Job.describe_keys()]
            word_of = written[2].replace("-", "_")
            elsewhere = import_module("tokabatch.job.names_elsewhere")
            if reason := elsewhere.why_none(tuple(word_of.split("."))):
                raise UsageError(f"{word}: {reason}")
            word_of = elsewhere.our_name((word_of,))
            keys += [f"server.{name}" for name in import_module("tokabatch.serve.settings").ServerConfig.model_fields]
            named = [key for key in keys if word_of in (key, key.rpartition(".")[2], key.removesuffix(".path"))]
            subject = named[0].partition(".")[0] if named else ""
            is_subject = bool(named) and named[0] == f"{subject}.path"
            if is_subject and any(each.name == subject and each.param_type_name == "argument" for each in self.params):
                raise UsageError(f"{word}: the {subject} is named without an option{self._example()}")
            if named or "." in word_of:
                value = written[3] or ("=VALUE" if following.startswith("-") or "=" in following else f"={following}")
                remedy = shlex.quote(f"{named[0] if named else word_of}{value}")
                raise UsageError(f"{word}: a key of the job is written without dashes: {remedy}")


class Group(TyperGroup):
    """The program itself, which names the command that was meant."""

    def get_help(self, ctx: Any) -> str:
        return _coloured(super().get_help(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args:  # Shows the help.
            return super().parse_args(ctx, args)
        try:
            return super().parse_args(ctx, args)
        except _Refused as error:
            where = "; a command comes first, and its options behind it: tokabatch run jobs/quickstart.yaml --quiet"
            raise UsageError(f"{_message(error, self.get_params(ctx), near_ones=False)}{where}") from None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if ctx.resilient_parsing or self.get_command(ctx, name) is not None:
            return super().resolve_command(ctx, args)
        names = [each for each, command in self.commands.items() if not command.hidden]
        if meant := _COMMANDS_ELSEWHERE.get(name.lower()):
            remedy = f"write `tokabatch {meant}`"
        elif name.endswith((".yaml", ".yml")):
            remedy = f"to run that job, write `tokabatch run {shlex.quote(name)}`"
        elif near := get_close_matches(name, names, n=1):
            remedy = f"did you mean `{near[0]}`?"
        else:
            remedy = f"the commands are {', '.join(names)}"
        raise UsageError(f"there is no command {name}; {remedy}")


def _message(error: Any, params: Sequence[Any], *, near_ones: bool = True) -> str:
    """What the parser says, with the option that was meant: one of these parameters if `near_ones`, or what others call it."""
    option = getattr(error, "option_name", None)
    names = [name for each in params for name in each.opts if name.startswith("-")]
    has = {*names, *(each.name for each in params)}
    if option is None and type(error).__name__ == "MissingParameter" and error.param is not None:
        option, value = error.param.opts[0], error.param.metavar or "VALUE"
        return f"{f'{option} {value}' if option.startswith('-') else value} is missing"
    if option is None or option in names:
        return error.format_message().rstrip(".")
    starting = [name for name in names if name.startswith(option) and option.startswith("--")]
    words = {name.lstrip("-"): name for name in names}
    near = starting or [words[word] for word in get_close_matches(option.lstrip("-"), words, n=1, cutoff=0.65)]
    remedy = f"did you mean {near[0]}?" if near else f"the options are {', '.join(names)}" if names else ""
    remedy = remedy if near_ones else ""
    remedy = next((text for options, needs, text in _OPTIONS_ELSEWHERE if option in options and needs in has), remedy)
    return f"there is no option {option}{f'; {remedy}' if remedy else ''}"


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
