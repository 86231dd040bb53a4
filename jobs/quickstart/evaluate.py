"""pass@k of a checkpoint on the held-out problems, measured with transformers alone.

Contract: samples the prompt of `jobs/quickstart.yaml` (the few-shot header, then the question) and counts a sample as correct
when it ends in `#### N` with the problem's N. It shares no code with tokabatch, so it can check tokabatch's own figure.

    python jobs/quickstart/evaluate.py --model jobs/quickstart
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from problem_generator import Problem, held_out, job_problems, shots
from torch import Tensor
from training_data import document
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

MAX_TOKENS = 160
RESULT = re.compile(r"#### (\d+)\s*$")


@dataclass(frozen=True)
class Measured:
    """How many of its `num_samples` samples each problem got right, and what the samples looked like."""

    problems: tuple[Problem, ...]
    num_correct: tuple[int, ...]
    num_samples: int
    num_tokens: int
    finished: float
    """The share of samples that stopped by themselves."""

    def pass_at(self, k: int) -> float:
        return sum(self._pass_at(k, correct) for correct in self.num_correct) / len(self.problems)

    def _pass_at(self, k: int, correct: int) -> float:
        """Unbiased estimate of Chen et al. 2021, section 2.1."""
        return 1 - math.comb(self.num_samples - correct, k) / math.comb(self.num_samples, k)

    def table(self) -> str:
        powers = [1 << i for i in range(self.num_samples.bit_length())]
        overall = "  ".join(f"pass@{k} {self.pass_at(k):.3f}" for k in powers)
        parts: dict[str, list[int]] = defaultdict(list)
        for problem, correct in zip(self.problems, self.num_correct, strict=True):
            parts[f"level {problem.level}"].append(correct)
            parts[f"steps {problem.num_steps}"].append(correct)
        detail = "  ".join(
            f"{name}: {sum(of) / len(of) / self.num_samples:.2f}/{sum(c > 0 for c in of) / len(of):.2f}"
            for name, of in sorted(parts.items())
        )
        shape = f"{self.num_tokens / len(self.problems) / self.num_samples:.0f} tokens a sample, {self.finished:.3f} finished"
        return f"{overall}  ({shape})\n    {detail}"


def header() -> str:
    return "".join(document(shot) + "\n\n" for shot in shots())


def measure(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    num_samples: int,
    temperature: float,
    seed: int = 0,
    batch_size: int = 64,
) -> Measured:
    """`num_samples` samples of each problem, `batch_size` problems at a time."""
    torch.manual_seed(seed)
    model.eval()
    correct, tokens, finished = [], 0, 0
    stops = {tokenizer.convert_tokens_to_ids(tokenizer.tokenize("\n\n"))[0], tokenizer.eos_token_id}
    for first in range(0, len(problems), batch_size):
        some = problems[first : first + batch_size]
        prompts = [f"{header()}Question: {problem.question}\nAnswer:" for problem in some]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        samples = draw_samples(model, inputs["input_ids"], inputs["attention_mask"], num_samples, temperature, stops).tolist()
        for index, problem in enumerate(some):
            mine = samples[index * num_samples : (index + 1) * num_samples]
            ends = [next((i for i, token in enumerate(sample) if token in stops), None) for sample in mine]
            results = [RESULT.search(tokenizer.decode(sample[:end])) for sample, end in zip(mine, ends, strict=True)]
            finished += sum(end is not None for end in ends)
            tokens += sum(len(sample) if end is None else end + 1 for sample, end in zip(mine, ends, strict=True))
            correct.append(sum(found is not None and int(found[1]) == problem.result for found in results))
    total = len(problems) * num_samples
    return Measured(tuple(problems), tuple(correct), num_samples, tokens, finished / total)


@torch.inference_mode()
def draw_samples(
    model: LlamaForCausalLM, prompt_BP: Tensor, mask_BP: Tensor, num_samples: int, temperature: float, stops: set[int]
) -> Tensor:
    """Tokens of shape [B * num_samples, at most MAX_TOKENS]; what follows a sample's first stop token is meaningless.

    Each prompt is read once and its cache repeated for its samples. Prompts are padded on the left.
    """
    place_BP = (mask_BP.cumsum(1) - 1).clamp(min=0)
    output = model(input_ids=prompt_BP, attention_mask=mask_BP, position_ids=place_BP, use_cache=True, logits_to_keep=1)
    cache = output.past_key_values
    cache.batch_repeat_interleave(num_samples)
    logits_NV = output.logits[:, -1].repeat_interleave(num_samples, 0)
    mask_NT = mask_BP.repeat_interleave(num_samples, 0)
    place_N1 = place_BP[:, -1:].repeat_interleave(num_samples, 0)
    stop_S = torch.tensor(sorted(stops), device=prompt_BP.device)
    stopped_N = torch.zeros(len(mask_NT), dtype=torch.bool, device=prompt_BP.device)
    drawn: list[Tensor] = []
    for _ in range(MAX_TOKENS):
        token_N1 = torch.multinomial((logits_NV.float() / temperature).softmax(-1), 1)
        drawn.append(token_N1)
        stopped_N |= torch.isin(token_N1[:, 0], stop_S)
        if stopped_N.all():
            break
        mask_NT = torch.cat([mask_NT, torch.ones_like(token_N1)], 1)
        place_N1 = place_N1 + 1
        output = model(input_ids=token_N1, attention_mask=mask_NT, position_ids=place_N1, past_key_values=cache, use_cache=True)
        logits_NV = output.logits[:, -1]
    return torch.cat(drawn, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure pass@k on held-out problems.")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--temperature", type=float, nargs="+", default=[1.0])
    parser.add_argument("--others", action="store_true", help="the held-out problems that are not the job's")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device)
    job = job_problems()
    some = [problem for problem in held_out() if problem not in job] if args.others else job
    for temperature in args.temperature:
        started = time.perf_counter()
        # Few prompts at a time where memory is scarce.
        result = measure(model, tokenizer, some, args.samples, temperature, args.seed, 64 if device == "cuda" else 8)
        print(f"temperature {temperature}: {result.table()}  {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
