"""Train the bundled demo model, or its larger sister, from text: one file, one device, minutes.

    python examples/train_demo_moe.py OUT --text corpus.txt --heldout heldout.txt [--size tiny|small] [--steps 4702]

CORPUS and HELDOUT are UTF-8 files of documents separated by three newlines. OUT becomes an ordinary Hugging Face folder
in bfloat16, with the tokenizer and the log (training.json). On a CUDA device the whole forward and backward pass runs
in bfloat16 on a copy of float32 master weights, because that is what the grouped matrix multiplication of the experts
wants, and autocast does not reach it; on a CPU it all runs in float32.

Letters: B windows in a batch, T tokens per window, V vocabulary, E experts, N tokens in a batch (B * T).
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from codequant.calibration import consecutive_windows, read_documents, token_stream
from codequant.data import DEMO_MODEL

SIZES = {
    "tiny": {
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 16,
        "intermediate_size": 512,
    },
    "small": {
        "hidden_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_experts": 32,
        "intermediate_size": 1024,
    },
}
BALANCE_WEIGHT = 0.01
WARMUP_STEPS = 200
FINAL_LEARNING_RATE = 0.05  # of the peak
HELDOUT_WINDOWS = 64


def create_model(size: str, vocabulary: int, eos: int, pad: int | None) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        **SIZES[size],
        vocab_size=vocabulary,
        num_hidden_layers=6,
        head_dim=64,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        norm_topk_prob=True,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=eos,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    return Qwen3MoeForCausalLM(config)


def balance_loss(router_logits: Tensor, top_k: int) -> Tensor:
    """Switch Transformer's load-balancing loss of one layer's router logits [N, E]: 1 when perfectly even, at most E.

    E * sum_e(share of routed slots that expert e gets * mean probability of e); only the second factor has a gradient.
    """
    probability = router_logits.float().softmax(-1)  # [N, E]
    E = probability.shape[-1]
    share = torch.bincount(probability.topk(top_k).indices.flatten(), minlength=E) / (len(probability) * top_k)  # [E]
    return E * (share * probability.mean(0)).sum()


def losses(model: PreTrainedModel, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy and mean balance loss of windows [B, T + 1], each token from those before it in its window."""
    weights = dict(model.named_parameters())
    if windows.is_cuda:
        weights = {name: weight.bfloat16() for name, weight in weights.items()}
    output = functional_call(
        model, weights, kwargs={"input_ids": windows[:, :-1], "use_cache": False, "output_router_logits": True}
    )
    cross_entropy = F.cross_entropy(output.logits.flatten(0, 1).float(), windows[:, 1:].flatten())
    top_k = model.config.num_experts_per_tok
    balance = torch.stack([balance_loss(logits.flatten(0, -2), top_k) for logits in output.router_logits]).mean()
    return cross_entropy, balance


@torch.no_grad()
def heldout_loss(model: PreTrainedModel, windows: Tensor) -> float:
    """Mean cross entropy of windows [B, T + 1]."""
    batches = windows.split(16)
    return sum(float(losses(model, batch)[0]) * len(batch) for batch in batches) / len(windows)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up times cosine decay."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return peak * min(1.0, (step + 1) / WARMUP_STEPS) * (FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * cosine)


def train(
    model: PreTrainedModel,
    stream: Tensor,
    heldout: Tensor,
    steps: int,
    batch: int,
    context: int,
    peak: float,
    seed: int,
) -> dict[str, object]:
    """Train on random windows of `stream` [L]; returns the log. `heldout` is [HELDOUT_WINDOWS, T + 1]."""
    device = stream.device
    generator = torch.Generator(device).manual_seed(seed)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    offsets = torch.arange(context + 1, device=device)
    log, start = [], time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        first = torch.randint(len(stream) - context, (batch, 1), device=device, generator=generator)
        cross_entropy, balance = losses(model, stream[first + offsets])
        optimizer.zero_grad()
        (cross_entropy + BALANCE_WEIGHT * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 199 or step == steps - 1:
            row = {
                "step": step + 1,
                "loss": round(cross_entropy.item(), 4),
                "balance": round(balance.item(), 4),
                "heldout_loss": round(heldout_loss(model, heldout), 4),
                "seconds": round(time.monotonic() - start, 1),
            }
            log.append(row)
            print(" ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    final = log[-1]["heldout_loss"]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "tokens_seen": steps * batch * context,
        "heldout_loss": final,
        "heldout_perplexity": math.exp(final),
        "log": log,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--text", type=Path, required=True, help="training documents")
    parser.add_argument("--heldout", type=Path, required=True, help="documents that are only evaluated")
    parser.add_argument("--tokenizer", type=Path, default=DEMO_MODEL, help="folder (default: the demo model's)")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--steps", type=int, default=4702)
    parser.add_argument("--batch", type=int, default=64, help="windows per step")
    parser.add_argument("--context", type=int, default=512, help="tokens per window")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    stream, _ = token_stream(read_documents(options.text), tokenizer)
    heldout = consecutive_windows(read_documents(options.heldout), tokenizer, options.context + 1)[:HELDOUT_WINDOWS]
    model = create_model(options.size, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(stream):,} tokens of text, {device}")

    log = train(
        model,
        stream.to(device),
        heldout.to(device),
        options.steps,
        options.batch,
        options.context,
        options.learning_rate,
        options.seed + 1,
    )
    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    (options.out / "training.json").write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    main()
