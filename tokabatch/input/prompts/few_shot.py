"""The examples in front of every prompt: the first k rows of a file, rendered once.

Each example ends with its template's own newline, or is followed by a blank line, so that examples never run together.
"""

from __future__ import annotations

from tokabatch.errors import InputError, RowError
from tokabatch.input.prompts.templates import compile_template
from tokabatch.input.readers import open_path
from tokabatch.input.rows import Row, RowPlaces
from tokabatch.number_text import counted

SEPARATOR = "\n\n"


def render_few_shot(path: str, k: int, template: str) -> str:
    """Return the joined examples: the first `k` rows of `path`. Raises InputError naming the file and the row that cannot be
    rendered."""
    compiled = compile_template(template, "prompt.few_shot.template")
    rows: list[Row] = []
    begins: list[tuple[int, str, int]] = []
    try:
        for batch in open_path(path, "prompt.few_shot.path").batches(compiled.names):
            rows += batch.rows[: k - len(rows)]
            begins += batch.begins
            if len(rows) == k:
                break
    except InputError as error:
        if "prompt.few_shot.path" in str(error):
            raise
        raise InputError(f"prompt.few_shot.path: {error}") from error
    if len(rows) < k:
        raise InputError(f"prompt.few_shot.path {path} holds {counted(len(rows), 'row')}, but few_shot.k is {k}; lower k")
    examples: list[str] = []
    for row in rows:
        text = row.error or compiled.render(row.columns or {})
        if isinstance(text, RowError):
            raise InputError(f"prompt.few_shot.path {path}, {RowPlaces(begins).name(row.index)}: {text.message}")
        examples.append(text if text.endswith("\n") else text + SEPARATOR)
    return "".join(examples)
