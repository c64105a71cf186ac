"""Small random models of every supported family, and quantized checkpoints of them made by round-to-nearest."""

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

# Odd where the architecture allows it: hidden sizes that are no power of two, grouped queries, a dense first layer.
_COMMON = {
    "vocab_size": 67,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_QWEN = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "intermediate_size": 40}
_CONFIGS = {
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_COMMON, **_QWEN, hidden_size=48, head_dim=16, num_hidden_layers=3, mlp_only_layers=[0], norm_topk_prob=True
    ),
    "mixtral": lambda: MixtralConfig(
        **_COMMON, hidden_size=32, intermediate_size=40, num_local_experts=4, num_experts_per_tok=2, num_hidden_layers=2
    ),
    "deepseek_v2": lambda: DeepseekV2Config(
        **{**_COMMON, "num_key_value_heads": 4},
        hidden_size=48,
        intermediate_size=56,
        moe_intermediate_size=24,
        n_routed_experts=6,
        n_shared_experts=2,
        num_experts_per_tok=3,
        first_k_dense_replace=1,
        num_hidden_layers=3,
        kv_lora_rank=20,
        q_lora_rank=28,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=12,
        topk_method="greedy",
        n_group=None,
        topk_group=None,
    ),
    "olmoe": lambda: OlmoeConfig(
        **_COMMON, hidden_size=32, intermediate_size=20, num_experts=6, num_experts_per_tok=2, num_hidden_layers=2
    ),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **_COMMON, **_QWEN, hidden_size=48, shared_expert_intermediate_size=36, num_hidden_layers=2, qkv_bias=True
    ),
    "phimoe": lambda: PhimoeConfig(
        **_COMMON,
        hidden_size=48,
        intermediate_size=40,
        num_local_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        attention_bias=True,
        lm_head_bias=True,
    ),
    "gpt_oss": lambda: GptOssConfig(
        **_COMMON,
        hidden_size=48,
        head_dim=12,
        intermediate_size=24,
        num_local_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        sliding_window=16,
    ),
}
FAMILIES = tuple(_CONFIGS)


def tiny_config(family: str) -> PretrainedConfig:
    """A configuration of a few thousand parameters, float32."""
    config = _CONFIGS[family]()
    config.dtype = torch.float32
    return config


def random_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of `tiny_config` whose every parameter is random: norm gains and biases too, so that folding or dropping
    one changes the logits. Matrices keep activations near 1, so that routing is neither uniform nor constant.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                is_gain = name.endswith("norm.weight") or "layernorm.weight" in name
                parameter.copy_(torch.randn_like(parameter) * 0.2 + is_gain)
            elif name.endswith("_bias"):
                parameter.copy_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight.copy_(torch.randn_like(module.weight))
    return model.to(dtype)


def random_tokens(model: PreTrainedModel, batch: int = 2, length: int = 17, seed: int = 1) -> torch.Tensor:
    """int64 [batch, length] token ids of the model's vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=generator)
