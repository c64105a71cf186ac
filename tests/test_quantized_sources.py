"""Sources that are block-quantized already: read as transformers reads them, quantized like their bf16 twins."""

import copy
import json
from pathlib import Path

import pytest
import scale_runs
import torch
from helpers import write_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    FineGrainedFP8Config,
    GptOssConfig,
    Mxfp4Config,
    PreTrainedModel,
)

from codequant.errors import InputError
from codequant.pipeline import quantize
from codequant.source import SourceModel, dequantize_fp8, dequantize_mxfp4

BLOCK = 4
SINGLE = "model.safetensors"
DEEPSEEK = DeepseekV3Config(
    vocab_size=67,
    hidden_size=48,
    intermediate_size=56,
    moe_intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    n_routed_experts=6,
    n_shared_experts=1,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    kv_lora_rank=20,
    q_lora_rank=28,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=12,
    n_group=2,
    topk_group=1,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)
GPT_OSS = GptOssConfig(
    vocab_size=67,
    hidden_size=64,
    head_dim=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=128,
    sliding_window=16,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)


def random_source(config: DeepseekV3Config | GptOssConfig, folder: Path) -> dict[str, torch.Tensor]:
    """A random bf16 model on disk; returns its tensors."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder, config.vocab_size)
    return load_file(folder / SINGLE)


def rewrite(folder: Path, tensors: dict[str, torch.Tensor], quantization: dict) -> Path:
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return folder


def to_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = weight.float().unfold(0, BLOCK, BLOCK).unfold(1, BLOCK, BLOCK)
    scale = (blocks.abs().amax((-1, -2)) / 448).contiguous()
    return (weight.float() / scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)).to(
        torch.float8_e4m3fn
    ), scale


def deepseek_fp8(folder: Path) -> Path:
    """FP8 in blocks, and a multi-token-prediction layer that the model does not use."""
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in random_source(DEEPSEEK, folder).items():
        if "proj" in name:
            tensors[name], tensors[f"{name}_scale_inv"] = to_fp8(weight)
        else:
            tensors[name] = weight
    mtp = "model.layers.61.eh_proj.weight"
    tensors[mtp], tensors[f"{mtp}_scale_inv"] = to_fp8(torch.randn(48, 96))
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    return rewrite(folder, tensors, quantization)


def gpt_oss_mxfp4(folder: Path) -> Path:
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in random_source(GPT_OSS, folder).items():
        if weight.ndim == 3:  # [E, I, O]
            E, I, O = weight.shape
            shape = (E, O, I // 32, 16)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(121, 125, shape[:-1], generator=generator, dtype=torch.uint8)
        else:
            tensors[name] = weight
    return rewrite(folder, tensors, {"quant_method": "mxfp4"})


def dequantized_by_transformers(folder: Path) -> PreTrainedModel:
    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    config = (
        Mxfp4Config(dequantize=True)
        if method == "mxfp4"
        else FineGrainedFP8Config(dequantize=True, weight_block_size=(BLOCK, BLOCK))
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)


WRITERS = {"deepseek-v3-fp8": deepseek_fp8, "gpt-oss-mxfp4": gpt_oss_mxfp4}


@pytest.fixture(params=WRITERS)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return WRITERS[request.param](tmp_path / "source")


def test_parameters_equal_those_of_transformers(source: Path) -> None:
    model, state = SourceModel(source), dequantized_by_transformers(source).state_dict()
    assert set(model.sources) == set(state)
    for name, expected in state.items():
        assert torch.equal(model.read(name).to(expected.dtype), expected), name
    for name in (name for name, t in state.items() if t.ndim == 3):
        run = slice(1, 3)
        assert torch.equal(model.read(name, torch.bfloat16, run), state[name][run]), name


def test_quantizing_them_is_quantizing_their_bf16_twins(source: Path, tmp_path: Path) -> None:
    """And tensors that the model does not use stay as they are, byte for byte."""
    twin = tmp_path / "twin"
    model = dequantized_by_transformers(source)
    read = SourceModel(source)
    plain = {
        s.name: model.state_dict()[s.parameter][s.index].to(read.checkpoint.dtype(s.name), copy=True)
        for entries in read.sources.values()
        for s in entries
    }
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    twin.mkdir()
    save_file(plain, twin / SINGLE, metadata={"format": "pt"})
    (twin / "config.json").write_text(json.dumps(config))
    write_tokenizer(twin, 67)
    text = scale_runs.write_text(tmp_path / "text.txt")
    outputs = []
    for folder in (source, twin):
        out = quantize(folder, tmp_path / f"{folder.name}-out", calibration=text, overrides=scale_runs.OVERRIDES)
        outputs.append({n: t for p in sorted(out.glob("model-*")) for n, t in raw_bytes(p).items()})
    ours, expected = outputs
    assert expected.items() <= ours.items()
    kept = set(ours) - set(expected)
    stored = raw_bytes(source / SINGLE)
    assert all(ours[name] == stored[name] for name in kept)
    assert kept == {name for name in stored if "layers.61" in name}


def raw_bytes(path: Path) -> dict[str, tuple[str, bytes]]:
    with safe_open(path, "pt") as file:
        return {
            name: (
                file.get_slice(name).get_dtype(),
                file.get_tensor(name).contiguous().view(torch.uint8).numpy().tobytes(),
            )
            for name in file.keys()  # noqa: SIM118  a handle, no mapping
        }


def test_blocks_that_are_cut_off_at_the_edge() -> None:
    weight = torch.randn(9, 6).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2) + 0.5
    expected = torch.stack(
        [torch.stack([weight[i, j].float() * scale[i // 4, j // 4] for j in range(6)]) for i in range(9)]
    )
    assert torch.equal(dequantize_fp8(weight, scale, (4, 4)), expected.to(torch.bfloat16))


def test_every_mxfp4_code() -> None:
    """All sixteen codes, low nibble first, at an exponent of one half: E8M0 126 is 2 ** -1."""
    blocks = torch.tensor([[[[2 * k | (2 * k + 1) << 4 for k in range(8)] * 2]]], dtype=torch.uint8)  # [1, 1, 1, 16]
    row = dequantize_mxfp4(blocks, torch.tensor([[[126]]], dtype=torch.uint8))  # [1, 32, 1]
    positive = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 2
    assert torch.equal(row.flatten().float(), torch.cat((positive, -positive)).repeat(2))


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq', expected an unquantized, fp8 or mxfp4"),
        ({"bits": 4}, "quant_method None"),
        ({"quant_method": "fp8"}, "weight_block_size None, expected FP8 in blocks"),
    ],
)
def test_other_quantized_sources_are_refused_by_name(tmp_path: Path, quantization: dict, message: str) -> None:
    folder = rewrite(tmp_path, random_source(GPT_OSS, tmp_path), quantization)
    with pytest.raises(InputError, match=message):
        SourceModel(folder)


def test_fp8_without_scales_and_damaged_shards_are_named(tmp_path: Path) -> None:
    folder = deepseek_fp8(tmp_path / "source")
    tensors = load_file(folder / SINGLE)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    save_file({n: t for n, t in tensors.items() if n != f"{name}_scale_inv"}, folder / SINGLE)
    with pytest.raises(InputError, match=f"{name}: F8_E4M3 without {name}_scale_inv"):
        SourceModel(folder)
    wrong = {**tensors, "lm_head.weight": tensors["lm_head.weight"][:-1].contiguous()}
    save_file(wrong, folder / SINGLE)
    with pytest.raises(InputError, match=r"lm_head.weight: shape \(66, 48\).*needs \(67, 48\)"):
        SourceModel(folder)
    tensors[f"{name}_scale_inv"][1, 2] = float("nan")
    save_file(tensors, folder / SINGLE)
    with pytest.raises(InputError, match=f"{name}_scale_inv: holds NaN or infinity"):
        SourceModel(folder).checkpoint.scan(SINGLE)
    with (folder / SINGLE).open("r+b") as file:
        file.truncate((folder / SINGLE).stat().st_size - 1)
    with pytest.raises(InputError, match=r"model.safetensors: not a whole safetensors file"):
        SourceModel(folder)
