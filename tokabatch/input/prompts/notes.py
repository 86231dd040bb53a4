"""Notes on prompts that may not be what their author intended: all alike, with chat markup twice or as plain text, with a
backslash and a letter in place of a newline, or with few-shot examples that show no answers or are input rows themselves."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from tokabatch.input.missing import list_columns
from tokabatch.input.prompts.columns import PROMPT
from tokabatch.input.prompts.templates import compile_template
from tokabatch.input.readers import list_local_files
from tokabatch.input.rows import NO_PLACES, RowPlaces
from tokabatch.job import FewShotConfig, GenerationConfig, InputConfig, Job, PromptConfig
from tokabatch.job.keys import accepts_of
from tokabatch.number_text import first_counted

_PLAIN_NAMES = frozenset(("n", "seed", "stop"))
"""Settings with names that ordinary data columns may have."""
_TAGS = re.compile(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}", re.DOTALL)
_LATEX = (
    "abla atural cong e earrow eg eq ewcommand ewline exists geq i leq mid oindent olimits onumber ormalsize ot otin parallel "
    "prec rightarrow leftarrow sim subseteq succ supseteq u warrow Leftarrow Rightarrow"
)
"""Commands of LaTeX that begin with `n`, without it."""
_WRITTEN_NEWLINE = re.compile(rf"\\n(?!(?:{'|'.join(_LATEX.split())})(?![a-z]))")
"""A backslash and `n`, unless they begin a command of LaTeX."""
_CUT_COMMANDS = {
    "\t": ("t", "a tab", "ext[a-z]* heta herefore ilde imes au o riangle[a-z]*"),
    "\r": ("r", "a carriage return", "angle ceil floor ho ight[a-z]*"),
    "\n": ("n", "a newline", "abla earrow eq ewcommand ewline geq leq otin subseteq"),
    "\u2028": ("L", "the character U+2028", "ambda eft[a-z]* ong[a-z]*"),
    "\u2029": ("P", "the character U+2029", "hi i r si"),
}
"""What a backslash and a letter become in double quotes: the character, its letter, its name, and the rest of each command of
LaTeX that is cut off so. Those whose rest is a word, as of `\\tan`, are left out."""
_CUT_COMMAND = re.compile(
    "|".join(f"{sign}(?:{'|'.join(rests.split())})(?![A-Za-z])" for sign, (_, _, rests) in _CUT_COMMANDS.items())
)
SINGLE_BRACES = re.compile(r"(?<![{$\\])\{ ?([A-Za-z_][A-Za-z0-9_]*) ?\}(?!\})")


@dataclass
class Spelled:
    """The number of rows that spell special tokens, and the first such row with its token."""

    rows: int = 0
    first: tuple[int, str] | None = None

    def note(self, row: int, text: str) -> None:
        self.rows += 1
        self.first = self.first or (row, text)


def describe_prompts(
    config: PromptConfig,
    *,
    rows: int,
    spelled: Spelled,
    chat: bool,
    columns: Collection[str],
    read: Collection[str],
    special_texts: Collection[str],
    places: RowPlaces = NO_PLACES,
) -> tuple[str, ...]:
    """Return the notes. `chat`: texts go through the chat template; `columns` are those of the input, which has `rows` rows;
    `read` are the columns that prompts and settings are made of."""
    return (
        *_describe_settings(columns, read),
        *_describe_templates(config, rows, columns),
        *_describe_examples(config),
        *_describe_markup(config, spelled, chat, special_texts, places),
    )


def _describe_settings(columns: Collection[str], read: Collection[str]) -> Iterator[str]:
    """Note columns that look like settings of a row, but are not."""
    names = sorted((set(columns) & GenerationConfig.model_fields.keys()) - set(read) - _PLAIN_NAMES)
    if names:
        yield (
            f"warning: not settings of their rows, and not used: {', '.join(names)}. A row's settings are a mapping in the "
            f'column sampling_params: {{"{names[0]}": ...}}'
        )


def _describe_templates(config: PromptConfig, rows: int, columns: Collection[str]) -> Iterator[str]:
    """Note templates that name no column, and columns in single braces."""
    few_shot = config.few_shot
    templates = {"template": config.template, "system": config.system, "few_shot.template": few_shot and few_shot.template}
    for key, source in templates.items():
        if source is None:
            continue
        if _WRITTEN_NEWLINE.search(_TAGS.sub("", source)):
            yield (
                f"warning: prompt.{key} holds a backslash and 'n', as YAML's single quotes and the command line keep them; "
                'if a newline is meant, put the template in double quotes: "...\\n..." (on a command line, '
                f"'prompt.{key}=\"...\\n...\"')"
            )
        if cut := _CUT_COMMAND.search(source):
            letter, sign, _ = _CUT_COMMANDS[cut[0][0]]
            yield (
                f"warning: prompt.{key} holds {sign} in front of {cut[0][1:]!r}, as \\{letter}{cut[0][1:]} becomes in double "
                "quotes; if that command is meant, put the template in single quotes or below a block `|`"
            )
        alike = {"template": rows, "few_shot.template": few_shot.k if few_shot else 0}.get(key, 0)
        constant = key in ("template", "few_shot.template") and not compile_template(source, f"prompt.{key}").names
        found = dict.fromkeys(SINGLE_BRACES.findall(source))
        remedy = "; ".join(f"write {{{{ {name} }}}} for {{{name}}}" for name in found if constant or name in columns)
        if constant and (remedy or alike > 1):
            what = "examples" if key != "template" else "prompts"
            so = f", so all {alike:,} {what} are alike" if alike > 1 else ""
            remedy = remedy or f"write a column as {{{{ name }}}}; there are {list_columns(columns)}"
            yield f"warning: prompt.{key} names no column{so}; {remedy}"
        elif remedy:
            yield f"warning: prompt.{key} has names of columns in single braces, which are plain text; {remedy}"


def _describe_examples(config: PromptConfig) -> Iterator[str]:
    """Note few-shot examples that show no more of their rows than the prompts do of theirs."""
    if config.few_shot is None:
        return
    shown = compile_template(config.few_shot.template, "prompt.few_shot.template").names
    asked = compile_template(config.template, "prompt.template").names if config.template else frozenset((PROMPT,))
    if shown and shown <= asked:
        yield (
            f"warning: prompt.few_shot.template shows no column that a prompt does not ({', '.join(sorted(shown))}), so the "
            "examples may lack their answers; an answer is written like any column, as in "
            f"{accepts_of(FewShotConfig.model_fields['template']).example}"
        )


def describe_answer(job: Job) -> tuple[str, ...]:
    """Return a note if prompts show the reference answer that their samples are judged by."""
    answer = job.verify.answer if job.verify else None
    templates = {"prompt.template": job.prompt.template, "prompt.system": job.prompt.system}
    shows = [key for key, source in templates.items() if source and answer in compile_template(source, key).names]
    if not shows:
        return ()
    return (
        f"warning: {shows[0]} uses the column {answer!r}, the reference answer that samples are judged by (verify.answer): a "
        "model can copy what its prompt shows. Unless that is the task, leave it out of the prompt, or correct verify.answer",
    )


def describe_unscored(job: Job) -> tuple[str, ...]:
    """Return a note if the job names continuations, but scores none."""
    given = job.prompt.continuations
    if job.mode == "score" or given == PromptConfig.model_fields["continuations"].default:
        return ()
    return (
        f"warning: prompt.continuations is {given!r}, which has no effect without `mode: score`: samples are drawn, none is "
        "scored",
    )


def describe_shots(job: Job) -> tuple[str, ...]:
    """Return a note if few-shot examples are rows of the input, so that these see their own answers."""
    few_shot, files = job.prompt.few_shot, list_local_files(job.input)
    if few_shot is None or not files:
        return ()
    shots = list_local_files(InputConfig(path=few_shot.path)) or ()
    if not shots or shots[0].resolve() not in {file.resolve() for file in files}:
        return ()
    return (
        f"warning: prompt.few_shot.path {few_shot.path} is input, too: its {first_counted(few_shot.k, 'row')} "
        "(prompt.few_shot.k) are completed behind examples that hold their own answers; keep the examples in a file of their "
        "own",
    )


def _describe_markup(
    config: PromptConfig, spelled: Spelled, chat: bool, special_texts: Collection[str], places: RowPlaces
) -> Iterator[str]:
    """Note a template that writes chat markup although a chat template applies, and rows that contain special tokens."""
    written = next((text for text in sorted(special_texts) if config.template and text and text in config.template), None)
    if chat and written:
        yield (
            f"warning: prompt.template writes the special token {written!r} itself, and its text goes through the chat "
            "template as well; write prompt.chat: false if it holds the whole conversation"
        )
    if spelled.first is None:
        return
    row, text = spelled.first
    found = (
        f"warning: rows that spell special tokens: {spelled.rows:,} ({places.line(row) or f'row {row}'}: {text!r}), taken as"
    )
    if config.special_tokens == "text":
        whole = " and prompt.chat: false" if chat and not config.messages else ""
        yield f"{found} plain text; if they hold chat markup already, write prompt.special_tokens: allow{whole}"
    else:
        yield f"{found} tokens, and put into the chat template; if they hold chat markup already, write prompt.chat: false"
