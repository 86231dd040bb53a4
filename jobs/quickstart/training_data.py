"""From problems to tokens: the tokenizer and the rows that the model trains on.

Contract: a row is `<|begin|>` and as many worked problems as fit into `length` tokens, in the form of the job's prompt
(`Question: ...\\nAnswer: ...`, a blank line between two), so that a few-shot header is what the model has always seen. Now and
then a document ends with `<|end|>` and the next begins within the row. This module knows no model and no device.
"""

from __future__ import annotations

import random
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from problem_generator import Problem, problems, training_problems
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
VOCAB_SIZE = 1280
ROWS_PER_BLOCK = 512
END_RATE = 0.1

# Each digit on its own; ` = ` whole, so that equations are short; a word with the space before it, a line end with its stop.
PIECES = r" [-+*/=] |\d| ?\p{L}+| ?[^\s\p{L}\d]+[\r\n]*|[\r\n]+|\s"


def document(problem: Problem) -> str:
    return f"Question: {problem.question}\nAnswer: {problem.answer}"


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of the problems' own language."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BEGIN, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [document(problem) + "\n\n" for problem in islice(problems("tokenizer"), 20_000)]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        padding_side="left",
    )


def make_rows(tokenizer: Path, num_rows: int, length: int, excluded: frozenset[str], processes: int) -> npt.NDArray[np.int16]:
    """Token rows, shape [num_rows, length]; equal arguments give equal rows, whatever `processes` is."""
    blocks = range(-(-num_rows // ROWS_PER_BLOCK))
    work = partial(_make_block, str(tokenizer), length, excluded)
    with ProcessPoolExecutor(processes) as pool:
        return np.concatenate(list(pool.map(work, blocks)))[:num_rows]


def _make_block(tokenizer_file: str, length: int, excluded: frozenset[str], block: int) -> npt.NDArray[np.int16]:
    tokenizer = Tokenizer.from_file(tokenizer_file)
    begin, end = tokenizer.token_to_id(BEGIN), tokenizer.token_to_id(END)
    rng = random.Random(f"rows-{block}")
    rows: list[list[int]] = []
    row = [begin]
    some_problems = training_problems(block, 1 << 62, excluded)
    while len(rows) < ROWS_PER_BLOCK:
        texts = [document(problem) + "\n\n" for problem in islice(some_problems, 1000)]
        for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
            tokens = encoding.ids
            if rng.random() < END_RATE:
                tokens[-1:] = [end, begin]
            row += tokens
            if len(row) >= length:
                rows.append(row[:length])
                row = [begin]
    return np.array(rows[:ROWS_PER_BLOCK], dtype=np.int16)
