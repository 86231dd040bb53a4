"""How long the plan order of a dataset takes, and the memory it needs.

    python -m benchmarks.planning --prompts 1000000 --tokens 200
    python -m benchmarks.planning --prompts 10000000 --tokens 12

The prompts are a mix as datasets have it, in random order: four fifths begin with one of 64 headers of half their
length, a tenth repeats one of a few prompts whole, a tenth is random throughout. The token file is written first, to a
temporary folder, and mapped into memory, as in a run. Peak memory counts the mapped pages.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tokabatch.arrays import Int32
from tokabatch.input.prompt_order import measure_sharing, order_prompts

_VOCABULARY = 32_000
_HEADERS = 64
_CHUNK = 50_000


def write_prompts(path: Path, num_prompts: int, num_tokens: int, seed: int) -> None:
    """Write the mix described above, `num_prompts` x `num_tokens` int32, a chunk at a time."""
    random = np.random.default_rng(seed)
    headers = random.integers(0, _VOCABULARY, (_HEADERS, num_tokens // 2), dtype=np.int32)
    earlier = random.integers(0, _VOCABULARY, (max(num_prompts // 50, 1), num_tokens), dtype=np.int32)
    with path.open("wb") as file:
        for begin in range(0, num_prompts, _CHUNK):
            size = min(_CHUNK, num_prompts - begin)
            prompts = random.integers(0, _VOCABULARY, (size, num_tokens), dtype=np.int32)
            kind = random.random(size)
            with_header = kind < 0.8
            prompts[with_header, : num_tokens // 2] = headers[random.integers(0, _HEADERS, int(with_header.sum()))]
            repeats = kind > 0.9
            prompts[repeats] = earlier[random.integers(0, len(earlier), int(repeats.sum()))]
            file.write(prompts.tobytes())


def peak_bytes() -> int:
    """The largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=200, help="length of each prompt")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    num_prompts, num_tokens = options.prompts, options.tokens
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.int32"
        write_prompts(path, num_prompts, num_tokens, options.seed)
        tokens: Int32 = np.memmap(path, dtype=np.int32, mode="r")
        start = np.arange(num_prompts, dtype=np.int64) * num_tokens
        length = np.full(num_prompts, num_tokens, dtype=np.int32)
        before = peak_bytes()
        clock = time.perf_counter()
        order = order_prompts(tokens, start, length)
        seconds = time.perf_counter() - clock
        sharing = measure_sharing(length[order.permutation], order.lcp, np.ones(num_prompts, dtype=np.int64))
    print(f"prompts {num_prompts:,} x {num_tokens} tokens ({num_prompts * num_tokens * 4 / 1e9:.2f} GB of token ids)")
    print(f"order and LCPs  {seconds:.2f} s")
    print(f"peak memory     {peak_bytes() / 1e9:.2f} GB (before ordering {before / 1e9:.2f} GB)")
    print(f"prefix tree     {sharing.unique_tokens:,} of {sharing.total_tokens:,} tokens are unique")


if __name__ == "__main__":
    main()
