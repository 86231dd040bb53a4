"""The examples in front of every prompt: the first k rows of a file, rendered once.

Each example ends with a newline of its own template, or gets a blank line after it, so that examples never run together.
"""

from __future__ import annotations

from itertools import chain, islice

from tokabatch.errors import InputError, RowError
from tokabatch.input.missing import list_columns
from tokabatch.input.prompts.templates import compile_template
from tokabatch.input.readers import open_path
from tokabatch.job import FewShotConfig

SEPARATOR = "\n\n"


def render_few_shot(config: FewShotConfig) -> str:
    """The joined examples. Raises InputError naming the file and row where one cannot be rendered."""
    template = compile_template(config.template, "prompt.few_shot.template")
    batches = open_path(config.path, "prompt.few_shot.path").batches(template.names)
    rows = list(islice(chain.from_iterable(batch.rows for batch in batches), config.k))
    if len(rows) < config.k:
        raise InputError(f"prompt.few_shot.path {config.path} holds {len(rows)} rows, but few_shot.k is {config.k}; lower k")
    examples: list[str] = []
    for row in rows:
        text = row.error or template.render(row.columns or {})
        if isinstance(text, RowError):
            columns = f" (the row has the columns {list_columns(row.columns)})" if row.columns is not None else ""
            raise InputError(f"prompt.few_shot.path {config.path}, row {row.index}: {text.message}{columns}")
        examples.append(text if text.endswith("\n") else text + SEPARATOR)
    return "".join(examples)
