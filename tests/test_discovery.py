"""How layers are wired, as found by probes, against what is known about each family."""

from pathlib import Path

import pytest
import torch
from helpers import random_model
from sources import SMALL, write_source, write_tokenizer
from transformers import AutoModelForCausalLM, Gemma3TextConfig, JambaConfig

from codequant import folding, pipeline
from codequant.errors import InputError, InvarianceError
from codequant.source import SourceModel

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def structures(family: str, tmp_path: Path):
    return SourceModel(write_source(family, tmp_path / "source")).structures


def readers_by_norm(structure) -> dict[str | None, set[str]]:
    found: dict[str | None, set[str]] = {}
    for site in structure.sites:
        found.setdefault(site.norm.path if site.norm else None, set()).update(site.readers)
    return found


def test_qwen3_moe(tmp_path: Path) -> None:
    dense, sparse, _ = structures("qwen3_moe", tmp_path)
    assert readers_by_norm(dense) == {
        "input_layernorm": set(ATTENTION),
        "post_attention_layernorm": {"mlp.gate_proj", "mlp.up_proj"},
        None: {"self_attn.o_proj", "mlp.down_proj"},
    }
    assert dense.writers == ("self_attn.o_proj", "mlp.down_proj") and dense.experts is None
    assert readers_by_norm(sparse)["post_attention_layernorm"] == {"mlp.gate"}
    assert sparse.routers == ("mlp.gate",) and sparse.writers == ("self_attn.o_proj",)
    assert sparse.experts is not None and sparse.experts.num_experts == 5 and sparse.experts.intermediate == 24
    assert sparse.experts_norm is not None and sparse.experts_norm.path == "post_attention_layernorm"


def test_grouped_queries_share_the_rows_of_a_value_head(tmp_path: Path) -> None:
    (pair,) = [p for p in structures("qwen3_moe", tmp_path)[1].pairs if p.consumer == "self_attn.o_proj"]
    assert pair.producers == ("self_attn.v_proj",) and pair.linear and pair.block == 16
    head = torch.arange(16)
    assert torch.equal(pair.row_of_column, torch.cat((head, head, head + 16, head + 16)))
    assert [len(columns) for _, columns in folding.head_blocks(pair)] == [2, 2]


def test_latent_attention_finds_the_value_rows_between_the_key_rows(tmp_path: Path) -> None:
    layer = structures("deepseek_v2", tmp_path)[1]
    (pair,) = [p for p in layer.pairs if p.consumer == "self_attn.o_proj"]
    per_head = torch.arange(8, 8 + 12)  # 8 key rows, then 12 value rows, per head
    assert pair.producers == ("self_attn.kv_b_proj",) and pair.block == 12
    assert torch.equal(pair.row_of_column, torch.cat([per_head + 20 * head for head in range(4)]))
    assert "mlp.shared_experts.down_proj" in layer.writers
    norms = readers_by_norm(layer)
    assert norms["input_layernorm"] == {"self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"}
    assert {"self_attn.q_b_proj", "self_attn.kv_b_proj"} <= norms[None]


def test_nonlinear_pairs_are_found_through_the_activation(tmp_path: Path) -> None:
    (pair,) = [p for p in structures("qwen2_moe", tmp_path)[0].pairs if p.consumer.endswith("down_proj")]
    assert set(pair.producers) == {"mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"}
    assert not pair.linear and torch.equal(pair.row_of_column, torch.arange(36)) and pair.block == 36


def test_norms_are_told_apart_by_what_they_compute(tmp_path: Path) -> None:
    (norm, _) = structures("phimoe", tmp_path)[0].norms
    assert norm.centered and norm.has_bias and not norm.unit_offset
    (norm, _) = structures("olmoe", tmp_path / "2")[0].norms  # not q_norm, which is as wide as the residual
    assert norm.path == "input_layernorm" and not norm.centered and not norm.has_bias


def test_expert_flags(tmp_path: Path) -> None:
    experts = structures("gpt_oss", tmp_path)[0].experts
    assert experts is not None and experts.is_transposed and experts.has_bias and not experts.is_concatenated


def write_other(config, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def test_a_post_norm_model_is_refused_by_name_unless_unrotated(tmp_path: Path) -> None:
    write_source("mixtral", tmp_path / "unused")  # for the text
    config = Gemma3TextConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=67, max_position_embeddings=64,
    )  # fmt: skip
    source = write_other(config, tmp_path / "gemma")
    with pytest.raises(InputError, match=r"layers\.0: .* cannot be rotated \(the output of post_attention_layernorm"):
        pipeline.quantize(source, tmp_path / "out", overrides=SMALL, calibration=tmp_path / "text.txt")
    overrides = [*SMALL, "rotation.method=none"]
    assert pipeline.quantize(source, tmp_path / "out", overrides=overrides, calibration=tmp_path / "text.txt").is_dir()


def test_a_layer_that_cannot_be_traced_is_named(tmp_path: Path) -> None:
    config = JambaConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=67, num_experts=4, use_mamba_kernels=False,
    )  # fmt: skip
    source = SourceModel(write_other(config, tmp_path / "jamba"))
    with pytest.raises(InputError, match=r"model\.layers\.0: JambaMambaDecoderLayer cannot be traced"):
        _ = source.structures


def test_discovery_leaves_the_model_alone(tmp_path: Path) -> None:
    source = SourceModel(write_source("deepseek_v2", tmp_path / "source"))
    _ = source.structures
    untouched = SourceModel(tmp_path / "source").model
    for (name, found), expected in zip(source.model.named_parameters(), untouched.parameters()):
        assert found.is_meta and found.shape == expected.shape, name
    assert source.model.config._attn_implementation == random_model("deepseek_v2").config._attn_implementation


def test_the_proof_names_the_layer_where_the_paths_part(tmp_path: Path, monkeypatch) -> None:
    source = write_source("mixtral", tmp_path / "source")
    monkeypatch.setattr(folding, "fold_writer", lambda weight, rotation: weight)  # forgets to rotate what is written
    with pytest.raises(InvarianceError, match=r"model\.layers\.0: the rotated layer differs from the source by"):
        pipeline.quantize(source, tmp_path / "out", overrides=SMALL, calibration=tmp_path / "text.txt")
    assert not (tmp_path / "out").exists()
