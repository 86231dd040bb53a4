"""What e4m3 costs in accuracy: log-probabilities and greedy choices of one model, rounded and not, on the same texts.

    python -m benchmarks.gpu.accuracy jobs/quickstart jobs/quickstart/problems.jsonl --field question --field answer
    python -m benchmarks.gpu.accuracy MODEL_FOLDER TEXTS.jsonl --field question --limit 200

Every text is read in one forward pass per variant, so that all variants see the same context at every position. Printed for
each: mean and largest difference of the next token's log-probability to bf16's, and the share of positions whose most likely
token is the same; beside them what bf16 itself differs by from float32.

Shape legend: T tokens of a text, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from tokabatch.attention import create_backend
from tokabatch.attention.capturable import Capturable
from tokabatch.attention.upload import Outbox
from tokabatch.engine.replica_sizes import kv_shape
from tokabatch.model.decoder import Decoder, KVPages
from tokabatch.model.families import read_spec
from tokabatch.model.weights import load_decoder
from tokabatch.scheduling.contracts import SlotInit, StepBatch

PAGE = 16


@dataclass(frozen=True, slots=True)
class Variant:
    name: str
    dtype: torch.dtype = torch.bfloat16
    fp8: bool = False
    kv_fp8: bool = False


VARIANTS = (
    Variant("float32", dtype=torch.float32),
    Variant("bf16"),
    Variant("weights and inputs e4m3", fp8=True),
    Variant("cache e4m3", kv_fp8=True),
    Variant("both", fp8=True, kv_fp8=True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--field", action="append", required=True, help="may be given several times: joined by line breaks")
    parser.add_argument("--limit", type=int, default=48)
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    lines = arguments.texts.read_text().splitlines()[: arguments.limit]
    rows = [json.loads(line) for line in lines]
    joined = ["\n".join(row[field] for field in arguments.field) for row in rows]
    texts = [np.array(tokenizer.encode(text).ids, np.int32) for text in joined]
    logprobs = {variant.name: torch.cat(list(read_all(arguments.model, variant, texts))) for variant in VARIANTS}
    chosen = torch.cat([torch.from_numpy(text[1:].astype(np.int64)) for text in texts])
    print(f"{len(texts)} texts, {len(chosen)} predicted tokens")
    print("| variant | against | mean |d logprob| | largest | same greedy token |\n|---|---|---|---|---|")
    for variant in VARIANTS[1:]:
        base = "float32" if variant.name == "bf16" else "bf16"
        mine, other = logprobs[variant.name], logprobs[base]
        difference = (mine - other).gather(1, chosen[:, None]).abs()
        same = (mine.argmax(1) == other.argmax(1)).float().mean()
        print(f"| {variant.name} | {base} | {difference.mean():.4f} | {difference.max():.3f} | {same:.2%} |", flush=True)


@torch.inference_mode()
def read_all(folder: Path, variant: Variant, texts: list[np.ndarray]):
    """log-probabilities [T - 1, V] of each text's continuations, float32 on the host."""
    spec, device = read_spec(folder), torch.device("cuda")
    decoder = load_decoder(folder, spec, variant.dtype, device, fp8=variant.fp8)
    columns = -(-max(map(len, texts)) // PAGE)
    name = "torch_paged" if variant.dtype == torch.float32 else "flashinfer_paged"
    kept = torch.float8_e4m3fn if variant.kv_fp8 else None
    backend = create_backend(name, kv_shape(spec, PAGE, columns, 1, columns), variant.dtype, device, kept)
    for index, text in enumerate(texts):
        outbox = Outbox(device)
        backend.plan(one_prompt(text, index), outbox)
        outbox.send()
        yield forward(decoder, backend, text)[:-1].float().log_softmax(-1).cpu()


def forward(decoder: Decoder, backend, text: np.ndarray) -> torch.Tensor:
    token_T = torch.from_numpy(text).to(decoder.device)
    position_T = torch.arange(len(text), dtype=torch.int32, device=decoder.device)
    pages = KVPages(backend.cache, torch.zeros_like(position_T)) if isinstance(backend, Capturable) else None
    return decoder.forward(token_T, position_T, backend.attend, None, pages)


def one_prompt(text: np.ndarray, index: int) -> StepBatch:
    """A step that reads one text into slot 0."""
    none, pages = np.zeros(0, np.int32), np.arange(-(-len(text) // PAGE), dtype=np.int32)
    zero = np.zeros(1, np.int32)
    wide, one = zero.astype(np.int64), np.ones(1, np.float32)
    return StepBatch(
        index=index,
        inits=SlotInit(zero, wide, zero, wide, one, one, zero, one, zero),
        table_slot=np.zeros_like(pages),
        table_column=pages,
        table_page=pages,
        clear_pages=none,
        copy_src=none,
        copy_dst=none,
        num_prefill_runs=1,
        run_slot=zero,
        run_start=zero,
        run_length=np.array([len(text)], np.int32),
        run_samples=np.ones(1, np.bool_),
        run_skip=zero,
        token_ids=text,
        prefix_levels=(),
    )


if __name__ == "__main__":
    main()
