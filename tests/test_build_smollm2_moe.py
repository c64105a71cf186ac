"""The mixture of permuted copies computes what the dense model computes."""

import pytest
import torch
from helpers import load_example
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.mark.parametrize("tied", [True, False])
def test_a_dense_llama_and_its_mixture_agree(tied: bool) -> None:
    script = load_example("build_smollm2_moe")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1234.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
    )
    dense = LlamaForCausalLM(config).eval()
    moe = script.as_mixtral(dense, experts=3, top_k=2)
    tokens = torch.randint(61, (2, 40))
    assert script.relative_difference(dense, moe, tokens) < 48 * 2**-23  # sums over 48 channels in another order
    experts = moe.model.layers[0].mlp.experts.gate_up_proj
    assert not torch.equal(experts[0], experts[1]) and len(torch.unique(moe.model.layers[0].mlp.gate.weight)) == 3 * 32
