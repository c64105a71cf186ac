"""The table of checkpoint names must be the one transformers itself writes by and loads by."""

import pytest
import torch
from helpers import FAMILIES, random_model, tiny_config
from safetensors.torch import load_file

from codequant.checkpoint_names import by_checkpoint_name, parameter_sources, skeleton


@pytest.mark.parametrize("family", FAMILIES)
def test_table_names_and_places_are_what_transformers_saves(family, tmp_path):
    model = random_model(family)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    table = by_checkpoint_name(parameter_sources(skeleton(tiny_config(family))))
    assert set(table) == set(saved)
    state = model.state_dict()
    for name, source in table.items():
        assert source.shape == tuple(saved[name].shape)
        torch.testing.assert_close(state[source.parameter][source.index], saved[name], rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_sources_cover_every_element_once(family):
    model = skeleton(tiny_config(family))
    state = model.state_dict()
    for parameter, sources in parameter_sources(model).items():
        covered = torch.zeros(state[parameter].shape, dtype=torch.int32)
        for source in sources:
            covered[source.index] += 1
        assert bool((covered == 1).all()), parameter


def test_experts_of_a_mixtral_have_the_original_names():
    sources = parameter_sources(skeleton(tiny_config("mixtral")))["model.layers.1.mlp.experts.gate_up_proj"]
    assert [s.name for s in sources[:3]] == [
        "model.layers.1.block_sparse_moe.experts.0.w1.weight",
        "model.layers.1.block_sparse_moe.experts.0.w3.weight",
        "model.layers.1.block_sparse_moe.experts.1.w1.weight",
    ]
    assert sources[1].index == (0, slice(40, 80)) and sources[1].module.endswith("experts.0.w3")


def test_tied_output_is_not_in_the_checkpoint():
    config = tiny_config("qwen3_moe")
    config.tie_word_embeddings = True
    sources = parameter_sources(skeleton(config))
    assert "lm_head.weight" not in sources and "model.embed_tokens.weight" in sources
