"""Small random models of every supported family, and quantized checkpoints of them made by round-to-nearest."""

import copy
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from codequant import packing
from codequant.checkpoint_names import matrices, parameter_sources
from codequant.hadamard import hadamard_matrix
from codequant.packing import PackedParts, PackedWeight
from codequant.quantization_config import QuantizationConfig

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


def load_example(name: str) -> ModuleType:
    """A script of examples/ as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def log_probability(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: str, continuation: str
) -> float:
    """Of the continuation's tokens after the context."""
    start = len(tokenizer(context).input_ids)
    ids = tokenizer(context + continuation, return_tensors="pt").input_ids
    with torch.no_grad():
        logs = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
    return float(logs[start - 1 :].sum())


def round_to_nearest(weight: torch.Tensor, bits: int, group_size: int) -> PackedWeight:
    """The crudest codebook: 2**bits equally spaced values between the ends of each group of each row."""
    *lead, O, I = weight.shape
    size = I if group_size == -1 else group_size
    grouped = weight.float().reshape(*lead, O, -1, size)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    codebook, step = packing.round_codebook(low + (high - low) * torch.linspace(0, 1, 2**bits))
    values = codebook.float() * step.float().unsqueeze(-1)  # [..., O, G, K]
    indices = (grouped.unsqueeze(-1) - values.unsqueeze(-2)).abs().argmin(-1)
    return packing.pack(indices.to(torch.uint8).reshape(weight.shape), codebook, step)


def quantize_rtn_checkpoint(
    model: PreTrainedModel, folder: Path, config: QuantizationConfig, shards: int = 1
) -> PreTrainedModel:
    """Write `model` as a quantized folder with a toy tokenizer; returns the plain model of the dequantized weights."""
    sources = parameter_sources(model)
    quantizable = matrices(model, sources)
    dequantized = copy.deepcopy(model)
    state = dequantized.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    for source in (s for entries in sources.values() for s in entries):
        value = state[source.parameter][source.index]
        matrix = quantizable.get(source.name)
        scheme = config.scheme(source.module) if matrix else None
        if matrix is None or scheme is None:
            tensors[source.name] = value.clone()
            continue
        rows = value.mT if matrix.transposed else value
        H = hadamard_matrix(matrix.in_features).float() if scheme.hadamard else torch.eye(matrix.in_features)
        packed = round_to_nearest(rows.float() @ H, scheme.bits, scheme.group_size)
        tensors |= {f"{source.name}_{suffix}": getattr(packed, suffix) for suffix in packing.SUFFIXES}
        restored = packing.unpack(packed) @ H.T
        value.copy_(restored.mT if matrix.transposed else restored)
    _write(folder, model.config, config, tensors, shards)
    return dequantized


def write_source(model: PreTrainedModel, folder: Path, shard_size: str = "60KB") -> Path:
    """Write a model as a source folder: checkpoint names, several shards, a toy tokenizer."""
    model.save_pretrained(folder, max_shard_size=shard_size)
    write_tokenizer(folder, model.config.vocab_size)
    return folder


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """One token per word: w3, w4, ..."""
    words = {"[UNK]": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def _write(
    folder: Path,
    config: PretrainedConfig,
    quantization: QuantizationConfig,
    tensors: dict[str, torch.Tensor],
    shards: int,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    values = copy.deepcopy(config)
    values.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    values.quantization_config = quantization.to_dict()
    values.save_pretrained(folder)
    write_tokenizer(folder, config.vocab_size)
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def dyadic(generator: torch.Generator, *shape: int, limit: int, denominator: int) -> Tensor:
    high = limit * denominator
    return torch.randint(-high, high + 1, shape, generator=generator) / denominator


def sweep_case(
    shape: tuple[int, int, int, int, int], from_scratch: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Target, matrix, codebook, groups and indices (None from scratch) of B, O, I, G, K, for a sweep over columns:
    numbers whose sums float32 holds exactly, so that even ties must agree."""
    B, O, I, G, K = shape
    generator = torch.Generator().manual_seed(I)
    target = dyadic(generator, B, O, I, limit=4, denominator=8)
    codebook = dyadic(generator, B, O, G, K, limit=4, denominator=1)
    matrix = dyadic(generator, B, I, I, limit=1, denominator=4)
    matrix = torch.triu(matrix, 1) if from_scratch else (matrix.triu(1) + matrix.triu(1).mT)
    matrix.diagonal(dim1=-2, dim2=-1).fill_(2.0)
    groups = torch.randint(0, G, (B, I), generator=generator)
    indices = None
    if not from_scratch:
        groups = (torch.arange(I) // (I // G)).expand(B, I)
        indices = torch.randint(0, K, (B, O, I), generator=generator).to(torch.uint8)
    return target, matrix, codebook, groups, indices


def in_parts(weight: PackedWeight, each: int) -> PackedParts:
    """A stack [E, O, I] as `each` tensors for every matrix, as a checkpoint has them."""
    count = len(weight.packed)
    split = ([t.clone() for t in getattr(weight, s).flatten(0, 1).chunk(count * each)] for s in packing.SUFFIXES)
    return PackedParts([PackedWeight(*tensors, weight.in_features) for tensors in zip(*split, strict=True)], count)
