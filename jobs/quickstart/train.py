"""Train the quickstart's model from nothing: tokenizer, data, a Llama of five million parameters, and its measure.

    python jobs/quickstart/train.py --out jobs/quickstart        about a minute on one H200 with 16 CPU cores

Contract: every seed is fixed, so a second run draws the same data, weights and order (the GPU's own rounding aside). Writes the
tokenizer, the configuration and the bfloat16 weights to `--out`, and the weights after each quarter of training to
`--out/checkpoints` when `--checkpoints` is given. `--steps 20 --rows 512 --batch 4 --length 256` tries it on a CPU.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from evaluate import measure
from problem_generator import fingerprints_of, held_out, job_problems, shots, write_files
from safetensors.torch import save_file
from torch import Tensor
from training_data import make_rows, train_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

QUESTION_WEIGHT = 0.05
"""The questions' words and numbers are random: predicting them teaches little, solving them is the task."""
WARMUP_STEPS = 200
WEIGHT_DECAY = 0.1


def build_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def loss_of(model: LlamaForCausalLM, tokens_BT: Tensor, answer: int, question: int) -> Tensor:
    """Weighted cross entropy; `answer` and `question` are the tokens that open the two halves of a problem."""
    logits_BTV = model(input_ids=tokens_BT[:, :-1], use_cache=False).logits
    target_BT = tokens_BT[:, 1:]
    place_T = torch.arange(target_BT.shape[1], device=target_BT.device)
    opened_BT = torch.where(target_BT == answer, place_T, -1).cummax(1).values
    closed_BT = torch.where(target_BT == question, place_T, -1).cummax(1).values
    weight_BT = torch.where(opened_BT > closed_BT, 1.0, QUESTION_WEIGHT)
    loss_N = F.cross_entropy(logits_BTV.flatten(0, 1).float(), target_BT.flatten(), reduction="none")
    return (loss_N * weight_BT.flatten()).sum() / weight_BT.sum()


def batches(rows: npt.NDArray[np.int16], batch: int, steps: int, device: str) -> list[Tensor]:
    """The rows on the device and the order in which training walks them, one index tensor a step."""
    rng = np.random.default_rng(0)
    epochs = -(-steps * batch // len(rows))
    order = np.concatenate([rng.permutation(len(rows)) for _ in range(epochs)])[: steps * batch]
    return list(torch.from_numpy(order).to(device).view(steps, batch))


def rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine to a fiftieth of the peak."""
    warmup = min(WARMUP_STEPS, steps // 10 + 1)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def optimizer_for(model: LlamaForCausalLM, device: str) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=device == "cuda")


def save_weights(model: LlamaForCausalLM, path: Path) -> None:
    """bfloat16, without the output layer: it is the embedding again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(tensors, path, metadata={"format": "pt"})


def save_model(model: LlamaForCausalLM, folder: Path) -> None:
    model.config.dtype = "bfloat16"
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_weights(model, folder / "model.safetensors")


def report(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, limit: int, temperature: float) -> None:
    """The model's figures on the job's problems, and on the other held-out ones, which are of every difficulty."""
    job = job_problems()
    others = [problem for problem in held_out() if problem not in job]
    for name, some in (("job's", job[:limit]), ("other", others[:limit])):
        table = measure(model, tokenizer, some, 16, temperature).table()
        print(f"  {len(some)} {name} held-out problems: {table}", flush=True)


def train(
    args: argparse.Namespace, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: npt.NDArray[np.int16]
) -> None:
    device = model.device.type
    answer, question = (tokenizer.convert_tokens_to_ids(word) for word in ("Answer", "Question"))
    data = torch.from_numpy(rows).to(device)
    optimizer = optimizer_for(model, device)
    compute_loss = torch.compile(loss_of) if args.compile else loss_of
    autocast = torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()
    quarters = {round(args.steps * part / 4): part for part in (1, 2, 3, 4)}
    training_s, started = 0.0, time.perf_counter()
    for step, index in enumerate(batches(rows, args.batch, args.steps, device), start=1):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step - 1, args.steps, args.rate)
        with autocast:
            loss = compute_loss(model, data[index].long(), answer, question)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % args.log_every == 0 or step in quarters:
            value = loss.item()
            seconds = training_s + time.perf_counter() - started
            speed = step * args.batch * args.length / seconds
            print(f"step {step}/{args.steps}  loss {value:.4f}  {seconds:.0f} s  {speed:,.0f} tokens/s", flush=True)
        if step in quarters:
            training_s += time.perf_counter() - started
            if args.checkpoints:
                save_weights(model, args.out / "checkpoints" / f"quarter-{quarters[step]}.safetensors")
            report(model, tokenizer, args.measure, args.temperature)
            model.train()
            started = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the quickstart's model.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=64, help="rows a step")
    parser.add_argument("--length", type=int, default=1024, help="tokens a row")
    parser.add_argument("--rows", type=int, default=800 * 64, help="distinct training rows")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--measure", type=int, default=64, help="held-out problems of each kind to measure on")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--log-every", type=int, default=250)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--checkpoints", action="store_true", help="keep the weights after each quarter")
    args = parser.parse_args()

    # The workers are processes already; this must be set before the first of them starts.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    write_files(args.out)
    tokenizer = train_tokenizer()
    tokenizer.save_pretrained(args.out)
    excluded = fingerprints_of(held_out() + shots())
    rows = make_rows(args.out / "tokenizer.json", args.rows, args.length + 1, excluded, args.processes)
    print(f"{rows.size:,} training tokens in {time.perf_counter() - started:.0f} s", flush=True)

    model = build_model(tokenizer).to("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{model.num_parameters():,} parameters on {model.device}", flush=True)
    train(args, model, tokenizer, rows)
    save_model(model, args.out)
    print(f"wrote {args.out} after {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
