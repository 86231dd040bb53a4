"""Why a text cannot be parsed as YAML, in plain English: the line at fault, what is wrong in it, what to write instead.

PyYAML says what its grammar expected where it gave up. From that, the tokens before it and the lines, `explain` recognises what
was probably written wrongly, by a table of causes. Where it recognises none, it quotes PyYAML. Independent of the job's keys.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import yaml

from tokabatch.number_text import counted

_SHOWN, _MOST_CHARACTERS = 80, 2000
_HEADER = re.compile(r"[^#]: *[|>][-+0-9]*\s*(#.*)?$")
"""The first line of a text written with `|` or `>`."""
_PAIR = re.compile(r"\s*(?:- +)?(?P<key>[\w.-]+): +(?P<value>\S.*?)(?: +#.*)?")
_TEMPLATE = re.compile(r"[^\"'#]*?(?P<key>[\w.-]+): +(?P<value>\{[{%].*)")


@dataclass(frozen=True)
class _Fault:
    """Where PyYAML gave up (`row`, `column`), and where the construct began that it could not finish (`start`); from 0."""

    lines: list[str]
    what: str
    row: int
    column: int
    start: tuple[int, int]
    tokens: list[yaml.Token]
    """Those of the whole text, or up to where it cannot be split into tokens."""

    @property
    def line(self) -> str:
        return self.lines[self.row]

    @property
    def last(self) -> yaml.Token | None:
        """The token in front of the fault."""
        before = [each for each in self.tokens if (each.end_mark.line, each.end_mark.column) <= (self.row, self.column)]
        real = [each for each in before if not isinstance(each, yaml.BlockEndToken | yaml.KeyToken)]
        return real[-1] if real else None

    def is_text(self, row: int, column: int) -> bool:
        """Return whether a character belongs to a text in quotes or written with `|` or `>`, or to a comment."""
        for each in self.tokens:
            begin, end = ((mark.line, mark.column) for mark in (each.start_mark, each.end_mark))
            if isinstance(each, yaml.ScalarToken) and each.style and begin <= (row, column) < end:
                return True
        return re.search(r"(^|\s)#", self.lines[row][:column]) is not None

    def above(self, row: int) -> int | None:
        """The next line above `row` that holds more than a comment."""
        return next((each for each in range(row - 1, -1, -1) if not re.fullmatch(r"\s*(#.*)?", self.lines[each])), None)


_BREAKS = {"\x85": "\U0001fffe", "\u2028": "\U0001ffff", "\u2029": "\U0002fffe"}
"""Characters that end a line in YAML 1.1, which PyYAML reads, and are ordinary ones in YAML 1.2 and in editors; each with a
code point that no text has, which stands for it while the text is parsed."""
_CURLY = {"\u201c": '"', "\u201d": '"', "\u201e": '"', "\u2018": "'", "\u2019": "'"}
"""Typographic quotes, and the straight ones that YAML knows."""

_Cause = Callable[[_Fault], tuple[int, str] | None]
"""The row at fault, and what to do about it; None if this is not the cause."""


def explain(error: yaml.YAMLError, text: str) -> tuple[int | None, str]:
    """Return the line at fault, counted from 1 (None if unknown), and a message that shows it."""
    if isinstance(error, yaml.reader.ReaderError):
        row = text.count("\n", 0, error.position)
        begin = text.rfind("\n", 0, error.position) + 1
        line = text[begin:].partition("\n")[0]
        advice = f"it holds a control character, U+{ord(text[error.position]):04X}; remove it"
        return row + 1, _message(line, error.position - begin, advice)
    mark = (error.problem_mark or error.context_mark) if isinstance(error, yaml.MarkedYAMLError) else None
    if not isinstance(error, yaml.MarkedYAMLError) or mark is None:
        return None, f"not valid YAML: {' '.join(str(error).split())}"
    what = " ".join(part for part in (error.context, error.problem) if part)
    lines = [line.expandtabs(1) for line in text.splitlines()] or [""]
    row = min(mark.line, len(lines) - 1)
    column = mark.column if row == mark.line else len(lines[row])
    begun = error.context_mark or mark
    fault = _Fault(lines, what, row, column, (min(begun.line, row), begun.column), list(_tokens(text)))
    # Some patterns take a time that grows with the square of the line's length.
    causes = _CAUSES if len(fault.line) <= _MOST_CHARACTERS else ()
    for pattern, cause in causes:
        if re.search(pattern, what) and (found := cause(fault)) is not None:
            at, advice = found
            where = fault.start[1] if at == fault.start[0] != row else column
            return at + 1, _message(lines[at], where, advice)
    return row + 1, _message(fault.line, column, f"YAML's parser says: {what}")


def hide_breaks(text: str) -> str:
    """Return the text with stand-ins for the characters that YAML 1.1 alone takes for the end of a line."""
    return text.translate(str.maketrans(_BREAKS))


def show_breaks(text: str) -> str:
    """Return the text with those characters again."""
    return text.translate(str.maketrans({stand_in: sign for sign, stand_in in _BREAKS.items()}))


def _tokens(text: str) -> Iterator[yaml.Token]:
    try:
        yield from yaml.scan(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return


def _message(line: str, column: int, advice: str) -> str:
    begin = 0 if len(line) <= _SHOWN else max(0, min(column - _SHOWN // 2, len(line) - _SHOWN))
    shown = _visible(line[begin : begin + _SHOWN].strip(" "))
    cut = ("…" if begin else "", "…" if begin + _SHOWN < len(line) else "")
    if any(stand_in in line for stand_in in _BREAKS.values()):
        advice += "; the character that is shown by its code does not end the line here"
    return f"`{cut[0]}{shown}{cut[1]}` is not valid YAML: {_visible(advice)}"


def _visible(text: str) -> str:
    """The text with the codes of characters that cannot be seen."""
    return "".join(sign if sign.isprintable() else f"<U+{ord(sign):04X}>" for sign in show_breaks(text))


def _width(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def quoted(text: str) -> str:
    """In double quotes, where \\n is a newline, unless that would change the text."""
    return "'" + text.replace("'", "''") + "'" if re.search(r'"|\\[^nt]', text) else f'"{text}"'


def _says(advice: str) -> _Cause:
    return lambda fault: (fault.row, advice)


def _tab(fault: _Fault) -> tuple[int, str] | None:
    where = f"there is a tab in column {fault.column + 1}"
    if fault.line[: fault.column].strip():
        return fault.row, f"{where}; write a space instead, or put the text in quotes"
    return fault.row, f"{where}; indent with spaces instead, two for each level"


def _wide_space(fault: _Fault) -> tuple[int, str] | None:
    """A space that YAML takes for a letter, where it looks like one that separates or indents."""
    here = {fault.start[0], fault.row}
    for row in sorted(here | ({above} if (above := fault.above(fault.row)) is not None else set())):
        # A line above the fault is blamed only if the space stands behind its key or in front of it.
        pattern = r"^\s*([^\S ])|:([^\S ])" if row in here else r"^\s*([^\S ])|^\s*(?:- +)?[\w.-]+:([^\S ])"
        found = re.search(pattern, fault.lines[row].replace("\t", " "))
        sign = found and (found[1] or found[2])
        if found and sign and not fault.is_text(row, found.end() - 1):
            named = f"U+{ord(sign):04X} ({unicodedata.name(sign, 'a space').lower()})"
            return row, f"the space in column {found.end()} is {named}; write an ordinary one"
    return None


def _fence(fault: _Fault) -> tuple[int, str] | None:
    if fault.line.lstrip().startswith("```"):
        return fault.row, "lines of ``` belong to the page that the job was copied from; remove them"
    return None


def _merge(fault: _Fault) -> tuple[int, str] | None:
    rows = [row for row in range(fault.row + 1) if re.match(r"<{7} |={7}$|>{7} ", fault.lines[row])]
    return (rows[0], "version control left both sides of a conflict here; keep one, and remove the marks") if rows else None


def _block_text(fault: _Fault) -> tuple[int, str] | None:
    """A line that ends a text begun with `|`, because it is not indented as far as that."""
    row = fault.start[0] if "simple key" in fault.what else fault.row
    header = next((each for each in range(row - 1, -1, -1) if _HEADER.search(fault.lines[each])), None)
    if header is None:
        return None
    width = _width(fault.lines[header])
    if any(_width(line) <= width for line in fault.lines[header + 1 : row] if line.strip()):
        return None
    own = _width(fault.lines[row])
    if row > header + 1 and (own < width or (own == width and ":" in fault.lines[row])):
        return None
    shown = fault.lines[header].strip()
    least = max(width + 2, max((_width(line) for line in fault.lines[header + 1 : row]), default=0))
    return row, f"the text below `{shown}` ends in front of it; indent every line of that text by {counted(least, 'space')}"


def _template(fault: _Fault) -> tuple[int, str] | None:
    if (match := _TEMPLATE.match(fault.line)) is None or match.start("value") > fault.column:
        return None
    whole = _PAIR.fullmatch(fault.line)
    example = f": `{whole['key']}: {quoted(whole['value'])}`" if whole and whole["key"] == match["key"] else ""
    return fault.row, f"a template needs quotes, because {{ begins a mapping{example}"


def _colon_in_value(fault: _Fault) -> tuple[int, str] | None:
    match = _PAIR.fullmatch(fault.line)
    if match is None or match.start("value") > fault.column:
        return None
    if match["value"][0] in _CURLY:
        straight = "".join(_CURLY.get(sign, sign) for sign in match["value"])
        return fault.row, f"{match['value'][0]} is no quote in YAML; write straight ones: `{match['key']}: {straight}`"
    two = re.fullmatch(r"((?:'[^']*'|\"[^\"]*\"|\S+) +)([a-z_]+: .*)", match["value"])
    if two and two[1][0] in "'\"":
        return fault.row, f"two keys stand on one line; begin `{two[2]}` on a line of its own"
    other = f"; or, if that is a key, begin `{two[2]}` on a line of its own" if two else ""
    advice = f"text that contains a colon and a space needs quotes: `{match['key']}: {quoted(match['value'])}`"
    return fault.row, advice + other


def missing_space(line: str) -> str | None:
    """What to say of an item of a list whose dash has no space behind it; None if the line is none."""
    match = re.match(r" *-(?![\s-])(.*)", line)
    return f"a space is missing behind the dash: write `- {match[1].strip()}`" if match else None


def _dash(fault: _Fault) -> tuple[int, str] | None:
    row = fault.start[0] if "simple key" in fault.what else fault.row
    advice = missing_space(fault.lines[row])
    return None if advice is None else (row, advice)


def _no_colon(fault: _Fault) -> tuple[int, str] | None:
    """A line without a colon and a space, which the next line, or the end of the text, shows to be no value."""
    row = fault.start[0] if "simple key" in fault.what else fault.above(fault.row)
    if row is None:
        return None
    line = fault.lines[row].strip()
    if match := re.fullmatch(r"([A-Za-z_]\w*):(\S.*)", line):
        return row, f"a space is missing behind the colon: write `{match[1]}: {match[2]}`"
    if match := re.fullmatch(r"([A-Za-z_]\w*) *= *(.+)", line):
        return row, f"a key and its value are joined by a colon: write `{match[1]}: {match[2]}`"
    if match := re.fullmatch(r"([A-Za-z_]\w*)(?: +(.+))?", line):
        if match[2] is None:
            return row, f"a colon is missing: write `{match[1]}:`"
        if ":" not in match[2]:
            return row, f"a colon is missing: write `{match[1]}: {match[2]}`"
    return None


def _indentation(fault: _Fault) -> tuple[int, str] | None:
    row, above = fault.row, fault.above(fault.row)
    if above is None or (fault.line[: fault.column].strip(" -") and "mapping values" not in fault.what):
        return None
    width, shown = _width(fault.line), fault.lines[above].strip()[:_SHOWN]
    if width > _width(fault.lines[above]):
        match = _PAIR.fullmatch(fault.lines[above])
        other = f", or write `{match['key']}:` with nothing behind it" if match and match["value"][0] not in "{[\"'" else ""
        return row, f"it is indented further than `{shown}`, which has its value already; begin both in the same column{other}"
    used = sorted({_width(line) for line in fault.lines[:row] if re.match(r" *[\w\"'-]", line)})
    if width in used:
        return None
    counts = " or ".join(map(str, used))
    return row, f"it is indented by {width}, as no line above; keys of one section begin in the same column, here {counts}"


def _top(fault: _Fault) -> tuple[int, str] | None:
    first = next((row for row, line in enumerate(fault.lines) if not re.fullmatch(r"\s*(#.*)?", line)), fault.row)
    above = fault.above(fault.row)
    if re.fullmatch(r"\[[\w.]+\]\s*", fault.lines[first]):
        section = fault.lines[first].strip()[1:-1]
        return first, f"a job is YAML, not TOML; write `{section}:`, and below it each key on an indented line, as `key: value`"
    if above is not None and fault.lines[above].startswith("..."):
        return above, "`...` ends the document; remove it"
    if _width(fault.line) < _width(fault.lines[first]):
        return first, "the first section is indented and later ones are not; begin every section in the first column"
    return fault.row, "the job is complete in the line above; write one mapping, each section with its name in the first column"


def _open_quote(fault: _Fault) -> tuple[int, str] | None:
    row, column = fault.start
    line = fault.lines[row]
    for token in fault.tokens:
        if not isinstance(token, yaml.ScalarToken) or token.style not in ("'", '"'):
            continue
        if token.end_mark.line == row and re.match(r"\w", line[token.end_mark.column :]):
            # The text has taken in a later line up to the quote behind its key; within one text, a key does not stand there.
            if token.start_mark.line < row and re.search(r"\w\s*:\s*.$", line[: token.end_mark.column]):
                return token.start_mark.line, _not_closed(token.style, token.start_mark.column)
            return row, _second_quote(token.style)
    quote = line[column : column + 1]
    return row, _not_closed(quote, column)


def _not_closed(quote: str, column: int) -> str:
    return f"the quote {quote} in column {column + 1} is not closed; add one at the end of the text"


def _second_quote(quote: str) -> str:
    within = "''" if quote == "'" else '\\"'
    return f"a text ends at its second {quote}; write {within} for a {quote} within it"


def _behind_quote(fault: _Fault) -> tuple[int, str] | None:
    """Text that goes on behind a closing quote."""
    last = fault.last
    if not isinstance(last, yaml.ScalarToken) or last.style not in ("'", '"'):
        return None
    quote, start = last.style, last.start_mark
    if start.line != last.end_mark.line:
        where = f"column {start.column + 1} is closed only on line {last.end_mark.line + 1}"
        return start.line, f"the quote {quote} in {where}; close it here"
    if start.line != fault.row:
        return None
    match = _PAIR.fullmatch(fault.line)
    if match is None or match.start("value") != start.column:
        return (fault.row, _second_quote(quote)) if last.end_mark.column == fault.column < len(fault.line) else None
    inner = match["value"][1:-1]
    if not match["value"].endswith(quote):
        return (
            fault.row,
            f"text goes on behind its closing quote; put all of it in quotes: `{match['key']}: {quoted(match['value'])}`",
        )
    mended = inner.replace("'", "''") if quote == "'" else re.sub(r'(?<!\\)"', r'\\"', inner)
    remedy = f"`{match['key']}: {quote}{mended}{quote}`"
    return fault.row, f"{_second_quote(quote)}: {remedy}"


def _braces(fault: _Fault) -> tuple[int, str] | None:
    """A mapping or list in { } or [ ] that is not closed, closed wrongly, or lacks a comma."""
    opened = fault.lines[fault.start[0]][fault.start[1] : fault.start[1] + 1]
    if opened not in ("{", "["):
        return None
    closing = {"{": "}", "[": "]"}[opened]
    here = fault.line[fault.column : fault.column + 1]
    if here in ("}", "]"):
        return (
            fault.row,
            f"{here} in column {fault.column + 1} does not close the {opened} before it; write {closing} there, or remove it",
        )
    begun = (yaml.FlowMappingStartToken, yaml.FlowSequenceStartToken)
    ended = (yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)
    surplus = sum(isinstance(each, begun) - isinstance(each, ended) for each in fault.tokens)
    if surplus > 0:
        return fault.start[0], f"the {opened} in column {fault.start[1] + 1} is not closed; add {closing}"
    before = fault.line[: fault.column]
    if before.rstrip()[-1:] in _CURLY:
        return fault.row, f"{before.rstrip()[-1]} is no quote in YAML; write straight ones"
    if here == ":" and not re.search(r"(^|[\w.)\"'\]}]\s)\s*[\w.-]+$", before):
        return fault.row, 'text that contains a colon and a space needs quotes: "…: …"'
    word = re.search(r"[\w.-]*$", before) if here == ":" else re.match(r"[^\s,}\]]*", fault.line[fault.column :])
    shown = word[0] if word else here
    return fault.row, f"a comma is missing in front of `{shown}`; or, if it is part of a text, quotes around that text"


def _surplus(fault: _Fault) -> tuple[int, str] | None:
    sign = fault.line[fault.column : fault.column + 1]
    return (fault.row, f"{sign} in column {fault.column + 1} closes nothing; remove it") if sign in ("}", "]") else None


def _escape(fault: _Fault) -> tuple[int, str] | None:
    begin = fault.line.rfind("\\", 0, fault.column + 1)
    written = fault.line[begin : begin + 2]
    if begin < 0 or len(written) < 2:
        return None
    return fault.row, f"within double quotes a backslash begins an escape, and {written} is none; write \\{written}"


def _first_sign(fault: _Fault) -> tuple[int, str] | None:
    """Text whose first character has a meaning in YAML."""
    at_start = re.search("alias|anchor|tag|directive", fault.what)
    row, column = fault.start if at_start else (fault.row, fault.column)
    line = fault.lines[row]
    match = _PAIR.fullmatch(line)
    example = f": `{match['key']}: {quoted(match['value'])}`" if match and match.start("value") == column else ""
    return row, f"text that begins with {line[column : column + 1]} needs quotes{example}"


_CAUSES: tuple[tuple[str, _Cause], ...] = (
    (r"'\\t'", _tab),
    ("single document", _says("a line --- begins a second job; keep one job a file, and remove that line")),
    ("", _wide_space),
    ("", _merge),
    ("", _fence),
    ("quoted scalar found unexpected end", _open_quote),
    ("escape", _escape),
    ("simple key|block end", _dash),
    ("block end|simple key|mapping values", _block_text),
    ("block end|that cannot start|expected ',' or|mapping values", _template),
    (
        "block scalar",
        _says("the text of | or > begins on the next line, indented; quote a value that itself begins with | or >"),
    ),
    ("mapping values", _colon_in_value),
    ("mapping values|simple key", _no_colon),
    ("expected '<document start>'", _top),
    ("mapping values|<block mapping start>", _indentation),
    ("found '[?-]'", _says("items of a list (-) and keys cannot stand side by side; give the list a key, and indent it")),
    ("block end|expected ',' or", _behind_quote),
    ("block end", _surplus),
    ("expected ',' or", _braces),
    ("sequence entries", _says("a list on the line of its key is written in brackets, as [a, b]")),
    ("that cannot start|alias|anchor|tag|mapping keys|directive", _first_sign),
)
"""Causes by what PyYAML says, tried in this order."""
